"""RoIAlign on a GPU: all levels of the pyramid in one launch, forward and backward, without atomics.

Receives checked tensors and a `RoIAlignGeometry` from `detector.ops.roi_align` and returns plain tensors to it.

Letters: R rois, S bins per side, C channels, L the longest side of any level, N cells of all levels and images. A cell
is one position of a feature map.

Bilinear weights separate: `roi_weights` says how much each cell counts in each bin along an axis. Forward is

    out[r, i, j] = sum over y, x of weights[r, 0, y, i] * weights[r, 1, x, j] * feature[y, x]

Backward is the transposed sum, gathered per tile of cells over the rois whose hull meets the tile, in the order of the
rois: every gradient is written once, in its final dtype, and is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from detector.ops.kernels.roi_weights import level_sizes, merge_samples, select
from detector.ops.roi_align_geometry import RoIAlignGeometry

CELLS_PER_READ = tl.constexpr(4)  # cells of a line that the forward pass reads at once
ROIS_PER_READ = tl.constexpr(32)  # rois that the backward pass tests at once: one per lane
TILE = (2, 4)  # height and width of the backward pass's tiles of cells
MAX_BLOCK_C = 256


@triton.jit(do_not_specialize=["longest"])
def roi_align_forward_kernel(
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
    BINS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Pool the features of one bin.

    Grid: (R * S * S, ceil(C / BLOCK_C)); one program owns a block of channels of one bin.
    Reads: features, a tuple over the levels of (B, H, W, C) in any dtype; weights, bounds; rois (R, 5) float32, levels.
    Writes: out (R, S, S, C), in full.
    """
    pid = tl.program_id(0)
    roi = (pid // (BINS * BINS)).to(tl.int64)
    bin_y = pid // BINS % BINS
    bin_x = pid % BINS
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
def roi_align_backward_kernel(
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
    BINS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Gather the gradient of one tile of cells from the rois that touch it.

    Grid: (tiles of all levels and images, ceil(C / BLOCK_C)); one program owns TILE_H x TILE_W cells.
    Reads: grad (R, S, S, C) in any dtype; weights, bounds, hulls; order (R,) int64, the rois sorted by (level, image),
        and begins (levels * B + 1,) int64 where each pair begins in it; heights, widths, tuples over the levels.
    Writes: out (N, C), in full.
    """
    # Which level, image and tile of the image this program owns.
    tile = tl.program_id(0)
    level = 0
    row = tl.full((), 0, tl.int64)  # of `out`, where the level begins
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
                    row_ptr = grad_ptr + ((roi * BINS + bin_y) * BINS + bin_x) * channels
                    grad = tl.load(row_ptr + c, mask=live_c, other=0.0).to(tl.float32)
                    total += weight[:, None] * grad[None, :]
            next_lane = tl.min(tl.where(meets & (lane > next_lane), lane, ROIS_PER_READ))
    row += (image.to(tl.int64) * height + y) * width + x
    live = ((y < height) & (x < width))[:, None] & live_c[None, :]
    tl.store(out_ptr + row[:, None] * channels + c[None, :], total.to(out_ptr.dtype.element_ty), mask=live)


def forward(geometry: RoIAlignGeometry, features: list[Tensor], rois: Tensor, levels: Tensor) -> Tensor:
    """Pool the features; see `detector.ops.roi_align.roi_align`. Returns (R, C, S, S) with channels_last strides."""
    features = [feature.permute(0, 2, 3, 1).contiguous() for feature in features]
    channels = features[0].shape[3]
    bins = geometry.bins
    out = features[0].new_empty(len(rois), bins, bins, channels)  # written in full
    if out.numel() == 0 or geometry.batch == 0:
        return out.zero_().permute(0, 3, 1, 2)

    rois = rois.float().contiguous()
    levels = levels.contiguous()
    heights, widths = level_sizes(geometry)
    block_c = min(triton.next_power_of_2(channels), MAX_BLOCK_C)
    with torch.cuda.device_of(out):
        weights, bounds, _ = merge_samples(geometry, rois, levels)
        roi_align_forward_kernel[(len(rois) * bins**2, triton.cdiv(channels, block_c))](
            out,
            tuple(features),
            heights,
            widths,
            weights,
            bounds,
            rois,
            levels,
            channels,
            weights.shape[2],
            LEVELS=len(features),
            BINS=bins,
            BLOCK_C=block_c,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return out.permute(0, 3, 1, 2)


def backward(geometry: RoIAlignGeometry, grad: Tensor, rois: Tensor, levels: Tensor) -> Tensor:
    """Return the gradient of all levels as one (N, C) table in the dtype of `grad` (R, C, S, S)."""
    grad = grad.permute(0, 2, 3, 1).contiguous()
    channels = grad.shape[3]
    out = grad.new_empty(geometry.num_cells, channels)  # written in full
    if len(rois) == 0 or out.numel() == 0:
        return out.zero_()

    rois = rois.float().contiguous()
    levels = levels.contiguous()
    order, begins = _sort_by_image(geometry, rois, levels)
    heights, widths = level_sizes(geometry)
    block_c = min(triton.next_power_of_2(channels), MAX_BLOCK_C)
    with torch.cuda.device_of(out):
        weights, bounds, hulls = merge_samples(geometry, rois, levels)
        roi_align_backward_kernel[(_count_tiles(geometry), triton.cdiv(channels, block_c))](
            out,
            grad,
            heights,
            widths,
            weights,
            bounds,
            hulls,
            order,
            begins,
            geometry.batch,
            channels,
            weights.shape[2],
            LEVELS=len(geometry.heights),
            BINS=geometry.bins,
            TILE_H=TILE[0],
            TILE_W=TILE[1],
            BLOCK_C=block_c,
            BLOCK_S=triton.next_power_of_2(geometry.bins),
            num_warps=1,
            enable_fp_fusion=True,
        )
    return out


def _count_tiles(geometry: RoIAlignGeometry) -> int:
    """Return the number of tiles of all levels and images."""
    tiles_per_image = 0
    for height, width in zip(geometry.heights, geometry.widths, strict=True):
        tiles_per_image += triton.cdiv(height, TILE[0]) * triton.cdiv(width, TILE[1])
    return geometry.batch * tiles_per_image


def _sort_by_image(geometry: RoIAlignGeometry, rois: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the rois by (level, image); padding comes last.

    Returns:
        order (R,) int64, and begins (levels * B + 1,) int64, where each pair of level and image begins in it.
    """
    num_levels = len(geometry.strides)
    pairs = num_levels * geometry.batch
    image = rois[:, 0].clamp(-1, geometry.batch).nan_to_num(-1).long()
    exists = (image >= 0) & (image < geometry.batch) & (levels >= 0) & (levels < num_levels)
    pair = (levels * geometry.batch + image).where(exists, pairs)
    sorted_pair, order = pair.sort(stable=True)
    return order, torch.searchsorted(sorted_pair, torch.arange(pairs + 1, device=pair.device))
