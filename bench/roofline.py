"""What this machine can do: copy bandwidth and matrix rate, and the least time that a case needs by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.cases import Case
from bench.measure import Timing, time_interleaved


@dataclass(frozen=True)
class Machine:
    """Measured limits, per millisecond, and how they were measured.

    Attributes:
        bandwidth: bytes read and written by a large copy.
        rate: floating-point operations of the fastest large product.
        measurements: (name, shape, timing) of each measurement.
    """

    bandwidth: float
    rate: float
    measurements: tuple[tuple[str, str, Timing], ...]

    def least_ms(self, case: Case, mode: str, itemsize: int) -> float:
        """Return the roofline of a case: the larger of the times for its traffic and for its products."""
        return max(case.traffic(mode, itemsize) / self.bandwidth, case.flops(mode) / self.rate)


class _Work(NamedTuple):
    """One thing to time; `amount` is in bytes or floating-point operations."""

    call: Callable[[], object]
    shape: str
    amount: int


def measure_machine(dtype: torch.dtype, device: torch.device, seconds: float) -> Machine:
    """Time a large copy, and a large matrix product and 3x3 convolution in `dtype`."""
    if device.type == "cuda":
        nbytes = 1 << 30
        size = 8192
        channels = 512
        side = 128
    else:
        nbytes = 1 << 26
        size = 2048
        channels = 256
        side = 64
    work = {
        "copy": _copy(nbytes, device),
        "matmul": _matmul(size, dtype, device),
        "conv2d": _conv2d(channels, side, dtype, device),
    }
    with torch.no_grad():
        functions = {name: item.call for name, item in work.items()}
        # the list of failures is not needed: a work that failed is missing in `timings`, which is an error below
        timings = time_interleaved(functions, device, seconds, "machine", [])
    rates = {name: item.amount / timings[name].p20 for name, item in work.items()}
    measurements = tuple((name, item.shape, timings[name]) for name, item in work.items())
    return Machine(rates["copy"], max(rates["matmul"], rates["conv2d"]), measurements)


def _copy(nbytes: int, device: torch.device) -> _Work:
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    return _Work(lambda: copy.copy_(source), f"{nbytes} bytes", 2 * nbytes)


def _matmul(size: int, dtype: torch.dtype, device: torch.device) -> _Work:
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    return _Work(lambda: a @ b, f"{size}x{size}x{size}", 2 * size**3)


def _conv2d(channels: int, side: int, dtype: torch.dtype, device: torch.device) -> _Work:
    x = torch.randn(1, channels, side, side)
    weight = torch.randn(channels, channels, 3, 3)
    x = x.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    weight = weight.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    flops = 2 * 9 * channels**2 * side**2
    return _Work(lambda: F.conv2d(x, weight, padding=1), f"1x{channels}x{side}x{side}", flops)
