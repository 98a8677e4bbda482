"""RoIAlign in plain PyTorch, as sums over bags of weighted cells: the CPU path, and float64 on any device.

Receives checked tensors and a `RoIAlignGeometry` from `detector.ops.roi_align` and returns plain tensors to it.

A cell is one position of a feature map. Bilinear weights separate: the samples of a bin are merged along each axis into
the weights of consecutive cells, and the outer product of the two axes is the bin's bag of weighted cells. One
`embedding_bag` then sums the bags of all bins and levels. The gradient is the transposed product: the same entries
sorted by cell, one bag of bins per cell.

Letters: R rois, S bins per side, C channels, N cells of all levels and images, E entries (one cell in one bag).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from detector.ops.roi_align_geometry import MAX_ADAPTIVE_SAMPLES, RoIAlignGeometry

CHUNK_ENTRIES = 1 << 22
"""Entries expanded at a time; bounds the memory of the index arrays."""

COPY_CELLS = 4096
"""Cells copied at a time, so that the lines of the table that they write stay in the cache for all channels."""


def forward(geometry: RoIAlignGeometry, features: list[Tensor], rois: Tensor, levels: Tensor) -> Tensor:
    """Pool the features; see `detector.ops.roi_align.roi_align`. Returns (R, C, S, S) with channels_last strides."""
    dtype = features[0].dtype
    table = _cell_table(features, torch.promote_types(dtype, torch.float32))

    pooled = []
    for _, cells, weights, offsets in _bags(geometry, rois, levels):
        weights = weights.to(table.dtype)
        pooled.append(F.embedding_bag(cells, table, offsets, mode="sum", per_sample_weights=weights))

    bins = pooled[0] if len(pooled) == 1 else torch.cat([table[:0], *pooled])
    shape = (len(rois), geometry.bins, geometry.bins, table.shape[1])
    return bins.view(shape).to(dtype).permute(0, 3, 1, 2)


def backward(geometry: RoIAlignGeometry, grad: Tensor, rois: Tensor, levels: Tensor) -> Tensor:
    """Return the gradient of all levels as one (N, C) table in the dtype of `grad` (R, C, S, S)."""
    channels = grad.shape[1]
    dtype = torch.promote_types(grad.dtype, torch.float32)
    grad_bins = grad.permute(0, 2, 3, 1).to(dtype).reshape(-1, channels)  # (R * S * S, C)

    table = None
    for first_bag, cells, weights, offsets in _bags(geometry, rois, levels):
        sizes = offsets.diff(append=offsets.new_tensor([len(cells)]))
        bag = torch.repeat_interleave(sizes, output_size=len(cells)) + first_bag  # (E,)

        cells, order = cells.sort(stable=True)
        counts = torch.bincount(cells, minlength=geometry.num_cells)
        cell_offsets = counts.cumsum(0) - counts
        weights = weights[order].to(dtype)
        part = F.embedding_bag(bag[order], grad_bins, cell_offsets, mode="sum", per_sample_weights=weights)
        table = part if table is None else table.add_(part)

    if table is None:
        table = grad_bins.new_zeros(geometry.num_cells, channels)
    return table.to(grad.dtype)


def _cell_table(features: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Copy the features into one (N, C) table, level after level."""
    channels = features[0].shape[1]
    num_cells = sum(feature.numel() // channels for feature in features)
    table = features[0].new_empty(num_cells, channels, dtype=dtype)
    row = 0
    for feature in features:
        for image in feature:
            for block in image.flatten(1).split(COPY_CELLS, dim=1):
                stop = row + block.shape[1]
                table[row:stop].copy_(block.t())
                row = stop
    return table


def _bags(geometry: RoIAlignGeometry, rois: Tensor, levels: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield the bags of all bins in chunks of consecutive rois.

    Yields:
        number of the first bag, then the arguments of `embedding_bag`: rows of the cells in the table (E,) int64,
        weights (E,) and offsets of the bags.
    """
    device = rois.device
    live = _live_rois(rois, levels, geometry.batch, len(geometry.strides))
    level = levels.where(live, 0)
    heights = torch.tensor(geometry.heights, device=device)[level]
    widths = torch.tensor(geometry.widths, device=device)[level]
    level_starts = torch.tensor(geometry.level_starts, device=device)[level]

    rois = rois.to(torch.promote_types(rois.dtype, torch.float32)).where(live[:, None], 0)
    scale = 1 / torch.tensor(geometry.strides, dtype=rois.dtype, device=device)[level]
    x1, y1, x2, y2 = (rois[:, 1:] * scale[:, None] - 0.5).unbind(1)
    y_axis = _merge_samples(y1, y2 - y1, heights, live, geometry)
    x_axis = _merge_samples(x1, x2 - x1, widths, live, geometry)

    image = rois[:, 0].long()
    image_starts = level_starts + image * heights * widths
    entries = y_axis.count.sum(1) * x_axis.count.sum(1)  # (R,)
    for start, stop in _chunks(entries.tolist()):
        part = slice(start, stop)
        bags = _outer_product(y_axis.of_rois(part), x_axis.of_rois(part), image_starts[part], widths[part])
        yield start * geometry.bins**2, *bags


def _live_rois(rois: Tensor, levels: Tensor, batch: int, num_levels: int) -> Tensor:
    """Return (R,) bool: batch index and level exist, and the box is finite, also its width and height."""
    sides = rois[:, 3:] - rois[:, 1:3]
    exists = (rois[:, 0] >= 0) & (rois[:, 0] < batch) & (levels >= 0) & (levels < num_levels)
    return exists & sides.isfinite().all(1) & rois[:, 1:].isfinite().all(1)


def _chunks(entries: list[int]) -> Iterator[tuple[int, int]]:
    """Split consecutive rois into ranges [start, stop) of at most CHUNK_ENTRIES entries; one roi may exceed it."""
    start = 0
    total = 0
    for index, count in enumerate(entries):
        if total + count > CHUNK_ENTRIES and index > start:
            yield start, index
            start = index
            total = 0
        total += count
    if entries:
        yield start, len(entries)


@dataclass(frozen=True)
class _AxisWeights:
    """The weights of every bin along one axis, merged over its samples.

    Attributes:
        first: (R, S), the first cell of the bin.
        count: (R, S), how many consecutive cells it has; 0 for a bin without samples.
        begin: (R, S), where the weights of the bin begin in `weights`.
        weights: flat, already divided by the number of samples per bin.
    """

    first: Tensor
    count: Tensor
    begin: Tensor
    weights: Tensor

    def of_rois(self, part: slice) -> _AxisWeights:
        """Return the weights of a range of rois."""
        return _AxisWeights(self.first[part], self.count[part], self.begin[part], self.weights)


def _merge_samples(
    start: Tensor, length: Tensor, size: Tensor, live: Tensor, geometry: RoIAlignGeometry
) -> _AxisWeights:
    """Merge the samples of each bin along one axis into weights of consecutive cells.

    Args:
        start: (R,), first edge of the rois, in cells.
        length: (R,), extent of the rois, in cells.
        size: (R,) int64, cells of the roi's level along the axis.
        live: (R,) bool; the other rois get no cells.
        geometry: bins and sampling ratio.
    """
    bins = geometry.bins
    bin_length = (length / bins)[:, None]
    bin_start = start[:, None] + torch.arange(bins, device=start.device) * bin_length  # (R, S)
    samples_per_bin, first_sample, stop_sample = _sample_range(bin_start, bin_length, size, geometry.sampling_ratio)

    # One entry per sample of every bin: the number of its bin, and its position.
    counts = ((stop_sample - first_sample).clamp(min=0) * live[:, None]).long().flatten()
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    bin_index = torch.repeat_interleave(counts, output_size=total)
    roi = bin_index // bins
    sample = torch.arange(total, device=start.device) - (ends - counts)[bin_index] + first_sample.flatten()[bin_index]
    samples_per_bin = samples_per_bin[:, 0]
    position = bin_start.flatten()[bin_index] + (sample + 0.5) * bin_length[roi, 0] / samples_per_bin[roi]

    # Leave out the samples that read 0.
    last_cell = size[roi] - 1
    inside = (position >= -1) & (position <= last_cell + 1)
    bin_index = bin_index[inside]
    roi = roi[inside]
    position = position[inside]
    last_cell = last_cell[inside]

    # Each sample gives weight to two cells.
    position = position.clamp(min=0).minimum(last_cell)
    low = position.long()
    high = (low + 1).minimum(last_cell)
    high_weight = (position - low) / samples_per_bin[roi]
    low_weight = 1 / samples_per_bin[roi] - high_weight

    # Sum the weights of equal cells of a bin.
    first = torch.full_like(counts, 1 << 40).scatter_reduce(0, bin_index, low, "amin")
    last = torch.full_like(counts, -1).scatter_reduce(0, bin_index, high, "amax")
    count = (last - first + 1).clamp(min=0)
    begin = count.cumsum(0) - count
    weights = position.new_zeros(int(count.sum()))
    weights_start = (begin - first)[bin_index]
    weights.index_add_(0, weights_start + low, low_weight)
    weights.index_add_(0, weights_start + high, high_weight)
    return _AxisWeights(first.view(-1, bins), count.view(-1, bins), begin.view(-1, bins), weights)


def _sample_range(
    bin_start: Tensor, bin_length: Tensor, size: Tensor, sampling_ratio: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return samples per bin (R, 1), and the range [first, stop) of samples (R, S) that can lie in [-1, size]."""
    if sampling_ratio:
        samples_per_bin = torch.full_like(bin_length, sampling_ratio)
        return samples_per_bin, torch.zeros_like(bin_start), samples_per_bin.expand_as(bin_start)

    samples_per_bin = bin_length.ceil().clamp(0, MAX_ADAPTIVE_SAMPLES)
    step = bin_length / samples_per_bin
    first = ((-1 - bin_start) / step - 1.5).floor()
    stop = ((size[:, None] - bin_start) / step + 2.5).ceil()
    first = first.nan_to_num(0).clamp(min=0).minimum(samples_per_bin)
    stop = stop.nan_to_num(0).clamp(min=0).minimum(samples_per_bin)
    return samples_per_bin, first, stop


def _outer_product(
    y_axis: _AxisWeights, x_axis: _AxisWeights, image_starts: Tensor, widths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Expand the outer product of the axes into bags, in (roi, bin y, bin x, cell y, cell x) order.

    Args:
        y_axis: weights of R rois along y.
        x_axis: weights of the same rois along x.
        image_starts: (R,), row of the table where the roi's image begins at the roi's level.
        widths: (R,), cells per line of that level.

    Returns:
        rows of the cells in the table (E,), weights (E,) and offsets (R*S*S,), ready for `embedding_bag`.
    """
    bins = y_axis.count.shape[1]
    device = y_axis.count.device

    # One entry per run, the consecutive cells of one line in one bag.
    lines = y_axis.count[:, :, None].expand(-1, -1, bins).flatten()  # lines of each bag
    line_ends = lines.cumsum(0)
    bag = torch.repeat_interleave(lines, output_size=int(line_ends[-1]))
    line = torch.arange(len(bag), device=device) - (line_ends - lines)[bag]
    roi = bag // bins**2
    y_bin = bag // bins  # index into (R * S,), as x_bin
    x_bin = roi * bins + bag % bins
    line_start = image_starts[roi] + (y_axis.first.flatten()[y_bin] + line) * widths[roi]
    first_cell = line_start + x_axis.first.flatten()[x_bin]
    y_weight = y_axis.weights[y_axis.begin.flatten()[y_bin] + line]

    # One entry per cell.
    lengths = x_axis.count.flatten()[x_bin]
    ends = lengths.cumsum(0)
    begins = ends - lengths
    total = int(ends[-1]) if len(ends) else 0
    run = torch.repeat_interleave(lengths, output_size=total)
    entry = torch.arange(total, device=device)
    cells = entry + (first_cell - begins)[run]
    x_weight_index = entry + (x_axis.begin.flatten()[x_bin] - begins)[run]
    weights = x_axis.weights[x_weight_index] * y_weight[run]

    sizes = lines * x_axis.count[:, None, :].expand(-1, bins, -1).flatten()
    return cells, weights, sizes.cumsum(0) - sizes
