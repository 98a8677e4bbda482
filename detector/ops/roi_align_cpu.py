"""RoIAlign as bags of weighted pixels, in plain PyTorch: the CPU path, and float64 on any device.

Bilinear weights separate. The samples of a bin are merged along each axis into the weights of consecutive pixels; the
outer product of the two axes is the bin's bag of pixels, and one ragged `embedding_bag` pools every bag of every level.
The gradient is the transposed product: the same entries sorted by pixel, one bag of bins per pixel.

Letters: R rois, S bins per side, C channels, N pixels of all levels and images, E entries (pixel in a bag).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_GRID = 1 << 20
"""Adaptive sampling takes at most this many samples per bin and axis."""

CHUNK_ENTRIES = 1 << 22
"""Entries expanded at a time; bounds the memory of the index arrays."""

COPY_PIXELS = 4096
"""Pixels transposed at a time, so that a block's cache lines are still there for the next channel."""


@dataclass(frozen=True)
class PoolGeometry:
    """The sizes of one RoIAlign over a pyramid.

    Attributes:
        batch: images.
        heights, widths: extent of each level, in cells.
        strides: pixels per cell of each level.
        bins: bins per side of the output, S.
        sampling_ratio: samples per bin and axis; 0 is adaptive.
    """

    batch: int
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    strides: tuple[float, ...]
    bins: int
    sampling_ratio: int

    @property
    def starts(self) -> list[int]:
        """Row of the pixel table where each level begins, and the number of rows, N."""
        sizes = (self.batch * h * w for h, w in zip(self.heights, self.widths, strict=True))
        return list(accumulate(sizes, initial=0))


@dataclass(frozen=True)
class _Axis:
    """Merged pixel weights of every bin along one axis; `first`, `count` and `begin` are (R, S).

    Attributes:
        first: first pixel of the bin.
        count: consecutive pixels; 0 for a bin without samples.
        begin: position of the bin's weights in `weights`.
        weights: flat, already divided by the number of samples per bin.
    """

    first: Tensor
    count: Tensor
    begin: Tensor
    weights: Tensor

    def rows(self, part: slice) -> _Axis:
        """Return the axis of a range of rois."""
        return _Axis(self.first[part], self.count[part], self.begin[part], self.weights)


def live_rois(rois: Tensor, levels: Tensor, batch: int, num_levels: int) -> Tensor:
    """Return (R,) bool: batch index and level exist, and the box is finite, also its width and height."""
    sides = rois[:, 3:] - rois[:, 1:3]
    live = (rois[:, 0] >= 0) & (rois[:, 0] < batch) & (levels >= 0) & (levels < num_levels)
    return live & sides.isfinite().all(1) & rois[:, 1:].isfinite().all(1)


def forward(geometry: PoolGeometry, features: list[Tensor], rois: Tensor, levels: Tensor) -> Tensor:
    """Pool the features; see `detector.ops.roi_align.roi_align`. Returns (R, C, S, S) with channels_last strides."""
    dtype = features[0].dtype
    table = _pixel_table(features, torch.promote_types(dtype, torch.float32))
    pooled = [
        F.embedding_bag(pixels, table, offsets, mode="sum", per_sample_weights=weights.to(table.dtype))
        for _, pixels, weights, offsets in _entries(geometry, rois, levels)
    ]
    table = pooled[0] if len(pooled) == 1 else torch.cat([table[:0], *pooled])
    shape = len(rois), geometry.bins, geometry.bins, table.shape[1]
    return table.view(shape).to(dtype).permute(0, 3, 1, 2)


def backward(geometry: PoolGeometry, grad: Tensor, rois: Tensor, levels: Tensor) -> Tensor:
    """Return the gradient of all levels as one (N, C) table in the dtype of `grad` (R, C, S, S)."""
    rows = geometry.starts[-1]
    dtype = torch.promote_types(grad.dtype, torch.float32)
    bags = grad.permute(0, 2, 3, 1).to(dtype).reshape(-1, grad.shape[1])
    table = None
    for first_bag, pixels, weights, offsets in _entries(geometry, rois, levels):
        sizes = offsets.diff(append=offsets.new_tensor([len(pixels)]))
        owner = torch.repeat_interleave(sizes, output_size=len(pixels)) + first_bag
        pixels, order = pixels.sort(stable=True)
        counts = torch.bincount(pixels, minlength=rows)
        weights = weights[order].to(dtype)
        part = F.embedding_bag(owner[order], bags, counts.cumsum(0) - counts, mode="sum", per_sample_weights=weights)
        table = part if table is None else table.add_(part)
    if table is None:
        table = bags.new_zeros(rows, grad.shape[1])
    return table.to(grad.dtype)


