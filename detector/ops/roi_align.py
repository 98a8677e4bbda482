"""RoIAlign over the levels of a feature pyramid: one operator, every level in one call.

`roi_align` -> custom operator -> `roi_align_cpu` (CPU, and float64 anywhere) | `kernels.roi_align` (Triton, CUDA).
`roi_align_reference` is the oracle of the tests: dense interpolation matrices, one roi at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detector.ops import roi_align_cpu
from detector.ops.roi_align_cpu import MAX_GRID, PoolGeometry, live_rois


def roi_levels(boxes: Tensor, num_levels: int = 4, finest_scale: float = 56) -> Tensor:
    """Choose the pyramid level of each box from its size.

    Args:
        boxes: (..., 4) floating, x1 y1 x2 y2 in pixels of the image.
        num_levels: levels to choose from; 0 is the finest.
        finest_scale: boxes whose geometric mean side is below twice this many pixels belong to level 0.

    Returns:
        (...) int64 in [0, num_levels); level 0 where width * height is negative or NaN.

    Source:
        Lin et al., Feature Pyramid Networks, CVPR 2017, equation 1.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    scale = torch.sqrt((x2 - x1) * (y2 - y1))
    level = torch.floor(torch.log2(scale / finest_scale + 1e-6))
    return level.clamp(0, num_levels - 1).nan_to_num(nan=0.0).long()


def roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    *,
    strides: Sequence[float],
    output_size: int = 7,
    sampling_ratio: int = 0,
) -> Tensor:
    """Average bilinear samples of the features on a regular grid in every roi.

    Coordinates are shifted by half a cell (`aligned=True`). A sample outside [-1, size] reads 0, otherwise it is
    clamped to the border cells. A roi counts for nothing (output 0, no gradient) if its batch index or level does not
    exist (-1 marks padding), if a coordinate is not finite or, with adaptive sampling, if a side is not positive.

    Args:
        features: one (B, C, Hl, Wl) tensor per level, float16, bfloat16, float32 or float64, any strides; channels_last
            saves a copy.
        rois: (R, 5) floating, [batch index, x1, y1, x2, y2] in pixels of the image. Not differentiable. Sampling
            positions are computed in float32; in float64 if rois and features are, or on a CPU if the rois are.
        levels: (R,) int64, index into `features`.
        strides: pixels per cell of each level.
        output_size: bins per side, S.
        sampling_ratio: samples per bin and axis; 0 takes ceil(roi side in cells / S), at least one per cell
            (at most 2**20).

    Returns:
        (R, C, S, S), dtype of the features, channels_last strides.

    Raises:
        ValueError: shapes, `strides`, `output_size` or `sampling_ratio` disagree with the above.
        TypeError: dtypes or devices disagree.

    Source:
        He et al., Mask R-CNN, ICCV 2017, section 3; half-cell shift and adaptive grid as in Detectron2.
    """
    features = list(features)
    _check(features, rois, levels, strides, output_size, sampling_ratio)
    return _roi_align(features, rois, levels, [float(stride) for stride in strides], output_size, sampling_ratio)


def roi_align_reference(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    *,
    strides: Sequence[float],
    output_size: int = 7,
    sampling_ratio: int = 0,
) -> Tensor:
    """Compute `roi_align` by dense matrices, one roi at a time; differentiable, any device, slow.

    Arguments, result and errors are those of `roi_align`, except that the result is contiguous.
    """
    features = list(features)
    _check(features, rois, levels, strides, output_size, sampling_ratio)
    batch, channels = features[0].shape[:2]
    live = live_rois(rois, levels, batch, len(features)).tolist()
    zero = features[0].new_zeros(channels, output_size, output_size)
    pooled = [zero] * len(live)
    for index in [index for index, alive in enumerate(live) if alive]:
        level = int(levels[index])
        feature = features[level][int(rois[index, 0])]
        x1, y1, x2, y2 = rois[index, 1:].to(torch.promote_types(rois.dtype, torch.float32)) / strides[level] - 0.5
        down = _interpolation(y1, y2 - y1, feature.shape[1], output_size, sampling_ratio)
        across = _interpolation(x1, x2 - x1, feature.shape[2], output_size, sampling_ratio)
        pooled[index] = torch.einsum("py,cyx,qx->cpq", down.to(feature), feature, across.to(feature))
    return torch.stack(pooled) if pooled else zero.new_zeros(0, *zero.shape)


def _interpolation(start: Tensor, length: Tensor, size: int, bins: int, sampling_ratio: int) -> Tensor:
    """Return the (bins, size) matrix that averages the samples of each bin along one axis."""
    bin_length = length / bins
    grid = sampling_ratio or min(max(int(torch.ceil(bin_length)), 0), MAX_GRID)
    corner = start + torch.arange(bins, dtype=start.dtype, device=start.device) * bin_length
    step = (torch.arange(grid, dtype=start.dtype, device=start.device) + 0.5) * bin_length / max(grid, 1)
    position = corner[:, None] + step  # (bins, grid)
    inside = (position >= -1) & (position <= size)
    position = position.clamp(0, size - 1)
    low = position.floor().long()
    high = (low + 1).clamp(max=size - 1)
    inside = inside.to(position.dtype)
    weight = (position - low) * inside
    matrix = position.new_zeros(bins, size)
    matrix.scatter_add_(1, low, inside - weight).scatter_add_(1, high, weight)
    return matrix / max(grid, 1)


