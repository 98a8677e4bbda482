"""RoI pooling without an offset, RoIAlign: all levels of the pyramid in one launch, without atomics.

Letters: R rois, Ph Pw bins of a roi, S the larger of them, C channels, L the longest side of any level, N cells of all
levels and images. A cell is one position of a feature map.

Bilinear weights separate: `axis_weights` says how much each cell counts in each bin along an axis. Forward is

    out[r, i, j] = sum over y, x of weights[r, 0, y, i] * weights[r, 1, x, j] * feature[y, x]

Backward is the transposed sum, gathered per tile of cells over the rois whose hull meets the tile, in the order of the
rois: every gradient is written once, in its final dtype, and is the same in every run.
"""

import triton
import triton.language as tl

from triton_dcn.roi_pool.kernels.sampling import locate_tile, select

CELLS_PER_READ = tl.constexpr(4)  # cells of a line that the forward pass reads at once
ROIS_PER_READ = tl.constexpr(32)  # rois that the backward pass tests at once: one per lane


@triton.jit(do_not_specialize=["longest"])
def roi_pool_kernel(
    out_ptr,
    feature_ptrs,
    heights,
    widths,
    weights_ptr,
    bounds_ptr,
    rois_ptr,
    levels_ptr,
    channels,
    longest,
    LEVELS: tl.constexpr,
    BINS_Y: tl.constexpr,
    BINS_X: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Pool the features of one bin.

    Grid: (R * Ph * Pw, ceil(C / BLOCK_C)); one program owns a block of channels of one bin.
    Reads: features, a tuple over the levels of (B, H, W, C) in any dtype; weights, bounds; rois (R, 5) float32, levels.
    Writes: out (R, Ph, Pw, C), in full.
    """
    pid = tl.program_id(0)
    roi = (pid // (BINS_Y * BINS_X)).to(tl.int64)
    bin_y = pid // BINS_X % BINS_Y
    bin_x = pid % BINS_X
    level = tl.load(levels_ptr + roi)
    image = tl.load(rois_ptr + roi * 5)
    image = tl.where(image >= 0, image, 0.0).to(tl.int64)  # that of padding is not used: its bounds are empty
    height = tl.cast(select(heights, level, LEVELS), tl.int32)
    width = tl.cast(select(widths, level, LEVELS), tl.int32)
    feature_ptr = select(feature_ptrs, level, LEVELS)
    y_bounds_ptr = bounds_ptr + (roi * 2 * BINS + bin_y) * 2
    x_bounds_ptr = bounds_ptr + ((roi * 2 + 1) * BINS + bin_x) * 2
    x_first = tl.load(x_bounds_ptr)
    x_stop = tl.load(x_bounds_ptr + 1)
    y_weights_ptr = weights_ptr + roi * 2 * longest * BINS + bin_y
    x_weights_ptr = weights_ptr + (roi * 2 + 1) * longest * BINS + bin_x

    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live_c = c < channels
    pooled = tl.zeros((CELLS_PER_READ, BLOCK_C), tl.float32)
    for y in range(tl.load(y_bounds_ptr), tl.load(y_bounds_ptr + 1)):
        y_weight = tl.load(y_weights_ptr + y * BINS)
        line_ptr = feature_ptr + (image * height + y) * width * channels
        for x_begin in range(x_first, x_stop, CELLS_PER_READ):
            x = x_begin + tl.arange(0, CELLS_PER_READ)
            weight = y_weight * tl.load(x_weights_ptr + x * BINS, mask=x < x_stop, other=0.0)
            live = (x < x_stop)[:, None] & live_c[None, :]
            value = tl.load(line_ptr + x[:, None] * channels + c[None, :], mask=live, other=0.0)
            pooled += weight[:, None] * value.to(tl.float32)  # (CELLS_PER_READ, BLOCK_C)
    out = tl.sum(pooled, axis=0)
    tl.store(out_ptr + pid.to(tl.int64) * channels + c, out.to(out_ptr.dtype.element_ty), mask=live_c)


@triton.jit(do_not_specialize=["batch", "longest"])
def roi_pool_grad_kernel(
    out_ptr,
    grad_ptr,
    heights,
    widths,
    weights_ptr,
    bounds_ptr,
    hulls_ptr,
    order_ptr,
    begins_ptr,
    batch,
    channels,
    longest,
    LEVELS: tl.constexpr,
    BINS_Y: tl.constexpr,
    BINS_X: tl.constexpr,
    BINS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Gather the gradient of one tile of cells from the rois that touch it.

    Grid: (tiles of all levels and images, ceil(C / BLOCK_C)); one program owns TILE_H x TILE_W cells.
    Reads: grad (R, Ph, Pw, C) in any dtype; weights, bounds, hulls; order (R,) int64, the rois sorted by (level,
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
    bins = tl.arange(0, BLOCK_S)
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

            # The bins of the roi that meet the tile.
            y_bounds_ptr = bounds_ptr + (roi * 2 * BINS + bins) * 2
            x_bounds_ptr = y_bounds_ptr + BINS * 2
            y_meets = tl.load(y_bounds_ptr, mask=bins < BINS, other=height) < y_tile + TILE_H
            y_meets = y_meets & (tl.load(y_bounds_ptr + 1, mask=bins < BINS, other=0) > y_tile)
            x_meets = tl.load(x_bounds_ptr, mask=bins < BINS, other=width) < x_tile + TILE_W
            x_meets = x_meets & (tl.load(x_bounds_ptr + 1, mask=bins < BINS, other=0) > x_tile)

            # Outside the hull no weights are written.
            y_live = (y >= tl.load(hulls_ptr + roi * 4)) & (y < tl.load(hulls_ptr + roi * 4 + 1))
            x_live = (x >= tl.load(hulls_ptr + roi * 4 + 2)) & (x < tl.load(hulls_ptr + roi * 4 + 3))
            y_weights_ptr = weights_ptr + (roi * 2 * longest + y) * BINS
            x_weights_ptr = weights_ptr + ((roi * 2 + 1) * longest + x) * BINS
            x_begin = tl.min(tl.where(x_meets, bins, BINS))
            x_end = tl.max(tl.where(x_meets, bins + 1, 0))
            for bin_y in range(tl.min(tl.where(y_meets, bins, BINS)), tl.max(tl.where(y_meets, bins + 1, 0))):
                y_weight = tl.load(y_weights_ptr + bin_y, mask=y_live, other=0.0)  # (TILE_H * TILE_W,)
                for bin_x in range(x_begin, x_end):
                    weight = y_weight * tl.load(x_weights_ptr + bin_x, mask=x_live, other=0.0)
                    row_ptr = grad_ptr + ((roi * BINS_Y + bin_y) * BINS_X + bin_x) * channels
                    grad = tl.load(row_ptr + c, mask=live_c, other=0.0).to(tl.float32)
                    total += weight[:, None] * grad[None, :]
            next_lane = tl.min(tl.where(meets & (lane > next_lane), lane, ROIS_PER_READ))
    row += (image.to(tl.int64) * height + y) * width + x
    live = ((y < height) & (x < width))[:, None] & live_c[None, :]
    tl.store(out_ptr + row[:, None] * channels + c[None, :], total.to(out_ptr.dtype.element_ty), mask=live)
