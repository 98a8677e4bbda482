"""Check, then time: interleaved rounds, median and quantiles, peak memory; on CPU and on CUDA."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.cases import Case, Inputs, make_inputs
from bench.providers import Provider
from triton_dcn import reference

TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "tf32": 5e-3, "float16": 5e-3, "bfloat16": 4e-2}
"""Relative l2 error to the float64 reference above which a provider is not timed."""
MODES = ("fwd", "bwd", "both")
SLEEP_CYCLES = 2_000_000
"""About 1 ms that a CUDA device sleeps before a call: the host launches ahead, or its time would be measured."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds (median, quantiles at 0.2 and 0.8) and MiB above what was held before the call; None: unknown."""

    p50: float
    p20: float
    p80: float
    peak_mib: float | None


def relative_errors(found: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """Relative l2 errors of tensors to those of float64."""
    pairs = zip(found, truth, strict=True)
    return [((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs]


def worst(values: Sequence[float]) -> float:
    """Return the largest error, NaN if there is one: max() passes over a NaN that does not come first."""
    return max(values, key=lambda value: (value != value, value))


def errors(provider: Provider, inputs: Inputs, truth: list[Tensor]) -> list[float]:
    """Relative l2 errors of output and gradients to `truth`, of `exact`."""
    output = provider.call(inputs)
    return relative_errors([output, *torch.autograd.grad(output, inputs.leaves, inputs.grad)], truth)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextmanager
def surviving(what: str, failed: list[str]) -> Iterator[None]:
    """Go on after an exception of the block: told with its traceback, and `what` is added to `failed`."""
    try:
        yield
    except (Exception, SystemExit) as error:  # the other measurements are worth having
        traceback.print_exc()
        print(f"bench: {what} failed: {first_line(error)}", file=sys.stderr, flush=True)
        failed.append(what)


def check_inputs(case: Case, dtype: torch.dtype, device: torch.device, magnitude: float) -> Inputs:
    """Inputs to judge a provider by: one image, never whole-pixel offsets, at which peers differ on purpose."""
    single = Case(**{**vars(case), "batch": 1})
    return make_inputs(single, dtype, device, max(magnitude, 1.0), seed=1)


def exact(inputs: Inputs) -> list[Tensor]:
    """Output and gradients of the float64 reference on the same rounded values."""
    x, offset, mask, weight = (leaf.detach().double() for leaf in inputs.leaves)
    geom = inputs.geometry
    output = reference.forward(geom, x, offset, mask, weight, None)
    return [output, *reference.backward(geom, inputs.grad.double(), x, offset, mask, weight, (True,) * 4)]


def calls(provider: Provider, inputs: Inputs, mode: str) -> Callable[[], object]:
    """The function to time: "fwd" without autograd, "bwd" on a graph kept, "both" as training does."""
    if mode == "fwd":

        def forward() -> Tensor:
            with torch.no_grad():
                return provider.call(inputs)

        return forward
    if mode == "bwd":
        output = provider.call(inputs)
        leaves = inputs.leaves if provider.checked else (inputs.input, inputs.weight)
        return lambda: torch.autograd.grad(output, leaves, inputs.grad, retain_graph=True)

    def both() -> object:
        leaves = inputs.leaves if provider.checked else (inputs.input, inputs.weight)
        return torch.autograd.grad(provider.call(inputs), leaves, inputs.grad)

    return both


def interleave(
    functions: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    what: str,
    failed: list[str],
    least: int = 3,
    most: int = 100,
) -> dict[str, Timing]:
    """Time functions side by side: after a warm-up, rounds of one call each until `seconds` have passed.

    Args:
        functions: by provider.
        device: chooses the clock.
        seconds: budget of the rounds together.
        what: is timed, for messages.
        failed: a function that fails is left out, and added here.
        least, most: number of rounds in any case.
    """
    peaks = {}
    for name, function in functions.items():
        with surviving(f"{what}: {name}", failed):
            function()
            peaks[name] = peak_memory(function, device)
    spans: dict[str, list[float]] = {name: [] for name in peaks}
    clock = _cuda_clock(device) if device.type == "cuda" else _cpu_clock
    end = time.perf_counter() + seconds
    for done in range(most):
        if done >= least and time.perf_counter() > end:
            break
        for name in list(spans):
            values = spans.pop(name)  # back again unless the call fails
            with surviving(f"{what}: {name}", failed):
                spans[name] = [*values, clock(functions[name])]
    return {name: _summary(values, peaks[name]) for name, values in spans.items()}


def _summary(values: list[float], peak: float | None) -> Timing:
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 2
    return Timing(statistics.median(values), low, high, peak)


def _cpu_clock(function: Callable[[], object]) -> float:
    """Time the second of two calls: the first pays for pages that another's turn gave back to the system."""
    function()
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def _cuda_clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Return a clock of CUDA events; a buffer as large as any L2 cache is written before each call."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device=device)

    def clock(function: Callable[[], object]) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    return clock


def peak_memory(function: Callable[[], object], device: torch.device) -> float | None:
    """MiB that a call holds at most beyond what was held before; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc: hand freed memory back, or reuse of it would hide the peak
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again from here
        before = _status("VmRSS")
        function()
        return (_status("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    """One line of /proc/self/status, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))
