"""Named sizes of deformable convolutions, and the tensors of one measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_dcn.geometry import ConvGeometry, conv_output_size


@dataclass(frozen=True)
class Case:
    """The sizes of one layer and of its input.

    Attributes:
        name: what `--cases` and the CSV call it.
        batch: images.
        channels: of the input.
        out_channels: of the output.
        height: of the input, pixels.
        width: of the input, pixels.
        kernel: (y, x).
        stride: (y, x).
        padding: (y, x).
        dilation: (y, x).
        groups: of the contraction.
        offset_groups: of the offsets.
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
    def taps(self) -> int:
        """Taps of the kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        size = (self.height, self.width)
        return conv_output_size(size, self.kernel, self.stride, self.padding, self.dilation)

    @property
    def shape(self) -> str:
        """The sizes for the CSV: batch x channels x height x width, and what is not 3x3, stride 1, dilation 1."""
        text = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        labeled_values = (
            ("o", self.out_channels, self.channels),
            ("k", self.kernel, (3, 3)),
            ("s", self.stride, (1, 1)),
            ("d", self.dilation, (1, 1)),
            ("g", self.groups, 1),
            ("dg", self.offset_groups, 1),
        )
        for label, value, default in labeled_values:
            if value == default:
                continue
            numbers = value if isinstance(value, tuple) else (value,)
            text += f" {label}" + "x".join(str(number) for number in numbers)
        return text

    def flops(self, mode: str) -> float:
        """Return the multiplications and additions of the contraction; the backward pass contracts twice."""
        out_height, out_width = self.out_size
        positions = self.batch * out_height * out_width
        contraction = 2.0 * positions * self.out_channels * self.channels // self.groups * self.taps
        contractions = {"fwd": 1, "bwd": 2, "both": 3}
        return contraction * contractions[mode]

    def traffic(self, mode: str, itemsize: int) -> float:
        """Return the bytes that must move if each tensor is read or written once."""
        out_height, out_width = self.out_size
        positions = self.batch * out_height * out_width
        input = self.batch * self.channels * self.height * self.width
        weight = self.out_channels * self.channels // self.groups * self.taps
        offset_and_mask = 3 * self.taps * self.offset_groups * positions
        output = self.out_channels * positions

        inputs = input + weight + offset_and_mask
        forward = inputs + output
        backward = 2 * inputs + output
        elements = {"fwd": forward, "bwd": backward, "both": forward + backward}
        return itemsize * elements[mode]


def _cases() -> dict[str, list[Case]]:
    r50 = [
        Case("r50-c3", 2, 128, 128, 100, 168),
        Case("r50-c4", 2, 256, 256, 50, 84),
        Case("r50-c5", 2, 512, 512, 25, 42),
    ]
    r50_down = [
        replace(case, name=f"{case.name}-down", height=2 * case.height, width=2 * case.width, stride=(2, 2))
        for case in r50
    ]
    return {
        "r50": r50,  # stages of ResNet-50 at 800 x 1333
        "r50-down": r50_down,
        "small": [  # stages of ResNet-18 at 256 x 256
            Case("small-c3", 8, 128, 128, 32, 32),
            Case("small-c4", 8, 256, 256, 16, 16),
            Case("small-c5", 8, 512, 512, 8, 8),
        ],
        "micro": [
            Case("micro-64", 2, 64, 64, 64, 64),
            Case("micro-32", 8, 32, 32, 64, 64),
        ],
        "video": [  # alignment of frames: many offset groups
            Case("video-64-d8", 1, 64, 64, 180, 320, offset_groups=8),  # EDVR
            Case("video-128-64-d16", 1, 128, 64, 180, 320, offset_groups=16),  # BasicVSR++
            Case("video-128-d8", 1, 128, 128, 180, 320, offset_groups=8),  # EDVR, large
            Case("video-120-d12", 1, 120, 120, 64, 64, offset_groups=12),  # VRT
            Case("video-256-128-d16", 1, 256, 128, 60, 108, offset_groups=16),  # ProPainter
            Case("video-360-g3-d24", 1, 360, 360, 64, 64, groups=3, offset_groups=24),
        ],
        "dla": [  # up-sampling nodes of DLA-34 at 512 x 512
            Case("dla-64", 8, 64, 64, 128, 128),
            Case("dla-128-64", 8, 128, 64, 64, 64),
        ],
        "wide": [  # far more output than input channels: the large kernel of BiRefNet
            Case("wide-64-256-7x7", 1, 64, 256, 256, 256, (7, 7), padding=(3, 3)),
        ],
        "resnext": [  # stages of ResNeXt-101 32x4d at 800 x 1333
            Case("resnext-c3", 2, 256, 256, 100, 168, groups=32),
            Case("resnext-c4", 2, 512, 512, 50, 84, groups=32),
            Case("resnext-c5", 2, 1024, 1024, 25, 42, groups=32),
        ],
        "depthwise": [
            Case("dlka-5x5", 4, 96, 96, 56, 56, (5, 5), padding=(2, 2), groups=96),  # D-LKA Net
            Case("dlka-7x7", 4, 96, 96, 56, 56, (7, 7), padding=(9, 9), dilation=(3, 3), groups=96),
            Case("depthwise-96-d96", 4, 96, 96, 56, 56, groups=96, offset_groups=96),
        ],
        "dry": [  # for the interpreter, whose time grows with the taps
            Case("dry", 1, 16, 16, 6, 8, (1, 2), padding=(0, 1)),
        ],
        "odd": [
            Case("odd-channels", 2, 80, 48, 33, 57),
            Case("odd-kernel", 1, 64, 64, 40, 60, (5, 3), (2, 1), (4, 1), (2, 1)),
            Case("odd-groups", 2, 64, 64, 40, 60, groups=4, offset_groups=2),
            Case("odd-pointwise", 2, 64, 128, 40, 60, (1, 1), padding=(0, 0)),
        ],
    }


CASES = _cases()


def all_cases() -> list[Case]:
    """Return the cases of all sets."""
    return [case for cases in CASES.values() for case in cases]


def select_cases(names: list[str], batch_size: int | None = None, offset_groups: int | None = None) -> list[Case]:
    """Return the cases of the sets or single names given; "all" is everything.

    Args:
        names: names of sets or cases.
        batch_size: replaces that of each case.
        offset_groups: replaces that of each case.

    Raises:
        ValueError: no such name.
    """
    known = {case.name: [case] for case in all_cases()} | CASES | {"all": all_cases()}
    chosen: dict[str, Case] = {}
    for name in names:
        if name not in known:
            raise ValueError(f"--cases: expected one of {', '.join(known)}, got {name!r}")
        chosen.update({case.name: case for case in known[name]})

    changes: dict[str, int] = {}
    if batch_size is not None:
        changes["batch"] = batch_size
    if offset_groups is not None:
        changes["offset_groups"] = offset_groups
    return [replace(case, **changes) for case in chosen.values()]


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call in the layout and dtype of the measurement; all but `grad_output` require gradients."""

    case: Case
    input: Tensor
    offset: Tensor
    mask: Tensor
    weight: Tensor
    grad_output: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return self.input, self.offset, self.mask, self.weight

    @property
    def geometry(self) -> ConvGeometry:
        """The sizes as the operator sees them."""
        case = self.case
        tensors = (self.input, self.offset, self.weight, self.mask)
        return ConvGeometry.of(*tensors, case.stride, case.padding, case.dilation)


