"""Narrow slices for backend "torch": samples of single channels. Entry points: `suits`, `forward` and `backward`.

Receives from `torch_backend` the tensors of a call whose offset groups have few channels each. Fills the output or the
gradients.

Where a sample reads only a few channels, finding its rows costs more than reading them. So the samples keep the order
of the offsets, the input lies in memory as planes of one channel each, and every corner of one channel is read by one
`index_select`. The columns are those of an image-to-columns convolution: products need no other order, either.

Letters: see `torch_samples`. U units, u of them: the channels divide into gcd(G, D) units, each of whole groups and
whole offset groups. w = C / D channels of an offset group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from triton_dcn.geometry import ConvGeometry, even_slices
from triton_dcn.offset_mask import OffsetMaskGrad
from triton_dcn.torch_samples import (
    Samples,
    TapGrid,
    corner_distances,
    find_samples,
    image_pixels,
    make_table,
    view_pixels,
    view_samples,
)

WIDEST = 4
"""Channels of an offset group up to which this is faster than reading them at once, on a CPU."""

CHUNK_SAMPLES = 1 << 16
"""Samples computed at once: their arrays stay in the cache."""


class _Part(NamedTuple):
    """What is computed at once, of one image.

    Attributes:
        groups: within range(G).
        offset_groups: within range(D).
        channels: within range(C).
        positions: within range(P).
    """

    groups: slice
    offset_groups: slice
    channels: slice
    positions: slice


def suits(geom: ConvGeometry, input: Tensor) -> bool:
    """Tell whether to compute the convolution here."""
    return input.is_cpu and geom.in_channels // geom.offset_groups <= WIDEST


def forward(
    geom: ConvGeometry,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    grid: TapGrid,
    output: Tensor,
    *,
    relu: bool,
) -> None:
    """Fill the output (B, O, Ho, Wo); the weight has the dtype of the computation, for the rest see `torch_backend`."""
    weight_matrix = _weight_matrix(geom, weight)
    output_by_group = _view_groups(geom, output)
    for image in range(geom.batch):
        planes = _make_planes(geom, input[image], weight.dtype)
        for part in _divide(geom):
            samples = _sample(geom, offset, mask, image, part, grid)
            columns = planes.new_empty(_column_shape(geom, samples))
            for channel, channel_columns in enumerate(columns.unbind(1)):
                top, bottom = _blend_in_rows(_read_corners(geom, planes, samples, channel), samples)
                _modulate(top.lerp_(bottom, samples.fractions[0]), samples, channel_columns)
            product = torch.bmm(weight_matrix[part.groups], _by_group(columns, part))
            if bias is not None:
                product.add_(bias.view(geom.groups, -1, 1)[part.groups])
            if relu:
                product.relu_()
            output_by_group[image, part.groups, :, part.positions] = product


def backward(
    geom: ConvGeometry,
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    grid: TapGrid,
    grad_input: Tensor | None,
    grad_offset_mask: OffsetMaskGrad,
    *,
    needs_weight: bool,
) -> Tensor | None:
    """Fill the gradients that are not None, and return that of the weight (O, C/G, kh, kw), if needed."""
    weight_matrix = _weight_matrix(geom, weight)
    grad_by_group = _view_groups(geom, grad_output)
    grad_matrix = torch.zeros_like(weight_matrix) if needs_weight else None

    for image in range(geom.batch):
        planes = _make_planes(geom, input[image], weight.dtype)
        grad_planes = None if grad_input is None else torch.zeros_like(planes)
        for part in _divide(geom):
            samples = _sample(geom, offset, mask, image, part, grid)
            grad = grad_by_group[image, part.groups, :, part.positions].to(weight.dtype)
            grad_columns = None
            if grad_planes is not None or grad_offset_mask.needed:
                grad_columns = torch.bmm(weight_matrix[part.groups].mT, grad).view(_column_shape(geom, samples))
            if grad_matrix is not None or grad_offset_mask.needed:
                sums = _SampleSums(geom, planes, samples, grad_columns)
                if grad_matrix is not None:
                    grad_matrix[part.groups].baddbmm_(grad, _by_group(sums.columns, part).mT)
                sums.write(geom, samples, grad_offset_mask, image, part)
            if grad_planes is not None and grad_columns is not None:
                _scatter_add(geom, grad_columns, samples, grad_planes)
        if grad_input is not None and grad_planes is not None:
            grad_input[image] = view_pixels(geom, grad_planes[:, None])[..., 0]
    return None if grad_matrix is None else grad_matrix.view(weight.shape)


def _weight_matrix(geom: ConvGeometry, weight: Tensor) -> Tensor:
    """View the weight (O, C/G, kh, kw) as the matrix that multiplies columns: (G, O/G, C/G*K)."""
    return weight.reshape(geom.groups, geom.out_channels // geom.groups, -1)


def _view_groups(geom: ConvGeometry, tensor: Tensor) -> Tensor:
    """View output or grad_output, (B, O, Ho, Wo), as (B, G, O/G, P)."""
    by_group: Tensor = tensor.flatten(2).unflatten(1, (geom.groups, -1))
    return by_group


def _divide(geom: ConvGeometry) -> Iterator[_Part]:
    """Divide the channels and positions of an image: some units at all positions, or one unit at some of them."""
    units = math.gcd(geom.groups, geom.offset_groups)
    samples_per_position = geom.offset_groups // units * geom.taps
    longest = max(1, CHUNK_SAMPLES // samples_per_position)

    def members(part: slice, total: int) -> slice:
        return slice(part.start * total // units, part.stop * total // units)

    for part in even_slices(units, max(1, longest // max(1, geom.positions))):
        for positions in even_slices(geom.positions, longest):
            groups = members(part, geom.groups)
            yield _Part(groups, members(part, geom.offset_groups), members(part, geom.in_channels), positions)


def _make_planes(geom: ConvGeometry, image: Tensor, dtype: torch.dtype) -> Tensor:
    """Lay out an image (C, H, W) as C planes with zeros around them, each as an image of `make_table`, flat."""
    return make_table(geom, image[:, None], dtype).flatten()


def _sample(geom: ConvGeometry, offset: Tensor, mask: Tensor | None, image: int, part: _Part, grid: TapGrid) -> Samples:
    """Return the samples of a part, without the dimension of the images: (d, K, p).

    Their pixels are numbered within the planes of the whole image, for the first channel of each offset group.
    """
    images = slice(image, image + 1)
    offset = view_samples(geom, offset, images)[:, :, part.offset_groups, :, part.positions]
    if mask is not None:
        mask = view_samples(geom, mask, images)[0, :, part.offset_groups, :, part.positions]
    samples = find_samples(offset, mask, grid.at(part.positions), geom.width + 2)

    pixels = samples.pixels[0]
    step = geom.in_channels // geom.offset_groups * image_pixels(geom)
    offset_groups = torch.arange(part.offset_groups.start, part.offset_groups.stop, dtype=pixels.dtype)
    pixels.add_((offset_groups * step).view(-1, 1, 1))
    return Samples(pixels, samples.fractions[:, 0], None if samples.mask is None else samples.mask[0])


def _column_shape(geom: ConvGeometry, samples: Samples) -> tuple[int, ...]:
    """Return the shape of the columns of these samples: (d, w, K, p)."""
    offset_groups, taps, positions = samples.pixels.shape
    return offset_groups, geom.in_channels // geom.offset_groups, taps, positions


def _by_group(columns: Tensor, part: _Part) -> Tensor:
    """View the columns of a part, (d, w, K, p), as (groups, C/G*K, p)."""
    return columns.view(part.groups.stop - part.groups.start, -1, columns.shape[-1])


def _read_corners(geom: ConvGeometry, planes: Tensor, samples: Samples, channel: int) -> list[Tensor]:
    """Read the four corners of each sample, (d, K, p) each, in one channel of its offset group."""
    pixels = samples.pixels.flatten()
    first = channel * image_pixels(geom)
    corners = (planes[first + distance :].index_select(0, pixels) for distance in corner_distances(geom))
    return [corner.view(samples.pixels.shape) for corner in corners]


def _blend_in_rows(corners: list[Tensor], samples: Samples) -> tuple[Tensor, Tensor]:
    """Interpolate between left and right, above and below the sample, in the memory of the left corners."""
    top_left, top_right, bottom_left, bottom_right = corners
    fraction_x = samples.fractions[1]
    return top_left.lerp_(top_right, fraction_x), bottom_left.lerp_(bottom_right, fraction_x)


def _modulate(values: Tensor, samples: Samples, out: Tensor) -> None:
    """Write the values times the mask to `out`."""
    if samples.mask is None:
        out.copy_(values)
    else:
        torch.mul(values, samples.mask, out=out)


class _SampleSums:
    """What the backward pass needs of the samples, which are read again.

    Attributes:
        columns: (d, w, K, p).
        mask, y, x: (d, K, p) each, the derivatives with respect to mask and position times the gradient of the
            columns, summed over the channels; the last two before the factor of the mask. Zeros without a gradient.
    """

    def __init__(self, geom: ConvGeometry, planes: Tensor, samples: Samples, grad_columns: Tensor | None) -> None:
        """Read the samples."""
        self.columns = planes.new_empty(_column_shape(geom, samples))
        self.mask, self.y, self.x = planes.new_zeros(3, *samples.pixels.shape)
        fraction_y, _ = samples.fractions
        for channel, channel_columns in enumerate(self.columns.unbind(1)):
            corners = _read_corners(geom, planes, samples, channel)
            top_left, top_right, bottom_left, bottom_right = corners
            if grad_columns is not None:
                grad = grad_columns[:, channel]
                slope_x = torch.lerp(top_right - top_left, bottom_right - bottom_left, fraction_y)
                self.x.addcmul_(grad, slope_x)
            top, bottom = _blend_in_rows(corners, samples)
            values = torch.lerp(top, bottom, fraction_y)
            if grad_columns is not None:
                self.mask.addcmul_(grad, values)
                self.y.addcmul_(grad, bottom.sub_(top))
            _modulate(values, samples, channel_columns)

    def write(
        self, geom: ConvGeometry, samples: Samples, grad_offset_mask: OffsetMaskGrad, image: int, part: _Part
    ) -> None:
        """Write the gradients of offset and mask that are needed."""
        images = slice(image, image + 1)
        if grad_offset_mask.mask is not None:
            grad_mask = view_samples(geom, grad_offset_mask.mask, images)
            grad_mask[0, 0, part.offset_groups, :, part.positions] = self.mask
        if grad_offset_mask.offset is not None:
            if samples.mask is not None:
                self.y.mul_(samples.mask)
                self.x.mul_(samples.mask)
            grad_offset = view_samples(geom, grad_offset_mask.offset, images)
            grad_offset[0, 0, part.offset_groups, :, part.positions] = self.y
            grad_offset[1, 0, part.offset_groups, :, part.positions] = self.x


def _scatter_add(geom: ConvGeometry, grad_columns: Tensor, samples: Samples, grad_planes: Tensor) -> None:
    """Add to each pixel the weighted gradients of the samples that read it, in the order of the samples."""
    pixels = samples.pixels.flatten()
    fraction_y, fraction_x = samples.fractions
    for channel, grad in enumerate(grad_columns.unbind(1)):
        upper = grad if samples.mask is None else grad * samples.mask
        lower = upper * fraction_y
        upper = upper - lower
        upper_right = upper * fraction_x
        lower_right = lower * fraction_x
        corners = (upper.sub_(upper_right), upper_right, lower.sub_(lower_right), lower_right)
        first = channel * image_pixels(geom)
        for corner, distance in zip(corners, corner_distances(geom), strict=True):
            grad_planes[first + distance :].index_add_(0, pixels, corner.flatten())
