"""Where the samples of a bin lie, and what they weigh, along one axis: shared by all kernels of RoI pooling.

A cell is one position of a feature map; positions and lengths are in cells.

The kernels receive the sizes of the levels as tuples of floats: for integers in a tuple Triton compiles again where one
becomes 1 or a multiple of 16, and so for many different image sizes.
"""

import triton
import triton.language as tl

ADAPTIVE_CANDIDATES = 5
"""Adaptive samples are over 1/2 apart: at most 4 are within one cell of a cell, 1 more by rounding."""

ADAPTIVE_SLOPE_CANDIDATES = 7
"""As above, for cell 1, which also sees the samples that are up to a cell beyond the border."""


@triton.jit
def select(values, index, COUNT: tl.constexpr):
    """Return values[index] for a run-time index into a tuple of COUNT scalars; values[0] if it is out of range."""
    chosen = values[0]
    for i in tl.static_range(1, COUNT):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def is_finite(value):
    """Return whether a float is neither NaN nor infinite."""
    return tl.abs(value) < float("inf")


@triton.jit
def load_roi(rois_ptr, levels_ptr, scales, roi, batch, LEVELS: tl.constexpr):
    """Return a roi as (live, level, y_start, x_start, y_length, x_length); one that is ignored lies at 0, without size.

    Args:
        rois_ptr, levels_ptr: (R, 5) float32 and (R,) int64.
        scales: cells per pixel, a tuple over the levels.
        roi: its index, int64.
        batch: number of images.
        LEVELS: number of levels.
    """
    image = tl.load(rois_ptr + roi * 5)
    x1 = tl.load(rois_ptr + roi * 5 + 1)
    y1 = tl.load(rois_ptr + roi * 5 + 2)
    x2 = tl.load(rois_ptr + roi * 5 + 3)
    y2 = tl.load(rois_ptr + roi * 5 + 4)
    level = tl.load(levels_ptr + roi)
    live = (image >= 0) & (image < batch) & (level >= 0) & (level < LEVELS)
    live = live & is_finite(x2 - x1) & is_finite(y2 - y1) & is_finite(x1) & is_finite(y1)

    scale = select(scales, level, LEVELS)
    y_start = y1 * scale - 0.5
    x_start = x1 * scale - 0.5
    y_length = y2 * scale - 0.5 - y_start
    x_length = x2 * scale - 0.5 - x_start
    live = live & is_finite(x_length) & is_finite(y_length) & is_finite(x_start) & is_finite(y_start)
    y_start = tl.where(live, y_start, 0.0)
    x_start = tl.where(live, x_start, 0.0)
    y_length = tl.where(live, y_length, 0.0)
    x_length = tl.where(live, x_length, 0.0)
    return live, level, y_start, x_start, y_length, x_length


@triton.jit
def count_samples(bin_length, SAMPLING_RATIO: tl.constexpr, MAX_SAMPLES: tl.constexpr):
    """Return the samples per bin, a float; 0 where the side of the roi is not positive and sampling is adaptive."""
    samples = bin_length * 0.0 + SAMPLING_RATIO
    if SAMPLING_RATIO == 0:
        samples = tl.minimum(tl.maximum(tl.ceil(bin_length), 0.0), MAX_SAMPLES)
    return samples


@triton.jit
def sample_position(bin_start, bin_length, samples, sample):
    """Return the coordinate of a sample, in the order of operations of the CPU path."""
    return bin_start + tl.div_rn((sample + 0.5) * bin_length, samples)


@triton.jit
def bin_bounds(bin_start, bin_length, samples, size):
    """Return (used, first, stop): whether a sample can be on the map, and the cells between the outermost samples.

    Args:
        bin_start: where the bins begin.
        bin_length: their extent, which may be negative.
        samples: per bin, at least 1.
        size: cells of the map along the axis, int32.
    """
    first_position = sample_position(bin_start, bin_length, samples, 0.0)
    last_position = sample_position(bin_start, bin_length, samples, samples - 1)
    lowest = tl.minimum(first_position, last_position)
    highest = tl.maximum(first_position, last_position)
    used = (lowest <= size) & (highest >= -1)
    last_cell = (size - 1).to(tl.float32)
    first = tl.minimum(tl.maximum(lowest, 0.0), last_cell).to(tl.int32)
    stop = tl.minimum(tl.minimum(tl.maximum(highest, 0.0), last_cell).to(tl.int32) + 1, size - 1) + 1
    return used, first, stop


