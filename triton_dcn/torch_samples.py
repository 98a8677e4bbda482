"""What `torch_backend` and `torch_planes` sample with: tables of pixels, and the rows and weights of each sample.

Receives the tensors and the geometry of a call. Hands out samples in the order of the offsets, and for `torch_backend`
also in the order of the columns, for some of the images and a block of their positions at a time.

Letters: B images, n images of one table, C channels, G channel groups, D offset groups, d some of the offset groups,
K taps, P positions of an image, p positions of a block or of a chunk, Q groups of the columns, J = D / Q offset groups
of such a group.

In this file and in `torch_backend`, a slice is the C/D channels of an offset group, which a sample reads at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from triton_dcn.geometry import ConvGeometry, even_slices

CHUNK_BYTES = 8 << 20
"""Bytes of the columns and indices of one chunk; the backward pass holds a few such buffers."""

CHUNK_WEIGHTS = 3
"""How many times the size of the weight a chunk may always have, because products rearrange the weight per chunk."""


class Chunk(NamedTuple):
    """What columns are computed and contracted for at once.

    Attributes:
        images: counted within those of the table.
        positions: of each of them, counted within the block.
    """

    images: slice
    positions: slice


class Block(NamedTuple):
    """Positions whose samples are computed at once.

    Attributes:
        positions: of each image, within range(P).
        chunks: cover the images of the table and the positions of the block.
    """

    positions: slice
    chunks: list[Chunk]


class TapGrid(NamedTuple):
    """Where the taps lie without offsets, and for which offsets they are inside the image.

    Attributes:
        pixels: (K, P), int32 or int64, the number of the pixel in the table of one image, see `make_table`.
        lowest: (2, 1, 1, K, P), y and x in the dtype of the computation, offsets that lead to -1; from there on all
            lie outside.
        highest: (2, 1, 1, K, P), offsets that lead to H and W; from there on all lie outside.
    """

    pixels: Tensor
    lowest: Tensor
    highest: Tensor

    def at(self, positions: slice) -> TapGrid:
        """Return the grid of some positions."""
        if positions == slice(0, self.pixels.shape[-1]):
            return self
        return TapGrid(*(values[..., positions] for values in self))


class Samples(NamedTuple):
    """Samples in the order of the offsets.

    Attributes:
        pixels: (n, d, K, p), int32 or int64, the number of the top left corner in the table of one image.
        fractions: (2, n, d, K, p), y and x from the top left corner.
        mask: (n, d, K, p), 0 outside the image; None in version 1.
    """

    pixels: Tensor
    fractions: Tensor
    mask: Tensor | None


class Corners(NamedTuple):
    """The four corners of samples in the order of the columns: top left, top right, bottom left, bottom right.

    Attributes:
        rows: (Q, n, p, K, J, 4), int32 or int64, the row of the corner in the table of slices.
        weights: (Q, n, p, K, J, 4), the weight of the corner, the mask included.
    """

    rows: Tensor
    weights: Tensor

    def chunk(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Return rows and weights of a chunk, each (Q * n * p * K * J * 4,)."""
        part = (slice(None), *chunk)
        return self.rows[part].flatten(), self.weights[part].flatten()


