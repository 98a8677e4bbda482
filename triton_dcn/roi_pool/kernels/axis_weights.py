"""The weight of every cell in every bin of a roi along one axis, where all rois have regular bins: without an offset.

Letters: R rois, L the longest side of any level, S the larger number of bins of an axis. A cell is one position of a
feature map.

    weights (R, 2, L, S) float32    axis 0 is y, 1 is x; the division by the number of samples is included; only the
                                    cells of the roi's hull (rounded out to whole blocks) are written and may be read
    bounds  (R, 2, S, 2) int32      first cell of a bin and one past its last; equal for a bin without samples
    hulls   (R, 2, 2) int32         the same for the whole roi; a roi that is ignored has empty bounds and hull
"""

import triton
import triton.language as tl

from triton_dcn.roi_pool.kernels.sampling import bin_bounds, cell_weight, count_samples, load_roi, select


@triton.jit(do_not_specialize=["batch", "longest"])
def roi_weights_kernel(
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
    BINS_Y: tl.constexpr,
    BINS_X: tl.constexpr,
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
    Assumes: BLOCK_S >= BINS = max(BINS_Y, BINS_X).
    """
    pid = tl.program_id(0)
    roi = (pid // 2).to(tl.int64)
    axis = pid % 2
    live, level, y_start, x_start, y_length, x_length = load_roi(rois_ptr, levels_ptr, scales, roi, batch, LEVELS)

    # The roi along the axis, in cells, and its bins.
    size = tl.where(axis == 0, select(heights, level, LEVELS), select(widths, level, LEVELS)).to(tl.int32)
    start = tl.where(axis == 0, y_start, x_start)
    length = tl.where(axis == 0, y_length, x_length)
    num_bins = tl.where(axis == 0, BINS_Y, BINS_X)
    bins = tl.arange(0, BLOCK_S)
    bin_length = tl.div_rn(length, num_bins.to(tl.float32))
    bin_start = start + bins * bin_length  # (BLOCK_S,)
    samples_per_bin = count_samples(bin_length, SAMPLING_RATIO, MAX_SAMPLES)
    samples = tl.maximum(samples_per_bin, 1.0)
    sampled_bins = tl.where(live & (samples_per_bin > 0), num_bins, 0)
    used, first, stop = bin_bounds(bin_start, bin_length, samples, size)
    used = used & (bins < sampled_bins)
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
        weight = cell_weight(
            cell[:, None], bin_start[None, :], bin_length, samples, size, SAMPLING_RATIO, CANDIDATES
        )  # (BLOCK_L, BLOCK_S)
        weight = tl.where(used[None, :], weight / samples, 0.0)
        weight_ptr = weights_ptr + ((pid.to(tl.int64) * longest + cell[:, None]) * BINS + bins[None, :])
        tl.store(weight_ptr, weight, mask=(cell[:, None] < size) & (bins[None, :] < BINS))
