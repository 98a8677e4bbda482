"""RoIAlign on a GPU: all levels of the pyramid in one launch, forward and backward, without atomics.

Letters: R rois, S bins per side, C channels, L the longest side of any level, N pixels of all levels and images.

Bilinear weights separate, so a small kernel first writes, per roi and axis, how much every pixel counts in every bin:

    weights (R, 2, L, S) float32    axis 0 is y, 1 is x; the division by the number of samples is included; only the
                                    pixels of the roi's hull (rounded out to whole blocks) are written and may be read
    bounds  (R, 2, S, 2) int32      first pixel of a bin and one past its last; equal for a bin without samples
    hulls   (R, 2, 2) int32         the same for the whole roi; a roi that does not count has empty bounds and hull

Forward: out[r, i, j] = sum over y, x of weights[r, 0, y, i] * weights[r, 1, x, j] * feature[y, x]. Backward is the
transposed sum, gathered per tile of pixels over the rois whose hull meets the tile, in the order of the rois: every
gradient is written once, in its final dtype, and is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from detector.roi_bags import MAX_GRID, PoolGeometry

PIXELS_PER_LOAD = tl.constexpr(4)  # pixels of a line that the forward pass loads at once
ROIS_PER_LOOK = tl.constexpr(32)  # rois that the backward pass tests at once: one per lane
TILE = (2, 4)  # height and width of the backward pass's pixel tiles
ADAPTIVE_CANDIDATES = 5  # adaptive samples are > 1/2 apart: 4 fall within a cell of a pixel, 1 more by rounding
MAX_BLOCK_C = 256


@triton.jit
def select(values, index, COUNT: tl.constexpr):
    """Return values[index] for a run-time index into a tuple of COUNT scalars; values[0] if it is out of range."""
    chosen = values[0]
    for i in tl.static_range(1, COUNT):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def sample_position(corner, bin_length, grid, sample):
    """Return the coordinate of a sample, in the order of operations of the CPU path."""
    return corner + tl.div_rn((sample + 0.5) * bin_length, grid)


@triton.jit
def is_finite(value):
    """Return whether a float is neither NaN nor infinite."""
    return tl.abs(value) < float("inf")


@triton.jit
def roi_align_weights_kernel(
    weights_ptr,
    bounds_ptr,
    hulls_ptr,
    rois_ptr,
    levels_ptr,
    heights,
    widths,
    scales,
    batch,
    longest,
    LEVELS: tl.constexpr,
    BINS: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    CANDIDATES: tl.constexpr,
    GRID_LIMIT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Merge the samples of every bin along one axis into pixel weights.

    Grid: (2 * R, ceil(L / BLOCK_L)); one program owns a block of pixels of one axis of one roi.
    Reads: rois (R, 5) float32, levels (R,) int64; heights, widths, scales (cells per pixel) are tuples over the levels.
    Writes: weights where the block meets the hull; bounds and hulls in full (by the programs of block 0).
    Assumes: BLOCK_S >= BINS.
    """
    pid = tl.program_id(0)
    roi = (pid // 2).to(tl.int64)
    axis = pid % 2
    image = tl.load(rois_ptr + roi * 5)
    x1 = tl.load(rois_ptr + roi * 5 + 1)
    y1 = tl.load(rois_ptr + roi * 5 + 2)
    x2 = tl.load(rois_ptr + roi * 5 + 3)
    y2 = tl.load(rois_ptr + roi * 5 + 4)
    level = tl.load(levels_ptr + roi)
    live = (image >= 0) & (image < batch) & (level >= 0) & (level < LEVELS)
    live = live & is_finite(x2 - x1) & is_finite(y2 - y1) & is_finite(x1) & is_finite(y1)
    size = tl.where(axis == 0, select(heights, level, LEVELS), select(widths, level, LEVELS))
    scale = select(scales, level, LEVELS)
    start = tl.where(axis == 0, y1, x1) * scale - 0.5
    length = tl.where(axis == 0, y2, x2) * scale - 0.5 - start

    bins = tl.arange(0, BLOCK_S)
    bin_length = tl.div_rn(length, BINS * 1.0)
    corner = start + bins * bin_length  # (BLOCK_S,)
    grid = SAMPLING_RATIO * 1.0
    if SAMPLING_RATIO == 0:
        grid = tl.minimum(tl.maximum(tl.ceil(bin_length), 0.0), GRID_LIMIT)
    samples = tl.maximum(grid, 1.0)
    one_end = sample_position(corner, bin_length, samples, 0.0)
    other_end = sample_position(corner, bin_length, samples, samples - 1)
    lowest = tl.minimum(one_end, other_end)
    highest = tl.maximum(one_end, other_end)
    sampled = tl.where(live & (grid > 0), BINS, 0)
    used = (bins < sampled) & (lowest <= size) & (highest >= -1)
    last = (size - 1).to(tl.float32)
    first = tl.minimum(tl.maximum(lowest, 0.0), last).to(tl.int32)
    stop = tl.minimum(tl.minimum(tl.maximum(highest, 0.0), last).to(tl.int32) + 1, size - 1) + 1
    hull_first = tl.min(tl.where(used, first, size))
    hull_stop = tl.max(tl.where(used, stop, 0))

    block = tl.program_id(1) * BLOCK_L
    if block == 0:
        at = bounds_ptr + (pid.to(tl.int64) * BINS + bins) * 2
        tl.store(at, tl.where(used, first, 0), mask=bins < BINS)
        tl.store(at + 1, tl.where(used, stop, 0), mask=bins < BINS)
        tl.store(hulls_ptr + pid * 2, hull_first)
        tl.store(hulls_ptr + pid * 2 + 1, hull_stop)
    if (block < hull_stop) & (block + BLOCK_L > hull_first):
        pixel = block + tl.arange(0, BLOCK_L)
        distance = (pixel[:, None] - 1) - corner[None, :]  # (BLOCK_L, BLOCK_S)
        candidate = tl.zeros_like(distance)
        if SAMPLING_RATIO == 0:
            candidate = tl.maximum(tl.ceil(distance * (samples / bin_length) - 0.51), 0.0)
        weight = tl.zeros_like(distance)
        for i in tl.static_range(CANDIDATES):
            position = sample_position(corner[None, :], bin_length, samples, candidate + i)
            inside = (position >= -1) & (position <= size) & (candidate + i < samples)
            position = tl.minimum(tl.maximum(position, 0.0), last)
            weight += tl.where(inside, tl.maximum(1 - tl.abs(pixel[:, None] - position), 0.0), 0.0)
        weight = tl.where(used[None, :], weight / samples, 0.0)
        at = weights_ptr + ((pid.to(tl.int64) * longest + pixel[:, None]) * BINS + bins[None, :])
        tl.store(at, weight, mask=(pixel[:, None] < size) & (bins[None, :] < BINS))


@triton.jit
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
    image = tl.load(rois_ptr + roi * 5).to(tl.int64)
    height = select(heights, level, LEVELS)
    width = select(widths, level, LEVELS)
    feature_ptr = select(feature_ptrs, level, LEVELS)
    y_bounds_ptr = bounds_ptr + (roi * 2 * BINS + bin_y) * 2
    x_bounds_ptr = bounds_ptr + ((roi * 2 + 1) * BINS + bin_x) * 2
    x_first = tl.load(x_bounds_ptr)
    x_stop = tl.load(x_bounds_ptr + 1)
    y_weights_ptr = weights_ptr + roi * 2 * longest * BINS + bin_y
    x_weights_ptr = weights_ptr + (roi * 2 + 1) * longest * BINS + bin_x

    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live_c = c < channels
    pooled = tl.zeros((PIXELS_PER_LOAD, BLOCK_C), tl.float32)
    for y in range(tl.load(y_bounds_ptr), tl.load(y_bounds_ptr + 1)):
        y_weight = tl.load(y_weights_ptr + y * BINS)
        line_ptr = feature_ptr + (image * height + y) * width * channels
        for x_begin in range(x_first, x_stop, PIXELS_PER_LOAD):
            x = x_begin + tl.arange(0, PIXELS_PER_LOAD)
            weight = y_weight * tl.load(x_weights_ptr + x * BINS, mask=x < x_stop, other=0.0)
            live = (x < x_stop)[:, None] & live_c[None, :]
            value = tl.load(line_ptr + x[:, None] * channels + c[None, :], mask=live, other=0.0)
            pooled += weight[:, None] * value.to(tl.float32)  # (PIXELS_PER_LOAD, BLOCK_C)
    out = tl.sum(pooled, axis=0)
    tl.store(out_ptr + pid.to(tl.int64) * channels + c, out.to(out_ptr.dtype.element_ty), mask=live_c)


@triton.jit
def roi_align_backward_kernel(
    out_ptr,
    grad_ptr,
    heights,
    widths,
    row_starts,
    tile_starts,
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
    """Gather the gradient of one tile of pixels from the rois that touch it.

    Grid: (tiles of all levels and images, ceil(C / BLOCK_C)); one program owns TILE_H x TILE_W pixels.
    Reads: grad (R, S, S, C) in any dtype; weights, bounds, hulls; order (R,) int64, the rois sorted by (level, image),
        and begins (levels * B + 1,) int64 where each pair begins in it; heights, widths, row_starts (first row of the
        level in `out`) and tile_starts (its first program) are tuples over the levels.
    Writes: out (N, C), in full.
    """
    pid = tl.program_id(0)
    level = 0
    for i in tl.static_range(1, LEVELS):
        level += (pid >= tile_starts[i]).to(tl.int32)
    height = select(heights, level, LEVELS)
    width = select(widths, level, LEVELS)
    tiles_x = tl.cdiv(width, TILE_W)
    tiles = tl.cdiv(height, TILE_H) * tiles_x
    tile = pid - select(tile_starts, level, LEVELS)
    image = tile // tiles
    y_tile = tile % tiles // tiles_x * TILE_H
    x_tile = tile % tiles_x * TILE_W

    pixel = tl.arange(0, TILE_H * TILE_W)
    y = y_tile + pixel // TILE_W
    x = x_tile + pixel % TILE_W
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live_c = c < channels
    lane = tl.arange(0, ROIS_PER_LOOK)
    bins = tl.arange(0, BLOCK_S)
    total = tl.zeros((TILE_H * TILE_W, BLOCK_C), tl.float32)
    begin = tl.load(begins_ptr + level * batch + image)
    end = tl.load(begins_ptr + level * batch + image + 1)
    for look in range(begin, end, ROIS_PER_LOOK):
        known = look + lane < end
        hull_ptr = hulls_ptr + tl.load(order_ptr + look + lane, mask=known, other=0) * 4
        meets = known & (tl.load(hull_ptr) < y_tile + TILE_H) & (tl.load(hull_ptr + 1) > y_tile)
        meets = meets & (tl.load(hull_ptr + 2) < x_tile + TILE_W) & (tl.load(hull_ptr + 3) > x_tile)
        hit = tl.min(tl.where(meets, lane, ROIS_PER_LOOK))
        while hit < ROIS_PER_LOOK:
            roi = tl.load(order_ptr + look + hit)
            y_bounds_ptr = bounds_ptr + (roi * 2 * BINS + bins) * 2
            x_bounds_ptr = y_bounds_ptr + BINS * 2
            y_meets = tl.load(y_bounds_ptr, mask=bins < BINS, other=height) < y_tile + TILE_H
            y_meets = y_meets & (tl.load(y_bounds_ptr + 1, mask=bins < BINS, other=0) > y_tile)
            x_meets = tl.load(x_bounds_ptr, mask=bins < BINS, other=width) < x_tile + TILE_W
            x_meets = x_meets & (tl.load(x_bounds_ptr + 1, mask=bins < BINS, other=0) > x_tile)
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
            hit = tl.min(tl.where(meets & (lane > hit), lane, ROIS_PER_LOOK))
    row = select(row_starts, level, LEVELS) + (image.to(tl.int64) * height + y) * width + x
    live = ((y < height) & (x < width))[:, None] & live_c[None, :]
    tl.store(out_ptr + row[:, None] * channels + c[None, :], total.to(out_ptr.dtype.element_ty), mask=live)


def forward(geometry: PoolGeometry, features: list[Tensor], rois: Tensor, levels: Tensor) -> Tensor:
    """Pool the features; see `detector.roi_align.roi_align`. Returns (R, C, S, S) with channels_last strides."""
    features = [feature.permute(0, 2, 3, 1).contiguous() for feature in features]
    channels = features[0].shape[3]
    bins = geometry.bins
    out = features[0].new_empty(len(rois), bins, bins, channels)
    if out.numel():
        rois, levels = rois.float().contiguous(), levels.contiguous()
        weights, bounds, _ = _merge(geometry, rois, levels)
        block_c = min(triton.next_power_of_2(channels), MAX_BLOCK_C)
        roi_align_forward_kernel[(len(rois) * bins**2, triton.cdiv(channels, block_c))](
            out,
            tuple(features),
            geometry.heights,
            geometry.widths,
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


def backward(geometry: PoolGeometry, grad: Tensor, rois: Tensor, levels: Tensor) -> Tensor:
    """Return the gradient of all levels as one (N, C) table in the dtype of `grad` (R, C, S, S)."""
    grad = grad.permute(0, 2, 3, 1).contiguous()
    channels = grad.shape[3]
    starts = geometry.starts
    out = grad.new_empty(starts[-1], channels)
    if len(rois) == 0 or len(out) == 0:
        return out.zero_()
    rois, levels = rois.float().contiguous(), levels.contiguous()
    weights, bounds, hulls = _merge(geometry, rois, levels)
    order, begins = _sort(geometry, rois, levels)
    tile_starts = [0]
    for height, width in zip(geometry.heights, geometry.widths, strict=True):
        tile_starts.append(tile_starts[-1] + geometry.batch * triton.cdiv(height, TILE[0]) * triton.cdiv(width, TILE[1]))
    block_c = min(triton.next_power_of_2(channels), MAX_BLOCK_C)
    roi_align_backward_kernel[(tile_starts[-1], triton.cdiv(channels, block_c))](
        out,
        grad,
        geometry.heights,
        geometry.widths,
        tuple(starts[:-1]),
        tuple(tile_starts[:-1]),
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


def _merge(geometry: PoolGeometry, rois: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run the weights kernel: (weights, bounds, hulls) of the module's docstring."""
    longest = max(geometry.heights + geometry.widths)
    weights = rois.new_empty(len(rois), 2, longest, geometry.bins)
    bounds = levels.new_empty(len(rois), 2, geometry.bins, 2, dtype=torch.int32)
    hulls = levels.new_empty(len(rois), 2, 2, dtype=torch.int32)
    block_l = 32
    roi_align_weights_kernel[(2 * len(rois), triton.cdiv(longest, block_l))](
        weights,
        bounds,
        hulls,
        rois,
        levels,
        geometry.heights,
        geometry.widths,
        tuple(1 / stride for stride in geometry.strides),
        geometry.batch,
        longest,
        LEVELS=len(geometry.strides),
        BINS=geometry.bins,
        SAMPLING_RATIO=geometry.sampling_ratio,
        CANDIDATES=geometry.sampling_ratio or ADAPTIVE_CANDIDATES,
        GRID_LIMIT=MAX_GRID,
        BLOCK_L=block_l,
        BLOCK_S=triton.next_power_of_2(geometry.bins),
        num_warps=1,
        enable_fp_fusion=False,  # the rounding of the CPU path: a sample at -1 or size must not move across
    )
    return weights, bounds, hulls


def _sort(geometry: PoolGeometry, rois: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the rois by (level, image): (order (R,), begins (levels * B + 1,)), int64; padding goes to the ends."""
    image = rois[:, 0].clamp(-1, geometry.batch).nan_to_num(-1).long()
    pairs = len(geometry.strides) * geometry.batch
    exists = (image >= 0) & (image < geometry.batch) & (levels >= 0) & (levels < len(geometry.strides))
    key, order = (levels * geometry.batch + image).where(exists, pairs).sort(stable=True)
    return order, torch.searchsorted(key, torch.arange(pairs + 1, device=key.device))
