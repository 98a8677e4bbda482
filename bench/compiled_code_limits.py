"""What the compiler made of every row of the tile table, by Triton version, and the limits that follow from it.

The numbers stand in compiled_code.csv beside this file, one line per Triton version (3.7 stands for 3.7.0 and 3.7.1),
architecture and row. `python -m bench.compiled_code --record` writes those of the installed version.

The limits of a row are the numbers of the installed version. A version without numbers is held to those of the newest
recorded version, plus a slack.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path

from bench.compiled_code_table import size_name, tile_name
from bench.machine_code import CodeReport
from triton_dcn.tile_table import TileRow

FILE = Path(__file__).with_name("compiled_code.csv")
CHECKED_ARCHS = ("sm80", "sm90", "gfx942")
"""Architectures whose limits are asserted in CI; those of sm100 are reported only."""
SHARED_LIMITS = {"sm80": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that one block may use on every GPU that the rows of an architecture serve."""
REGISTER_SLACK = 8
"""Registers are allocated in groups of eight."""
BARRIER_SLACK = 4
"""A tile that changes its layout through shared memory costs two barriers."""
LOAD_SLACK = 4
"""One 128-bit load becomes four of 32 bits."""
KNOWN_SPILLS = {
    ("sm90", "forward_direct", "half", "128x128x32"): {"3.6": 24, "3.7": 24, "3.8": 24},
    ("sm90", "forward_direct", "tf32", "128x256x32"): {"3.6": 4, "3.7": 4, "3.9": 10},
    ("sm90", "grad_sample_fused", "half", "128x128x64"): {"3.6": 8, "3.7": 8, "3.8": 4},
    ("sm90", "grad_sample_fused", "half", "64x256x64"): {"3.6": 6, "3.7": 6},
}
"""Instructions that spill, of a row by Triton version; everywhere else there are none.

On an H200 with Triton 3.6 no other tile that was timed is faster than these, see bench/NOTES.md. Three have a limit on
registers, so that more warps are resident; that of TF32 has all there are, and gathers for 256 output channels at once.
"""

VERSION_COLUMN = "triton"
ROW_COLUMNS = ("arch", "kernel", "arithmetic", "channels", "tile", "warps")


@dataclass(frozen=True)
class CodeLimits:
    """The most that the compiled code of a row may use.

    Attributes:
        registers: per thread.
        shared: bytes of shared memory per block.
        barriers: block-wide barriers in the code.
        narrow_loads: global loads of less than 128 bits in the code.
    """

    registers: int
    shared: int
    barriers: int
    narrow_loads: int

    def with_slack(self) -> CodeLimits:
        """Return the limits for a version of the compiler that has no numbers of its own."""
        return CodeLimits(
            registers=self.registers + REGISTER_SLACK,
            shared=self.shared,
            barriers=self.barriers + BARRIER_SLACK,
            narrow_loads=self.narrow_loads + LOAD_SLACK,
        )


LIMIT_COLUMNS = tuple(field.name for field in fields(CodeLimits))
RowKey = tuple[str, ...]


def minor_version(version: str) -> str:
    """Return "3.7" for "3.7.1"."""
    return ".".join(version.split(".")[:2])


def row_key(row: TileRow, arch: str) -> RowKey:
    """Return the values of `ROW_COLUMNS` for a row on an architecture."""
    return (arch, row.kernel, row.arithmetic, size_name(row), tile_name(row), str(row.tile.num_warps))


@cache
def read_numbers() -> dict[RowKey, dict[str, CodeLimits]]:
    """Return the recorded numbers of every row, by Triton version."""
    numbers: dict[RowKey, dict[str, CodeLimits]] = {}
    with FILE.open(newline="") as stream:
        for line in csv.DictReader(stream):
            key = tuple(line[column] for column in ROW_COLUMNS)
            limits = CodeLimits(*(int(line[column]) for column in LIMIT_COLUMNS))
            numbers.setdefault(key, {})[line[VERSION_COLUMN]] = limits
    return numbers


def limits_for(row: TileRow, arch: str, version: str) -> CodeLimits:
    """Return what the code of `row` may use when Triton `version` compiles it for `arch`.

    Raises:
        KeyError: nothing is recorded of this row for this architecture.
    """
    by_version = read_numbers().get(row_key(row, arch))
    if by_version is None:
        raise KeyError(
            f"{FILE.name}: expected a line for {row_key(row, arch)}, got none; "
            "run python -m bench.compiled_code --record"
        )

    version = minor_version(version)
    if version in by_version:
        return by_version[version]
    newest = max(by_version, key=_version_order)
    return by_version[newest].with_slack()


def known_spills(row: TileRow, arch: str, version: str) -> int:
    """Return how many instructions may spill in the code of `row`, by `KNOWN_SPILLS`."""
    by_version = KNOWN_SPILLS.get((arch, row.kernel, row.arithmetic, tile_name(row)), {})
    return by_version.get(minor_version(version), 0)


def write_numbers(entries: Sequence[tuple[TileRow, str, CodeReport]], version: str) -> None:
    """Record what Triton `version` made of the whole table; other versions keep their numbers of these rows.

    Args:
        entries: every row of the table with an architecture and the report of its code.
        version: as in `triton.__version__`.
    """
    numbers = read_numbers()
    lines: list[tuple[str | int, ...]] = []
    for row, arch, report in entries:
        key = row_key(row, arch)
        by_version = dict(numbers.get(key, {}))
        by_version[minor_version(version)] = CodeLimits(
            report.registers, report.shared, report.barriers, report.narrow_loads
        )
        lines += [(recorded, *key, *astuple(limits)) for recorded, limits in by_version.items()]
    lines.sort(key=lambda line: _version_order(str(line[0])))  # stable: the order of the rows stays

    with FILE.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow((VERSION_COLUMN, *ROW_COLUMNS, *LIMIT_COLUMNS))
        writer.writerows(lines)
    read_numbers.cache_clear()


def _version_order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
