"""RoI pooling in plain PyTorch, as sums over bags of weighted cells: the CPU path, and float64 on any device.

Receives checked tensors and a `RoIPoolGeometry` from `roi_pool.operator` and returns plain tensors to it.

A cell is one position of a feature map. Bilinear weights separate: the samples of a bin are merged along each axis into
the weights of consecutive cells, and the outer product of the two axes is the bin's bag of weighted cells. One
`embedding_bag` then sums the bags of all bins and levels. The gradient of the features is the transposed product: the
same entries sorted by cell, one bag of bins per cell. The gradient of the offset needs the products of the bins'
gradients and their cells, one for each entry, and sums them with other weights that separate as well.

Without an offset all bins of a line share the weights along y, all bins of a column those along x. With an offset each
bin has its own.

Letters: R rois, C channels, N cells of all levels and images, E entries (one cell in one bag), Ph Pw bins of a roi.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_dcn.roi_pool.geometry import MAX_ADAPTIVE_SAMPLES, RoIPoolGeometry

CHUNK_ENTRIES = 1 << 22
"""Samples merged, and entries expanded, at a time; bounds the memory of the index arrays."""

COPY_CELLS = 4096
"""Cells copied at a time, so that the lines of the table that they write stay in the cache for all channels."""

SUM = 0
"""What `embedding_bag` calls its mode in the dispatcher."""


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the table that `forward` keeps for features of this dtype."""
    return torch.promote_types(dtype, torch.float32)


