"""Named shapes of deformable convolutions, and the tensors of one measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_dcn.geometry import ConvGeometry, conv_output_size


@dataclass(frozen=True)
class Case:
    """One layer.

    Attributes:
        name: what `--cases` and the CSV call it.
        batch, channels, out_channels, height, width: of the input (pixels) and the weight.
        kernel, stride, padding, dilation: (y, x).
        groups, offset_groups: of the contraction and of the offsets.
    """

    name: str
    batch: int
    channels: int
    out_channels: int
    height: int
    width: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        size = (self.height, self.width)
        return conv_output_size(size, self.kernel, self.stride, self.padding, self.dilation)

    @property
    def shape(self) -> str:
        """The sizes for the CSV: batch x channels x height x width, and what is not 3x3, stride 1, dilation 1."""
        text = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        for label, value, usual in (
            ("o", self.out_channels, self.channels), ("k", self.kernel, (3, 3)), ("s", self.stride, (1, 1)),
            ("d", self.dilation, (1, 1)), ("g", self.groups, 1), ("dg", self.offset_groups, 1),
        ):  # fmt: skip
            if value != usual:
                text += f" {label}" + ("x".join(map(str, value)) if isinstance(value, tuple) else str(value))
        return text

    def flops(self, mode: str) -> float:
        """Multiplications and additions of the contraction; the backward pass contracts twice."""
        out_height, out_width = self.out_size
        once = 2.0 * self.batch * out_height * out_width * self.out_channels * self.channels // self.groups
        return once * self.kernel[0] * self.kernel[1] * {"fwd": 1, "bwd": 2, "both": 3}[mode]

    def traffic(self, mode: str, itemsize: int) -> float:
        """Bytes that must move if each tensor is read or written once."""
        taps = self.kernel[0] * self.kernel[1]
        positions = self.batch * self.out_size[0] * self.out_size[1]
        x = self.batch * self.channels * self.height * self.width
        weight = self.out_channels * self.channels // self.groups * taps
        sampling = 3 * taps * self.offset_groups * positions
        y = self.out_channels * positions
        inputs = x + weight + sampling
        return itemsize * {"fwd": inputs + y, "bwd": 2 * inputs + y, "both": 3 * inputs + 2 * y}[mode]


def _cases() -> dict[str, list[Case]]:
    r50 = [
        Case("r50-c3", 2, 128, 128, 100, 168),
        Case("r50-c4", 2, 256, 256, 50, 84),
        Case("r50-c5", 2, 512, 512, 25, 42),
    ]
    return {
        "r50": r50,  # stages of ResNet-50 at 800 x 1333
        "r50-down": [
            replace(case, name=f"{case.name}-down", height=2 * case.height, width=2 * case.width, stride=(2, 2))
            for case in r50
        ],
        "small": [  # stages of ResNet-18 at 256 x 256
            Case("small-c3", 8, 128, 128, 32, 32),
            Case("small-c4", 8, 256, 256, 16, 16),
            Case("small-c5", 8, 512, 512, 8, 8),
        ],
        "micro": [Case("micro-64", 2, 64, 64, 64, 64), Case("micro-32", 8, 32, 32, 64, 64)],
        "dry": [Case("dry", 1, 16, 16, 6, 8)],  # for the interpreter
        "odd": [
            Case("odd-channels", 2, 80, 48, 33, 57),
            Case("odd-kernel", 1, 64, 64, 40, 60, (5, 3), (2, 1), (4, 1), (2, 1)),
            Case("odd-groups", 2, 64, 64, 40, 60, groups=4, offset_groups=2),
            Case("odd-pointwise", 2, 64, 128, 40, 60, (1, 1), padding=(0, 0)),
        ],
    }


CASES = _cases()


def select(names: list[str], batch: int | None = None, offset_groups: int | None = None) -> list[Case]:
    """Return the cases of the sets or single names given; "all" is everything.

    Args:
        names: names of sets or cases.
        batch: replaces that of each case.
        offset_groups: replaces that of each case.

    Raises:
        ValueError: no such name.
    """
    single = {case.name: [case] for cases in CASES.values() for case in cases}
    known = {**single, **CASES, "all": [case for cases in CASES.values() for case in cases]}
    chosen: dict[str, Case] = {}
    for name in names:
        if name not in known:
            raise ValueError(f"unknown case {name!r}, expected one of {', '.join(known)}")
        chosen.update({case.name: case for case in known[name]})
    changes = {"batch": batch, "offset_groups": offset_groups}
    changes = {key: value for key, value in changes.items() if value is not None}
    return [replace(case, **changes) for case in chosen.values()]


@dataclass(frozen=True)
class Inputs:
    """Leaf tensors of one call, all but `grad` requiring gradients.

    Attributes:
        input, offset, mask, weight, grad: in the layout and dtype of the measurement.
    """

    case: Case
    input: Tensor
    offset: Tensor
    mask: Tensor
    weight: Tensor
    grad: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return self.input, self.offset, self.mask, self.weight

    @property
    def geometry(self) -> ConvGeometry:
        """The sizes as the operator sees them."""
        case = self.case
        return ConvGeometry.of(
            self.input, self.offset, self.weight, self.mask, case.stride, case.padding, case.dilation
        )  # fmt: skip


COARSE = 8
"""Positions from one independent value of a smooth field of offsets to the next."""


def _draw_offsets(shape: tuple[int, ...], magnitude: float, smooth: bool, draw: torch.Generator) -> Tensor:
    """Return normal offsets (B, 2*D*K, Ho, Wo) with `magnitude` pixels as standard deviation."""
    if not smooth:
        return torch.randn(shape, generator=draw) * magnitude
    coarse = torch.randn(*shape[:2], *(math.ceil(size / COARSE) + 1 for size in shape[2:]), generator=draw)
    field = F.interpolate(coarse, shape[2:], mode="bilinear", align_corners=True)
    return field * (magnitude / field.std())


def make_inputs(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    magnitude: float,
    channels_last: bool = False,
    smooth: bool = False,
    seed: int = 0,
) -> Inputs:
    """Draw tensors; offsets are normal with `magnitude` pixels as standard deviation, 0.1 away from whole pixels.

    Args:
        case: the layer.
        dtype, device: of every tensor.
        magnitude: pixels; 0 gives offsets of exactly 0.
        channels_last: memory format of input, weight and grad.
        smooth: whether neighbors have similar offsets, as trained layers predict them, or independent ones.
        seed: of the drawing.
    """
    draw = torch.Generator().manual_seed(seed)
    taps, extent = case.kernel[0] * case.kernel[1], case.out_size
    offset = torch.zeros(case.batch, 2 * case.offset_groups * taps, *extent)
    if magnitude:
        drawn = _draw_offsets(offset.shape, magnitude, smooth, draw)
        offset = drawn.floor() + 0.1 + 0.8 * (drawn - drawn.floor())
    fan_in = case.channels // case.groups * taps
    plain = {
        "input": torch.randn(case.batch, case.channels, case.height, case.width, generator=draw),
        "offset": offset,
        "mask": torch.rand(case.batch, case.offset_groups * taps, *extent, generator=draw),
        "weight": torch.randn(case.out_channels, case.channels // case.groups, *case.kernel, generator=draw)
        / fan_in**0.5,
        "grad": torch.randn(case.batch, case.out_channels, *extent, generator=draw),
    }
    tensors = {}
    for name, tensor in plain.items():
        last = channels_last and name in ("input", "weight", "grad")
        layout = torch.channels_last if last else torch.contiguous_format
        tensor = tensor.to(device, dtype).contiguous(memory_format=layout)
        tensors[name] = tensor.requires_grad_(name != "grad")
    return Inputs(case, **tensors)