@triton.jit
def first_candidate(begin, bin_start, bin_length, samples, SAMPLING_RATIO: tl.constexpr):
    """Return the number of the first sample that may be at `begin` or after it; 0 if sampling is not adaptive."""
    distance = begin - bin_start
    candidate = distance * 0.0
    if SAMPLING_RATIO == 0:
        candidate = tl.maximum(tl.ceil(distance * (samples / bin_length) - 0.51), 0.0)
    return candidate


@triton.jit
def cell_weight(cell, bin_start, bin_length, samples, size, SAMPLING_RATIO: tl.constexpr, CANDIDATES: tl.constexpr):
    """Return the sum of the bilinear weights of a bin's samples at a cell, not divided by their number.

    Args:
        cell: int32.
        bin_start, bin_length, samples: of the bin, which has at least one sample; shapes that broadcast with `cell`.
        size: cells of the map along the axis, int32.
        SAMPLING_RATIO: samples per bin; 0 is adaptive.
        CANDIDATES: how many samples may be less than one cell away.
    """
    last_cell = (size - 1).to(tl.float32)
    candidate = first_candidate(cell - 1, bin_start, bin_length, samples, SAMPLING_RATIO)
    weight = candidate * 0.0
    for i in tl.static_range(CANDIDATES):
        position = sample_position(bin_start, bin_length, samples, candidate + i)
        inside = (position >= -1) & (position <= size) & (candidate + i < samples)
        position = tl.minimum(tl.maximum(position, 0.0), last_cell)
        weight += tl.where(inside, tl.maximum(1 - tl.abs(cell - position), 0.0), 0.0)
    return weight


@triton.jit
def cell_slope(cell, bin_start, bin_length, samples, size, SAMPLING_RATIO: tl.constexpr, CANDIDATES: tl.constexpr):
    """Return (free weight, slope) of a cell, for the gradient of the offset; the arguments are those of `cell_weight`.

    The slope is the derivative of the cell's weight for the position of the bin. The free weight is that of samples
    which are not moved onto the map: before it they count less than 0 at cell 1 and more than 1 at cell 0, behind it
    their two cells are one, whose terms add up to 0.
    """
    last_cell = (size - 1).to(tl.float32)
    begin = tl.where(cell == 1, -1, cell - 1)
    candidate = first_candidate(begin, bin_start, bin_length, samples, SAMPLING_RATIO)
    free_weight = candidate * 0.0
    slope = candidate * 0.0
    for i in tl.static_range(CANDIDATES):
        position = sample_position(bin_start, bin_length, samples, candidate + i)
        on_map = tl.maximum(position, 0.0)
        inside = (position >= -1) & (on_map < last_cell) & (candidate + i < samples)
        low = tl.floor(on_map)
        is_low = inside & (cell == low)
        is_high = inside & (cell == low + 1)
        free_weight += tl.where(is_low, low + 1 - position, 0.0) + tl.where(is_high, position - low, 0.0)
        slope += tl.where(is_high, 1.0, 0.0) - tl.where(is_low, 1.0, 0.0)
    return free_weight, slope


@triton.jit
def locate_tile(tile, heights, widths, batch, LEVELS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Return where a tile of cells lies, counted through all levels and images.

    Returns:
        level, image, the first row and column of the tile, height and width of the level, and the row (int64) of the
        table of all cells (N, C) where the level begins.
    """
    level = 0
    row = tl.full((), 0, tl.int64)
    for i in tl.static_range(LEVELS - 1):
        height = tl.cast(heights[i], tl.int32)
        width = tl.cast(widths[i], tl.int32)
        tiles = batch * tl.cdiv(height, TILE_H) * tl.cdiv(width, TILE_W)
        beyond = (level == i) & (tile >= tiles)
        tile -= tl.where(beyond, tiles, 0)
        row += tl.where(beyond, batch * height * width, 0)
        level += tl.where(beyond, 1, 0)
    height = tl.cast(select(heights, level, LEVELS), tl.int32)
    width = tl.cast(select(widths, level, LEVELS), tl.int32)
    tiles_x = tl.cdiv(width, TILE_W)
    tiles = tl.cdiv(height, TILE_H) * tiles_x
    image = tile // tiles
    y_tile = tile % tiles // tiles_x * TILE_H
    x_tile = tile % tiles_x * TILE_W
    return level, image, y_tile, x_tile, height, width, row