def forward(
    geometry: RoIPoolGeometry,
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    offset: Tensor | None,
    *,
    keep_cells: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Pool the features; see `roi_pool.functional`.

    Returns:
        (R, C, Ph, Pw) with channels_last strides; and, with `keep_cells`, the table (N, C) of all cells for `backward`.
    """
    dtype = features[0].dtype
    table = _cell_table(features, table_dtype(dtype))

    pooled = []
    for bags in _bags(geometry, rois, levels, offset):
        weights = bags.weights.to(table.dtype)
        pooled.append(F.embedding_bag(bags.cells, table, bags.begins, mode="sum", per_sample_weights=weights))

    bins = pooled[0] if len(pooled) == 1 else torch.cat([table[:0], *pooled])
    bins = bins.view(len(rois), *geometry.bins, table.shape[1]).to(dtype)
    return bins.permute(0, 3, 1, 2), table if keep_cells else None


def backward(
    geometry: RoIPoolGeometry,
    grad: Tensor,
    cells: Tensor | None,
    rois: Tensor,
    levels: Tensor,
    offset: Tensor | None,
    *,
    needs_features: bool,
    needs_offset: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradient of all levels as one (N, C) table in the dtype of `grad`, and that of the offset.

    Args:
        geometry: of the call.
        grad: (R, C, Ph, Pw).
        cells: (N, C), what `forward` kept; read only for the gradient of the offset.
        rois, levels, offset: as in `forward`.
        needs_features, needs_offset: which gradients to compute; None takes the place of the other one.
    """
    channels = grad.shape[1]
    dtype = torch.promote_types(grad.dtype, torch.float32)
    grad_bins = grad.permute(0, 2, 3, 1).to(dtype).reshape(-1, channels)  # (R * Ph * Pw, C)

    table = None
    slopes = []
    for bags in _bags(geometry, rois, levels, offset, with_slopes=needs_offset):
        bag = bags.bag_of_entries()
        if needs_offset and cells is not None:
            slopes.append(bags.sum_slopes(bag, grad_bins, cells))
        if needs_features:
            sorted_cells, order = bags.cells.sort(stable=True)
            counts = torch.bincount(sorted_cells, minlength=geometry.num_cells)
            begins = counts.cumsum(0) - counts
            weights = bags.weights[order].to(dtype)
            bag = bag[order] + bags.first
            part = F.embedding_bag(bag, grad_bins, begins, mode="sum", per_sample_weights=weights)
            table = part if table is None else table.add_(part)

    if needs_features and table is None:
        table = grad_bins.new_zeros(geometry.num_cells, channels)
    grad_offset = None
    if needs_offset and offset is not None:
        grad_offset = _offset_gradient(geometry, slopes, rois, levels, offset)
    return None if table is None else table.to(grad.dtype), grad_offset


def _offset_gradient(
    geometry: RoIPoolGeometry, slopes: list[Tensor], rois: Tensor, levels: Tensor, offset: Tensor
) -> Tensor:
    """Return the gradient of the offset (R, 2, Ph, Pw) from the slopes of all bins in y and x, in cells."""
    if not slopes:
        return torch.zeros_like(offset)
    y_slope, x_slope = torch.cat(slopes, 1).view(2, len(rois), *geometry.bins)
    axes = _AxesOfRoIs.of(geometry, rois, levels, offset)
    grad_x = geometry.gamma * axes.x_length[:, None, None] * x_slope
    grad_y = geometry.gamma * axes.y_length[:, None, None] * y_slope
    return torch.stack([grad_x, grad_y], 1).to(offset.dtype)


def _cell_table(features: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Copy the features into one (N, C) table, level after level, each in (B, Hl, Wl) order."""
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


@dataclass(frozen=True)
class _Bags:
    """The bags of consecutive bins.

    Attributes:
        first: number of the first bin.
        cells: (E,) int64, row in the table of each entry's cell.
        begins: (bins,) int64, where each bag begins among the entries.
        weights: (E,), how much the cell counts in its bin.
        lines: (bins,) int64, how many lines of cells each bag has.
        lengths: of each line of each bag, int64.
        y_moving: (lines, 2), for each line, slope and free weight along y, see `_AxisWeights`; None if not asked for.
        x_moving: (E, 2), for each entry, free weight and slope along x.
    """

    first: int
    cells: Tensor
    begins: Tensor
    weights: Tensor
    lines: Tensor
    lengths: Tensor
    y_moving: Tensor | None
    x_moving: Tensor | None

    def bag_of_entries(self) -> Tensor:
        """Return the bag of each entry (E,), counted from 0."""
        return torch.repeat_interleave(self._sizes(), output_size=len(self.cells))

    def sum_slopes(self, bag: Tensor, grad_bins: Tensor, table: Tensor) -> Tensor:
        """Return how fast the loss changes where each bin moves in y and x, (2, bins).

        Args:
            bag: of `bag_of_entries`.
            grad_bins: (R * Ph * Pw, C), gradient of the loss for the pooled bins.
            table: (N, C), the cells.
        """
        assert self.y_moving is not None
        assert self.x_moving is not None
        grad_bags = grad_bins[self.first : self.first + len(self.begins)]
        # The product of each entry's cell and its bin's gradient, by what autograd runs for `per_sample_weights`.
        products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad_bags, table, self.cells, self.begins, bag, SUM
        )
        entries = products[:, None] * self.x_moving.to(products.dtype)
        sums = _segment_sums(entries, self.lengths) * self.y_moving.to(products.dtype)
        return _segment_sums(sums, self.lines).t()

    def _sizes(self) -> Tensor:
        return self.begins.diff(append=self.begins.new_tensor([len(self.cells)]))


def _segment_sums(rows: Tensor, lengths: Tensor) -> Tensor:
    """Return the sums of consecutive rows, of which there are as many as `lengths` says."""
    # `unsafe` spares the check of the lengths, which fails where there are none
    return torch.segment_reduce(rows, "sum", lengths=lengths, axis=0, initial=0, unsafe=True)


@dataclass(frozen=True)
class _AxesOfRoIs:
    """Where the rois lie on the maps of their levels.

    Attributes:
        live: (R, 1, 1) bool, or (R, Ph, Pw) with an offset: what is pooled at all.
        y_start, x_start: first edge of the rois in cells, (R, 1, 1) or, moved by the offset, (R, Ph, Pw).
        y_length, x_length: (R,), extent of the rois in cells.
        heights, widths: (R,) int64, size of the roi's level in cells.
        image_starts: (R,) int64, row of the table where the roi's image begins at the roi's level.
    """

    live: Tensor
    y_start: Tensor
    x_start: Tensor
    y_length: Tensor
    x_length: Tensor
    heights: Tensor
    widths: Tensor
    image_starts: Tensor

    @classmethod
    def of(cls, geometry: RoIPoolGeometry, rois: Tensor, levels: Tensor, offset: Tensor | None) -> _AxesOfRoIs:
        """Compute in float32, or in float64 if the rois or the offset are."""
        dtype = torch.promote_types(rois.dtype, torch.float32)
        if offset is not None:
            dtype = torch.promote_types(dtype, offset.dtype)
        rois = rois.to(dtype)
        live = _live_rois(rois, levels, geometry)
        rois = rois.where(live[:, None], 0)

        device = rois.device
        level = levels.where(live, 0)
        heights = torch.tensor(geometry.heights, device=device)[level]
        widths = torch.tensor(geometry.widths, device=device)[level]
        level_starts = torch.tensor(geometry.level_starts, device=device)[level]
        scale = torch.tensor(geometry.scales, dtype=dtype, device=device)[level]
        x1, y1, x2, y2 = (rois[:, 1:] * scale[:, None] - 0.5).unbind(1)
        y_length = y2 - y1
        x_length = x2 - x1
        live = live[:, None, None]
        y_start = y1[:, None, None]
        x_start = x1[:, None, None]
        if offset is not None:
            x_shift, y_shift = offset.to(dtype).unbind(1)  # (R, Ph, Pw)
            y_start = y_start + geometry.gamma * y_length[:, None, None] * y_shift
            x_start = x_start + geometry.gamma * x_length[:, None, None] * x_shift
            live = live & y_start.isfinite() & x_start.isfinite()
            y_start = y_start.where(live, 0)
            x_start = x_start.where(live, 0)

        image_starts = level_starts + rois[:, 0].long() * heights * widths
        return cls(live, y_start, x_start, y_length, x_length, heights, widths, image_starts)

    def of_rois(self, part: slice) -> _AxesOfRoIs:
        """Return a range of rois."""
        return _AxesOfRoIs(**{name: tensor[part] for name, tensor in vars(self).items()})

    def most_samples(self, geometry: RoIPoolGeometry) -> list[int]:
        """Return for each roi how many samples of its bins can be on the map, along both axes together, at most."""
        bins_y, bins_x = geometry.bins
        most = torch.zeros_like(self.y_length)
        for length, bins, size, start in (
            (self.y_length, bins_y, self.heights, self.y_start),
            (self.x_length, bins_x, self.widths, self.x_start),
        ):
            moved_bins = start.shape[1] * start.shape[2]
            num_bins = geometry.bins_per_roi if moved_bins > 1 else bins
            samples = (length / bins).ceil().clamp(min=0).minimum(2 * size + 8)  # over half a cell apart
            most += num_bins * (geometry.sampling_ratio or samples)
        return most.long().tolist()


def _bags(
    geometry: RoIPoolGeometry, rois: Tensor, levels: Tensor, offset: Tensor | None, with_slopes: bool = False
) -> Iterator[_Bags]:
    """Yield the bags of all bins in chunks of consecutive rois."""
    axes = _AxesOfRoIs.of(geometry, rois, levels, offset)
    for start, stop in _chunks(axes.most_samples(geometry)):
        yield from _bags_of_rois(geometry, axes.of_rois(slice(start, stop)), start, with_slopes)


def _bags_of_rois(geometry: RoIPoolGeometry, axes: _AxesOfRoIs, first_roi: int, with_slopes: bool) -> Iterator[_Bags]:
    """Yield the bags of the bins of consecutive rois, whose samples are merged at once."""
    bins_y, bins_x = geometry.bins
    device = axes.live.device
    ratio = geometry.sampling_ratio
    y_bins = torch.arange(bins_y, device=device)[:, None]
    x_bins = torch.arange(bins_x, device=device)
    y_axis = _merge_samples(axes.y_start, axes.y_length / bins_y, y_bins, axes.heights, axes.live, ratio, with_slopes)
    x_axis = _merge_samples(axes.x_start, axes.x_length / bins_x, x_bins, axes.widths, axes.live, ratio, with_slopes)

    sizes = y_axis.count * x_axis.count  # (R, Ph, Pw)
    for start, stop in _chunks(sizes.sum((1, 2)).tolist()):
        part = slice(start, stop)
        bags = _outer_product(y_axis, x_axis, part, axes.image_starts, axes.widths)
        yield _Bags((first_roi + start) * geometry.bins_per_roi, *bags)


def _live_rois(rois: Tensor, levels: Tensor, geometry: RoIPoolGeometry) -> Tensor:
    """Return (R,) bool: batch index and level exist, and the box and its sides are finite, also in cells."""
    exists = (rois[:, 0] >= 0) & (rois[:, 0] < geometry.batch) & (levels >= 0) & (levels < len(geometry.scales))
    sides = rois[:, 3:] - rois[:, 1:3]
    numbers = torch.cat([rois[:, 1:], sides], 1) * max(1.0, *geometry.scales)
    return exists & numbers.isfinite().all(1)


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

    The shape of the bins is (R, Ph, Pw), where Pw (along y) or Ph (along x) is 1 without an offset.

    Attributes:
        first: the first cell of each bin.
        count: how many consecutive cells it has; 0 for a bin without samples.
        begin: where the weights of the bin begin in `weights`.
        weights: flat, already divided by the number of samples per bin.
        moving: (weights, 2), None if not asked for: the weights for samples that are not moved onto the map, called
            free, and the derivatives of the weights for the position of the bin, called slopes.
    """

    first: Tensor
    count: Tensor
    begin: Tensor
    weights: Tensor
    moving: Tensor | None


def _merge_samples(
    start: Tensor,
    bin_length: Tensor,
    bin_numbers: Tensor,
    size: Tensor,
    live: Tensor,
    sampling_ratio: int,
    with_slopes: bool,
) -> _AxisWeights:
    """Merge the samples of each bin along one axis into weights of consecutive cells.

    Args:
        start: (R, 1, 1) or (R, Ph, Pw), first edge of the roi, in cells.
        bin_length: (R,), extent of its bins, in cells.
        bin_numbers: (Ph, 1) or (Pw,), numbers of the bins along the axis.
        size: (R,) int64, cells of the roi's level along the axis.
        live: as `start`, bool; the others get no cells.
        sampling_ratio: samples per bin; 0 is adaptive.
        with_slopes: whether to compute also what the gradient of the offset needs.
    """
    bin_starts = start + bin_numbers * bin_length[:, None, None]
    shape = bin_starts.shape
    bins = shape[1] * shape[2]  # per roi
    bin_start = bin_starts.flatten(1)
    samples_per_bin, first_sample, stop_sample = _sample_range(bin_start, bin_length[:, None], size, sampling_ratio)

    # One entry per sample of every bin: the number of its bin, and its position.
    counts = ((stop_sample - first_sample).clamp(min=0) * live.flatten(1)).long().flatten()
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    bin_index = torch.repeat_interleave(counts, output_size=total)
    roi = bin_index // bins
    sample = torch.arange(total, device=start.device) - (ends - counts)[bin_index] + first_sample.flatten()[bin_index]
    samples_per_bin = samples_per_bin[:, 0]
    position = bin_start.flatten()[bin_index] + (sample + 0.5) * bin_length[roi] / samples_per_bin[roi]

    # Leave out the samples that read 0.
    last_cell = size[roi] - 1
    inside = ((position >= -1) & (position <= last_cell + 1)).nonzero()[:, 0]
    bin_index = bin_index[inside]
    roi = roi[inside]
    position = position[inside]
    last_cell = last_cell[inside]

    # Each sample gives weight to two cells.
    on_map = position.clamp(min=0).minimum(last_cell)
    low = on_map.long()
    high = (low + 1).minimum(last_cell)
    samples = samples_per_bin[roi]
    high_weight = (on_map - low) / samples
    low_weight = 1 / samples - high_weight

    # Sum the weights of equal cells of a bin.
    first = torch.full_like(counts, 1 << 40).scatter_reduce(0, bin_index, low, "amin")
    last = torch.full_like(counts, -1).scatter_reduce(0, bin_index, high, "amax")
    count = (last - first + 1).clamp(min=0)
    begin = count.cumsum(0) - count
    weights_start = (begin - first)[bin_index]
    num_weights = int(count.sum())

    def merge(low_terms: Tensor, high_terms: Tensor) -> Tensor:
        merged = position.new_zeros(num_weights)
        merged.index_add_(0, weights_start + low, low_terms)
        merged.index_add_(0, weights_start + high, high_terms)
        return merged

    weights = merge(low_weight, high_weight)
    moving = None
    if with_slopes:
        free = merge((high - position) / samples, (position - low) / samples)
        moving = torch.stack([free, merge(-1 / samples, 1 / samples)], 1)
    return _AxisWeights(first.view(shape), count.view(shape), begin.view(shape), weights, moving)


def _sample_range(
    bin_start: Tensor, bin_length: Tensor, size: Tensor, sampling_ratio: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return samples per bin (R, 1), and the range [first, stop) of samples (R, bins) that can lie in [-1, size]."""
    if sampling_ratio:
        samples_per_bin = torch.full_like(bin_length, sampling_ratio)
        return samples_per_bin, torch.zeros_like(bin_start), samples_per_bin.expand_as(bin_start)

    # rounded up from float32 also in float64, as mmcv does
    samples_per_bin = bin_length.float().ceil().clamp(0, MAX_ADAPTIVE_SAMPLES).to(bin_length)
    step = bin_length / samples_per_bin
    first = ((-1 - bin_start) / step - 1.5).floor()
    stop = ((size[:, None] - bin_start) / step + 2.5).ceil()
    first = first.nan_to_num(0).clamp(min=0).minimum(samples_per_bin)
    stop = stop.nan_to_num(0).clamp(min=0).minimum(samples_per_bin)
    return samples_per_bin, first, stop


def _outer_product(
    y_axis: _AxisWeights,
    x_axis: _AxisWeights,
    part: slice,
    image_starts: Tensor,
    widths: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Expand the outer product of the axes into bags, in (roi, bin y, bin x, cell y, cell x) order.

    Args:
        y_axis, x_axis: weights along the axes.
        part: the rois to expand.
        image_starts: (R,), row of the table where the roi's image begins at the roi's level.
        widths: (R,), cells per line of that level.

    Returns:
        The attributes of `_Bags` after the first.
    """
    device = image_starts.device
    bins = torch.broadcast_shapes(y_axis.count[part].shape, x_axis.count[part].shape)

    def of_bags(numbers: Tensor) -> Tensor:
        return numbers[part].expand(bins).flatten()

    # One entry per run, the consecutive cells of one line in one bag.
    lines = of_bags(y_axis.count)
    line_ends = lines.cumsum(0)
    bag = torch.repeat_interleave(lines, output_size=int(line_ends[-1]))
    line = torch.arange(len(bag), device=device) - (line_ends - lines)[bag]
    starts = image_starts[:, None, None] + y_axis.first * widths[:, None, None] + x_axis.first
    first_cell = of_bags(starts)[bag] + line * of_bags(widths[:, None, None])[bag]
    y_index = of_bags(y_axis.begin)[bag] + line

    # One entry per cell.
    lengths = of_bags(x_axis.count)[bag]
    ends = lengths.cumsum(0)
    run_begins = ends - lengths
    total = int(ends[-1]) if len(ends) else 0
    run = torch.repeat_interleave(lengths, output_size=total)
    entry = torch.arange(total, device=device)
    cells = entry + (first_cell - run_begins)[run]
    x_index = entry + (of_bags(x_axis.begin)[bag] - run_begins)[run]
    weights = x_axis.weights[x_index] * y_axis.weights[y_index][run]

    y_moving = None if y_axis.moving is None else y_axis.moving.flip(1).index_select(0, y_index)
    x_moving = None if x_axis.moving is None else x_axis.moving.index_select(0, x_index)

    sizes = lines * of_bags(x_axis.count)
    return cells, sizes.cumsum(0) - sizes, weights, lines, lengths, y_moving, x_moving
