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

CHUNK_SAMPLES = 1 << 17
"""Samples computed at once: their arrays stay in the cache."""


class _Part(NamedTuple):
    """What is computed at once, of one image.

    Attributes:
        groups: within range(G).
        offset_groups: within range(D).
        positions: within range(P).
    """

    groups: slice
    offset_groups: slice
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
        corner_planes = _shift_planes(geom, planes)
        image_offset, image_mask = _view_image(geom, offset, mask, image)
        for part in _divide(geom):
            samples = _sample(geom, image_offset, image_mask, part, grid)
            columns = planes.new_empty(_column_shape(geom, part))
            for channel, channel_columns in enumerate(columns.unbind(1)):
                top, bottom = _blend_in_rows(_read_corners(corner_planes[channel], samples), samples)
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
        corner_planes = _shift_planes(geom, planes)
        grad_planes = None if grad_input is None else torch.zeros_like(planes)
        grad_corner_planes = None if grad_planes is None else _shift_planes(geom, grad_planes)
        image_offset, image_mask = _view_image(geom, offset, mask, image)
        for part in _divide(geom):
            samples = _sample(geom, image_offset, image_mask, part, grid)
            grad = grad_by_group[image, part.groups, :, part.positions].to(weight.dtype)
            grad_columns = None
            if grad_planes is not None or grad_offset_mask.needed:
                grad_columns = torch.bmm(weight_matrix[part.groups].mT, grad).view(_column_shape(geom, part))
            if grad_matrix is not None or grad_offset_mask.needed:
                columns = planes.new_empty(_column_shape(geom, part))
                sums = _SampleSums(corner_planes, samples, grad_columns, columns)
                if grad_matrix is not None:
                    grad_matrix[part.groups].baddbmm_(grad, _by_group(columns, part).mT)
                sums.write(geom, samples, grad_offset_mask, image, part)
            if grad_corner_planes is not None and grad_columns is not None:
                _scatter_add(grad_columns, samples, grad_corner_planes)
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

    for positions in even_slices(geom.positions, longest):
        for part in even_slices(units, max(1, longest // geom.positions)):
            groups = members(part, geom.groups)
            yield _Part(groups, members(part, geom.offset_groups), positions)


def _make_planes(geom: ConvGeometry, image: Tensor, dtype: torch.dtype) -> Tensor:
    """Lay out an image (C, H, W) as C planes with zeros around them, each as an image of `make_table`, flat."""
    return make_table(geom, image[:, None], dtype).flatten()


def _shift_planes(geom: ConvGeometry, planes: Tensor) -> list[list[Tensor]]:
    """View the planes so that element i is a corner of pixel i, for each channel of a slice and each of the corners."""
    channels = range(geom.in_channels // geom.offset_groups)
    return [[planes[j * image_pixels(geom) + distance :] for distance in corner_distances(geom)] for j in channels]


def _view_image(geom: ConvGeometry, offset: Tensor, mask: Tensor | None, image: int) -> tuple[Tensor, Tensor | None]:
    """View offsets (2, 1, D, K, P) and mask (1, D, K, P) of one image."""
    images = slice(image, image + 1)
    return view_samples(geom, offset, images), None if mask is None else view_samples(geom, mask, images)[0]


def _sample(geom: ConvGeometry, offset: Tensor, mask: Tensor | None, part: _Part, grid: TapGrid) -> Samples:
    """Return the samples of a part of an image, d offset groups, without the other dimensions: (d*K*p,).

    Their pixels are numbered within the planes of the whole image, for the first channel of each offset group.
    """
    offset = offset[:, :, part.offset_groups, :, part.positions]
    if mask is not None:
        mask = mask[:, part.offset_groups, :, part.positions]
    samples = find_samples(offset, mask, grid.at(part.positions), geom.width + 2)

    pixels = samples.pixels
    step = geom.in_channels // geom.offset_groups * image_pixels(geom)
    first = part.offset_groups.start * step
    pixels.add_(torch.arange(first, first + pixels.shape[1] * step, step, dtype=pixels.dtype).view(-1, 1, 1))
    mask = samples.mask
    return Samples(pixels.flatten(), samples.fractions.flatten(1), None if mask is None else mask.flatten())


def _column_shape(geom: ConvGeometry, part: _Part) -> tuple[int, ...]:
    """Return the shape of the columns of a part: (d, w, K, p)."""
    offset_groups = part.offset_groups.stop - part.offset_groups.start
    positions = part.positions.stop - part.positions.start
    return offset_groups, geom.in_channels // geom.offset_groups, geom.taps, positions


def _by_group(columns: Tensor, part: _Part) -> Tensor:
    """View the columns of a part, (d, w, K, p), as (groups, C/G*K, p)."""
    return columns.view(part.groups.stop - part.groups.start, -1, columns.shape[-1])


def _read_corners(corner_planes: list[Tensor], samples: Samples) -> list[Tensor]:
    """Read the four corners of each sample, (d*K*p,) each, in one channel of its offset group."""
    return [plane.index_select(0, samples.pixels) for plane in corner_planes]


def _blend_in_rows(corners: list[Tensor], samples: Samples) -> tuple[Tensor, Tensor]:
    """Interpolate between left and right, above and below the sample, in the memory of the left corners."""
    top_left, top_right, bottom_left, bottom_right = corners
    fraction_x = samples.fractions[1]
    return top_left.lerp_(top_right, fraction_x), bottom_left.lerp_(bottom_right, fraction_x)


def _modulate(values: Tensor, samples: Samples, out: Tensor) -> None:
    """Write the values (d*K*p,) times the mask to `out` (d, K, p)."""
    if samples.mask is None:
        out.copy_(values.view(out.shape))
    else:
        torch.mul(values.view(out.shape), samples.mask.view(out.shape), out=out)


class _SampleSums:
    """What the gradients of offset and mask are made of: sums over the channels of each offset group.

    Attributes:
        mask, y, x: (d*K*p,) each, the derivatives with respect to mask and position times the gradient of the columns;
            the last two before the factor of the mask. Zeros without that gradient.
    """

    def __init__(
        self,
        corner_planes: list[list[Tensor]],
        samples: Samples,
        grad_columns: Tensor | None,
        columns: Tensor,
    ) -> None:
        """Read the samples again, and also write them to the columns (d, w, K, p)."""
        fraction_y, _ = samples.fractions
        self.mask, self.y, self.x = fraction_y.new_zeros(3, len(fraction_y))
        for channel, channel_columns in enumerate(columns.unbind(1)):
            corners = _read_corners(corner_planes[channel], samples)
            grad = None if grad_columns is None else grad_columns[:, channel].flatten()
            if grad is not None:
                top_left, top_right, bottom_left, bottom_right = corners
                self.x.addcmul_(grad, torch.lerp(top_right - top_left, bottom_right - bottom_left, fraction_y))
            top, bottom = _blend_in_rows(corners, samples)
            values = torch.lerp(top, bottom, fraction_y)
            if grad is not None:
                self.mask.addcmul_(grad, values)
                self.y.addcmul_(grad, bottom.sub_(top))
            _modulate(values, samples, channel_columns)

    def write(
        self, geom: ConvGeometry, samples: Samples, grad_offset_mask: OffsetMaskGrad, image: int, part: _Part
    ) -> None:
        """Write the gradients of offset and mask that are needed."""
        images = slice(image, image + 1)
        if grad_offset_mask.mask is not None:
            grad_mask = view_samples(geom, grad_offset_mask.mask, images)[0, 0, part.offset_groups, :, part.positions]
            grad_mask.copy_(self.mask.view(grad_mask.shape))
        if grad_offset_mask.offset is not None:
            if samples.mask is not None:
                self.y.mul_(samples.mask)
                self.x.mul_(samples.mask)
            grad_offset = view_samples(geom, grad_offset_mask.offset, images)[:, 0, part.offset_groups]
            grad_y, grad_x = grad_offset[..., part.positions]
            grad_y.copy_(self.y.view(grad_y.shape))
            grad_x.copy_(self.x.view(grad_x.shape))


def _scatter_add(grad_columns: Tensor, samples: Samples, grad_corner_planes: list[list[Tensor]]) -> None:
    """Add to each pixel the weighted gradients of the samples that read it, in the order of the samples."""
    fraction_y, fraction_x = samples.fractions
    for grad, planes in zip(grad_columns.unbind(1), grad_corner_planes, strict=True):
        upper = grad.flatten() if samples.mask is None else grad.flatten() * samples.mask
        lower = upper * fraction_y
        upper = upper - lower
        upper_right = upper * fraction_x
        lower_right = lower * fraction_x
        corners = (upper.sub_(upper_right), upper_right, lower.sub_(lower_right), lower_right)
        for plane, corner in zip(planes, corners, strict=True):
            plane.index_add_(0, samples.pixels, corner)
