"""Everything there is to measure on a GPU, in one command: `python -m bench.gpu` (`make bench-gpu`).

Runs the benchmarks one after another, most valuable first, each in a process of its own that is stopped when its time
is up; those that no time is left for are named. The first checks every kernel, and nothing else is run where none is
right. Tables, bar charts, rooflines and what the benchmarks print go to bench/results under the name of the GPU as soon
as they are there; with `--archive` all of it is packed anew after each benchmark.

`--dry-run` makes the same calls on a CPU, with tiny shapes and the kernels in Triton's interpreter: it proves that the
command works, and measures nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import report
from bench.device import gpu_or_dry_run
from bench.gpu_kit.smoke import NOTHING_RIGHT
from bench.measure import record_failure
from bench.rows import read_csv
from bench.steps import Step, python_step, run_steps, write_archive

RESULTS = Path(__file__).parent / "results"
MINUTES = 8.0
DRY_SECONDS = 600.0
"""Limit of one benchmark in a dry run, which proves nothing by its time."""


@dataclass(frozen=True)
class Benchmark:
    """One entry of the plan.

    Attributes:
        name: of its files and for `--only`.
        module: of `bench`, run as a command.
        arguments: of a run on a GPU.
        dry_arguments: of a dry run.
        seconds: after which it is stopped: about twice what it is expected to take on an H100.
        writes_csv: whether it has the option `--csv`.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    dry_arguments: tuple[str, ...]
    seconds: float
    writes_csv: bool = True


FORWARD_BOTH = ("--modes", "fwd", "both")
PEERS = ("--providers", "triton", "conv2d", "torchvision", "mmcv", "tvdcn")
R50_N16 = ("--cases", "r50", "--batch-size", "16", *FORWARD_BOTH, *PEERS)
DRY_CASE = ("--cases", "dry", "--providers", "triton", "torch", "conv2d", "--seconds", "0", "--device", "cpu")
TRAIN = ("--size", "800", "1333", "--batch-size", "2", "--seconds", "15")
DETECT = ("--size", "800", "1333", "--batch-size", "1", "--seconds", "15")
DRY_STEP = ("--size", "64", "64", "--batch-size", "1", "--preset", "tiny", "--options", "--no-peer", "--seconds", "0")
PLAN = (
    Benchmark("smoke", "gpu_kit.smoke", (), ("--dry-run", "--dtypes", "float32"), 120, writes_csv=False),
    Benchmark(
        "kernels-n16",
        "kernel_times",
        ("--cases", "r50", "--batch-size", "16", "--dtypes", "bfloat16", "tf32", "--seconds", "60"),
        ("--dry-run",),
        90,
    ),
    Benchmark(
        "stages-n16",
        "deform_conv",
        (*R50_N16, "--channels-last", "--dtypes", "bfloat16", "tf32", "float32"),
        (*DRY_CASE, "--channels-last", *FORWARD_BOTH),
        60,
    ),
    Benchmark(
        "video",
        "deform_conv",
        ("--cases", "video", "dla", *FORWARD_BOTH, *PEERS, "--channels-last", "--dtypes", "float16", "float32"),
        (*DRY_CASE, "--channels-last", "--deform-groups", "4", "--modes", "fwd"),
        75,
    ),
    Benchmark(
        "train-step",
        "train_step",
        (*TRAIN, "--options", "tf32", "bf16+channels_last", "tf32+channels_last+graph", "bf16+channels_last+graph"),
        DRY_STEP,
        75,
    ),
    Benchmark(
        "inference",
        "inference",
        (
            *(*DETECT, "--options", "tf32", "bf16+channels_last"),
            *("bf16+channels_last+fused", "tf32+channels_last+fused+graph", "bf16+channels_last+fused+graph"),
        ),
        DRY_STEP,
        60,
    ),
    Benchmark(
        "kernels-n2",
        "kernel_times",
        ("--cases", "r50", "--dtypes", "bfloat16", "float16", "float32", "--seconds", "35"),
        ("--dry-run",),
        50,
    ),
    Benchmark(
        "accuracy",
        "accuracy",
        (
            *("--cases", "r50", "--providers", "triton", "torchvision"),
            *("--dtypes", "bfloat16", "float16", "tf32", "float32"),
        ),
        ("--cases", "dry", "--providers", "triton", "torch", "--device", "cpu"),
        45,
    ),
    Benchmark(
        "kernels-video",
        "kernel_times",
        ("--cases", "video", "dla", "--dtypes", "float16", "--providers", "triton", "torchvision", "--seconds", "35"),
        ("--dry-run", "--smooth"),
        50,
    ),
    Benchmark(
        "atomics",
        "atomics",
        ("--cases", "r50", "--batch-size", "16", "--dtypes", "bfloat16", "tf32"),
        ("--dry-run",),
        45,
    ),
    Benchmark(
        "offsets-smooth",
        "deform_conv",
        (*R50_N16, "--channels-last", "--dtypes", "bfloat16", "--smooth"),
        (*DRY_CASE, "--channels-last", "--smooth", "--modes", "fwd"),
        30,
    ),
    Benchmark(
        "stages-n2",
        "deform_conv",
        ("--cases", "r50", "--modes", "fwd", "bwd", "both", "--channels-last", "--dtypes", "bfloat16", "tf32"),
        (*DRY_CASE, "--channels-last", "--modes", "bwd"),
        50,
    ),
    Benchmark(
        "odd-shapes",
        "deform_conv",
        (
            *("--cases", "resnext", "odd", "r50-down", "wide", "depthwise"),
            *(*FORWARD_BOTH, *PEERS, "--dtypes", "float16", "float32"),
        ),
        (*DRY_CASE, "--modes", "both"),
        75,
    ),
    Benchmark(
        "contiguous",
        "deform_conv",
        (*R50_N16, "--dtypes", "bfloat16"),
        (*DRY_CASE, "--modes", "fwd"),
        30,
    ),
    Benchmark(  # apart, because it compiles its kernels here
        "deformops",
        "deform_conv",
        (*R50_N16, "deformops", "--channels-last", "--dtypes", "bfloat16"),
        (*DRY_CASE, "--channels-last", "--modes", "fwd"),
        45,
    ),
    Benchmark(
        "offsets-16",
        "deform_conv",
        (*R50_N16, "--channels-last", "--dtypes", "bfloat16", "--offset-magnitude", "16"),
        (*DRY_CASE, "--channels-last", "--offset-magnitude", "16", "--modes", "fwd"),
        30,
    ),
    Benchmark(
        "offsets-0",
        "deform_conv",
        (*R50_N16, "--channels-last", "--dtypes", "bfloat16", "--offset-magnitude", "0"),
        (*DRY_CASE, "--channels-last", "--offset-magnitude", "0", "--modes", "fwd"),
        30,
    ),
)


