"""The weight of every cell in every bin of a roi along one axis, for the forward and backward pass of RoIAlign.

Receives rois and a `RoIAlignGeometry` from `kernels.roi_align` and hands these tables back to it.

Letters: R rois, S bins per side, L the longest side of any level. A cell is one position of a feature map.

    weights (R, 2, L, S) float32    axis 0 is y, 1 is x; the division by the number of samples is included; only the
                                    cells of the roi's hull (rounded out to whole blocks) are written and may be read
    bounds  (R, 2, S, 2) int32      first cell of a bin and one past its last; equal for a bin without samples
    hulls   (R, 2, 2) int32         the same for the whole roi; a roi that is ignored has empty bounds and hull

The kernels receive the sizes of the levels as tuples of floats: for integers in a tuple Triton compiles again where one
becomes 1 or a multiple of 16, and so for many different image sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from detector.ops.roi_align_geometry import MAX_ADAPTIVE_SAMPLES, RoIAlignGeometry

BLOCK_L = 32  # cells of an axis per program
ADAPTIVE_CANDIDATES = 5  # adaptive samples are over 1/2 apart: at most 4 within one cell of a cell, 1 more by rounding


@triton.jit
def select(values, index, COUNT: tl.constexpr):
    """Return values[index] for a run-time index into a tuple of COUNT scalars; values[0] if it is out of range."""
    chosen = values[0]
    for i in tl.static_range(1, COUNT):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def sample_position(bin_start, bin_length, samples, sample):
    """Return the coordinate of a sample, in the order of operations of the CPU path."""
    return bin_start + tl.div_rn((sample + 0.5) * bin_length, samples)


@triton.jit
def is_finite(value):
    """Return whether a float is neither NaN nor infinite."""
    return tl.abs(value) < float("inf")


@triton.jit(do_not_specialize=["batch", "longest"])
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
    MAX_SAMPLES: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Merge the samples of every bin along one axis into cell weights.

    Grid: (2 * R, ceil(L / BLOCK_L)); one program owns a block of cells of one axis of one roi.
    Reads: rois (R, 5) float32, levels (R,) int64; heights, widths, scales (cells per pixel), tuples over the levels.
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

    # The roi along the axis, in cells.
    size = tl.where(axis == 0, select(heights, level, LEVELS), select(widths, level, LEVELS)).to(tl.int32)
    scale = select(scales, level, LEVELS)
    start = tl.where(axis == 0, y1, x1) * scale - 0.5
    length = tl.where(live, tl.where(axis == 0, y2, x2) * scale - 0.5 - start, 0.0)
    start = tl.where(live, start, 0.0)

    # Bounds of the bins: the cells between the outermost samples.
    bins = tl.arange(0, BLOCK_S)
    bin_length = tl.div_rn(length, BINS * 1.0)
    bin_start = start + bins * bin_length  # (BLOCK_S,)
    samples_per_bin = SAMPLING_RATIO * 1.0
    if SAMPLING_RATIO == 0:
        samples_per_bin = tl.minimum(tl.maximum(tl.ceil(bin_length), 0.0), MAX_SAMPLES)
    samples = tl.maximum(samples_per_bin, 1.0)
    first_position = sample_position(bin_start, bin_length, samples, 0.0)
    last_position = sample_position(bin_start, bin_length, samples, samples - 1)
    lowest = tl.minimum(first_position, last_position)  # a length may be negative
    highest = tl.maximum(first_position, last_position)
    sampled_bins = tl.where(live & (samples_per_bin > 0), BINS, 0)
    used = (bins < sampled_bins) & (lowest <= size) & (highest >= -1)
    last_cell = (size - 1).to(tl.float32)
    first = tl.minimum(tl.maximum(lowest, 0.0), last_cell).to(tl.int32)
    stop = tl.minimum(tl.minimum(tl.maximum(highest, 0.0), last_cell).to(tl.int32) + 1, size - 1) + 1
    hull_first = tl.min(tl.where(used, first, size))
    hull_stop = tl.max(tl.where(used, stop, 0))

    block = tl.program_id(1) * BLOCK_L
    if block == 0:
        bin_bounds_ptr = bounds_ptr + (pid.to(tl.int64) * BINS + bins) * 2
        tl.store(bin_bounds_ptr, tl.where(used, first, 0), mask=bins < BINS)
        tl.store(bin_bounds_ptr + 1, tl.where(used, stop, 0), mask=bins < BINS)
        tl.store(hulls_ptr + pid * 2, hull_first)
        tl.store(hulls_ptr + pid * 2 + 1, hull_stop)

    # Weights of the block's cells: every cell goes through the few samples that may be less than one cell away.
    if (block < hull_stop) & (block + BLOCK_L > hull_first):
        cell = block + tl.arange(0, BLOCK_L)
        distance = (cell[:, None] - 1) - bin_start[None, :]  # (BLOCK_L, BLOCK_S)
        candidate = tl.zeros_like(distance)
        if SAMPLING_RATIO == 0:
            candidate = tl.maximum(tl.ceil(distance * (samples / bin_length) - 0.51), 0.0)
        weight = tl.zeros_like(distance)
        for i in tl.static_range(CANDIDATES):
            position = sample_position(bin_start[None, :], bin_length, samples, candidate + i)
            inside = (position >= -1) & (position <= size) & (candidate + i < samples)
            position = tl.minimum(tl.maximum(position, 0.0), last_cell)
            weight += tl.where(inside, tl.maximum(1 - tl.abs(cell[:, None] - position), 0.0), 0.0)
        weight = tl.where(used[None, :], weight / samples, 0.0)
        weight_ptr = weights_ptr + ((pid.to(tl.int64) * longest + cell[:, None]) * BINS + bins[None, :])
        tl.store(weight_ptr, weight, mask=(cell[:, None] < size) & (bins[None, :] < BINS))


def level_sizes(geometry: RoIAlignGeometry) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return heights and widths of the levels as the kernels take them."""
    return tuple(map(float, geometry.heights)), tuple(map(float, geometry.widths))


def merge_samples(geometry: RoIAlignGeometry, rois: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, bounds and hulls of rois (R, 5) float32 and levels (R,) int64, both contiguous; R > 0."""
    longest = max(geometry.heights + geometry.widths)
    weights = rois.new_empty(len(rois), 2, longest, geometry.bins)  # only inside the hulls
    bounds = levels.new_empty(len(rois), 2, geometry.bins, 2, dtype=torch.int32)  # written in full, as hulls
    hulls = levels.new_empty(len(rois), 2, 2, dtype=torch.int32)
    heights, widths = level_sizes(geometry)
    roi_align_weights_kernel[(2 * len(rois), triton.cdiv(longest, BLOCK_L))](
        weights,
        bounds,
        hulls,
        rois,
        levels,
        heights,
        widths,
        tuple(1 / stride for stride in geometry.strides),
        geometry.batch,
        longest,
        LEVELS=len(geometry.strides),
        BINS=geometry.bins,
        SAMPLING_RATIO=geometry.sampling_ratio,
        CANDIDATES=geometry.sampling_ratio or ADAPTIVE_CANDIDATES,
        MAX_SAMPLES=MAX_ADAPTIVE_SAMPLES,
        BLOCK_L=BLOCK_L,
        BLOCK_S=triton.next_power_of_2(geometry.bins),
        num_warps=1,
        enable_fp_fusion=False,  # the rounding of the CPU path: a sample at -1 or size must not move across
    )
    return weights, bounds, hulls
