"""How far every provider is from float64: `python -m bench.accuracy --dtypes bfloat16 float32`.

Relative l2 errors of output and gradients on one image of each case, on the same rounded inputs, beside those of the
plain reference computed in that dtype. Ours may have at most twice the reference's error, and a rounding more; the exit
status is 1 where it has not.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import traceback
from pathlib import Path

import torch
from tqdm import tqdm

from bench.cases import Case, select
from bench.deform_conv import DTYPES, allow_tf32, environment
from bench.measure import check_inputs, errors, exact, first_line, surviving, worst
from bench.providers import FACTORIES, OURS, Provider, available
from bench.report import table, write_csv

QUANTITIES = ("output", "grad_input", "grad_offset", "grad_mask", "grad_weight")


def measure(case: Case, dtype: str, device: torch.device, providers: dict[str, Provider]) -> dict[str, list[float]]:
    """Return the errors of `QUANTITIES` by provider; one that cannot compute the case is told and left out."""
    with allow_tf32(False):
        inputs = check_inputs(case, DTYPES[dtype], device, 2.0)
        truth = exact(inputs)
    found = {}
    with allow_tf32(dtype == "tf32"):
        for name, provider in providers.items():
            try:
                found[name] = errors(provider, inputs, truth)
            except Exception as error:  # a peer without the dtype, a compiler that refuses
                if name == "reference":
                    raise
                tqdm.write(f"{case.name}: {name} cannot: {first_line(error)}", file=sys.stderr)
                if name in OURS:
                    traceback.print_exc()
    return found


def too_far(found: dict[str, list[float]], ours: list[str], dtype: str) -> list[str]:
    """Return a line for every error of ours that is over its bound, and for every one of `ours` that has none."""
    slack = 2**-10 if dtype == "tf32" else torch.finfo(DTYPES[dtype]).eps
    missing = [f"{name} could not compute it" for name in ours if name not in found]
    return missing + [
        f"{quantity} of {name} has an error of {error:.1e}, the reference {plain:.1e}"
        for name in ours
        if name in found
        for quantity, error, plain in zip(QUANTITIES, found[name], found["reference"], strict=True)
        if not error <= 2 * plain + slack
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the largest error of every case and dtype, write all to the CSV; return the exit status."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["r50", "odd"], help="sets or names of bench.cases, or all")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--providers", nargs="+", help=f"of {', '.join(FACTORIES)}; default: all that compute it")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--csv", type=Path, help="write the errors here")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    try:
        cases = select(options.cases)
        names = ["reference", *(name for name in options.providers or FACTORIES if name != "reference")]
        if device.type == "cpu" and not options.providers:
            names.remove("triton")  # its interpreter takes minutes for a case of this size; --providers asks for it
        providers, missing = available(names, device)
    except ValueError as error:
        sys.exit(f"bench: {error}")
    for name, reason in missing.items():
        print(f"skipped {name}: {reason}", file=sys.stderr)
    providers = {name: provider for name, provider in providers.items() if provider.checked}
    rows, lines, wrong, failed, where = [], [], [], [], environment(device)
    ours = [name for name in OURS if name in names]
    for case, dtype in tqdm(list(itertools.product(cases, options.dtypes)), unit="case", disable=None):
        found = {}
        with surviving(f"{case.name} {dtype}", failed):
            found = measure(case, dtype, device, providers)
        lines.append([case.name, dtype, *(f"{worst(found[n]):.1e}" if n in found else "-" for n in providers)])
        wrong += [f"{case.name} {dtype}: {line}" for line in too_far(found, ours, dtype)]
        for name, values in found.items():
            for quantity, value in zip(QUANTITIES, values, strict=True):
                keys = {"case": case.name, "shape": case.shape, "dtype": dtype, "quantity": quantity}
                rows.append({"provider": name, **keys, "error": f"{value:.3e}", **where})
        write_csv(options.csv, rows)
    print("relative l2 error to float64, the largest of output and gradients\n")
    print(table(["case", "dtype", *providers], lines))
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong or failed))


if __name__ == "__main__":
    sys.exit(main())
