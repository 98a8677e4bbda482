"""`ConvGeometry`: the sizes of one call, derived from the shapes of its tensors, with the checks that these agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from torch import Tensor


@dataclass(frozen=True)
class ConvGeometry:
    """The integers that describe a deformable convolution; pairs are (y, x).

    Attributes:
        batch: images, B.
        in_channels: channels of the input, C.
        height: of the input, H.
        width: of the input, W.
        out_channels: channels of the output, O.
        kernel: size of the kernel (kh, kw).
        stride: input pixels from one output position to the next.
        padding: input pixels that the first output position lies outside the image.
        dilation: input pixels from one tap to the next.
        groups: channel groups of the convolution, G.
        offset_groups: groups of input channels that share offsets and mask, D.
        out_height: of the output, Ho.
        out_width: of the output, Wo.
        taps: kernel taps, K; follows from `kernel`.
        positions: output positions of one image, Ho * Wo; follows from the sizes of the output.
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
    taps: int = field(init=False)
    positions: int = field(init=False)

    def __post_init__(self) -> None:
        """Derive what is asked for at every step."""
        object.__setattr__(self, "taps", self.kernel[0] * self.kernel[1])
        object.__setattr__(self, "positions", self.out_height * self.out_width)

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
            weight: (O, C/G, kh, kw).
            mask: (B, D*K, Ho, Wo) or None.
            stride: (y, x).
            padding: (y, x).
            dilation: (y, x).

        Raises:
            ValueError: names the argument, what was expected and what was given.
        """
        mask_shape = None if mask is None else mask.shape
        return _derive(input.shape, offset.shape, weight.shape, mask_shape, stride, padding, dilation)

    @staticmethod
    def remembered(
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> ConvGeometry:
        """Do as `of`, where torch.compile does not trace; the same sizes give the same object."""
        mask_shape = None if mask is None else mask.shape
        shapes = (input.shape, offset.shape, weight.shape, mask_shape)
        pairs = (tuple(stride), tuple(padding), tuple(dilation))
        try:
            return _derive_once(*shapes, *pairs)
        except TypeError:  # symbolic sizes have no hash
            return _derive(*shapes, *pairs)


def _derive(
    input: Sequence[int],
    offset: Sequence[int],
    weight: Sequence[int],
    mask: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> ConvGeometry:
    """Return the geometry of tensors of these shapes, after the checks; see `ConvGeometry.of`."""
    _check_dimensions(input=input, offset=offset, weight=weight, mask=mask)
    check_minimum("stride", stride, 1)
    check_minimum("padding", padding, 0)
    check_minimum("dilation", dilation, 1)

    batch, in_channels, height, width = input
    out_channels, channels_per_group, kernel_height, kernel_width = weight
    if 0 in weight:
        raise ValueError(f"weight: expected no dimension of size 0, got shape {tuple(weight)}")
    if height < 1 or width < 1:
        raise ValueError(f"input: expected images of at least 1x1, got {height}x{width}")
    groups = _count_groups(in_channels, out_channels, channels_per_group)

    kernel = (kernel_height, kernel_width)
    out_height, out_width = conv_output_size((height, width), kernel, stride, padding, dilation)
    if out_height <= 0 or out_width <= 0:  # min() would make torch.compile guard on H < W
        raise ValueError(
            f"output: expected at least 1x1, got {out_height}x{out_width} from an input of {height}x{width} with "
            f"kernel {kernel}, stride {tuple(stride)}, padding {tuple(padding)}, dilation {tuple(dilation)}"
        )

    taps = kernel_height * kernel_width
    offset_groups = _count_offset_groups(in_channels, taps, offset[1])
    _check_shape("offset", offset, (batch, 2 * offset_groups * taps, out_height, out_width))
    if mask is not None:
        _check_shape("mask", mask, (batch, offset_groups * taps, out_height, out_width))

    stride_y, stride_x = stride
    padding_y, padding_x = padding
    dilation_y, dilation_x = dilation
    return ConvGeometry(
        batch=batch,
        in_channels=in_channels,
        height=height,
        width=width,
        out_channels=out_channels,
        kernel=kernel,
        stride=(stride_y, stride_x),
        padding=(padding_y, padding_x),
        dilation=(dilation_y, dilation_x),
        groups=groups,
        offset_groups=offset_groups,
        out_height=out_height,
        out_width=out_width,
    )


_derive_once = lru_cache(maxsize=1024)(_derive)


def conv_output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Return height and width of the output of a convolution; every argument is (y, x)."""
    height, width = [
        (size[axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    ]
    return height, width


def check_minimum(name: str, pair: Sequence[int], minimum: int) -> None:
    """Raise ValueError, which names the argument, if one value of a pair is below `minimum`."""
    y, x = pair
    if y < minimum or x < minimum:
        raise ValueError(f"{name}: expected at least {minimum} in both directions, got {tuple(pair)}")


def even_slices(total: int, longest: int) -> list[slice]:
    """Divide range(total) into slices of nearly the same length, which is at most `longest`."""
    if total == 0:
        return []
    if total <= longest:
        return [slice(0, total)]
    count = math.ceil(total / longest)
    length = math.ceil(total / count)
    return [slice(start, min(start + length, total)) for start in range(0, total, length)]


def _check_dimensions(**shapes: Sequence[int] | None) -> None:
    for name, shape in shapes.items():
        if shape is not None and len(shape) != 4:
            raise ValueError(f"{name}: expected 4 dimensions, got shape {tuple(shape)}")


def _check_shape(name: str, shape: Sequence[int], expected: tuple[int, ...]) -> None:
    if tuple(shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(shape)}")


def _count_groups(in_channels: int, out_channels: int, channels_per_group: int) -> int:
    """Return G, which follows from the input's channels and those of the weight's second dimension."""
    if in_channels == 0 or in_channels % channels_per_group:
        raise ValueError(
            f"input: expected a multiple of weight.shape[1] = {channels_per_group} channels, got {in_channels} channels"
        )

    groups = in_channels // channels_per_group
    if out_channels % groups:
        raise ValueError(
            f"weight: expected a multiple of {groups} output channels for the {groups} groups that follow from "
            f"{in_channels} input channels over weight.shape[1] = {channels_per_group}, got {out_channels} output "
            "channels"
        )
    return groups


def _count_offset_groups(in_channels: int, taps: int, channels: int) -> int:
    """Return D, which follows from the offset's channels."""
    offset_groups = channels // (2 * taps)
    if offset_groups == 0 or channels % (2 * taps) or in_channels % offset_groups:
        raise ValueError(
            f"offset: expected 2 * {taps} taps * D channels, where the number of offset groups D divides the "
            f"{in_channels} input channels, got {channels} channels"
        )
    return offset_groups
