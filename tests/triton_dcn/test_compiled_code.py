"""The compiled code of the kernels for GPUs that are not here: no spills, wide loads, tensor cores, no float atomics.

A reduced set; `python -m bench.compiled_code` compiles the whole table.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compiled_code_limits import CHECKED_ARCHS, SHARED_LIMIT, read_numbers, row_key
from bench.compiled_code_table import NAMES, Report, occupancy, size_name, table_line, tile_name
from triton_dcn import tile_table

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arch", CHECKED_ARCHS)
def test_code_for(arch, tmp_path):
    report = tmp_path / "report.jsonl"
    run = compile_in(
        "-m", "bench.compiled_code", "--arch", arch, "--first", "--json", str(report), cache=tmp_path / "cache"
    )
    assert run.returncode == 0, run.stdout + run.stderr
    kernels = {json.loads(line)["row"]["kernel"] for line in report.read_text().splitlines()}
    assert kernels >= {"sampling", "bins", "columns", "grad_sample", "grad_sample_fused", "t_columns", "g_form"}
    assert kernels & {"forward_prefetch", "forward_transposed"}


def compile_in(*arguments: str, cache: Path, timeout: float = 280) -> subprocess.CompletedProcess:
    """Run Python in a process of its own: where the interpreter is on, nothing can be compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )  # fmt: skip


def test_sample_gradients_take_any_number_of_output_channels(tmp_path):
    """No row of the table bounds it, so neither spills nor shared memory may grow with it; sm_80 spills scalars."""
    code = """if True:
        import triton
        from bench.compiled_code import compile_row
        from bench.compiled_code_limits import CHECKED_ARCHS, limits_for
        from triton_dcn import tile_table
        for row in tile_table.TABLE:
            for arch in CHECKED_ARCHS:
                if row.stage == "grad_sample_fused" and arch in row.archs:
                    report = compile_row(row, arch, OUT_CHANNELS=1024)
                    limits = limits_for(row, arch, triton.__version__)
                    print(report.spills <= 8, report.shared <= limits.shared)
    """
    run = compile_in("-c", code, cache=tmp_path)
    assert set(run.stdout.splitlines()) == {"True True"}, run.stdout + run.stderr


def test_no_kernel_is_compiled_anew_for_a_size(tmp_path):
    """Only what is a constant of the kernel, and the alignment of pointers, makes another variant."""
    code = """if True:
        from bench.compiled_code import KERNELS
        for kernel in KERNELS.values():
            for each in kernel.params:
                if not (each.is_constexpr or each.do_not_specialize or each.name.endswith("_ptr")):
                    print(kernel.__name__, each.name)
        print("done")
    """
    run = compile_in("-c", code, cache=tmp_path, timeout=60)
    assert run.stdout == "done\n", run.stdout + run.stderr


def test_every_stage_has_a_tile_everywhere():
    """Whatever the sizes, the general way exists on every architecture and for every arithmetic."""
    for arch in (*tile_table.GPUS, *tile_table.HOST):
        for kind in ("half", "tf32", "float32"):
            for stage in ("sampling", "bins", "columns", "grad_sample", "t_columns", "g_form"):
                assert tile_table.choose(stage, arch, kind, 999, 1001) is not None


@pytest.mark.parametrize("row", tile_table.TABLE, ids=lambda row: f"{row.kernel}-{row.archs[0]}-{row.arithmetic}")
def test_row_is_complete(row):
    assert len(tile_table.TABLE) < 40
    for arch in set(row.archs) - set(tile_table.HOST):
        limits_of_version = read_numbers()[row_key(row, arch)]
        assert all(limits.shared <= SHARED_LIMIT for limits in limits_of_version.values())


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
    report = Report(255, 999, 99 << 10, 128, 133, 0, 512, 0, 100, 99, 9999, 9999)
    for row in tile_table.TABLE:
        for arch in set(row.archs) - set(tile_table.HOST):
            assert len(table_line(row, arch, report)) <= 80


def test_page_has_the_rows_of_the_table():
    """After a change of the table: `python -m bench.compiled_code --markdown docs/compiled_code.md`."""
    _, *sections = (ROOT / "docs" / "compiled_code.md").read_text().split("\n## ")
    found = {}
    for section in sections:
        title, *lines = section.splitlines()
        rows = [line.strip("| ").split(" | ")[:5] for line in lines if line.startswith("| ")]
        found[title] = rows[1:]  # below the header
    assert found == {
        title: [
            [row.kernel, row.arithmetic, size_name(row), tile_name(row), str(row.tile.num_warps)]
            for row in tile_table.TABLE
            if arch in row.archs
        ]
        for arch, title in NAMES.items()
    }
