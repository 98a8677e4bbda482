"""Lines and page about the compiled code: occupancy, widths, the rows of the table."""

from pathlib import Path

import pytest

from bench.compiled_code_table import ARCH_NAMES, occupancy, size_name, table_line, tile_name
from bench.machine_code import CodeReport
from triton_dcn import tile_table

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "resident", "bound"),
    [
        pytest.param("sm90", 4, 32, 0, 64, "", id="full"),
        pytest.param("sm90", 4, 168, 12 << 10, 12, "registers", id="three-warps-a-partition"),
        pytest.param("sm90", 8, 168, 12 << 10, 8, "registers", id="whole-blocks"),
        pytest.param("sm90", 4, 33, 0, 48, "registers", id="registers-by-eights"),
        pytest.param("sm80", 4, 32, 40 << 10, 16, "shared memory", id="a100-with-the-reserved-kilobyte"),
        pytest.param("gfx942", 4, 128, 0, 16, "registers", id="mi300"),
        pytest.param("gfx942", 8, 64, 32 << 10, 16, "shared memory", id="mi300-shared"),
    ],
)
def test_occupancy(arch, warps, registers, shared, resident, bound):
    """Against the rules of the vendors, by hand."""
    places = 32 if arch == "gfx942" else 64
    assert occupancy(arch, warps, registers, shared) == (resident / places, bound)


def test_lines_fit_a_terminal():
    report = CodeReport(255, 999, 99 << 10, 128, 133, 0, 512, 0, 100, 99, 9999, 9999)
    for row in tile_table.TABLE:
        for arch in set(row.archs) - set(tile_table.HOST):
            assert len(table_line(row, arch, report)) <= 80


def test_page_has_the_rows_of_the_table():
    """After a change of the table: `python -m bench.compiled_code --markdown docs/compiled_code.md`."""
    _, *sections = (ROOT / "docs" / "compiled_code.md").read_text().split("\n## ")
    rows_of_page = {}
    for section in sections:
        title, *lines = section.splitlines()
        rows = [line.strip("| ").split(" | ")[:5] for line in lines if line.startswith("| ")]
        rows_of_page[title] = rows[1:]  # below the header

    rows_of_table = {}
    for arch, title in ARCH_NAMES.items():
        rows_of_table[title] = [
            [row.kernel, row.arithmetic, size_name(row), tile_name(row), str(row.tile.num_warps)]
            for row in tile_table.TABLE
            if arch in row.archs
        ]
    assert rows_of_page == rows_of_table
