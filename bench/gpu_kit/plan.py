"""What to run on a bare GPU machine, in two calls: `python -m bench.gpu_kit.plan first` and `second`.

Each step is stopped when its time is up, what it printed is kept whole and shown in part, and after each step all
results are packed anew. The first call answers whether every kernel runs, whether it is right, and how long it takes;
the second has the other tables, counters of the hardware, and a memory checker.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from bench import gpu
from bench.gpu_kit.smoke import NOTHING_RIGHT
from bench.steps import Step, python_step, run_steps, write_archive

PREFIX = "gpu"
FAILURES = r"FAIL|failed|no time left|disagrees|Error"
TABLE = rf"^\||{FAILURES}"
SHOWN = {
    "smoke": "",
    "kernels-n16": rf"^==|{FAILURES}",
    "kernels-n2": rf"^==|{FAILURES}",
    "kernels-video": rf"^==|{FAILURES}",
}
"""What to show of the output of a benchmark; a table by default."""
FIRST = ("smoke", "kernels-n16", "stages-n16", "video")
GPU_TESTS = (
    "tests/triton_dcn/test_gpu.py",
    "tests/triton_dcn/test_torch_backend.py",
    "tests/detector",
    "tests/train/test_step_graphs.py",
)
COUNTERS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "Occupancy",
    "LaunchStats",
)
"""Sections of Nsight Compute."""


def first_call(out: Path) -> list[Step]:
    """Return the steps of the first call."""
    tests = ("-q", "-m", "gpu", "-p", "no:cacheprovider", *GPU_TESTS)
    return [*_benchmarks(FIRST, out), python_step("tests", "pytest", tests, 140, r"passed|failed|^FAILED|^ERROR|^E ")]


def second_call(out: Path) -> list[Step]:
    """Return the steps of the second call."""
    others = [benchmark.name for benchmark in gpu.PLAN if benchmark.name not in FIRST]
    sections = [argument for name in COUNTERS for argument in ("--section", name)]
    ncu = ("ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details", *sections)
    one_step = (sys.executable, "-m", "bench.gpu_kit.one_step", "r50-c3", "r50-c4")
    counters = Step("ncu", (*ncu, *one_step), 80, r"==ERROR==|==WARNING==")
    checker = (
        "env",
        "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
        "compute-sanitizer",
        "--tool",
        "memcheck",
        "--print-limit",
        "20",
    )
    few_pixels = (sys.executable, "-m", "bench.gpu_kit.smoke", "--few-pixels", "--dtypes", "bfloat16")
    memory = Step("memcheck", (*checker, *few_pixels), 90)
    valuable = _benchmarks(others[:3], out)
    return [*valuable, counters, *_benchmarks(others[3:6], out), memory, *_benchmarks(others[6:], out)]


def _benchmarks(names: list[str] | tuple[str, ...], out: Path) -> list[Step]:
    """Return the steps of some benchmarks of `bench.gpu`, in their order there."""
    steps = []
    for benchmark in gpu.PLAN:
        if benchmark.name in names:
            steps += gpu.steps_of([benchmark], out, PREFIX, shown=SHOWN.get(benchmark.name, TABLE))
    return steps


CALLS = {"first": first_call, "second": second_call}


def main(arguments: list[str] | None = None) -> int:
    """Run one of the two calls; return 1 where a step failed or no time was left for it."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_kit.plan", description=__doc__.splitlines()[0])
    parser.add_argument("call", choices=list(CALLS))
    parser.add_argument("--minutes", type=float, default=8.5, help="of all steps together")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--archive", type=Path, help="pack the folder here after each step")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes

    failed: list[str] = []
    for step, status in run_steps(CALLS[options.call](options.out), options.out, PREFIX, deadline):
        if status != 0:
            failed.append(step.name)
        if options.archive:
            write_archive(options.out, options.archive)
        if step.name == "smoke" and status == NOTHING_RIGHT:
            print("gpu kit: no kernel is right, so nothing is measured", file=sys.stderr)
            break
    print(f"\nresults: {options.archive or options.out}" + (f"; not all of {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
