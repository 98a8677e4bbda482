"""Microseconds of every kernel of forward and backward: `python -m bench.kernel_times --cases r50 --batch-size 16`.

Beside ours stand the kernels of other providers, by default those of cuDNN's convolution of the same shape. Every call
finds the L2 cache without its tensors. Of ours the host's time for a pass is measured, too, in which nothing waits for
the device, and the time of a CUDA graph of forward and backward. The numbers are for finding the kernel to mend:
`bench.deform_conv` times whole calls.

`--dry-run` makes the same calls on a CPU, in Triton's interpreter (TRITON_INTERPRET=1), and counts PyTorch's operators
instead of kernels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.arguments import positive
from bench.cases import Inputs, make_inputs, select_cases
from bench.device import DTYPES, gpu_or_dry_run
from bench.measure import record_failure, timed_call
from bench.providers import Provider, load_providers
from bench.rows import CASE_COLUMNS, ResultRow, environment_columns, write_csv
from detector.graph import CudaRecorder
from triton_dcn.tf32 import allow_tf32

TOTAL = "all kernels"
"""In place of the name of a kernel: the device's time of a pass."""
HOST = "host"
"""The time in which the host starts a pass."""
GRAPH = "graph"
"""The time of a CUDA graph of forward and backward."""
WARM_UP_CALLS = 2
HOST_CALLS = 30
GRAPH_REPLAYS = 20

Call = Callable[[], object]


@dataclass(frozen=True)
class KernelTime:
    """The launches of one kernel in a call.

    Attributes:
        name: as the compiler has it.
        microseconds: of one launch, the median.
        launches: per call.
        total: microseconds of all launches of a call, the mean.
    """

    name: str
    microseconds: float
    launches: float
    total: float


class KernelTimer:
    """Times the kernels of calls on a device; a buffer as large as any L2 cache is written before each call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._warm_up_calls = WARM_UP_CALLS if device.type == "cuda" else 0
        # no kernel of ours has this dtype, so that the profiler's name of what fills it is that of nothing else
        self._l2_flush = torch.empty(32 << 20 if device.type == "cuda" else 1, dtype=torch.float64, device=device)
        self._flush_kernels = {kernel.name for kernel in self._profile(self._l2_flush.zero_, 2)}

    def kernel_times(self, call: Call, rounds: int) -> list[KernelTime]:
        """Return the kernels of a call in the order of their first launch; made after a warm-up, `rounds` times."""
        for _ in range(self._warm_up_calls):
            call()

        def flush_and_call() -> None:
            self._l2_flush.zero_()
            call()

        kernels = self._profile(flush_and_call, rounds)
        kernels = [kernel for kernel in kernels if kernel.name not in self._flush_kernels]
        if not kernels:
            raise RuntimeError("profiler: expected the kernels of a call, got none")
        return kernels

    def _profile(self, call: Call, rounds: int) -> list[KernelTime]:
        on_gpu = self._device.type == "cuda"
        self._wait()
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            for _ in range(rounds):
                call()
            self._wait()

        times: dict[str, list[float]] = {}
        for event in profiler.events():
            if event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU):
                times.setdefault(event.name, []).append(event.time_range.elapsed_us())
        return [
            KernelTime(name, statistics.median(values), len(values) / rounds, sum(values) / rounds)
            for name, values in times.items()
        ]

    def host_time(self, call: Call, calls: int = HOST_CALLS) -> float:
        """Return the microseconds in which the host starts a call, the median.

        The device is idle before each call: where a thousand launches wait for it, the driver lets the host wait, too.
        """
        for _ in range(self._warm_up_calls):
            call()
        seconds = []
        for _ in range(calls):
            self._wait()
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        self._wait()
        return 1e6 * statistics.median(seconds)

    def graph_time(self, call: Call) -> float:
        """Return the microseconds of a call captured in a CUDA graph."""
        recorder = CudaRecorder(self._device)
        for _ in range(WARM_UP_CALLS):
            recorder.run(call)
        _, replay = recorder.record(call)

        start = torch.cuda.Event(enable_timing=True)
        stop = torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(GRAPH_REPLAYS):
            replay()
        stop.record()
        torch.cuda.synchronize()
        return 1e3 * start.elapsed_time(stop) / GRAPH_REPLAYS

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_times", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["r50"], help="sets or names of bench.cases")
    parser.add_argument("--batch-size", "--batch", type=positive, help="instead of each case's own")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=list(DTYPES))
    parser.add_argument("--providers", nargs="+", default=["triton", "conv2d"], help="of bench.providers")
    parser.add_argument("--smooth", action="store_true", help="offsets that change little between neighbors")
    parser.add_argument("--rounds", type=positive, default=8, help="calls of each pass")
    parser.add_argument("--seconds", type=float, default=600.0, help="no case starts later")
    parser.add_argument("--csv", type=Path, help="write the measurements here")
    parser.add_argument("--dry-run", action="store_true", help="a tiny case on the CPU, kernels interpreted")
    options = parser.parse_args(arguments)
    if options.dry_run:
        options.cases = ["dry"]
        options.batch_size = None
        options.rounds = 1
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure case after case, print its kernels, write the CSV; return 1 where something is missing."""
    options = parse(arguments)
    device = gpu_or_dry_run(options.dry_run)
    end = time.monotonic() + options.seconds
    try:
        cases = select_cases(options.cases, options.batch_size)
        providers, missing = load_providers(options.providers, device)
    except ValueError as error:
        sys.exit(f"bench: {error}")
    for name, reason in missing.items():
        print(f"skipped {name}: {reason}", file=sys.stderr)

    environment = environment_columns(device)
    timer = KernelTimer(device)
    rows: list[ResultRow] = []
    failed: list[str] = []
    for dtype in options.dtypes:
        for case in cases:
            what = f"{case.name} {case.shape} {dtype}"
            if time.monotonic() > end:
                print(f"bench: no time left for {what}", file=sys.stderr)
                failed.append(what)
                continue
            with record_failure(what, failed), allow_tf32(dtype == "tf32"):
                inputs = make_inputs(case, DTYPES[dtype], device, 2.0, channels_last=True, smooth=options.smooth)
                new_rows = _measure(inputs, dtype, providers, timer, options.rounds, failed)
                _print(what, new_rows)
                rows += [{**row, **environment} for row in new_rows]
            write_csv(options.csv, rows)
    return int(bool(failed))


