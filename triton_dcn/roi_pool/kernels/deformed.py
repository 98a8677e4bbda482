"""RoI pooling with an offset: every bin has a place of its own, and no two share their weights along an axis.

The weights of a bin are computed where they are used, from what `deformed_bins_kernel` writes:

    starts  (R, 2, P) float32       where each bin begins, in cells; axis 0 is y, 1 is x
    sizes   (R, 2, 3) float32       extent of the roi, extent of a bin, and samples per bin, at least 1
    bounds  (R, 2, P, 2) int32      first cell of a bin and one past its last; equal for a bin without samples
    hulls   (R, 2, 2) int32         the same for the whole roi; a roi that is ignored has empty bounds and hull

Letters: R rois, Ph Pw bins of a roi, P their number, C channels, N cells of all levels and images. A cell is one
position of a feature map.
"""

import triton
import triton.language as tl

from triton_dcn.roi_pool.kernels.pool import CELLS_PER_READ, ROIS_PER_READ
from triton_dcn.roi_pool.kernels.sampling import (
    bin_bounds,
    cell_slope,
    cell_weight,
    count_samples,
    is_finite,
    load_roi,
    locate_tile,
    select,
)


@triton.jit(do_not_specialize=["batch"])
def deformed_bins_kernel(
    starts_ptr,
    sizes_ptr,
    bounds_ptr,
    hulls_ptr,
    rois_ptr,
    levels_ptr,
    offset_ptr,
    heights,
    widths,
    scales,
    gamma,
    batch,
    LEVELS: tl.constexpr,
    BINS_Y: tl.constexpr,
    BINS_X: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    MAX_SAMPLES: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Place the bins of one roi.

    Grid: (R,).
    Reads: rois (R, 5) float32, levels (R,) int64, offset (R, 2, Ph, Pw) in any dtype; heights, widths, scales (cells
        per pixel), tuples over the levels.
    Writes: starts, sizes, bounds and hulls, in full.
    Assumes: BLOCK_P >= BINS_Y * BINS_X.
    """
    BINS: tl.constexpr = BINS_Y * BINS_X
    roi = tl.program_id(0).to(tl.int64)
    live, level, y_start, x_start, y_length, x_length = load_roi(rois_ptr, levels_ptr, scales, roi, batch, LEVELS)
    height = select(heights, level, LEVELS).to(tl.int32)
    width = select(widths, level, LEVELS).to(tl.int32)
    y_bin_length = tl.div_rn(y_length, BINS_Y * 1.0)
    x_bin_length = tl.div_rn(x_length, BINS_X * 1.0)
    y_samples = count_samples(y_bin_length, SAMPLING_RATIO, MAX_SAMPLES)
    x_samples = count_samples(x_bin_length, SAMPLING_RATIO, MAX_SAMPLES)
    sampled_bins = tl.where(live & (y_samples > 0) & (x_samples > 0), BINS, 0)
    y_samples = tl.maximum(y_samples, 1.0)
    x_samples = tl.maximum(x_samples, 1.0)

    bins = tl.arange(0, BLOCK_P)
    exists = bins < BINS
    x_shift = tl.load(offset_ptr + roi * 2 * BINS + bins, mask=exists, other=0.0).to(tl.float32)
    y_shift = tl.load(offset_ptr + (roi * 2 + 1) * BINS + bins, mask=exists, other=0.0).to(tl.float32)
    y_first = y_start + gamma * y_length * y_shift
    x_first = x_start + gamma * x_length * x_shift
    placed = (bins < sampled_bins) & is_finite(y_first) & is_finite(x_first)
    y_bin_start = tl.where(placed, y_first, 0.0) + bins // BINS_X * y_bin_length
    x_bin_start = tl.where(placed, x_first, 0.0) + bins % BINS_X * x_bin_length

    y_used, y_begin, y_end = bin_bounds(y_bin_start, y_bin_length, y_samples, height)
    x_used, x_begin, x_end = bin_bounds(x_bin_start, x_bin_length, x_samples, width)
    used = placed & y_used & x_used

    tl.store(starts_ptr + roi * 2 * BINS + bins, y_bin_start, mask=exists)
    tl.store(starts_ptr + (roi * 2 + 1) * BINS + bins, x_bin_start, mask=exists)
    y_bounds_ptr = bounds_ptr + (roi * 2 * BINS + bins) * 2
    x_bounds_ptr = y_bounds_ptr + 2 * BINS
    tl.store(y_bounds_ptr, tl.where(used, y_begin, 0), mask=exists)
    tl.store(y_bounds_ptr + 1, tl.where(used, y_end, 0), mask=exists)
    tl.store(x_bounds_ptr, tl.where(used, x_begin, 0), mask=exists)
    tl.store(x_bounds_ptr + 1, tl.where(used, x_end, 0), mask=exists)
    tl.store(hulls_ptr + roi * 4, tl.min(tl.where(used, y_begin, height)))
    tl.store(hulls_ptr + roi * 4 + 1, tl.max(tl.where(used, y_end, 0)))
    tl.store(hulls_ptr + roi * 4 + 2, tl.min(tl.where(used, x_begin, width)))
    tl.store(hulls_ptr + roi * 4 + 3, tl.max(tl.where(used, x_end, 0)))
    tl.store(sizes_ptr + roi * 6, y_length)
    tl.store(sizes_ptr + roi * 6 + 1, y_bin_length)
    tl.store(sizes_ptr + roi * 6 + 2, y_samples)
    tl.store(sizes_ptr + roi * 6 + 3, x_length)
    tl.store(sizes_ptr + roi * 6 + 4, x_bin_length)
    tl.store(sizes_ptr + roi * 6 + 5, x_samples)


@triton.jit
def deformed_pool_kernel(
    out_ptr,
    feature_ptrs,
    heights,
    widths,
    starts_ptr,
    sizes_ptr,
    bounds_ptr,
    rois_ptr,
    levels_ptr,
    channels,
    LEVELS: tl.constexpr,
    BINS: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Pool the features of one bin.

    Grid: (R * P, ceil(C / BLOCK_C)); one program owns a block of channels of one bin.
    Reads: features, a tuple over the levels of (B, H, W, C) in any dtype; starts, sizes, bounds; rois (R, 5) float32,
        levels (R,) int64.
    Writes: out (R, P, C), in full.
    """
    pid = tl.program_id(0)
    roi = (pid // BINS).to(tl.int64)
    level = tl.load(levels_ptr + roi)
    image = tl.load(rois_ptr + roi * 5)
    image = tl.where(image >= 0, image, 0.0).to(tl.int64)  # that of padding is not used: its bounds are empty
    height = tl.cast(select(heights, level, LEVELS), tl.int32)
    width = tl.cast(select(widths, level, LEVELS), tl.int32)
    feature_ptr = select(feature_ptrs, level, LEVELS)
    y_bin = roi * 2 * BINS + pid % BINS
    x_bin = y_bin + BINS
    y_start = tl.load(starts_ptr + y_bin)
    x_start = tl.load(starts_ptr + x_bin)
    y_length = tl.load(sizes_ptr + roi * 6 + 1)
    y_samples = tl.load(sizes_ptr + roi * 6 + 2)
    x_length = tl.load(sizes_ptr + roi * 6 + 4)
    x_samples = tl.load(sizes_ptr + roi * 6 + 5)
    x_stop = tl.load(bounds_ptr + x_bin * 2 + 1)

    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live_c = c < channels
    pooled = tl.zeros((CELLS_PER_READ, BLOCK_C), tl.float32)
    for x_begin in range(tl.load(bounds_ptr + x_bin * 2), x_stop, CELLS_PER_READ):
        x = x_begin + tl.arange(0, CELLS_PER_READ)
        x_weight = cell_weight(x, x_start, x_length, x_samples, width, SAMPLING_RATIO, CANDIDATES)
        live = (x < x_stop)[:, None] & live_c[None, :]
        for y in range(tl.load(bounds_ptr + y_bin * 2), tl.load(bounds_ptr + y_bin * 2 + 1)):
            y_weight = cell_weight(y, y_start, y_length, y_samples, height, SAMPLING_RATIO, CANDIDATES)
            line_ptr = feature_ptr + (image * height + y) * width * channels
            value = tl.load(line_ptr + x[:, None] * channels + c[None, :], mask=live, other=0.0)
            pooled += (y_weight * x_weight)[:, None] * value.to(tl.float32)  # (CELLS_PER_READ, BLOCK_C)
    out = tl.sum(pooled, axis=0) / (y_samples * x_samples)
    tl.store(out_ptr + pid.to(tl.int64) * channels + c, out.to(out_ptr.dtype.element_ty), mask=live_c)


@triton.jit(do_not_specialize=["batch"])
def deformed_pool_grad_kernel(
    out_ptr,
    grad_ptr,
    heights,
    widths,
    starts_ptr,
    sizes_ptr,
    bounds_ptr,
    hulls_ptr,
    order_ptr,
    begins_ptr,
    batch,
    channels,
    LEVELS: tl.constexpr,
    BINS: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Gather the gradient of one tile of cells from the bins that touch it.

    Grid: (tiles of all levels and images, ceil(C / BLOCK_C)); one program owns TILE_H x TILE_W cells.
    Reads: grad (R, P, C) in any dtype; starts, sizes, bounds, hulls; order (R,) int64, the rois sorted by (level,
        image), and begins (levels * B + 1,) int64 where each pair begins in it; heights, widths, tuples over the
        levels.
    Writes: out (N, C), in full.
    """
    level, image, y_tile, x_tile, height, width, row = locate_tile(
        tl.program_id(0), heights, widths, batch, LEVELS, TILE_H, TILE_W
    )
    cell = tl.arange(0, TILE_H * TILE_W)
    y = y_tile + cell // TILE_W
    x = x_tile + cell % TILE_W
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live_c = c < channels
    lane = tl.arange(0, ROIS_PER_READ)
    bins = tl.arange(0, BLOCK_P)
    exists_bin = bins < BINS
    total = tl.zeros((TILE_H * TILE_W, BLOCK_C), tl.float32)
    begin = tl.load(begins_ptr + level * batch + image)
    end = tl.load(begins_ptr + level * batch + image + 1)
    for first in range(begin, end, ROIS_PER_READ):
        # The rois of this read whose hull meets the tile.
        exists = first + lane < end
        hull_ptr = hulls_ptr + tl.load(order_ptr + first + lane, mask=exists, other=0) * 4
        meets = exists & (tl.load(hull_ptr) < y_tile + TILE_H) & (tl.load(hull_ptr + 1) > y_tile)
        meets = meets & (tl.load(hull_ptr + 2) < x_tile + TILE_W) & (tl.load(hull_ptr + 3) > x_tile)
        next_lane = tl.min(tl.where(meets, lane, ROIS_PER_READ))
        while next_lane < ROIS_PER_READ:
            roi = tl.load(order_ptr + first + next_lane)
            y_length = tl.load(sizes_ptr + roi * 6 + 1)
            y_samples = tl.load(sizes_ptr + roi * 6 + 2)
            x_length = tl.load(sizes_ptr + roi * 6 + 4)
            x_samples = tl.load(sizes_ptr + roi * 6 + 5)

            # The bins of the roi that meet the tile.
            y_bounds_ptr = bounds_ptr + (roi * 2 * BINS + bins) * 2
            x_bounds_ptr = y_bounds_ptr + 2 * BINS
            touches = tl.load(y_bounds_ptr, mask=exists_bin, other=height) < y_tile + TILE_H
            touches = touches & (tl.load(y_bounds_ptr + 1, mask=exists_bin, other=0) > y_tile)
            touches = touches & (tl.load(x_bounds_ptr, mask=exists_bin, other=width) < x_tile + TILE_W)
            touches = touches & (tl.load(x_bounds_ptr + 1, mask=exists_bin, other=0) > x_tile)
            next_bin = tl.min(tl.where(touches, bins, BINS))
            while next_bin < BINS:
                y_start = tl.load(starts_ptr + roi * 2 * BINS + next_bin)
                x_start = tl.load(starts_ptr + (roi * 2 + 1) * BINS + next_bin)
                weight = cell_weight(y, y_start, y_length, y_samples, height, SAMPLING_RATIO, CANDIDATES)
                weight *= cell_weight(x, x_start, x_length, x_samples, width, SAMPLING_RATIO, CANDIDATES)
                weight /= y_samples * x_samples  # (TILE_H * TILE_W,)
                row_ptr = grad_ptr + (roi * BINS + next_bin) * channels
                grad = tl.load(row_ptr + c, mask=live_c, other=0.0).to(tl.float32)
                total += weight[:, None] * grad[None, :]
                next_bin = tl.min(tl.where(touches & (bins > next_bin), bins, BINS))
            next_lane = tl.min(tl.where(meets & (lane > next_lane), lane, ROIS_PER_READ))
    row += (image.to(tl.int64) * height + y) * width + x
    live = ((y < height) & (x < width))[:, None] & live_c[None, :]
    tl.store(out_ptr + row[:, None] * channels + c[None, :], total.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def deformed_pool_grad_offset_kernel(
    out_ptr,
    grad_ptr,
    feature_ptrs,
    heights,
    widths,
    starts_ptr,
    sizes_ptr,
    bounds_ptr,
    rois_ptr,
    levels_ptr,
    gamma,
    channels,
    LEVELS: tl.constexpr,
    BINS: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the gradient of the offset of one bin, in one pass over its cells.

    Grid: (R * P,); one program owns both components of one bin.
    Reads: grad (R, P, C) and features, a tuple over the levels of (B, H, W, C), in any dtype; starts, sizes, bounds;
        rois (R, 5) float32, levels (R,) int64.
    Writes: out (R, 2, P), x first, in full.
    """
    pid = tl.program_id(0)
    roi = (pid // BINS).to(tl.int64)
    level = tl.load(levels_ptr + roi)
    image = tl.load(rois_ptr + roi * 5)
    image = tl.where(image >= 0, image, 0.0).to(tl.int64)  # that of padding is not used: its bounds are empty
    height = tl.cast(select(heights, level, LEVELS), tl.int32)
    width = tl.cast(select(widths, level, LEVELS), tl.int32)
    feature_ptr = select(feature_ptrs, level, LEVELS)
    y_bin = roi * 2 * BINS + pid % BINS
    x_bin = y_bin + BINS
    y_start = tl.load(starts_ptr + y_bin)
    x_start = tl.load(starts_ptr + x_bin)
    y_length = tl.load(sizes_ptr + roi * 6 + 1)
    y_samples = tl.load(sizes_ptr + roi * 6 + 2)
    x_length = tl.load(sizes_ptr + roi * 6 + 4)
    x_samples = tl.load(sizes_ptr + roi * 6 + 5)
    x_stop = tl.load(bounds_ptr + x_bin * 2 + 1)

    y_grad = 0.0
    x_grad = 0.0
    for c_begin in range(0, channels, BLOCK_C):
        c = c_begin + tl.arange(0, BLOCK_C)
        live_c = c < channels
        y_change = tl.zeros((BLOCK_C,), tl.float32)  # of the pooled features, where the bin moves in y
        x_change = tl.zeros((BLOCK_C,), tl.float32)
        for x_begin in range(tl.load(bounds_ptr + x_bin * 2), x_stop, CELLS_PER_READ):
            x = x_begin + tl.arange(0, CELLS_PER_READ)
            x_free, x_slope = cell_slope(x, x_start, x_length, x_samples, width, SAMPLING_RATIO, CANDIDATES)
            live = (x < x_stop)[:, None] & live_c[None, :]
            for y in range(tl.load(bounds_ptr + y_bin * 2), tl.load(bounds_ptr + y_bin * 2 + 1)):
                y_free, y_slope = cell_slope(y, y_start, y_length, y_samples, height, SAMPLING_RATIO, CANDIDATES)
                line_ptr = feature_ptr + (image * height + y) * width * channels
                value = tl.load(line_ptr + x[:, None] * channels + c[None, :], mask=live, other=0.0).to(tl.float32)
                y_change += tl.sum((y_slope * x_free)[:, None] * value, axis=0)
                x_change += tl.sum((y_free * x_slope)[:, None] * value, axis=0)
        grad = tl.load(grad_ptr + pid.to(tl.int64) * channels + c, mask=live_c, other=0.0).to(tl.float32)
        y_grad += tl.sum(y_change * grad)
        x_grad += tl.sum(x_change * grad)
    y_grad *= gamma * tl.load(sizes_ptr + roi * 6) / (y_samples * x_samples)
    x_grad *= gamma * tl.load(sizes_ptr + roi * 6 + 3) / (y_samples * x_samples)
    tl.store(out_ptr + y_bin, x_grad.to(out_ptr.dtype.element_ty))  # the first component is x
    tl.store(out_ptr + x_bin, y_grad.to(out_ptr.dtype.element_ty))