def _check(features: list[Tensor], rois: Tensor, levels: Tensor, strides, output_size: int, sampling_ratio: int):
    """Raise for arguments that `roi_align` cannot take."""
    if not features or len(features) != len(strides):
        raise ValueError(f"strides: expected one per feature level ({len(features)}, at least 1), got {len(strides)}")
    first = features[0]
    for index, feature in enumerate(features):
        if feature.dim() != 4 or feature.shape[:2] != first.shape[:2] or 0 in feature.shape[1:]:
            raise ValueError(
                f"features[{index}]: expected (B, C, H, W) with B, C = {tuple(first.shape[:2])} and C, H, W > 0, "
                f"got {tuple(feature.shape)}"
            )
        if feature.dtype != first.dtype or not feature.is_floating_point():
            raise TypeError(f"features[{index}]: expected one floating dtype ({first.dtype}), got {feature.dtype}")
    if rois.dim() != 2 or rois.shape[1] != 5:
        raise ValueError(f"rois: expected (R, 5), got {tuple(rois.shape)}")
    if levels.shape != rois.shape[:1]:
        raise ValueError(f"levels: expected {tuple(rois.shape[:1])}, got {tuple(levels.shape)}")
    if not rois.is_floating_point():
        raise TypeError(f"rois: expected a floating dtype, got {rois.dtype}")
    if levels.dtype != torch.int64:
        raise TypeError(f"levels: expected torch.int64, got {levels.dtype}")
    devices = {tensor.device for tensor in (*features, rois, levels)}
    if len(devices) > 1:
        raise TypeError(f"features, rois, levels: expected one device, got {sorted(map(str, devices))}")
    if output_size < 1:
        raise ValueError(f"output_size: expected at least 1, got {output_size}")
    if sampling_ratio < 0:
        raise ValueError(f"sampling_ratio: expected 0 (adaptive) or more, got {sampling_ratio}")


@torch.library.custom_op("detector::roi_align", mutates_args=(), device_types="cpu")
def _roi_align(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    strides: list[float],
    output_size: int,
    sampling_ratio: int,
) -> Tensor:
    heights, widths = zip(*(feature.shape[2:] for feature in features), strict=True)
    geometry = PoolGeometry(features[0].shape[0], heights, widths, tuple(strides), output_size, sampling_ratio)
    return _backend(features[0]).forward(geometry, features, rois, levels)


@torch.library.custom_op("detector::roi_align_backward", mutates_args=(), device_types="cpu")
def _roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    levels: Tensor,
    batch: int,
    heights: list[int],
    widths: list[int],
    strides: list[float],
    sampling_ratio: int,
) -> Tensor:
    """Return the gradient of all levels as one (pixels, C) table: level after level, each in (B, Hl, Wl) order."""
    geometry = PoolGeometry(batch, tuple(heights), tuple(widths), tuple(strides), grad.shape[2], sampling_ratio)
    return _backend(grad).backward(geometry, grad, rois, levels)


_roi_align.register_kernel("cuda", _roi_align._init_fn)
_roi_align_backward.register_kernel("cuda", _roi_align_backward._init_fn)


def _backend(tensor: Tensor):
    """Choose the module that computes: Triton on a GPU unless the dtype is float64."""
    if tensor.is_cuda and tensor.dtype != torch.float64:
        from detector.ops.kernels import roi_align as kernels  # triton, absent where there is no GPU

        return kernels
    return roi_align_cpu


@_roi_align.register_fake
def _(features, rois, levels, strides, output_size, sampling_ratio):
    shape = (rois.shape[0], output_size, output_size, features[0].shape[1])
    return features[0].new_empty(shape).permute(0, 3, 1, 2)


@_roi_align_backward.register_fake
def _(grad, rois, levels, batch, heights, widths, strides, sampling_ratio):
    pixels = sum(batch * height * width for height, width in zip(heights, widths, strict=True))
    return grad.new_empty(pixels, grad.shape[1])


def _setup_context(ctx, inputs, output):
    features, rois, levels, strides, _, sampling_ratio = inputs
    ctx.save_for_backward(rois, levels)
    ctx.batch = features[0].shape[0]
    ctx.heights, ctx.widths = [f.shape[2] for f in features], [f.shape[3] for f in features]
    ctx.strides, ctx.sampling_ratio = strides, sampling_ratio


def _autograd_backward(ctx, grad):
    table = _roi_align_backward(
        grad, *ctx.saved_tensors, ctx.batch, ctx.heights, ctx.widths, ctx.strides, ctx.sampling_ratio
    )
    sizes = list(zip(ctx.heights, ctx.widths, strict=True))
    parts = table.split([ctx.batch * height * width for height, width in sizes])
    grads = [
        part.view(ctx.batch, height, width, table.shape[1]).permute(0, 3, 1, 2)
        for part, (height, width) in zip(parts, sizes, strict=True)
    ]
    return grads, None, None, None, None, None


_roi_align.register_autograd(_autograd_backward, setup_context=_setup_context)