def _measure(
    inputs: Inputs, dtype: str, providers: dict[str, Provider], timer: KernelTimer, rounds: int, failed: list[str]
) -> list[ResultRow]:
    """Return the rows of one case: the kernels of every pass of every provider, and what is measured of ours alone."""
    shape = f"{inputs.case.shape} nhwc"
    rows: list[ResultRow] = []

    def add(provider: str, mode: str, kernel: str, microseconds: float, launches: float) -> None:
        case_values = (provider, inputs.case.name, shape, dtype, mode)
        row = dict(zip(CASE_COLUMNS, case_values, strict=True))
        rows.append({**row, "kernel": kernel, "us": f"{microseconds:.1f}", "launches": f"{launches:g}"})

    for name, provider in providers.items():
        what = f"{inputs.case.name} {dtype}: {name}"
        calls: dict[str, Call] = {}
        with record_failure(what, failed):
            calls["fwd"] = _training_forward(provider, inputs)
            calls["bwd"] = timed_call(provider, inputs, "bwd")
        for mode, call in calls.items():
            with record_failure(f"{what} {mode}", failed):
                kernels = timer.kernel_times(call, rounds)
                for kernel in kernels:
                    add(name, mode, kernel.name, kernel.microseconds, kernel.launches)
                add(name, mode, TOTAL, sum(kernel.total for kernel in kernels), 1)
            with record_failure(f"{what} {mode} {HOST}", failed):
                if name == "triton":
                    add(name, mode, HOST, timer.host_time(call, HOST_CALLS if rounds > 1 else 1), 1)
        if name == "triton" and inputs.input.is_cuda:
            with record_failure(f"{what} graph", failed):
                call = timed_call(provider, _with_new_leaves(inputs), "both")
                add(name, "both", GRAPH, timer.graph_time(call), 1)
    return rows


def _with_new_leaves(inputs: Inputs) -> Inputs:
    """Return the inputs as new leaves of autograd.

    The old ones are tied to the stream of a graph that is kept for the backward passes, which must not be captured.
    """
    leaves = (leaf.detach().requires_grad_() for leaf in inputs.leaves)
    return Inputs(inputs.case, *leaves, inputs.grad_output)


def _training_forward(provider: Provider, inputs: Inputs) -> Call:
    """Return the forward pass of a training step, which may keep more for the backward pass than one without it."""
    return lambda: provider.call(inputs)


def _print(what: str, rows: list[ResultRow]) -> None:
    """Print a line for each kernel of ours, then one with the sums of all providers."""
    for row in rows:
        if row["provider"] == "triton" and row["kernel"] not in (TOTAL, HOST, GRAPH):
            print(f"   {row['mode']} {float(row['us']):9.1f} us x {row['launches']:>4s}  {row['kernel'][:90]}")
    sums = []
    for row in rows:
        if row["kernel"] in (TOTAL, HOST, GRAPH):
            label = "" if row["kernel"] == TOTAL else f" {row['kernel']}"
            sums.append(f"{row['provider']} {row['mode']}{label} {row['us']}")
    print(f"== {what}: {', '.join(sums)} us", flush=True)


if __name__ == "__main__":
    sys.exit(main())