def steps_of(plan: Sequence[Benchmark], out: Path, prefix: str, dry_run: bool = False, shown: str = "") -> list[Step]:
    """Return the steps of some benchmarks, whose files are out/prefix-NAME.csv.

    Args:
        plan: of `PLAN`.
        out: folder of the results.
        prefix: of the names of all files.
        dry_run: whether to run on the CPU.
        shown: of every step.
    """
    steps = []
    for benchmark in plan:
        arguments = list(benchmark.dry_arguments if dry_run else benchmark.arguments)
        if benchmark.writes_csv:
            arguments += ["--csv", str(out / f"{prefix}-{benchmark.name}.csv")]
        seconds = DRY_SECONDS if dry_run else benchmark.seconds
        steps.append(python_step(benchmark.name, f"bench.{benchmark.module}", arguments, seconds, shown))
    return steps


def main(arguments: list[str] | None = None) -> int:
    """Run the plan and return the exit status: 0, or 1 where a benchmark failed or no time was left for it."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all benchmarks together")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables and pictures")
    parser.add_argument("--archive", type=Path, help="pack the folder here after each benchmark")
    parser.add_argument("--only", nargs="+", choices=[benchmark.name for benchmark in PLAN], help="these alone")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, kernels interpreted")
    options = parser.parse_args(arguments)
    gpu_or_dry_run(options.dry_run)
    prefix = "dry-run" if options.dry_run else _file_prefix(torch.cuda.get_device_name())
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes

    chosen = {benchmark.name: benchmark for benchmark in PLAN if not options.only or benchmark.name in options.only}
    steps = steps_of(list(chosen.values()), options.out, prefix, options.dry_run)
    failed: list[str] = []
    for step, status in run_steps(steps, options.out, prefix, deadline):
        if status != 0:
            failed.append(step.name)
        elif chosen[step.name].module == "deform_conv":
            with record_failure(f"pictures of {step.name}", failed):
                _draw(options.out / f"{prefix}-{step.name}.csv")
        if options.archive:
            write_archive(options.out, options.archive)
        if step.name == "smoke" and status == NOTHING_RIGHT:
            print("bench: no kernel is right, so nothing is measured", file=sys.stderr)
            break

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
