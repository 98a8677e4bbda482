"""The reference: RoI pooling in plain differentiable PyTorch, one roi after the other, written to be read.

Receives the checked tensors of a call and their geometry, returns the output. Autograd does the rest: gradients, second
derivatives, forward mode. The products are dense: a NaN anywhere in a map reaches all rois of the map.

Bilinear weights separate, so that the samples of all bins are two matrices: how much each line of the map counts in a
bin, and how much each column does.

Letters: R rois, C channels, H W map, Ph Pw bins of a roi, P their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_dcn.roi_pool.geometry import MAX_ADAPTIVE_SAMPLES, RoIPoolGeometry


def forward(
    geometry: RoIPoolGeometry, features: list[Tensor], rois: Tensor, levels: Tensor, offset: Tensor | None
) -> Tensor:
    """Compute the output, (R, C, Ph, Pw), in the dtype of the features; positions and sums in float32 or better.

    Args:
        geometry: of these tensors.
        features: (B, C, Hl, Wl) for each level.
        rois: (R, 5).
        levels: (R,).
        offset: (R, 2, Ph, Pw) or None.

    Source:
        Dai et al., Deformable Convolutional Networks, ICCV 2017, section 2.2; border rule and gradients are mmcv's.
    """
    dtype = torch.promote_types(rois.dtype, torch.float32)
    if offset is not None:
        dtype = torch.promote_types(dtype, offset.dtype)
        offset = offset.to(dtype)
    rois = rois.to(dtype)

    empty = features[0].new_zeros(0, features[0].shape[1], *geometry.bins)
    zeros = empty.new_zeros(1, *empty.shape[1:])
    pooled = [empty]
    for index, level in enumerate(levels.tolist()):
        roi = rois[index]
        if not is_live(roi, level, geometry):
            pooled.append(zeros)
            continue
        feature = features[level][int(roi[0])]
        box = roi[1:] * geometry.scales[level] - 0.5
        bins = pool_roi(geometry, feature, box, None if offset is None else offset[index])
        pooled.append(bins[None])

    # Without a roi the gradients are 0, not missing.
    zero = torch.stack([feature[:0].sum() for feature in features]).sum()
    if offset is not None:
        zero = zero + offset[:0].sum().to(zero.dtype)
    return torch.cat(pooled) + zero


def is_live(roi: Tensor, level: int, geometry: RoIPoolGeometry) -> bool:
    """Tell whether image and level of a roi (5,) exist, and the box and its sides are finite, also in cells."""
    roi = roi.detach()
    exists = 0 <= float(roi[0]) < geometry.batch and 0 <= level < len(geometry.scales)
    sides = roi[3:] - roi[1:3]
    numbers = torch.cat([roi[1:], sides]) * max(1.0, *geometry.scales)
    return exists and bool(numbers.isfinite().all())


def pool_roi(geometry: RoIPoolGeometry, feature: Tensor, box: Tensor, offset: Tensor | None) -> Tensor:
    """Return the bins of one roi, (C, Ph, Pw), in the dtype of the map.

    Args:
        geometry: of the call.
        feature: (C, H, W).
        box: (4,), x1 y1 x2 y2 in cells.
        offset: (2, Ph, Pw), x and y, or None.
    """
    height, width = feature.shape[1:]
    bins_y, bins_x = geometry.bins
    x1, y1, x2, y2 = box
    x_shift = y_shift = box.new_zeros(geometry.bins)
    if offset is not None:
        x_shift = geometry.gamma * (x2 - x1) * offset[0]
        y_shift = geometry.gamma * (y2 - y1) * offset[1]

    live = x_shift.isfinite() & y_shift.isfinite()
    y_bin = torch.arange(bins_y, dtype=box.dtype, device=box.device)[:, None]
    x_bin = torch.arange(bins_x, dtype=box.dtype, device=box.device)
    y_start = y1 + y_shift.where(live, 0) + y_bin * ((y2 - y1) / bins_y)
    x_start = x1 + x_shift.where(live, 0) + x_bin * ((x2 - x1) / bins_x)
    ratio = geometry.sampling_ratio
    y_weights, y_free = axis_weights(y_start.flatten(), (y2 - y1) / bins_y, height, ratio)
    x_weights, x_free = axis_weights(x_start.flatten(), (x2 - x1) / bins_x, width, ratio)

    dtype = torch.promote_types(feature.dtype, torch.float32)
    pooled = average(feature.to(dtype), y_weights.to(dtype), x_weights.to(dtype))
    if offset is not None:
        # The derivative for the position is that of an interpolation that does not move samples onto the map. Its
        # value must not count, and is taken off again.
        y_free = y_free.to(dtype)
        x_free = x_free.to(dtype)
        free = average(feature.to(dtype), y_free, x_free)
        pooled = pooled + free - average(feature.to(dtype), y_free.detach(), x_free.detach())
    return (pooled * live.flatten()).view(-1, bins_y, bins_x).to(feature.dtype)


def average(feature: Tensor, y_weights: Tensor, x_weights: Tensor) -> Tensor:
    """Return the sums (C, P) of a map (C, H, W) with the weights (P, H) of its lines and (P, W) of its columns."""
    return torch.einsum("py,cyx,px->cp", y_weights, feature, x_weights)


def axis_weights(bin_start: Tensor, bin_length: Tensor, size: int, sampling_ratio: int) -> tuple[Tensor, Tensor]:
    """Return two matrices (P, size) that average the samples of each bin along one axis.

    Args:
        bin_start: (P,), where the bins begin, in cells.
        bin_length: (), extent of a bin, in cells.
        size: cells of the map along the axis.
        sampling_ratio: samples per bin; 0 is adaptive.

    Returns:
        The weights of the samples, moved onto the map where they are less than a cell beyond it, without derivative;
        and the weights of the same cells for samples that are not moved, which have a derivative for `bin_start`.
    """
    samples = sampling_ratio
    numbers = torch.arange(sampling_ratio, dtype=bin_start.dtype, device=bin_start.device)
    if sampling_ratio == 0:
        # rounded up from float32 also in float64, as mmcv does
        samples = int(bin_length.float().ceil().clamp(0, MAX_ADAPTIVE_SAMPLES))
        # Of many samples only these can lie on the map, because they are at least half a cell apart.
        count = min(samples, 2 * size + 8)
        first = ((-1 - bin_start.detach()) / (bin_length / max(samples, 1)) - 1.5).floor().nan_to_num(0)
        count_up = torch.arange(count, dtype=bin_start.dtype, device=bin_start.device)
        numbers = first.clamp(0, samples - count)[:, None] + count_up
    position = bin_start[:, None] + (numbers + 0.5) * bin_length / max(samples, 1)  # (P, samples)
    inside = (position >= -1) & (position <= size)
    position = position.where(inside, 0)

    on_map = position.detach().clamp(0, size - 1)
    low = on_map.floor().long()
    high = (low + 1).clamp(max=size - 1)

    def merge(low_weight: Tensor, high_weight: Tensor) -> Tensor:
        matrix = position.new_zeros(len(bin_start), size)
        matrix = matrix.scatter_add(1, low, low_weight.where(inside, 0))
        matrix = matrix.scatter_add(1, high, high_weight.where(inside, 0))
        return matrix / max(samples, 1)

    return merge(1 - (on_map - low), on_map - low), merge(high - position, position - low)
