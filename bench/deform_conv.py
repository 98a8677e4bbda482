"""Time deformable convolutions side by side: `python -m bench.deform_conv --cases r50 --modes fwd both --csv FILE`.

Every provider is first compared with the float64 reference, then all are timed in turns. Ours are not timed where they
disagree; the time of a peer that does, as torchvision's in half precision with its offsets in half precision, stands
with its error. The exit status is 1 where one of ours was left out, or anything failed.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from bench.arguments import positive, usable_device
from bench.cases import Case, make_inputs, select_cases
from bench.device import DTYPES
from bench.measure import (
    MODES,
    TOLERANCE,
    Timing,
    comparison_inputs,
    first_line,
    largest_error,
    provider_errors,
    record_failure,
    reference_results,
    time_interleaved,
    timed_call,
)
from bench.providers import FACTORIES, OURS, Provider, load_providers
from bench.report import markdown
from bench.roofline import Machine, measure_machine
from bench.rows import ERROR_COLUMN, ResultRow, environment_columns, timing_row, write_csv
from triton_dcn.tf32 import allow_tf32

MACHINE_SECONDS = 3.0
"""The most that the limits of the machine are measured for."""


@dataclass(frozen=True)
class _Settings:
    """What the measurements of all cases in one dtype share."""

    dtype: str
    device: torch.device
    providers: dict[str, Provider]
    machine: Machine
    options: argparse.Namespace
    environment: ResultRow


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, print the table, write the CSV; return the exit status."""
    options = parse(arguments)
    device = options.device
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        cases = select_cases(options.cases, options.batch_size, options.deform_groups)
        providers, missing = load_providers(options.providers, device)
    except ValueError as error:
        sys.exit(f"bench: {error}")
    for name, reason in missing.items():
        print(f"skipped {name}: {reason}", file=sys.stderr)

    environment = environment_columns(device)
    rows: list[ResultRow] = []
    failed: list[str] = []
    for dtype in options.dtypes:
        with record_failure(dtype, failed), allow_tf32(dtype == "tf32"):
            machine = measure_machine(DTYPES[dtype], device, min(MACHINE_SECONDS, options.seconds * 10))
            for name, shape, timing in machine.measurements:
                row = timing_row("machine", name, shape, dtype, name, timing, environment)
                rows.append({**row, ERROR_COLUMN: ""})
            settings = _Settings(dtype, device, providers, machine, options, environment)
            progress = tqdm(cases, desc=dtype, unit="case", disable=None)
            for case in progress:
                progress.set_postfix_str(case.name)
                with record_failure(f"{case.name} {dtype}", failed):
                    rows += _measure(case, settings, failed)
                write_csv(options.csv, rows)
    print(markdown(rows))
    return int(bool(failed))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.deform_conv", description=__doc__.splitlines()[0])
    default_cases = ["r50", "micro-64", "video-120-d12"]
    parser.add_argument("--cases", nargs="+", default=default_cases, help="sets or names of bench.cases, or all")
    parser.add_argument("--modes", nargs="+", default=["fwd", "both"], choices=MODES)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=list(DTYPES))
    parser.add_argument("--providers", nargs="+", help=f"of {', '.join(FACTORIES)}; default: all but reference")
    parser.add_argument("--batch-size", "--batch", type=positive, help="instead of each case's own")
    parser.add_argument("--deform-groups", type=positive, help="instead of each case's own")
    parser.add_argument("--offset-magnitude", type=float, default=2.0, help="standard deviation, pixels; 0: no offset")
    parser.add_argument("--smooth", action="store_true", help="offsets that change little between neighbors")
    parser.add_argument("--channels-last", action="store_true", help="layout of input and weight")
    parser.add_argument("--device", type=usable_device, default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=positive, help="of the CPU; default: torch's")
    parser.add_argument("--seconds", type=float, default=0.5 if cuda else 4.0, help="for the rounds of a case and mode")
    parser.add_argument("--csv", type=Path, help="write the measurements here")
    return parser.parse_args(arguments)


def _measure(case: Case, settings: _Settings, failed: list[str]) -> list[ResultRow]:
    """Return the rows of one case: every provider that `_compare` leaves, in every mode, and the roofline."""
    options = settings.options
    dtype = settings.dtype
    timed, errors = _compare(case, settings)
    for name in OURS:
        if name in settings.providers and name not in timed:
            failed.append(f"{case.name} {dtype}: {name}")

    inputs = make_inputs(
        case,
        DTYPES[dtype],
        settings.device,
        options.offset_magnitude,
        channels_last=options.channels_last,
        smooth=options.smooth,
    )
    shape = case.shape
    if options.channels_last:
        shape += " nhwc"
    shape += f" off{options.offset_magnitude:g}"
    if options.smooth:
        shape += " smooth"

    rows = []
    for mode in options.modes:
        what = f"{case.name} {dtype} {mode}"
        functions = {}
        for name, provider in timed.items():
            with record_failure(f"{what}: {name}", failed):
                functions[name] = timed_call(provider, inputs, mode)
        timings = time_interleaved(functions, settings.device, options.seconds, what, failed)
        least = settings.machine.least_ms(case, mode, DTYPES[dtype].itemsize)
        timings["roofline"] = Timing(least, least, least, None)
        for name, timing in timings.items():
            row = timing_row(name, case.name, shape, dtype, mode, timing, settings.environment)
            rows.append({**row, ERROR_COLUMN: errors.get(name, "")})
    return rows


def _compare(case: Case, settings: _Settings) -> tuple[dict[str, Provider], dict[str, str]]:
    """Return the providers to time, and the errors of those among them that disagree with the reference."""
    dtype = settings.dtype
    inputs = comparison_inputs(case, DTYPES[dtype], settings.device, settings.options.offset_magnitude)
    expected = reference_results(inputs)
    timed = {}
    errors = {}
    for name, provider in settings.providers.items():
        if provider.checked:
            try:
                error = largest_error(provider_errors(provider, inputs, expected))
            except Exception as reason:  # a compiler or a peer may refuse the case
                tqdm.write(f"{case.name}: {name} cannot: {first_line(reason)}", file=sys.stderr)
                if name in OURS:
                    traceback.print_exc()
                continue
            if not error < TOLERANCE[dtype]:
                tqdm.write(f"{case.name}: {name} disagrees by {error:.1e}", file=sys.stderr)
                if name in OURS:
                    continue
                errors[name] = f"{error:.0e}"
        timed[name] = provider
    return timed, errors


if __name__ == "__main__":
    sys.exit(main())
