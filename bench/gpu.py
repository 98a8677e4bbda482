"""Everything there is to measure on a GPU, in one command: `python -m bench.gpu` (`make bench-gpu`).

Runs the benchmarks one after another, most valuable first, until the time is up; those that no time is left for are
named. Tables, bar charts and the roofline go to bench/results under the name of the GPU. `--dry-run` makes the same
calls on a CPU, with tiny shapes and the kernels in Triton's interpreter: it proves that the command works, and measures
nothing.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import report
from bench.device import gpu_or_dry_run
from bench.measure import record_failure
from bench.rows import read_csv

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Benchmark:
    """One entry of the plan.

    Attributes:
        name: of its files and for `--only`.
        module: of `bench`, whose `main` takes arguments and returns an exit status. It is imported when its turn comes,
            so that a package that is missing here costs this benchmark alone.
        arguments: of a run on a GPU.
        dry_arguments: of a dry run.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    dry_arguments: tuple[str, ...]


R50_N16 = ("--cases", "r50", "--batch-size", "16", "--modes", "fwd", "both", "--dtypes", "bfloat16")
DRY_CASE = ("--cases", "dry", "--providers", "triton", "torch", "conv2d", "--seconds", "0", "--device", "cpu")
TRAIN = ("--size", "800", "1333", "--batch-size", "2")
DETECT = ("--size", "800", "1333", "--batch-size", "1")
DRY_STEP = ("--size", "64", "64", "--batch-size", "1", "--preset", "tiny", "--options", "--no-peer", "--seconds", "0")
PLAN = (
    Benchmark(
        "stages-n16",
        "deform_conv",
        (*R50_N16, "--dtypes", "bfloat16", "tf32"),
        (*DRY_CASE, "--modes", "fwd", "both"),
    ),
    Benchmark(
        "stages-n2",
        "deform_conv",
        ("--cases", "r50", "--modes", "fwd", "bwd", "both", "--dtypes", "bfloat16", "float16", "tf32", "float32"),
        (*DRY_CASE, "--modes", "bwd"),
    ),
    Benchmark(
        "accuracy",
        "accuracy",
        ("--cases", "r50", "--dtypes", "float32", "tf32", "float16", "bfloat16"),
        ("--cases", "dry", "--providers", "triton", "torch", "--device", "cpu"),
    ),
    Benchmark(
        "atomics",
        "atomics",
        ("--cases", "r50", "--batch-size", "16", "--dtypes", "bfloat16", "tf32"),
        ("--dry-run",),
    ),
    Benchmark("train-step", "train_step", (*TRAIN, "--options", "channels_last", "bf16", "tf32"), DRY_STEP),
    Benchmark("inference", "inference", (*DETECT, "--options", "channels_last", "bf16", "tf32", "fused"), DRY_STEP),
    Benchmark(
        "channels-last",
        "deform_conv",
        (*R50_N16, "--channels-last"),
        (*DRY_CASE, "--channels-last", "--modes", "fwd"),
    ),
    Benchmark(
        "offsets-smooth",
        "deform_conv",
        (*R50_N16, "--smooth"),
        (*DRY_CASE, "--smooth", "--modes", "fwd"),
    ),
    Benchmark(
        "offsets-0",
        "deform_conv",
        (*R50_N16, "--offset-magnitude", "0"),
        (*DRY_CASE, "--offset-magnitude", "0", "--modes", "fwd"),
    ),
    Benchmark(
        "offsets-16",
        "deform_conv",
        (*R50_N16, "--offset-magnitude", "16"),
        (*DRY_CASE, "--offset-magnitude", "16", "--modes", "fwd"),
    ),
    Benchmark(
        "deform-groups-4",
        "deform_conv",
        (*R50_N16, "--deform-groups", "4"),
        (*DRY_CASE, "--deform-groups", "4", "--modes", "fwd"),
    ),
    Benchmark(
        "odd-shapes",
        "deform_conv",
        ("--cases", "odd", "r50-down", "--modes", "fwd", "both", "--dtypes", "bfloat16"),
        (*DRY_CASE, "--modes", "both"),
    ),
    Benchmark(
        "tune",
        "tune",
        ("--cases", "r50-c4", "--batch-size", "16", "--dtypes", "bfloat16", "--max-tiles", "10"),
        ("--dry-run",),
    ),
    # last, since after a capture that fails the process may draw no more random numbers on the GPU
    Benchmark("train-step-graph", "train_step", (*TRAIN, "--options", "graph", "--no-peer"), DRY_STEP),
    Benchmark("inference-graph", "inference", (*DETECT, "--options", "graph", "--no-peer"), DRY_STEP),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the plan and return the exit status: 0, or 1 where a benchmark failed or no time was left for it."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="no benchmark starts after nine tenths of this")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables and pictures")
    parser.add_argument("--only", nargs="+", choices=[benchmark.name for benchmark in PLAN], help="these alone")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, kernels interpreted")
    options = parser.parse_args(arguments)
    gpu_or_dry_run(options.dry_run)
    prefix = "dry-run" if options.dry_run else _file_prefix(torch.cuda.get_device_name())
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 0.9 * 60 * options.minutes

    failed: list[str] = []
    for benchmark in PLAN:
        if options.only and benchmark.name not in options.only:
            continue
        if time.monotonic() > deadline:
            print(f"bench: no time left for {benchmark.name}", file=sys.stderr)
            failed.append(benchmark.name)
            continue
        print(f"\n## {benchmark.name}\n", flush=True)
        csv = options.out / f"{prefix}-{benchmark.name}.csv"
        with record_failure(benchmark.name, failed):
            module = importlib.import_module(f"bench.{benchmark.module}")
            benchmark_arguments = benchmark.dry_arguments if options.dry_run else benchmark.arguments
            status = module.main([*benchmark_arguments, "--csv", str(csv)])
            if benchmark.module == "deform_conv":
                _draw(csv)
            if status:
                failed.append(benchmark.name)

    incomplete = f"; not, or not all, of {', '.join(failed)}" if failed else ""
    print(f"\nresults: {options.out / prefix}-*{incomplete}")
    return 1 if failed else 0


def _file_prefix(device_name: str) -> str:
    """Return the name of a GPU as it can stand in names of files."""
    return re.sub(r"\W+", "-", device_name.lower()).strip("-")


def _draw(csv: Path) -> None:
    """Draw the bars of a benchmark of the operator, and the roofline where forward passes were measured."""
    rows = read_csv(csv)
    report.draw_bars(rows, csv.with_suffix(".png"))
    if any(row["mode"] == "fwd" for row in rows):
        report.draw_roofline(rows, csv.with_name(f"{csv.stem}-roofline.png"))


if __name__ == "__main__":
    sys.exit(main())
