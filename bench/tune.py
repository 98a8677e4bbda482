"""Search the tiles of the table on this GPU: `python -m bench.tune --cases r50-c4 --dtypes bfloat16`.

Every task is timed through the call that uses it, with the table as it is, with tiles around its row, and with other
ways to the same result: columns instead of the fused kernels, the stable sort instead of atomic ranks, row-major order
instead of strips. What disagrees with the float64 reference is not timed. At the end it prints rows to insert into
`triton_dcn/tile_table.py`; `python -m bench.compiled_code --record` then records their limits. `--dry-run` makes the
same calls on a CPU, in Triton's interpreter (TRITON_INTERPRET=1), and says nothing about speed.
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

from bench.arguments import positive
from bench.cases import Case, Inputs, make_inputs, select_cases
from bench.device import DTYPES, gpu_or_dry_run
from bench.measure import (
    TOLERANCE,
    Timing,
    comparison_inputs,
    first_line,
    record_failure,
    reference_results,
    relative_errors,
    time_interleaved,
)
from bench.rows import ResultRow, environment_columns, timing_row, write_csv
from bench.triton_calls import run_backward, run_forward, select_gradients
from bench.tuning_candidates import Candidate, candidates
from triton_dcn.tf32 import allow_tf32
from triton_dcn.tile_table import TileRow

GRADIENTS_OF_TASK: dict[str, tuple[str, ...]] = {
    "forward": (),
    "columns": (),
    "grad_sample_fused": ("grad_offset", "grad_mask"),
    "grad_sample": ("grad_offset", "grad_mask"),
    "t_columns": ("grad_input", "grad_weight"),
    "g_form": ("grad_input",),
}
"""Task -> the gradients whose computation it is part of; none: the output."""
MIN_GAIN = 1.03
"""How much faster than the table a new row must be."""


def task_call(task: str, inputs: Inputs, candidate: Candidate) -> Callable[[], list[Tensor]]:
    """Return the call to time: the output, or the gradients of `GRADIENTS_OF_TASK`."""
    gradients = GRADIENTS_OF_TASK[task]

    def call() -> list[Tensor]:
        with candidate.applied():
            if gradients:
                return run_backward(inputs, gradients)
            return [run_forward(inputs)]

    return call


def tune(
    task: str, case: Case, dtype: str, device: torch.device, options: argparse.Namespace, failed: list[str]
) -> dict[Candidate, Timing]:
    """Return the times of every candidate that compiles and agrees with the reference, fastest first."""
    inputs = make_inputs(case, DTYPES[dtype], device, 2.0)
    agreeing = _agreeing_candidates(task, inputs, dtype, options.max_tiles)
    what = f"{task} {case.name} {dtype}"
    if "table" not in agreeing:
        failed.append(f"{what}: table")

    functions = {label: task_call(task, inputs, candidate) for label, candidate in agreeing.items()}
    timings = time_interleaved(functions, device, options.seconds, what, failed)
    labels = sorted(timings, key=lambda label: timings[label].p50)
    return {agreeing[label]: timings[label] for label in labels}


def _agreeing_candidates(task: str, inputs: Inputs, dtype: str, max_tiles: int) -> dict[str, Candidate]:
    """Return the candidates whose results agree with the float64 reference, by label; name the others."""
    case = inputs.case
    one_image = comparison_inputs(case, DTYPES[dtype], inputs.input.device, 2.0)
    expected = reference_results(one_image)
    gradients = GRADIENTS_OF_TASK[task]
    expected = select_gradients(expected, gradients) if gradients else expected[:1]

    agreeing = {}
    for candidate in candidates(task, inputs, max_tiles):
        try:
            results = task_call(task, one_image, candidate)()
            errors = relative_errors(results, expected)
        except Exception as error:  # the compiler or the driver may refuse a tile
            print(f"{task} {case.name}: {candidate.label} cannot: {first_line(error)}", file=sys.stderr)
            continue
        if all(error < TOLERANCE[dtype] for error in errors):
            agreeing[candidate.label] = candidate
        else:
            print(f"{task} {case.name}: {candidate.label} disagrees by {errors}", file=sys.stderr)
    return agreeing


def new_row(timings: dict[Candidate, Timing]) -> TileRow | None:
    """Return the tile row of the fastest tile, or None where it gains less than `MIN_GAIN`."""
    table_ms = None
    for candidate, timing in timings.items():
        if candidate.label == "table":
            table_ms = timing.p50
    fastest = next((candidate for candidate in timings if candidate.row is not None), None)
    if table_ms is None or fastest is None or timings[fastest].p50 > table_ms / MIN_GAIN:
        return None
    return fastest.row


def main(arguments: list[str] | None = None) -> int:
    """Time the tasks, print their tables and the new rows, write the CSV, return 1 where something failed."""
    options = _parse(arguments)
    device = gpu_or_dry_run(options.dry_run)
    if options.dry_run:
        options.cases = ["dry"]
        options.batch_size = None
        options.dtypes = ["bfloat16"]
        options.max_tiles = 1
        options.seconds = 0.0
    try:
        cases = select_cases(options.cases, options.batch_size)
    except ValueError as error:
        sys.exit(f"bench: {error}")

    environment = environment_columns(device)
    csv_rows: list[ResultRow] = []
    new_rows: list[TileRow] = []
    failed: list[str] = []
    for dtype, case, task in itertools.product(options.dtypes, cases, options.tasks):
        if task == "g_form":
            case = replace(case, offset_groups=4)
        with record_failure(f"{task} {case.name} {dtype}", failed):
            with allow_tf32(dtype == "tf32"):
                timings = tune(task, case, dtype, device, options, failed)
            print(f"\n{task}, {case.name} {case.shape}, {dtype}")
            for candidate, timing in timings.items():
                print(f"    {timing.p50:9.4f} ms  {candidate.label}")
                csv_rows.append(timing_row(candidate.label, case.name, case.shape, dtype, task, timing, environment))
            write_csv(options.csv, csv_rows)
            tile_row = new_row(timings)
            if tile_row is not None and tile_row not in new_rows:
                new_rows.append(tile_row)

    print("\nrows that beat the table:" if new_rows else "\nno row beats the table")
    for row in new_rows:
        print(f"    {row},")
    return int(bool(failed))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    tasks = list(GRADIENTS_OF_TASK)
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["r50"], help="sets or names of bench.cases")
    parser.add_argument("--batch-size", "--batch", type=positive, help="instead of each case's own")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "tf32", "float32"], choices=list(DTYPES))
    parser.add_argument("--tasks", nargs="+", default=tasks, choices=tasks)
    parser.add_argument("--max-tiles", type=positive, default=16, help="of each kernel")
    parser.add_argument("--seconds", type=float, default=0.5, help="for the rounds of a task, case and dtype")
    parser.add_argument("--csv", type=Path, help="write the measurements here")
    parser.add_argument("--dry-run", action="store_true", help="a tiny case on the CPU, kernels interpreted")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
