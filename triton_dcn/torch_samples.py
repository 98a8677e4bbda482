"""What `torch_backend` samples with: tables of pixels, and the table rows and weights of each sample.

Receives the tensors and the geometry of a call. Hands tables and samples to `torch_backend`, for some of the images and
a block of their positions at a time.

Letters: B images, n images of one table, C channels, G channel groups, D offset groups, K taps, P positions of an
image, p positions of a block or of a chunk, L = lcm(G, D) slices of the channels, J = L / G slices of a group.

In this file and in `torch_backend`, a slice is a slice of the channels: all of its channels have the same group and the
same offset group, so that a sample reads it at once. Samples are ordered (G, n, p, K, J).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from triton_dcn.geometry import ConvGeometry, even_slices

CHUNK_BYTES = 8 << 20
"""Bytes of the columns and indices of one chunk; the backward pass holds a few such buffers."""

CHUNK_WEIGHTS = 3
"""How many times the size of the weight a chunk may always have, because products rearrange the weight per chunk."""

FAR = float(1 << 30)
"""Pixels. Offsets are clamped to it, so that the sampled coordinates fit in int32."""


class Block(NamedTuple):
    """Positions whose samples are computed at once.

    Attributes:
        positions: of each image, within range(P).
        chunks: counted within the block; positions whose columns are computed and contracted at once.
    """

    positions: slice
    chunks: list[slice]


class BilinearSamples(NamedTuple):
    """The samples of a block: four corners each, and what the weights of the corners are made of.

    Attributes:
        rows: (G, n, p, K, J, 4), int32 or int64, the table row of each corner: top left, top right, bottom left,
            bottom right.
        weights: (G, n, p, K, J, 4), the weight of each corner, the mask included.
        fractions: (2, n, p, K, D), y and x from the top left corner.
        mask: (n, p, K, D), 0 outside the image; None in version 1.
    """

    rows: Tensor
    weights: Tensor
    fractions: Tensor
    mask: Tensor | None

    def chunk(self, positions: slice) -> tuple[Tensor, Tensor]:
        """Return rows and weights of a chunk, each (G * n * p * K * J * 4,)."""
        return self.rows[:, :, positions].flatten(), self.weights[:, :, positions].flatten()


def divide_work(geom: ConvGeometry, itemsize: int) -> Iterator[tuple[slice, list[Block]]]:
    """Divide the images and their positions so that memory stays bounded.

    The table of some images, and the rows and weights of a block, take about CHUNK_BYTES each; the columns of a chunk
    take as much, or as much as CHUNK_WEIGHTS weights. Blocks are large because rows and weights of many positions keep
    all threads busy with few calls. Chunks are small because columns are contracted while they are in the cache.

    Args:
        geom: of the call.
        itemsize: bytes of an element in the dtype of the computation.

    Yields:
        Some of the images, as a slice of the batch, and the blocks of their positions.
    """
    pixel_bytes = geom.in_channels * itemsize
    sample_bytes = 64 * geom.taps * slice_count(geom)  # per position: four rows and weights, and their order
    column_bytes = geom.taps * pixel_bytes + sample_bytes
    table_bytes = (geom.height + 3) * (geom.width + 2) * pixel_bytes
    image_bytes = max(geom.positions * column_bytes, table_bytes)
    weight_bytes = geom.out_channels * geom.taps * pixel_bytes // geom.groups
    chunk_bytes = max(CHUNK_BYTES, CHUNK_WEIGHTS * weight_bytes)

    blocks = []
    for positions in even_slices(geom.positions, max(1, CHUNK_BYTES // sample_bytes)):
        chunks = even_slices(positions.stop - positions.start, max(1, chunk_bytes // column_bytes))
        blocks.append(Block(positions, chunks))
    for images in even_slices(geom.batch, max(1, CHUNK_BYTES // image_bytes)):
        yield images, blocks


def slice_count(geom: ConvGeometry) -> int:
    """Return the number of slices of the channels, L."""
    return math.lcm(geom.groups, geom.offset_groups)


def view_slices(geom: ConvGeometry, rows: Tensor) -> Tensor:
    """View rows of C channels as rows of slices: (any, C/L)."""
    return rows.view(-1, geom.in_channels // slice_count(geom))


def view_samples(geom: ConvGeometry, tensor: Tensor, images: slice, positions: slice) -> Tensor:
    """View a block of offsets (B, 2*D*K, Ho, Wo) as (2, n, p, K, D), or of masks (B, D*K, Ho, Wo) as (1, n, p, K, D).

    To write through the view, height and width must lie in memory as one dimension; otherwise it is a copy.
    """
    block = tensor[images].flatten(2)[..., positions]
    by_tap: Tensor = block.unflatten(1, (geom.offset_groups, geom.taps, -1))
    return by_tap.permute(3, 0, 4, 2, 1)


def tap_grid(geom: ConvGeometry, device: torch.device) -> Tensor:
    """Return where the taps lie without offsets: (2, P, K), y and x, int32 pixels."""

    def steps(count: int, step: int) -> Tensor:
        return torch.arange(count, dtype=torch.int32, device=device) * step

    window_y = steps(geom.out_height, geom.stride[0]) - geom.padding[0]  # where the first tap lies
    window_x = steps(geom.out_width, geom.stride[1]) - geom.padding[1]
    y = window_y[:, None] + steps(geom.kernel[0], geom.dilation[0])
    x = window_x[:, None] + steps(geom.kernel[1], geom.dilation[1])

    shape = (geom.out_height, geom.out_width, *geom.kernel)
    y = y[:, None, :, None].expand(shape)
    x = x[None, :, None, :].expand(shape)
    return torch.stack((y, x)).view(2, geom.positions, geom.taps)


def make_table(geom: ConvGeometry, input: Tensor, dtype: torch.dtype) -> Tensor:
    """Lay out images (n, C, H, W) as a table of pixels with zeros around them: (R, C).

    R is (n * (H + 3) + 2) * (W + 2), and pixel (y, x) of image i is row (i * (H + 3) + y + 2) * (W + 2) + x + 1. All
    four corners exist for every cell with -2 <= y <= H and -1 <= x <= W: the right neighbor of the last column is the
    first column of the next row. The corners are zero for the cells at y = -2, y = H and x = W, which stand for
    everything outside.
    """
    images, channels, height, width = input.shape
    table = input.new_zeros((images * (height + 3) + 2) * (width + 2), channels, dtype=dtype)
    view_pixels(geom, table).copy_(input.permute(0, 2, 3, 1))
    return table


def view_pixels(geom: ConvGeometry, table: Tensor) -> Tensor:
    """View the pixels of the images that a table holds: (n, H, W, C)."""
    row_length = geom.width + 2
    image_rows = geom.height + 3
    images = table[2 * row_length :].view(-1, image_rows, row_length, geom.in_channels)
    return images[:, : geom.height, 1:-1]


def make_samples(
    geom: ConvGeometry,
    offset: Tensor,
    mask: Tensor | None,
    images: slice,
    positions: slice,
    grid: Tensor,
    dtype: torch.dtype,
) -> BilinearSamples:
    """Compute which table rows the samples of a block read, and with which weights.

    Args:
        geom: of the call.
        offset: (B, 2*D*K, Ho, Wo), pixels.
        mask: (B, D*K, Ho, Wo), the factor of each sample, or None.
        images: the images that the table holds.
        positions: the positions of the block.
        grid: from `tap_grid`.
        dtype: of the weights.
    """
    y, x, fractions = _find_cells(geom, view_samples(geom, offset, images, positions), grid[:, positions], dtype)
    lower_weight = fractions[0]
    if mask is None:
        upper_weight = 1 - lower_weight
    else:
        mask = view_samples(geom, mask, images, positions)[0].to(dtype).contiguous()
        mask = _clear_outside(geom, mask, y, x)
        lower_weight = lower_weight * mask
        upper_weight = mask - lower_weight

    slices = slice_count(geom)
    row_length = geom.width + 2
    image_rows = geom.height + 3
    if (geom.batch * image_rows + 2) * row_length * slices >= 2**31:
        y = y.long()
        x = x.long()
    image = torch.arange(len(y), dtype=y.dtype, device=y.device).view(-1, 1, 1, 1)
    top_left = torch.add(x, y, alpha=row_length).add_((image * image_rows + 2) * row_length + 1)
    top_left = _repeat_for_slices(geom, top_left) * slices
    top_left = top_left + torch.arange(slices, dtype=y.dtype, device=y.device).view(geom.groups, -1)
    rows = _corner_rows(geom, top_left)

    weights = _corner_weights(
        _repeat_for_slices(geom, upper_weight),
        _repeat_for_slices(geom, lower_weight),
        _repeat_for_slices(geom, fractions[1]),
    )
    return BilinearSamples(rows, weights, fractions, mask)


def _find_cells(geom: ConvGeometry, offset: Tensor, grid: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the top left corner of each sample, y and x (n, p, K, D) int32, and its fractions (2, n, p, K, D).

    The whole pixels of the offset are split off before the grid is added, as in the Triton kernels: the corner is
    exact, and the fractions are rounded as the offset alone is, however large the image. What lies at or beyond -1, H
    or W, or is NaN, gets one of the corners that stand for everything outside, see `make_table`.

    Args:
        geom: of the call.
        offset: (2, n, p, K, D).
        grid: (2, p, K).
        dtype: of the fractions.
    """
    fractions = offset.to(dtype).nan_to_num(nan=FAR).clamp_(-FAR, FAR)
    whole = fractions.floor()
    fractions.sub_(whole)
    cell = whole.to(torch.int32) + grid[:, None, :, :, None]

    at_most_minus_one = cell + (fractions > 0) < 0
    y = torch.where(at_most_minus_one[0], -2, cell[0]).clamp_(max=geom.height)
    x = torch.where(at_most_minus_one[1], geom.width, cell[1]).clamp_(max=geom.width)
    return y, x, fractions


