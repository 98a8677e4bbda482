"""Sizes of one deformable convolution, and every error about them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ConvGeometry:
    """The integers that describe a deformable convolution; pairs are (y, x).

    Attributes:
        batch, in_channels, height, width: shape of the input.
        out_channels, kernel: from the weight.
        stride, padding, dilation: of the sampling grid, in input pixels.
        groups: channel groups of the contraction.
        offset_groups: groups of input channels that share offsets and mask.
        out_height, out_width: extent of the output.
    """

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    offset_groups: int
    out_height: int
    out_width: int

    @property
    def taps(self) -> int:
        """Number of kernel taps."""
        return self.kernel[0] * self.kernel[1]

    @property
    def positions(self) -> int:
        """Number of output positions of one image."""
        return self.out_height * self.out_width

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(B, O, Ho, Wo)."""
        return self.batch, self.out_channels, self.out_height, self.out_width

    @staticmethod
    def of(
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> ConvGeometry:
        """Derive the geometry from the tensors and check that they agree.

        Args:
            input: (B, C, H, W).
            offset: (B, 2*D*K, Ho, Wo) for D offset groups and K taps.
            weight: (O, C/groups, kh, kw).
            mask: (B, D*K, Ho, Wo) or None.
            stride, padding, dilation: (y, x).

        Raises:
            ValueError: names the argument, what was expected and what was found.
        """
        for name, tensor in (("input", input), ("offset", offset), ("weight", weight), ("mask", mask)):
            if tensor is not None and tensor.dim() != 4:
                raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(tensor.shape)}")
        for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
            check_least(name, pair, least)
        batch, in_channels, height, width = input.shape
        out_channels, group_channels, kernel_y, kernel_x = weight.shape
        (stride_y, stride_x), (padding_y, padding_x), (dilation_y, dilation_x) = stride, padding, dilation
        kernel, taps = (kernel_y, kernel_x), kernel_y * kernel_x
        if 0 in weight.shape:
            raise ValueError(f"weight must not be empty, got shape {tuple(weight.shape)}")
        if height < 1 or width < 1:
            raise ValueError(f"input has images of {height}x{width}, expected at least 1x1")
        if in_channels == 0 or in_channels % group_channels:
            raise ValueError(
                f"input has {in_channels} channels, expected a multiple of weight.shape[1] = {group_channels}"
            )
        groups = in_channels // group_channels
        if out_channels % groups:
            raise ValueError(
                f"weight has {out_channels} output channels, expected a multiple of the {groups} groups that follow "
                f"from {in_channels} input channels over weight.shape[1] = {group_channels}"
            )
        extent = [
            (size + 2 * p - (d * (k - 1) + 1)) // s + 1
            for size, k, s, p, d in zip((height, width), kernel, stride, padding, dilation, strict=True)
        ]
        if extent[0] <= 0 or extent[1] <= 0:  # not min(): it would tie a compiled program to H < W, or to H > W
            raise ValueError(
                f"input of {height}x{width} with kernel {kernel}, stride {tuple(stride)}, padding "
                f"{tuple(padding)}, dilation {tuple(dilation)} gives an output of {extent[0]}x{extent[1]}, "
                "expected at least 1x1"
            )
        offset_groups = offset.shape[1] // (2 * taps)
        if offset_groups == 0 or offset.shape[1] % (2 * taps) or in_channels % offset_groups:
            raise ValueError(
                f"offset has {offset.shape[1]} channels, expected 2 * {taps} taps * a number of offset groups that "
                f"divides the {in_channels} input channels"
            )
        for name, tensor, channels in (
            ("offset", offset, 2 * offset_groups * taps),
            ("mask", mask, offset_groups * taps),
        ):
            expected = (batch, channels, *extent)
            if tensor is not None and tuple(tensor.shape) != expected:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
        return ConvGeometry(
            batch, in_channels, height, width, out_channels, kernel, (stride_y, stride_x), (padding_y, padding_x),
            (dilation_y, dilation_x), groups, offset_groups, *extent,
        )  # fmt: skip


def check_least(name: str, pair: Sequence[int], least: int) -> None:
    """Raise ValueError, which names the argument, where one of a pair is below `least`."""
    if min(pair) < least:
        raise ValueError(f"{name} must be at least {least} in both directions, got {tuple(pair)}")


def spans(total: int, most: int) -> list[slice]:
    """Cut range(total) into even slices of at most `most`."""
    step = math.ceil(total / math.ceil(total / most)) if total else 1
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]
