"""What the `embedding_bag` formulation of deformable convolution reads: tables of pixels, rows and weights of samples.

Letters: B batch, n images of a piece, C channels, G groups, D offset groups, K taps, P positions of an image, p those
of a piece, L = lcm(G, D) slices of the channels, J = L / G of them in a group. Samples are ordered
(G, n, p, K, J).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from triton_dcn.geometry import ConvGeometry, even_slices

CHUNK_BYTES = 8 << 20
"""Size of the columns and indices of one piece; the backward pass holds a few such buffers."""
CHUNK_WEIGHTS = 3
"""Columns of one piece may be this many times as large as the weight, which the products rearrange for every piece."""
LIMIT = float(1 << 30)
"""Pixels; larger offsets are cut to it, so that positions are int32."""


class BilinearSamples(NamedTuple):
    """Four table rows and weights per sample, and the factors of the weights."""

    rows: Tensor  # (G, n, p, K, J, 4) int32 or int64
    weights: Tensor  # (G, n, p, K, J, 4)
    fractions: Tensor  # (2, n, p, K, D): y, x within the cell
    mask: Tensor | None  # (n, p, K, D)

    def piece(self, positions: slice) -> tuple[Tensor, Tensor]:
        """Return rows and weights of some of the positions."""
        return self.rows[:, :, positions].flatten(), self.weights[:, :, positions].flatten()


def cut(geom: ConvGeometry, itemsize: int) -> Iterator[tuple[slice, list[tuple[slice, list[slice]]]]]:
    """Cut the work into images, within these positions to sample at once, within these positions to contract at once.

    The images' table and the rows and weights of the first stay near CHUNK_BYTES each, the columns of the second near
    that or CHUNK_WEIGHTS weights. Computed for many positions at once, rows and weights keep every thread busy and cost
    few calls; columns are contracted while they are in the cache.

    Yields:
        Slices of the batch; for each, slices of its positions; for each of these, slices within it.
    """
    pixel = geom.in_channels * itemsize
    sample = 64 * geom.taps * slice_count(geom)  # four rows and weights, and their order
    column = geom.taps * pixel + sample
    image = max(geom.positions * column, (geom.height + 3) * (geom.width + 2) * pixel)
    piece = max(CHUNK_BYTES, CHUNK_WEIGHTS * geom.out_channels * geom.taps * pixel // geom.groups)
    blocks = [
        (block, even_slices(block.stop - block.start, max(1, piece // column)))
        for block in even_slices(geom.positions, max(1, CHUNK_BYTES // sample))
    ]
    for images in even_slices(geom.batch, max(1, CHUNK_BYTES // image)):
        yield images, blocks


def tap_grid(geom: ConvGeometry, device: torch.device) -> Tensor:
    """Positions of the taps without offsets: (2, P, K), int32 pixels."""
    axes = []
    for axis, extent in enumerate((geom.out_height, geom.out_width)):
        start = torch.arange(extent, dtype=torch.int32, device=device) * geom.stride[axis] - geom.padding[axis]
        tap = torch.arange(geom.kernel[axis], dtype=torch.int32, device=device) * geom.dilation[axis]
        axes.append(start[:, None] + tap)
    y, x = axes
    full = (geom.out_height, geom.out_width, *geom.kernel)
    y, x = y[:, None, :, None].expand(full), x[None, :, None].expand(full)
    return torch.stack((y, x)).view(2, geom.positions, geom.taps)


def make_table(geom: ConvGeometry, input: Tensor, dtype: torch.dtype) -> Tensor:
    """Lay out images as rows of channels with zeros around: (R, C), R = (n * (H + 3) + 2) * (W + 2).

    Pixel (y, x) of image i is row (i * (H + 3) + y + 2) * (W + 2) + x + 1. All four corners exist for every cell with
    -2 <= y <= H, -1 <= x <= W (the right neighbor of the last column is the first of the next row), and they are zero
    for the cells at y = -2, y = H and x = W, which stand for everything outside.
    """
    n, c, h, w = input.shape
    table = input.new_zeros((n * (h + 3) + 2) * (w + 2), c, dtype=dtype)
    pixels(geom, table).copy_(input.permute(0, 2, 3, 1))
    return table


def pixels(geom: ConvGeometry, table: Tensor) -> Tensor:
    """The pixels of a table as a view (n, H, W, C)."""
    high, wide = geom.height + 3, geom.width + 2
    n = len(table) // (high * wide)
    return table[: n * high * wide].view(n, high, wide, -1)[:, 2:-1, 1:-1]


def make_samples(
    geom: ConvGeometry,
    offset: Tensor,
    mask: Tensor | None,
    images: slice,
    positions: slice,
    grid: Tensor,
    dtype: torch.dtype,
) -> BilinearSamples:
    """Compute which rows the samples of some positions read, and their weights in `dtype`.

    As in the kernels, the offset is split before the grid is added: the cell is exact, and the fractions have the
    rounding of the offset alone, however large the image. Offsets beyond LIMIT, and NaN, lie outside.
    """
    move = per_sample(geom, offset, images, positions).to(dtype).nan_to_num(nan=LIMIT).clamp_(-LIMIT, LIMIT)
    whole = move.floor()
    fractions = move.sub_(whole)
    cell = whole.to(torch.int32) + grid[:, None, positions, :, None]
    before = cell + (fractions > 0) < 0  # at -1 or below
    y = torch.where(before[0], -2, cell[0]).clamp_(max=geom.height)
    x = torch.where(before[1], geom.width, cell[1]).clamp_(max=geom.width)
    slices, pitch = slice_count(geom), geom.width + 2
    small = (geom.batch * (geom.height + 3) + 2) * pitch * slices < 2**31
    y, x = (y, x) if small else (y.long(), x.long())
    image = torch.arange(len(y), dtype=y.dtype, device=y.device).view(-1, 1, 1, 1)
    base = torch.add(x, y, alpha=pitch).add_((image * (geom.height + 3) + 2) * pitch + 1)
    ly, lx = fractions
    if mask is None:
        lower, upper = ly, 1 - ly
    else:
        mask = per_sample(geom, mask, images, positions).to(dtype).contiguous()
        if not mask.is_cpu or not mask.sum().isfinite():  # what lies outside has no mask, be it NaN; a GPU is not asked
            mask = torch.where((y < -1) | (y == geom.height) | (x == geom.width), 0, mask)
        lower = ly * mask
        upper = mask - lower

    def split(per_offset_group: Tensor) -> Tensor:  # (n, p, K, D) -> (n, p, K, G, J)
        per_slice = per_offset_group.repeat_interleave(slices // geom.offset_groups, -1)
        return per_slice.view(*per_slice.shape[:-1], geom.groups, slices // geom.groups)

    base, lower, upper, lx = (split(x) for x in (base, lower, upper, lx))
    base = base * slices + torch.arange(slices, dtype=base.dtype, device=base.device).view(geom.groups, -1)
    shape = (geom.groups, *base.shape[:3], base.shape[4], 4)
    rows, weights = base.new_empty(shape), lower.new_empty(shape)
    row, part = (x.permute(5, 1, 2, 3, 0, 4) for x in (rows, weights))  # (4, n, p, K, G, J)
    for corner, step in enumerate((0, 1, pitch, pitch + 1)):
        torch.add(base, step * slices, out=row[corner])
    torch.mul(upper, lx, out=part[1])
    torch.sub(upper, part[1], out=part[0])
    torch.mul(lower, lx, out=part[3])
    torch.sub(lower, part[3], out=part[2])
    return BilinearSamples(rows, weights, fractions, mask)


def per_sample(geom: ConvGeometry, tensor: Tensor, images: slice, positions: slice) -> Tensor:
    """Offsets (B, 2*D*K, Ho, Wo) of some positions as (2, n, p, K, D), masks (B, D*K, Ho, Wo) as (n, p, K, D)."""
    planes: Tensor = tensor[images].flatten(2)[..., positions].unflatten(1, (geom.offset_groups, geom.taps, -1))
    planes = planes.permute(3, 0, 4, 2, 1)
    return planes if len(planes) == 2 else planes[0]


def slice_count(geom: ConvGeometry) -> int:
    """Slices of the channels within which group and offset group are the same: L."""
    return math.lcm(geom.groups, geom.offset_groups)


def sliced(geom: ConvGeometry, rows: Tensor) -> Tensor:
    """View rows of channels as rows of slices: (any, C / L)."""
    return rows.view(-1, geom.in_channels // slice_count(geom))