def _clear_outside(geom: ConvGeometry, mask: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Return the mask with 0 where the sample lies outside the image, because it may be NaN there."""
    if mask.is_cpu and mask.sum().isfinite():  # on a GPU, looking at a value would wait for the device
        return mask
    outside = (y < -1) | (y == geom.height) | (x == geom.width)
    return torch.where(outside, 0, mask)


def _repeat_for_slices(geom: ConvGeometry, samples: Tensor) -> Tensor:
    """Repeat the value of each offset group, (n, p, K, D), for its slices: (n, p, K, G, J)."""
    slices = slice_count(geom)
    repeated = samples.repeat_interleave(slices // geom.offset_groups, -1)
    return repeated.view(*samples.shape[:-1], geom.groups, slices // geom.groups)


def _corner_rows(geom: ConvGeometry, top_left: Tensor) -> Tensor:
    """Return the rows of the four corners, (G, n, p, K, J, 4), from those of the first, (n, p, K, G, J)."""
    rows, corners = _empty_corners(top_left)
    slices = slice_count(geom)
    row_length = geom.width + 2
    for corner, pixels_from_first in enumerate((0, 1, row_length, row_length + 1)):
        torch.add(top_left, pixels_from_first * slices, out=corners[corner])
    return rows


def _corner_weights(upper: Tensor, lower: Tensor, right: Tensor) -> Tensor:
    """Return the weights of the four corners, (G, n, p, K, J, 4).

    Args:
        upper: (n, p, K, G, J), weight of the two upper corners together.
        lower: (n, p, K, G, J), weight of the two lower corners together.
        right: (n, p, K, G, J), the share of the right corners.
    """
    weights, (top_left, top_right, bottom_left, bottom_right) = _empty_corners(upper)
    torch.mul(upper, right, out=top_right)
    torch.sub(upper, top_right, out=top_left)
    torch.mul(lower, right, out=bottom_right)
    torch.sub(lower, bottom_right, out=bottom_left)
    return weights


def _empty_corners(like: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate (G, n, p, K, J, 4) for a tensor of shape (n, p, K, G, J); also return it as (4, n, p, K, G, J)."""
    images, positions, taps, groups, slices_per_group = like.shape
    values = like.new_empty(groups, images, positions, taps, slices_per_group, 4)
    return values, values.permute(5, 1, 2, 3, 0, 4)
