"""How far every provider is from float64: `python -m bench.accuracy --dtypes bfloat16 float32`.

Relative l2 errors of output and gradients on one image of each case, on the same rounded inputs, beside those of the
plain reference computed in that dtype. Ours may have at most twice the reference's error plus one rounding; the exit
status is 1 where one of ours has more.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import traceback
from pathlib import Path

import torch
from tqdm import tqdm

from bench.arguments import usable_device
from bench.cases import Case, select_cases
from bench.device import DTYPES
from bench.measure import (
    comparison_inputs,
    first_line,
    largest_error,
    provider_errors,
    record_failure,
    reference_results,
)
from bench.providers import FACTORIES, OURS, Provider, load_providers
from bench.report import markdown_table
from bench.rows import ResultRow, environment_columns, write_csv
from triton_dcn.tf32 import allow_tf32

QUANTITIES = ("output", "grad_input", "grad_offset", "grad_mask", "grad_weight")
TF32_ROUNDING = 2**-10

Errors = dict[str, list[float]]
"""By provider, the errors of `QUANTITIES`."""


def measure_errors(case: Case, dtype: str, device: torch.device, providers: dict[str, Provider]) -> Errors:
    """Return the errors by provider; one that cannot compute the case is named and left out."""
    with allow_tf32(False):
        inputs = comparison_inputs(case, DTYPES[dtype], device, 2.0)
        expected = reference_results(inputs)
    errors: Errors = {}
    with allow_tf32(dtype == "tf32"):
        for name, provider in providers.items():
            try:
                errors[name] = provider_errors(provider, inputs, expected)
            except Exception as error:  # a peer without the dtype, a compiler that refuses
                if name == "reference":
                    raise
                tqdm.write(f"{case.name}: {name} cannot: {first_line(error)}", file=sys.stderr)
                if name in OURS:
                    traceback.print_exc()
    return errors


def find_violations(errors: Errors, ours: list[str], dtype: str) -> list[str]:
    """Return a line for every error of ours that is over its bound, and for every one of `ours` that has none."""
    rounding = TF32_ROUNDING if dtype == "tf32" else torch.finfo(DTYPES[dtype]).eps
    lines = [f"{name} could not compute it" for name in ours if name not in errors]
    for name in ours:
        if name not in errors:
            continue
        for quantity, error, reference_error in zip(QUANTITIES, errors[name], errors["reference"], strict=True):
            if not error <= 2 * reference_error + rounding:
                lines.append(f"{quantity} of {name} has an error of {error:.1e}, the reference {reference_error:.1e}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the largest error of every case and dtype, write all to the CSV; return the exit status."""
    options = parse(arguments)
    device = options.device
    names = ["reference", *(name for name in options.providers or FACTORIES if name != "reference")]
    if device.type == "cpu" and not options.providers:
        names.remove("triton")  # its interpreter takes minutes for a case of this size; --providers asks for it
    try:
        cases = select_cases(options.cases)
        providers, missing = load_providers(names, device)
    except ValueError as error:
        sys.exit(f"bench: {error}")
    for name, reason in missing.items():
        print(f"skipped {name}: {reason}", file=sys.stderr)
    providers = {name: provider for name, provider in providers.items() if provider.checked}
    ours = [name for name in OURS if name in names]

    environment = environment_columns(device)
    rows: list[ResultRow] = []
    lines: list[list[str]] = []
    violations: list[str] = []
    failed: list[str] = []
    cases_and_dtypes = list(itertools.product(cases, options.dtypes))
    for case, dtype in tqdm(cases_and_dtypes, unit="case", disable=None):
        errors: Errors = {}
        with record_failure(f"{case.name} {dtype}", failed):
            errors = measure_errors(case, dtype, device, providers)
        cells = [f"{largest_error(errors[name]):.1e}" if name in errors else "-" for name in providers]
        lines.append([case.name, dtype, *cells])
        violations += [f"{case.name} {dtype}: {line}" for line in find_violations(errors, ours, dtype)]
        rows += _rows(case, dtype, errors, environment)
        write_csv(options.csv, rows)

    print("relative l2 error to float64, the largest of output and gradients\n")
    print(markdown_table(["case", "dtype", *providers], lines))
    for line in violations:
        print(line, file=sys.stderr)
    return int(bool(violations or failed))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["r50", "odd"], help="sets or names of bench.cases, or all")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--providers", nargs="+", help=f"of {', '.join(FACTORIES)}; default: all that compute it")
    parser.add_argument("--device", type=usable_device, default="cuda" if cuda else "cpu")
    parser.add_argument("--csv", type=Path, help="write the errors here")
    return parser.parse_args(arguments)


def _rows(case: Case, dtype: str, errors: Errors, environment: ResultRow) -> list[ResultRow]:
    """Return one row per provider and quantity."""
    rows = []
    for name, values in errors.items():
        for quantity, error in zip(QUANTITIES, values, strict=True):
            row = {
                "provider": name,
                "case": case.name,
                "shape": case.shape,
                "dtype": dtype,
                "quantity": quantity,
                "error": f"{error:.3e}",
            }
            rows.append(row | environment)
    return rows


if __name__ == "__main__":
    sys.exit(main())
