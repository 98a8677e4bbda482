"""Everything there is to measure on a GPU, in one command: `python -m bench.gpu` (`make bench-gpu`).

Runs the benchmarks one after another, most valuable first, until the time is up; what no time is left for is named.
Tables, bar charts and the roofline go to bench/results under the name of the GPU. `--dry-run` makes the same calls on a
CPU, with tiny shapes and the kernels in Triton's interpreter: it proves that the command works, and measures nothing.
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

from bench import deform_conv, report
from bench.measure import surviving

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Part:
    """One benchmark of the plan: the CSV's name, the module of the program, its arguments, and those of a dry run.

    The module is imported at its turn, so that a package that is missing here costs this part alone. Its `main` returns
    an exit status.
    """

    name: str
    program: str
    arguments: tuple[str, ...]
    dry: tuple[str, ...]


R50_N16 = ("--cases", "r50", "--batch", "16", "--modes", "fwd", "both", "--dtypes", "bfloat16")
DRY_CASE = ("--cases", "dry", "--providers", "triton", "torch", "conv2d", "--seconds", "0", "--device", "cpu")
TRAIN = ("--size", "800", "1333", "--batch", "2")
DETECT = ("--size", "800", "1333", "--batch", "1")
DRY_STEP = ("--size", "64", "64", "--batch", "1", "--preset", "tiny", "--options", "--no-peer", "--seconds", "0")
PLAN = (
    Part(
        "stages-n16", "deform_conv",
        (*R50_N16, "--dtypes", "bfloat16", "tf32"),
        (*DRY_CASE, "--modes", "fwd", "both"),
    ),
    Part(
        "stages-n2", "deform_conv",
        ("--cases", "r50", "--modes", "fwd", "bwd", "both", "--dtypes", "bfloat16", "float16", "tf32", "float32"),
        (*DRY_CASE, "--modes", "bwd"),
    ),
    Part(
        "accuracy", "accuracy",
        ("--cases", "r50", "--dtypes", "float32", "tf32", "float16", "bfloat16"),
        ("--cases", "dry", "--providers", "triton", "torch", "--device", "cpu"),
    ),
    Part(
        "atomics", "atomics",
        ("--cases", "r50", "--batch", "16", "--dtypes", "bfloat16", "tf32"),
        ("--dry-run",),
    ),
    Part("train-step", "train_step", (*TRAIN, "--options", "channels_last", "bf16", "tf32"), DRY_STEP),
    Part("inference", "inference", (*DETECT, "--options", "channels_last", "bf16", "tf32", "fused"), DRY_STEP),
    Part(
        "channels-last", "deform_conv",
        (*R50_N16, "--channels-last"),
        (*DRY_CASE, "--channels-last", "--modes", "fwd"),
    ),
    Part(
        "offsets-smooth", "deform_conv",
        (*R50_N16, "--smooth"),
        (*DRY_CASE, "--smooth", "--modes", "fwd"),
    ),
    Part(
        "offsets-0", "deform_conv",
        (*R50_N16, "--offset-magnitude", "0"),
        (*DRY_CASE, "--offset-magnitude", "0", "--modes", "fwd"),
    ),
    Part(
        "offsets-16", "deform_conv",
        (*R50_N16, "--offset-magnitude", "16"),
        (*DRY_CASE, "--offset-magnitude", "16", "--modes", "fwd"),
    ),
    Part(
        "deform-groups-4", "deform_conv",
        (*R50_N16, "--deform-groups", "4"),
        (*DRY_CASE, "--deform-groups", "4", "--modes", "fwd"),
    ),
    Part(
        "odd-shapes", "deform_conv",
        ("--cases", "odd", "r50-down", "--modes", "fwd", "both", "--dtypes", "bfloat16"),
        (*DRY_CASE, "--modes", "both"),
    ),
    Part(
        "tune", "tune",
        ("--cases", "r50-c4", "--batch", "16", "--dtypes", "bfloat16", "--most", "10"),
        ("--dry-run",),
    ),
    # last, since after a capture that fails the process may draw no more random numbers on the GPU
    Part("train-step-graph", "train_step", (*TRAIN, "--options", "graph", "--no-peer"), DRY_STEP),
    Part("inference-graph", "inference", (*DETECT, "--options", "graph", "--no-peer"), DRY_STEP),
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the plan and return the exit status: 0, or 1 where a part failed or no time was left for it."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="no part starts after nine tenths of this")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables and pictures")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PLAN], help="these parts")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, kernels interpreted")
    options = parser.parse_args(arguments)
    deform_conv.gpu_or_dry_run(options.dry_run)
    name = "dry-run" if options.dry_run else re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 0.9 * 60 * options.minutes
    failed: list[str] = []
    for part in PLAN:
        if options.only and part.name not in options.only:
            continue
        if time.monotonic() > deadline:
            print(f"bench: no time left for {part.name}", file=sys.stderr)
            failed.append(part.name)
            continue
        print(f"\n## {part.name}\n", flush=True)
        path = options.out / f"{name}-{part.name}.csv"
        with surviving(part.name, failed):
            program = importlib.import_module(f"bench.{part.program}").main
            status = program([*(part.dry if options.dry_run else part.arguments), "--csv", str(path)])
            _draw(part, path)
            if status:
                failed.append(part.name)
    print(f"\nresults: {options.out / name}-*" + (f"; not, or not all, of {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _draw(part: Part, path: Path) -> None:
    """Draw the bars of a part of operators, and their roofline where forward passes were measured."""
    if part.program != "deform_conv":
        return
    rows = report.read_csv(path)
    report.draw_bars(rows, path.with_suffix(".png"))
    if any(row["mode"] == "fwd" for row in rows):
        report.draw_roofline(rows, path.with_name(f"{path.stem}-roofline.png"))


if __name__ == "__main__":
    sys.exit(main())