COARSE_SPACING = 8
"""Positions from one independent value of a smooth field of offsets to the next."""


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
        dtype: of every tensor.
        device: of every tensor.
        magnitude: pixels; 0 gives offsets of exactly 0.
        channels_last: memory format of input, weight and grad_output.
        smooth: whether neighbors have similar offsets, as trained layers predict them, or independent ones.
        seed: of the random numbers.
    """
    # drawn where they are used: on a CPU, those of a large batch take seconds
    drawn_on = device if device.type == "cuda" else torch.device("cpu")
    generator = torch.Generator(drawn_on).manual_seed(seed)
    in_per_group = case.channels // case.groups
    offset = torch.zeros(case.batch, 2 * case.offset_groups * case.taps, *case.out_size, device=drawn_on)
    if magnitude:
        normal = _draw_offsets(offset.shape, magnitude, smooth, generator)
        offset = normal.floor() + 0.1 + 0.8 * (normal - normal.floor())

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=drawn_on)

    input = randn(case.batch, case.channels, case.height, case.width)
    mask_shape = (case.batch, case.offset_groups * case.taps, *case.out_size)
    mask = torch.rand(mask_shape, generator=generator, device=drawn_on)
    weight = randn(case.out_channels, in_per_group, *case.kernel) / (in_per_group * case.taps) ** 0.5
    grad_output = randn(case.batch, case.out_channels, *case.out_size)

    def convert(tensor: Tensor, channels_last: bool = False) -> Tensor:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return tensor.to(device, dtype).contiguous(memory_format=layout)

    return Inputs(
        case,
        input=convert(input, channels_last).requires_grad_(),
        offset=convert(offset).requires_grad_(),
        mask=convert(mask).requires_grad_(),
        weight=convert(weight, channels_last).requires_grad_(),
        grad_output=convert(grad_output, channels_last),
    )


def _draw_offsets(shape: tuple[int, ...], magnitude: float, smooth: bool, generator: torch.Generator) -> Tensor:
    """Return normal offsets (B, 2*D*K, Ho, Wo) with `magnitude` pixels as standard deviation."""
    if not smooth:
        return torch.randn(shape, generator=generator, device=generator.device) * magnitude
    coarse_size = [math.ceil(size / COARSE_SPACING) + 1 for size in shape[2:]]
    coarse = torch.randn(*shape[:2], *coarse_size, generator=generator, device=generator.device)
    field = F.interpolate(coarse, shape[2:], mode="bilinear", align_corners=True)
    return field * (magnitude / field.std())
