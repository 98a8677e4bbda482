"""Time deformable convolutions side by side: `python -m bench.deform_conv --cases r50 --modes fwd both --csv FILE`.

Every provider is first checked against the float64 reference and not timed where it disagrees; then all take turns.
The exit status is 1 where one of ours was left out so, or anything failed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import traceback
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from bench.cases import Case, make_inputs, select
from bench.measure import (
    MODES,
    TOLERANCE,
    Timing,
    calls,
    check_inputs,
    errors,
    exact,
    first_line,
    interleave,
    surviving,
    worst,
)
from bench.providers import FACTORIES, OURS, Provider, available
from bench.report import markdown, write_csv
from bench.roofline import Machine, measure_machine

COLUMNS = (
    "provider", "case", "shape", "dtype", "mode", "ms_p50", "ms_p20", "ms_p80", "peak_mib",
    "gpu", "driver", "torch", "triton", "commit", "date",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, print the table, write the CSV; return the exit status."""
    options = _parse(arguments)
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        cases = select(options.cases, options.batch, options.deform_groups)
        providers, missing = available(options.providers, device)
    except ValueError as error:
        sys.exit(f"bench: {error}")
    for name, reason in missing.items():
        print(f"skipped {name}: {reason}", file=sys.stderr)
    rows, failed, where = [], [], environment(device)
    for dtype in options.dtypes:
        with surviving(dtype, failed), allow_tf32(dtype == "tf32"):
            machine = measure_machine(DTYPES[dtype], device)
            rows += _machine_rows(machine, dtype, where)
            bar = tqdm(cases, desc=dtype, unit="case", disable=None)
            for case in bar:
                bar.set_postfix_str(case.name)
                with surviving(f"{case.name} {dtype}", failed):
                    rows += _measure(case, dtype, device, providers, machine, options, where, failed)
                write_csv(options.csv, rows)
    print(markdown(rows))
    return int(bool(failed))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.deform_conv", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["r50", "micro-64"], help="sets or names of bench.cases, or all")
    parser.add_argument("--modes", nargs="+", default=["fwd", "both"], choices=MODES)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=list(DTYPES))
    parser.add_argument("--providers", nargs="+", help=f"of {', '.join(FACTORIES)}; default: all but reference")
    parser.add_argument("--batch", type=int, help="instead of each case's own")
    parser.add_argument("--deform-groups", type=int, help="instead of each case's own")
    parser.add_argument("--offset-magnitude", type=float, default=2.0, help="standard deviation, pixels; 0: no offset")
    parser.add_argument("--smooth", action="store_true", help="offsets that change little from place to place")
    parser.add_argument("--channels-last", action="store_true", help="layout of input and weight")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    parser.add_argument("--seconds", type=float, default=0.5 if cuda else 4.0, help="for the rounds of a case and mode")
    parser.add_argument("--csv", type=Path, help="write the measurements here")
    return parser.parse_args(arguments)


def _measure(
    case: Case,
    dtype: str,
    device: torch.device,
    providers: dict[str, Provider],
    machine: Machine,
    options: argparse.Namespace,
    where: dict[str, str],
    failed: list[str],
) -> list[dict]:
    """Rows of one case: every provider that agrees, in every mode, and the roofline."""
    agreed = _agreeing(case, dtype, device, providers, options.offset_magnitude)
    failed += [f"{case.name} {dtype}: {name}" for name in OURS if name in providers and name not in agreed]
    layout = {"channels_last": options.channels_last, "smooth": options.smooth}
    inputs = make_inputs(case, DTYPES[dtype], device, options.offset_magnitude, **layout)
    shape = case.shape + (" nhwc" if options.channels_last else "") + f" off{options.offset_magnitude:g}"
    shape += " smooth" if options.smooth else ""
    rows = []
    for mode in options.modes:
        what, functions = f"{case.name} {dtype} {mode}", {}
        for name, provider in agreed.items():
            with surviving(f"{what}: {name}", failed):
                functions[name] = calls(provider, inputs, mode)
        timings = interleave(functions, device, options.seconds, what, failed)
        least = machine.least_ms(case, mode, DTYPES[dtype].itemsize)
        timings["roofline"] = Timing(least, least, least, None)
        rows += [timing_row(name, case.name, shape, dtype, mode, timing, where) for name, timing in timings.items()]
    return rows


def _agreeing(
    case: Case, dtype: str, device: torch.device, providers: dict[str, Provider], magnitude: float
) -> dict[str, Provider]:
    """The providers whose output and gradients agree with the reference, and the limits; the others are told."""
    judged = check_inputs(case, DTYPES[dtype], device, magnitude)
    truth = exact(judged)
    agreed = {}
    for name, provider in providers.items():
        if provider.checked:
            try:
                error = worst(errors(provider, judged, truth))
            except Exception as reason:  # whatever a compiler or a peer has against the case
                tqdm.write(f"{case.name}: {name} cannot: {first_line(reason)}", file=sys.stderr)
                if name in OURS:
                    traceback.print_exc()
                continue
            if not error < TOLERANCE[dtype]:
                tqdm.write(f"{case.name}: {name} disagrees by {error:.1e} and is not timed", file=sys.stderr)
                continue
        agreed[name] = provider
    return agreed


@contextmanager
def allow_tf32(allowed: bool):
    """Let float32 products use tf32, or not."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def _machine_rows(machine: Machine, dtype: str, where: dict[str, str]) -> list[dict]:
    return [timing_row("machine", name, shape, dtype, name, timing, where) for name, shape, timing in machine.rows]


def timing_row(
    provider: str, case: str, shape: str, dtype: str, mode: str, timing: Timing, where: dict[str, str]
) -> dict:
    """Return one row of the CSV; `where` is from `environment`."""
    peak = "" if timing.peak_mib is None else f"{timing.peak_mib:.1f}"
    times = (f"{value:.4f}" for value in (timing.p50, timing.p20, timing.p80))
    return dict(zip(COLUMNS, (provider, case, shape, dtype, mode, *times, peak, *where.values()), strict=True))


def gpu_or_dry_run(dry_run: bool) -> torch.device:
    """Return the GPU, or the CPU for a dry run in the interpreter; exits with a message where that cannot be.

    Also lets PyTorch ask cuBLAS for determinism later on, which it looks up once, at the first product.
    """
    if dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("bench: --dry-run needs TRITON_INTERPRET=1 in the environment")
    if not dry_run and not torch.cuda.is_available():
        sys.exit("bench: no CUDA GPU here; --dry-run tries the command without one")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device("cpu" if dry_run else "cuda")


def environment(device: torch.device) -> dict[str, str]:
    """The columns that say where and when: gpu (or processor and threads), driver, torch, triton, commit, date."""

    def run(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split("\n")[0]
        except (OSError, subprocess.CalledProcessError):
            return ""

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
        name, driver = f"{model}, {torch.get_num_threads()} threads", ""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    commit = run("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD")
    return dict(zip(COLUMNS[-6:], (name, driver, torch.__version__, triton, commit, date), strict=True))


if __name__ == "__main__":
    sys.exit(main())
