"""What the compiler made of every row of the tile table, by Triton version, and the limits that follow from it.

The numbers stand in compiled_code.csv beside this file, one line per Triton version (3.7 covers 3.7.0 and 3.7.1),
architecture and row. `python -m bench.compiled_code --record` writes those of the installed version.

The limit of a row is what was recorded for the installed version. A version without numbers is held to those of the
newest recorded version, plus a slack.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench.compiled_code_table import Report, size_name, tile_name
from triton_dcn.tile_table import TileRow

FILE = Path(__file__).with_name("compiled_code.csv")
CHECKED_ARCHS = ("sm80", "sm90", "gfx942")
"""Architectures whose limits are asserted in CI; those of sm100 are reported only."""
SHARED_LIMIT = 99 << 10
"""Bytes of shared memory that one block may use on every NVIDIA GPU that the table serves."""
REGISTER_SLACK = 8
"""Registers per thread. The hardware allocates them by eights."""
BARRIER_SLACK = 4
"""A tile that changes its layout in shared memory costs two barriers."""

VERSION_COLUMN = "triton"
ROW_COLUMNS = ("arch", "kernel", "arithmetic", "channels", "tile", "warps")
LIMIT_COLUMNS = ("registers", "shared", "barriers")
COLUMNS = (VERSION_COLUMN, *ROW_COLUMNS, *LIMIT_COLUMNS)

Numbers = dict[tuple[str, ...], dict[str, "Limits"]]


@dataclass(frozen=True)
class Limits:
    """The most that the compiled code of a row may use.

    Attributes:
        registers: per thread.
        shared: bytes of shared memory per block.
        barriers: block-wide barriers in the code.
    """

    registers: int
    shared: int
    barriers: int

    def with_slack(self) -> Limits:
        """Return the limits for a version of the compiler without numbers of its own."""
        registers = self.registers + REGISTER_SLACK
        barriers = self.barriers + BARRIER_SLACK
        return Limits(registers, self.shared, barriers)


def minor_version(version: str) -> str:
    """Return "3.7" for "3.7.1"."""
    return ".".join(version.split(".")[:2])


def row_key(row: TileRow, arch: str) -> tuple[str, ...]:
    """Return the values of `ROW_COLUMNS` for a row on an architecture."""
    return (arch, row.kernel, row.arithmetic, size_name(row), tile_name(row), str(row.tile.num_warps))


@cache
def read_numbers(file: Path = FILE) -> Numbers:
    """Return the recorded numbers: by `row_key`, then by Triton version, in the order of the file."""
    numbers: Numbers = {}
    with file.open(newline="") as lines:
        for line in csv.DictReader(lines):
            key = tuple(line[column] for column in ROW_COLUMNS)
            limits = Limits(*(int(line[column]) for column in LIMIT_COLUMNS))
            numbers.setdefault(key, {})[line[VERSION_COLUMN]] = limits
    return numbers


def limits_for(row: TileRow, arch: str, version: str) -> Limits:
    """Return what the code of `row` may use when Triton `version` compiles it for `arch`.

    Raises:
        KeyError: the row was never recorded for this architecture.
    """
    by_version = read_numbers().get(row_key(row, arch))
    if by_version is None:
        raise KeyError(f"{row_key(row, arch)}: not in {FILE.name}, run python -m bench.compiled_code --record")

    recorded = by_version.get(minor_version(version))
    if recorded is not None:
        return recorded

    newest = max(by_version, key=_version_order)
    return by_version[newest].with_slack()


def write_numbers(entries: list[tuple[TileRow, str, Report]], version: str, file: Path = FILE) -> None:
    """Record the reports of the whole table for Triton `version`; other versions keep theirs for rows that still exist.

    Args:
        entries: rows with architecture and report, in the order of the table.
        version: as `triton.__version__`.
        file: the CSV.
    """
    numbers = read_numbers(file) if file.exists() else {}
    lines = []
    for row, arch, report in entries:
        key = row_key(row, arch)
        by_version = dict(numbers.get(key, {}))
        by_version[minor_version(version)] = Limits(report.registers, report.shared, report.barriers)
        for recorded_version, limits in by_version.items():
            values = (recorded_version, *key, limits.registers, limits.shared, limits.barriers)
            lines.append(values)
    lines.sort(key=lambda values: _version_order(values[0]))  # stable: inside a version the order of the table stays

    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(lines)
    read_numbers.cache_clear()


def _version_order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
