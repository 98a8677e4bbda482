"""The oracle of RoIAlign's tests: dense interpolation matrices, one roi at a time, differentiable, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detector.ops.roi_align import check_strides
from triton_dcn.roi_pool.functional import check_arguments
from triton_dcn.roi_pool.geometry import MAX_ADAPTIVE_SAMPLES


def roi_align_reference(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    *,
    strides: Sequence[float],
    output_size: int = 7,
    sampling_ratio: int = 0,
) -> Tensor:
    """Compute `roi_align` by dense matrices: same arguments, result and errors, but the result is contiguous."""
    check_strides(features, strides)
    check_arguments(features, rois, levels, None, (output_size, output_size), sampling_ratio)
    batch, channels = features[0].shape[:2]
    zero = features[0].new_zeros(channels, output_size, output_size)
    pooled = [zero] * len(rois)
    for index, (roi, level) in enumerate(zip(rois, levels.tolist(), strict=True)):
        if not is_live(roi, level, batch, len(features)):
            continue
        feature = features[level][int(roi[0])]
        height, width = feature.shape[1:]
        corners = roi[1:].to(torch.promote_types(roi.dtype, torch.float32))
        x1, y1, x2, y2 = corners / strides[level] - 0.5
        y_matrix = interpolation_matrix(y1, y2 - y1, height, output_size, sampling_ratio)
        x_matrix = interpolation_matrix(x1, x2 - x1, width, output_size, sampling_ratio)
        pooled[index] = torch.einsum("py,cyx,qx->cpq", y_matrix.to(feature), feature, x_matrix.to(feature))
    return torch.stack(pooled) if pooled else zero.new_zeros(0, *zero.shape)


def is_live(roi: Tensor, level: int, batch: int, num_levels: int) -> bool:
    """Tell whether batch index and level of a roi (5,) exist and the box is finite, also its width and height."""
    exists = 0 <= float(roi[0]) < batch and 0 <= level < num_levels
    sides = roi[3:] - roi[1:3]
    return exists and bool(roi[1:].isfinite().all() and sides.isfinite().all())


def interpolation_matrix(start: Tensor, length: Tensor, size: int, bins: int, sampling_ratio: int) -> Tensor:
    """Return the (bins, size) matrix that averages the samples of each bin along one axis.

    Args:
        start: (), first edge of the roi, in cells.
        length: (), extent of the roi, in cells.
        size: cells of the level along the axis.
        bins: bins of the roi along the axis.
        sampling_ratio: samples per bin; 0 is adaptive.
    """
    bin_length = length / bins
    samples = sampling_ratio or min(max(int(torch.ceil(bin_length.float())), 0), MAX_ADAPTIVE_SAMPLES)
    bin_start = start + torch.arange(bins, dtype=start.dtype, device=start.device) * bin_length
    sample_numbers = torch.arange(samples, dtype=start.dtype, device=start.device)
    position_in_bin = (sample_numbers + 0.5) * bin_length / max(samples, 1)
    position = bin_start[:, None] + position_in_bin  # (bins, samples)

    inside = ((position >= -1) & (position <= size)).to(position.dtype)
    position = position.clamp(0, size - 1)
    low = position.floor().long()
    high = (low + 1).clamp(max=size - 1)
    high_weight = (position - low) * inside
    low_weight = inside - high_weight

    matrix = position.new_zeros(bins, size)
    matrix.scatter_add_(1, low, low_weight)
    matrix.scatter_add_(1, high, high_weight)
    return matrix / max(samples, 1)
