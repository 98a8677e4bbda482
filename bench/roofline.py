"""What this machine can do: copy bandwidth and matrix rate, and the time that a case needs at least by them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench.cases import Case
from bench.measure import Timing, interleave


@dataclass(frozen=True)
class Machine:
    """Measured limits, per millisecond, and how they were measured.

    Attributes:
        bandwidth: bytes read and written by a large copy.
        rate: floating-point operations of the fastest large product.
        rows: (name, shape, timing) of each measurement.
    """

    bandwidth: float
    rate: float
    rows: tuple[tuple[str, str, Timing], ...]

    def least_ms(self, case: Case, mode: str, itemsize: int) -> float:
        """The roofline of a case: the larger of the times for its traffic and for its products."""
        return max(case.traffic(mode, itemsize) / self.bandwidth, case.flops(mode) / self.rate)


def measure_machine(dtype: torch.dtype, device: torch.device, seconds: float = 3.0) -> Machine:
    """Time a large copy, and a large matrix product and 3x3 convolution in `dtype`."""
    cuda = device.type == "cuda"
    count, size, channels, edge = (1 << 30, 8192, 512, 128) if cuda else (1 << 26, 2048, 256, 64)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    last = {"device": device, "memory_format": torch.channels_last}
    x = torch.randn(1, channels, edge, edge).to(dtype=dtype, **last)
    weight = torch.randn(channels, channels, 3, 3).to(dtype=dtype, **last)
    work = {
        "copy": (lambda: target.copy_(source), f"{count} bytes", 2 * count),
        "matmul": (lambda: a @ b, f"{size}x{size}x{size}", 2 * size**3),
        "conv2d": (
            lambda: F.conv2d(x, weight, padding=1),
            f"1x{channels}x{edge}x{edge}",
            2 * 9 * channels**2 * edge**2,
        ),
    }
    with torch.no_grad():
        functions = {name: call for name, (call, _, _) in work.items()}
        timings = interleave(functions, device, seconds, "machine", [])  # one that fails is missed in the next line
    speed = {name: amount / timings[name].p20 for name, (_, _, amount) in work.items()}
    rows = tuple((name, shape, timings[name]) for name, (_, shape, _) in work.items())
    return Machine(speed["copy"], max(speed["matmul"], speed["conv2d"]), rows)
