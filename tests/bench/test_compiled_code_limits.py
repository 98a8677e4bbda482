"""The limits of compiled code belong to a Triton version, and are recorded for the rows that exist."""

import dataclasses

import pytest

from bench import compiled_code_limits
from bench.compiled_code_limits import (
    KNOWN_SPILLS,
    CodeLimits,
    known_spills,
    limits_for,
    minor_version,
    read_numbers,
    row_key,
    write_numbers,
)
from bench.machine_code import CodeReport
from triton_dcn import tile_table

ROW = next(row for row in tile_table.TABLE if row.kernel == "grad_sample_fused")
REPORT = CodeReport(100, 0, 4096, 16, 24, 0, 8, 0, 0, 12, 999, 99)


@pytest.fixture
def numbers_file(tmp_path, monkeypatch):
    """An empty file of numbers."""
    file = tmp_path / "numbers.csv"
    file.write_text(compiled_code_limits.FILE.read_text().splitlines()[0] + "\n")
    monkeypatch.setattr(compiled_code_limits, "FILE", file)
    read_numbers.cache_clear()
    yield file
    read_numbers.cache_clear()


@pytest.mark.usefixtures("numbers_file")
def test_a_version_has_its_own_limits_and_an_unknown_one_those_of_the_newest():
    with pytest.raises(KeyError, match="--record"):
        limits_for(ROW, "sm90", "3.10.0")

    write_numbers([(ROW, "sm90", REPORT)], "3.10.1")
    write_numbers([(ROW, "sm90", dataclasses.replace(REPORT, registers=92))], "3.9.0")

    assert limits_for(ROW, "sm90", "3.9.2") == CodeLimits(92, 4096, 12, 8)
    assert limits_for(ROW, "sm90", "3.10.0+git1") == CodeLimits(100, 4096, 12, 8)
    for version in ("3.11.0", "3.5.0"):
        assert limits_for(ROW, "sm90", version) == CodeLimits(108, 4096, 16, 12)


def test_recording_again_replaces_a_version_and_drops_rows_that_are_gone(numbers_file):
    other_row = tile_table.TABLE[0]
    write_numbers([(ROW, "sm90", REPORT), (other_row, "sm90", REPORT)], "3.8.0")
    write_numbers([(ROW, "sm90", dataclasses.replace(REPORT, barriers=10))], "3.8.1")

    assert read_numbers() == {row_key(ROW, "sm90"): {"3.8": CodeLimits(100, 4096, 10, 8)}}
    assert len(numbers_file.read_text().splitlines()) == 2


def test_the_recorded_rows_are_those_of_the_table():
    """After a change of the table: `python -m bench.compiled_code --record`."""
    gpu_rows = [(row, arch) for row in tile_table.TABLE for arch in row.archs if arch not in tile_table.HOST]
    keys = [row_key(row, arch) for row, arch in gpu_rows]
    assert len(set(keys)) == len(keys)
    assert set(read_numbers()) == set(keys)


def test_known_spills_are_of_rows_that_exist():
    by_row = {}
    for row in tile_table.TABLE:
        for arch in row.archs:
            if known_spills(row, arch, "3.6.0"):
                by_row.setdefault(arch, []).append(row)

    assert set(by_row) == {"sm90"}
    assert len(by_row["sm90"]) == len(KNOWN_SPILLS)


def test_minor_version():
    assert minor_version("3.7.1") == "3.7"
    assert minor_version("3.10.0+gitabc") == "3.10"