def _pixel_table(features: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Copy the features into one (N, C) table, level after level."""
    channels = features[0].shape[1]
    table = features[0].new_empty(sum(feature.numel() // channels for feature in features), channels, dtype=dtype)
    row = 0
    for image in (image for feature in features for image in feature):
        for block in image.flatten(1).split(COPY_PIXELS, dim=1):
            table[row : row + block.shape[1]].copy_(block.t())
            row += block.shape[1]
    return table


def _entries(geometry: PoolGeometry, rois: Tensor, levels: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield the bags of all bins in chunks of rois: (first bag, pixel rows, weights, offsets of the bags)."""
    device = rois.device
    live = live_rois(rois, levels, geometry.batch, len(geometry.strides))
    level = levels.where(live, 0)
    heights, widths, starts = (
        torch.tensor(values, device=device)[level] for values in (geometry.heights, geometry.widths, geometry.starts)
    )
    rois = rois.to(torch.promote_types(rois.dtype, torch.float32)).where(live[:, None], 0)
    scale = 1 / torch.tensor(geometry.strides, dtype=rois.dtype, device=device)[level]
    image = rois[:, 0].long()
    x1, y1, x2, y2 = (rois[:, 1:] * scale[:, None] - 0.5).unbind(1)
    down = _merge(y1, y2 - y1, heights, live, geometry)
    across = _merge(x1, x2 - x1, widths, live, geometry)
    rows = starts + image * heights * widths
    per_roi = down.count.sum(1) * across.count.sum(1)
    for start, stop in _chunks(per_roi.tolist()):
        part = slice(start, stop)
        yield start * geometry.bins**2, *_outer(down.rows(part), across.rows(part), rows[part], widths[part])


def _chunks(entries: list[int]) -> Iterator[tuple[int, int]]:
    """Split consecutive rois into ranges of at most CHUNK_ENTRIES entries (one roi may exceed it)."""
    start = total = 0
    for index, count in enumerate(entries):
        if total + count > CHUNK_ENTRIES and index > start:
            yield start, index
            start, total = index, 0
        total += count
    if entries:
        yield start, len(entries)


def _merge(start: Tensor, length: Tensor, size: Tensor, live: Tensor, geometry: PoolGeometry) -> _Axis:
    """Merge the samples of each bin along one axis into weights of consecutive pixels.

    Args:
        start, length: (R,) first edge and extent of the rois, in cells.
        size: (R,) int64, cells of the roi's level along the axis.
        live: (R,) bool; the other rois get no pixels.
        geometry: bins and sampling ratio.
    """
    bins = geometry.bins
    bin_length = (length / bins)[:, None]
    corner = start[:, None] + torch.arange(bins, device=start.device) * bin_length  # (R, S)
    if geometry.sampling_ratio:
        grid = torch.full_like(bin_length, geometry.sampling_ratio)
        lowest, highest = torch.zeros_like(corner), grid.expand_as(corner)
    else:
        grid = bin_length.ceil().clamp(0, MAX_GRID)
        step = bin_length / grid
        lowest = ((-1 - corner) / step - 1.5).floor()  # only these samples can lie in [-1, size]
        highest = ((size[:, None] - corner) / step + 2.5).ceil()
        lowest, highest = (bound.nan_to_num(0).clamp(min=0).minimum(grid) for bound in (lowest, highest))
    samples = ((highest - lowest).clamp(min=0) * live[:, None]).long().flatten()
    ends = samples.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    owner = torch.repeat_interleave(samples, output_size=total)
    roi = owner // bins
    index = torch.arange(total, device=start.device) - (ends - samples)[owner] + lowest.flatten()[owner]
    grid = grid[:, 0]
    position = corner.flatten()[owner] + (index + 0.5) * bin_length[roi, 0] / grid[roi]
    last = size[roi] - 1
    inside = (position >= -1) & (position <= last + 1)
    owner, roi, position, last = owner[inside], roi[inside], position[inside], last[inside]
    position = position.clamp(min=0).minimum(last)
    low = position.long()
    high = (low + 1).minimum(last)
    upper = (position - low) / grid[roi]
    lower = 1 / grid[roi] - upper
    first = torch.full_like(samples, 1 << 40).scatter_reduce(0, owner, low, "amin")
    count = (torch.full_like(samples, -1).scatter_reduce(0, owner, high, "amax") - first + 1).clamp(min=0)
    begin = count.cumsum(0) - count
    weights = position.new_zeros(int(count.sum()))
    slot = (begin - first)[owner]
    weights.index_add_(0, slot + low, lower).index_add_(0, slot + high, upper)
    return _Axis(first.view(-1, bins), count.view(-1, bins), begin.view(-1, bins), weights)


def _outer(down: _Axis, across: _Axis, rows: Tensor, widths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Expand the outer product of the axes into bags, in (roi, bin y, bin x, pixel y, pixel x) order.

    Args:
        down, across: axes of the same rois.
        rows: (R,) row of the pixel table where the roi's image begins.
        widths: (R,) cells per image row.

    Returns:
        pixel rows (E,), weights (E,) and offsets (R*S*S,), ready for `embedding_bag`.
    """
    bins = down.count.shape[1]
    lines = down.count[:, :, None].expand(-1, -1, bins).flatten()  # pixel rows of each bag
    run_ends = lines.cumsum(0)
    bag = torch.repeat_interleave(lines, output_size=int(run_ends[-1]))  # a run: consecutive pixels of one line
    line = torch.arange(len(bag), device=bag.device) - (run_ends - lines)[bag]
    roi, bin_y, bin_x = bag // bins**2, bag // bins, bag // bins**2 * bins + bag % bins
    lengths = across.count.flatten()[bin_x]
    ends = lengths.cumsum(0)
    begins = ends - lengths
    total = int(ends[-1]) if len(ends) else 0
    run = torch.repeat_interleave(lengths, output_size=total)
    entry = torch.arange(total, device=bag.device)
    pixel = rows[roi] + (down.first.flatten()[bin_y] + line) * widths[roi] + across.first.flatten()[bin_x]
    weight = down.weights[down.begin.flatten()[bin_y] + line]
    pixels = entry + (pixel - begins)[run]
    weights = across.weights[entry + (across.begin.flatten()[bin_x] - begins)[run]] * weight[run]
    sizes = lines * across.count[:, None, :].expand(-1, bins, -1).flatten()
    return pixels, weights, sizes.cumsum(0) - sizes
