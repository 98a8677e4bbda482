"""Compare with the float64 reference, then time: interleaved rounds, quantiles and peak memory, on CPU and CUDA."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench.cases import Case, Inputs, make_inputs
from bench.providers import Provider
from triton_dcn import reference
from triton_dcn.offset_mask import OffsetMask

TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "tf32": 5e-3, "float16": 5e-3, "bfloat16": 4e-2}
"""Relative l2 error to the float64 reference above which a provider disagrees."""
MODES = ("fwd", "bwd", "both")
CYCLES_PER_MS = 2_000_000
"""Of a CUDA device, about."""
SLEEP_MS = (1.0, 10.0)
"""The least and the most that a CUDA device sleeps before a call, so that the host launches ahead and its time is not
measured: half as long again as the host takes for a call. Steps that take the host longer take the device longer, too.
"""


@dataclass(frozen=True)
class Timing:
    """Time and memory of one call.

    Attributes:
        p50: median, milliseconds.
        p20: quantile at 0.2, milliseconds.
        p80: quantile at 0.8, milliseconds.
        peak_mib: MiB above what was held before the call; None where it is unknown.
    """

    p50: float
    p20: float
    p80: float
    peak_mib: float | None


def relative_errors(results: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Return relative l2 errors of tensors to those of float64."""
    errors = []
    for result, truth in zip(results, expected, strict=True):
        difference = (result.double() - truth).norm()
        errors.append((difference / truth.norm().clamp(min=1e-30)).item())
    return errors


def largest_error(errors: Sequence[float]) -> float:
    """Return the largest error, NaN if there is one: max() passes over a NaN that does not come first."""
    return max(errors, key=lambda error: (error != error, error))


def provider_errors(provider: Provider, inputs: Inputs, expected: list[Tensor]) -> list[float]:
    """Return relative l2 errors of output and gradients to those of `reference_results`."""
    output = provider.call(inputs)
    grads = torch.autograd.grad(output, inputs.leaves, inputs.grad_output)
    return relative_errors([output, *grads], expected)


def reference_results(inputs: Inputs) -> list[Tensor]:
    """Return output and gradients of the float64 reference on the same rounded values."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves]
    x, offset, mask, weight = leaves
    output = reference.forward(inputs.geometry, x, OffsetMask(offset, mask), weight, None)
    grads = torch.autograd.grad(output, leaves, inputs.grad_output.double())
    return [output.detach(), *grads]


def comparison_inputs(case: Case, dtype: torch.dtype, device: torch.device, magnitude: float) -> Inputs:
    """Return one image to compare providers on; no offset is a whole pixel, where peers differ on purpose."""
    return make_inputs(replace(case, batch=1), dtype, device, max(magnitude, 1.0), seed=1)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class where it has none."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def record_failure(what: str, failed: list[str]) -> Iterator[None]:
    """Continue after an exception of the block: print it with its traceback and add `what` to `failed`."""
    try:
        yield
    except (Exception, SystemExit) as error:  # the other measurements are worth having
        traceback.print_exc()
        print(f"bench: {what} failed: {first_line(error)}", file=sys.stderr, flush=True)
        failed.append(what)


def timed_call(provider: Provider, inputs: Inputs, mode: str) -> Callable[[], object]:
    """Return the function to time: "fwd" without autograd, "bwd" on a graph that is kept, "both" as training does."""
    leaves = inputs.leaves if provider.checked else (inputs.input, inputs.weight)

    def forward() -> Tensor:
        with torch.no_grad():
            return provider.call(inputs)

    def both() -> object:
        return torch.autograd.grad(provider.call(inputs), leaves, inputs.grad_output)

    if mode == "fwd":
        return forward
    if mode == "both":
        return both
    output = provider.call(inputs)
    return lambda: torch.autograd.grad(output, leaves, inputs.grad_output, retain_graph=True)


def time_interleaved(
    functions: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    what: str,
    failed: list[str],
    min_rounds: int = 3,
    max_rounds: int = 100,
) -> dict[str, Timing]:
    """Time functions side by side: after a warm-up, rounds of one call each until `seconds` have passed.

    Args:
        functions: by name.
        device: chooses the clock.
        seconds: for all rounds together.
        what: what is timed, for messages.
        failed: receives the functions that fail; they are left out of the result.
        min_rounds: made even if the time is up.
        max_rounds: never exceeded.
    """
    peaks: dict[str, float | None] = {}
    for name, function in functions.items():
        with record_failure(f"{what}: {name}", failed):
            function()
            peaks[name] = peak_memory(function, device)

    times: dict[str, list[float]] = {name: [] for name in peaks}
    clock = _cuda_clock(device) if device.type == "cuda" else _cpu_clock
    end = time.perf_counter() + seconds
    for rounds_done in range(max_rounds):
        if rounds_done >= min_rounds and time.perf_counter() > end:
            break
        for name in list(times):
            earlier = times.pop(name)  # put back unless the call fails
            with record_failure(f"{what}: {name}", failed):
                times[name] = [*earlier, clock(functions[name])]
    return {name: _summary(values, peaks[name]) for name, values in times.items()}


def _summary(milliseconds: list[float], peak: float | None) -> Timing:
    median = statistics.median(milliseconds)
    if len(milliseconds) == 1:
        return Timing(median, median, median, peak)
    quintiles = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return Timing(median, quintiles[0], quintiles[-1], peak)


def _cpu_clock(function: Callable[[], object]) -> float:
    """Return the milliseconds of the second of two calls: the first may have to get its memory from the system."""
    function()
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def _cuda_clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Return a clock of CUDA events; a buffer as large as any L2 cache is written before each call."""
    l2_flush = torch.empty(64 << 20, dtype=torch.int32, device=device)
    sleeps: dict[Callable[[], object], float] = {}

    def clock(function: Callable[[], object]) -> float:
        if function not in sleeps:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            function()
            host_ms = 1e3 * (time.perf_counter() - begin)
            sleeps[function] = min(max(SLEEP_MS[0], 1.5 * host_ms), SLEEP_MS[1])
        start = torch.cuda.Event(enable_timing=True)
        stop = torch.cuda.Event(enable_timing=True)
        l2_flush.zero_()
        torch.cuda._sleep(int(CYCLES_PER_MS * sleeps[function]))  # PyTorch has no public function for it
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    return clock


def peak_memory(function: Callable[[], object], device: torch.device) -> float | None:
    """Return the most MiB that a call holds beyond what was held before; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc: give freed memory back, or reuse of it would hide the peak
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again from here
        before = _process_kib("VmRSS")
        function()
        return (_process_kib("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return None


def _process_kib(key: str) -> int:
    """Return the value of one line of /proc/self/status, KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status: expected a line {key}")