def divide_work(geom: ConvGeometry, itemsize: int, tables: int = 1) -> Iterator[tuple[slice, list[Block]]]:
    """Divide the images and their positions so that memory stays bounded.

    The table of some images with its gradient, and the rows and weights of a block, take about CHUNK_BYTES each; the
    columns of a chunk take as much, or as much as CHUNK_WEIGHTS weights. Tables and blocks are large because rows and
    weights of many samples keep all threads busy with few calls. Chunks are small because columns are contracted while
    they are in the cache; they have several images only where they have all positions of each.

    Args:
        geom: of the call.
        itemsize: bytes of an element in the dtype of the computation.
        tables: in how many tables the channels are; columns are computed for one of them at a time.

    Yields:
        Some of the images, as a slice of the batch, and the blocks of their positions.
    """
    pixel_bytes = geom.in_channels * itemsize
    sample_bytes = 64 * geom.taps * geom.offset_groups  # per position: four rows and weights, and their order
    column_bytes = geom.taps * pixel_bytes // tables + sample_bytes
    table_bytes = image_pixels(geom) * pixel_bytes
    weight_bytes = geom.out_channels * geom.taps * pixel_bytes // geom.groups
    chunk_bytes = max(CHUNK_BYTES, CHUNK_WEIGHTS * weight_bytes)
    chunk_positions = max(1, chunk_bytes // column_bytes)
    chunk_images = max(1, chunk_positions // geom.positions)

    image_bytes = max(2 * table_bytes, geom.positions * sample_bytes)
    for images in even_slices(geom.batch, max(1, CHUNK_BYTES // image_bytes)):
        image_chunks = even_slices(images.stop - images.start, chunk_images)
        blocks = []
        for positions in even_slices(geom.positions, max(1, CHUNK_BYTES // sample_bytes)):
            position_chunks = even_slices(positions.stop - positions.start, chunk_positions)
            chunks = [Chunk(some_images, some) for some_images in image_chunks for some in position_chunks]
            blocks.append(Block(positions, chunks))
        yield images, blocks


def column_groups(geom: ConvGeometry) -> int:
    """Return Q: columns are made group by group where each group has whole slices, else for all channels at once."""
    return geom.groups if geom.offset_groups % geom.groups == 0 else 1


def view_slices(geom: ConvGeometry, rows: Tensor) -> Tensor:
    """View rows of C channels as rows of slices: (any, C/D)."""
    return rows.view(-1, geom.in_channels // geom.offset_groups)


def view_samples(geom: ConvGeometry, tensor: Tensor, images: slice) -> Tensor:
    """View offsets (B, 2*D*K, Ho, Wo) as (2, n, D, K, P), or masks (B, D*K, Ho, Wo) as (1, n, D, K, P).

    To write through the view, height and width must lie in memory as one dimension; otherwise it is a copy.
    """
    by_tap: Tensor = tensor[images].flatten(2).unflatten(1, (geom.offset_groups, geom.taps, -1))
    return by_tap.movedim(3, 0)


def tap_grid(geom: ConvGeometry, device: torch.device, dtype: torch.dtype) -> TapGrid:
    """Return where the taps lie, for offsets in this dtype; do not write to it, later calls get the same tensors."""
    if device.type == "cpu":
        return _compute_tap_grid_once(geom, device, dtype)
    return _compute_tap_grid(geom, device, dtype)  # a GPU may be in another stream, or capturing, at the next call


def _compute_tap_grid(geom: ConvGeometry, device: torch.device, dtype: torch.dtype) -> TapGrid:
    """Compute where the taps lie."""

    def steps(count: int, step: int) -> Tensor:
        return torch.arange(count, dtype=torch.int32, device=device) * step

    window_y = steps(geom.out_height, geom.stride[0]) - geom.padding[0]  # where the first tap lies
    window_x = steps(geom.out_width, geom.stride[1]) - geom.padding[1]
    y = steps(geom.kernel[0], geom.dilation[0])[:, None] + window_y
    x = steps(geom.kernel[1], geom.dilation[1])[:, None] + window_x

    shape = (*geom.kernel, geom.out_height, geom.out_width)
    y = y[:, None, :, None].expand(shape)
    x = x[None, :, None, :].expand(shape)
    taps = torch.stack((y, x)).view(2, geom.taps, geom.positions)

    tap_y, tap_x = taps.to(_index_dtype(geom))
    pixels = (tap_y + 2) * (geom.width + 2) + (tap_x + 2)
    lowest = (-1 - taps).to(dtype)
    lowest = lowest[:, None, None]
    extent = lowest.new_tensor([geom.height + 1, geom.width + 1]).view(2, 1, 1, 1, 1)
    return TapGrid(pixels, lowest, lowest + extent)


_compute_tap_grid_once = lru_cache(maxsize=8)(_compute_tap_grid)


def _index_dtype(geom: ConvGeometry) -> torch.dtype:
    """Return the dtype in which every row and plane of all images can be numbered."""
    elements = (geom.batch * (geom.height + 3) + 2) * (geom.width + 2) * geom.in_channels
    return torch.int32 if elements < 2**31 else torch.int64


def make_table(geom: ConvGeometry, input: Tensor, dtype: torch.dtype) -> Tensor:
    """Lay out images (n, C, H, W) as a table of pixels with zeros around them: (R, C).

    R is (n * (H + 3) + 2) * (W + 2) + 1, and pixel (y, x) of image i is row (i * (H + 3) + y + 2) * (W + 2) + x + 2.
    All four corners exist for every cell with -2 <= y <= H and -2 <= x <= W: left of a row's first column, x = -1, is
    the last column of the row before, x = W. The corners are zero for the cells at y = -2, y = H, x = -2 and x = W,
    which stand for everything outside.
    """
    images, channels, height, width = input.shape
    table = input.new_zeros((images * (height + 3) + 2) * (width + 2) + 1, channels, dtype=dtype)
    view_pixels(geom, table).copy_(input.permute(0, 2, 3, 1))
    return table


def view_pixels(geom: ConvGeometry, table: Tensor) -> Tensor:
    """View the pixels of the images that a table holds: (n, H, W, C)."""
    row_length = geom.width + 2
    image_rows = geom.height + 3
    images = table[2 * row_length + 1 :].view(-1, image_rows, row_length, table.shape[1])
    return images[:, : geom.height, 1:-1]


def image_pixels(geom: ConvGeometry) -> int:
    """Return how many rows of a table lie between a pixel and the same pixel of the next image."""
    return (geom.height + 3) * (geom.width + 2)


def corner_distances(geom: ConvGeometry) -> tuple[int, int, int, int]:
    """Return how many pixels of a table lie between the top left corner of a cell and each of its corners."""
    row_length = geom.width + 2
    return 0, 1, row_length, row_length + 1


def find_samples(offset: Tensor, mask: Tensor | None, grid: TapGrid, row_length: int) -> Samples:
    """Compute between which pixels the samples lie.

    The whole pixels of the offset are split off before the grid is added, as in the Triton kernels: the corner is
    exact, and the fractions are rounded as the offset alone is, however large the image. What lies at or beyond -1, H
    or W, or is NaN, gets one of the corners that stand for everything outside, see `make_table`.

    Args:
        offset: (2, n, d, K, p), pixels, from `view_samples`.
        mask: (n, d, K, p), the factor of each sample, or None.
        grid: of the same positions.
        row_length: pixels of a row of the table, W + 2.
    """
    pixels, lowest, highest = grid
    dtype = lowest.dtype
    offset = offset.to(dtype)
    if mask is not None:
        mask = _clear_outside(mask.to(dtype), offset, lowest, highest)

    fractions = torch.empty(offset.shape, dtype=dtype, device=offset.device)
    torch.nan_to_num(offset, nan=torch.inf, out=fractions)
    torch.clamp(fractions, lowest, highest, out=fractions)
    whole = torch.empty_like(fractions)
    torch.le(fractions, lowest, out=whole)  # 1 at or beyond -1; as numbers, which takes a tenth of the time of `where`
    fractions.sub_(whole)  # the cell at -1 has corners inside
    torch.floor(fractions, out=whole)
    fractions.sub_(whole)
    whole_y, whole_x = whole.to(pixels.dtype)
    return Samples(whole_y.mul_(row_length).add_(whole_x).add_(pixels), fractions, mask)


def _clear_outside(mask: Tensor, offset: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Return the mask with 0 where the sample lies outside the image, because it may be NaN there."""
    if mask.is_cpu and math.isfinite(mask.sum()):  # on a GPU, looking at a value would wait for the device
        return mask
    inside = (offset > lowest) & (offset < highest)
    return torch.where(inside.all(0), mask, 0)


def find_corners(geom: ConvGeometry, samples: Samples) -> Corners:
    """Compute the rows and weights of all corners of all slices, in the order of the columns."""
    groups = (column_groups(geom), -1)
    pixels = samples.pixels.unflatten(1, groups).permute(1, 0, 4, 3, 2).contiguous()
    fraction_y, fraction_x = samples.fractions.unflatten(2, groups).permute(0, 2, 1, 5, 4, 3)
    mask = None if samples.mask is None else samples.mask.unflatten(1, groups).permute(1, 0, 4, 3, 2)
    # all (Q, n, p, K, J)

    steps = _corner_steps(geom, pixels.shape[1], pixels.device, pixels.dtype)
    rows = torch.add(steps, pixels.unsqueeze(-1), alpha=geom.offset_groups)

    lower = fraction_y if mask is None else fraction_y * mask
    upper = 1 - lower if mask is None else mask - lower
    lower_right = lower * fraction_x
    upper_right = upper * fraction_x
    weights = torch.stack((upper - upper_right, upper_right, lower - lower_right, lower_right), -1)
    return Corners(rows, weights)


def _corner_steps(geom: ConvGeometry, images: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return how many rows of the table of slices lie between the first slice of a pixel and each corner.

    Returns:
        (Q, n, 1, 1, J, 4), for samples of n images whose pixels are numbered within one.
    """
    if device.type == "cpu":
        return _compute_corner_steps_once(geom, images, device, dtype)
    return _compute_corner_steps(geom, images, device, dtype)


def _compute_corner_steps(geom: ConvGeometry, images: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Compute what `_corner_steps` returns."""
    slices = torch.arange(geom.offset_groups, dtype=dtype, device=device).view(column_groups(geom), 1, 1, 1, -1, 1)
    first_pixels = torch.arange(images, dtype=dtype, device=device).view(-1, 1, 1, 1, 1) * image_pixels(geom)
    distances = torch.tensor(corner_distances(geom), dtype=dtype, device=device)
    return (first_pixels + distances) * geom.offset_groups + slices


_compute_corner_steps_once = lru_cache(maxsize=8)(_compute_corner_steps)


def corners_by_offset(corners: Tensor) -> Tensor:
    """View (Q, n, p, K, J, 4) as (4, n, Q, J, K, p)."""
    return corners.permute(5, 1, 0, 4, 3, 2)
