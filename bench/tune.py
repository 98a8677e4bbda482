"""Search the tiles of the table on this GPU: `python -m bench.tune --cases r50-c4 --dtypes bfloat16`.

Every stage is timed through the call that uses it, with the table as it is, with tiles around its row, and with the
other way to the same result: columns for the fused forms, the stable sort for atomic ranks, rows for strips. What
disagrees with the float64 reference is not timed. Ends with rows for `triton_dcn/tile_table.py`. `--dry-run` makes the
same calls on a CPU, in Triton's interpreter (TRITON_INTERPRET=1), and finds out nothing about speed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bench.cases import Case, Inputs, make_inputs, select
from bench.choices import Choice, choices
from bench.deform_conv import DTYPES, allow_tf32, environment, gpu_or_dry_run, timing_row
from bench.measure import TOLERANCE, Timing, check_inputs, exact, interleave, relative_errors, surviving
from bench.report import write_csv
from triton_dcn import triton_backend
from triton_dcn.tile_table import TileRow

NEEDS = {
    "forward": None, "columns": None, "grad_sample_fused": (False, True, True, False),
    "grad_sample": (False, True, True, False), "t_columns": (True, False, False, True),
    "g_form": (True, False, False, False),
}  # fmt: skip
"""Stage -> the gradients whose computation it is part of; None: the output."""
GAIN = 1.03
"""How much faster than the table a new row must be."""


def function(stage: str, inputs: Inputs, choice: Choice) -> Callable[[], list[Tensor]]:
    """Return the call to time: the output, or the gradients of `NEEDS`."""
    tensors = tuple(leaf.detach() for leaf in inputs.leaves)

    def call() -> list[Tensor]:
        with choice.in_force():
            if NEEDS[stage] is None:
                return [triton_backend.forward(inputs.geometry, *tensors, None)]
            return [
                g
                for g in triton_backend.backward(inputs.geometry, inputs.grad, *tensors, NEEDS[stage])
                if g is not None
            ]

    return call


def tune(
    stage: str, case: Case, dtype: str, device: torch.device, options: argparse.Namespace, failed: list[str]
) -> dict[Choice, Timing]:
    """Return the times of every choice that compiles and agrees with the reference, fastest first."""
    small = check_inputs(case, DTYPES[dtype], device, 2.0)
    truth = exact(small)
    truth = truth[:1] if NEEDS[stage] is None else list(itertools.compress(truth[1:], NEEDS[stage]))
    inputs, agreed = make_inputs(case, DTYPES[dtype], device, 2.0), {}
    for choice in choices(stage, inputs, options.most):
        try:
            errors = relative_errors(function(stage, small, choice)(), truth)
        except Exception as error:  # whatever the compiler or the driver has against a tile
            print(f"{stage} {case.name}: {choice.label} cannot: {str(error).splitlines()[:1]}", file=sys.stderr)
        else:
            if all(error < TOLERANCE[dtype] for error in errors):
                agreed[choice.label] = choice
            else:
                print(f"{stage} {case.name}: {choice.label} disagrees by {errors}", file=sys.stderr)
    if "table" not in agreed:
        failed.append(f"{stage} {case.name} {dtype}: table")
    functions = {label: function(stage, inputs, choice) for label, choice in agreed.items()}
    timed = interleave(functions, device, options.seconds, f"{stage} {case.name} {dtype}", failed)
    return {agreed[label]: timed[label] for label in sorted(timed, key=lambda label: timed[label].p50)}


def new_row(timed: dict[Choice, Timing]) -> TileRow | None:
    """Return the row of the fastest tile, or None where it gains less than `GAIN`."""
    table = next((timing.p50 for choice, timing in timed.items() if choice.label == "table"), None)
    best = next((choice for choice in timed if choice.row), None)
    if table is None or best is None or timed[best].p50 > table / GAIN:
        return None
    return best.row


def main(arguments: list[str] | None = None) -> int:
    """Time the stages, print their tables and the new rows, write the CSV, return 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["r50"], help="sets or names of bench.cases")
    parser.add_argument("--batch", type=int, help="instead of each case's own")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "tf32", "float32"], choices=list(DTYPES))
    parser.add_argument("--stages", nargs="+", default=list(NEEDS), choices=list(NEEDS))
    parser.add_argument("--most", type=int, default=16, help="tiles of each form")
    parser.add_argument("--seconds", type=float, default=0.5, help="for the rounds of a stage, case and dtype")
    parser.add_argument("--csv", type=Path, help="write the measurements here")
    parser.add_argument("--dry-run", action="store_true", help="a tiny case on the CPU, kernels interpreted")
    options = parser.parse_args(arguments)
    device = gpu_or_dry_run(options.dry_run)
    if options.dry_run:
        options.cases, options.batch, options.dtypes = ["dry"], None, ["bfloat16"]
        options.most, options.seconds = 2, 0.0
    lines, rows, failed, where = [], [], [], environment(device)
    for dtype, case, stage in itertools.product(options.dtypes, select(options.cases, options.batch), options.stages):
        case = replace(case, offset_groups=4) if stage == "g_form" else case
        with surviving(f"{stage} {case.name} {dtype}", failed):
            with allow_tf32(dtype == "tf32"):
                timed = tune(stage, case, dtype, device, options, failed)
            print(f"\n{stage}, {case.name} {case.shape}, {dtype}")
            for choice, timing in timed.items():
                print(f"    {timing.p50:9.4f} ms  {choice.label}")
                lines.append(timing_row(choice.label, case.name, case.shape, dtype, stage, timing, where))
            write_csv(options.csv, lines)
            rows += [row for row in (new_row(timed),) if row and row not in rows]
    print("\nrows that beat the table:" if rows else "\nno row beats the table")
    for row in rows:
        print(f"    {row},")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
