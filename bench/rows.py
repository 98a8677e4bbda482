"""The rows of result files: their columns, the machine and versions in them, and the CSV files that hold them."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from bench.measure import Timing
from detector.files import replacing

CASE_COLUMNS = ("provider", "case", "shape", "dtype", "mode")
TIMING_COLUMNS = ("ms_p50", "ms_p20", "ms_p80", "peak_mib")
ENVIRONMENT_COLUMNS = ("gpu", "driver", "torch", "triton", "commit", "date")
COLUMNS = (*CASE_COLUMNS, *TIMING_COLUMNS, *ENVIRONMENT_COLUMNS)
ERROR_COLUMN = "error"
"""Relative l2 error to float64 of a provider that disagrees. Files of the operator's times have it after `COLUMNS`."""

ResultRow = dict[str, str]


def timing_row(
    provider: str, case: str, shape: str, dtype: str, mode: str, timing: Timing, environment: ResultRow
) -> ResultRow:
    """Return one row of the CSV; `environment` is from `environment_columns`."""
    case_values = (provider, case, shape, dtype, mode)
    return {
        **dict(zip(CASE_COLUMNS, case_values, strict=True)),
        **timing_columns(timing),
        **environment,
    }


def timing_columns(timing: Timing) -> ResultRow:
    """Return the values of `TIMING_COLUMNS`."""
    times = [f"{milliseconds:.4f}" for milliseconds in (timing.p50, timing.p20, timing.p80)]
    peak = "" if timing.peak_mib is None else f"{timing.peak_mib:.1f}"
    return dict(zip(TIMING_COLUMNS, (*times, peak), strict=True))


def environment_columns(device: torch.device) -> ResultRow:
    """Return where and when this is measured: gpu (or processor and threads), driver, torch, triton, commit, date."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = _first_line_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        name = f"{_processor_name()}, {torch.get_num_threads()} threads"
        driver = ""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    commit = _first_line_of("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD")
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    values = (name, driver, torch.__version__, triton, commit, date)
    return dict(zip(ENVIRONMENT_COLUMNS, values, strict=True))


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(": ")[1]
    return platform.processor()


def _first_line_of(*command: str) -> str:
    """Return the first line that a command prints, "" where it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip().split("\n")[0]


def read_csv(path: Path) -> list[ResultRow]:
    """Read the rows of a CSV."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def write_csv(path: Path | None, rows: list[ResultRow]) -> None:
    """Write rows, all with the keys of the first, in place of the file; nothing without a path or without rows.

    It is called after each case with all rows so far, so that a run that ends early leaves what it measured.
    """
    if path is None or not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
