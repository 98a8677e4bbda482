"""RoIAlign over the levels of a feature pyramid: checks the arguments and hands them to `detector::roi_align`.

That operator and its gradient hand on to `roi_align_cpu` (on a CPU, and in float64 anywhere) or to `kernels.roi_align`
(Triton, on a GPU). All levels go through one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from detector.ops import roi_align_cpu
from detector.ops.roi_align_geometry import RoIAlignGeometry
from detector.ops.vmapping import fold, unfold
from triton_dcn.forward_mode import refuse_tangents


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
    clamped to the border cells. A roi is ignored (output 0, no gradient) if its batch index or level does not exist
    (-1 marks padding), if a coordinate is not finite or, with adaptive sampling, if a side is not positive.

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
        NotImplementedError: second derivatives, or forward-mode differentiation outside of torch.compile.

    Source:
        He et al., Mask R-CNN, ICCV 2017, section 3; half-cell shift and adaptive grid as in Detectron2.
    """
    features = list(features)
    check_arguments(features, rois, levels, strides, output_size, sampling_ratio)
    refuse_tangents("roi_align has no forward-mode derivative (jvp, jacfwd): use torch.autograd.grad", *features, rois)
    float_strides = [float(stride) for stride in strides]
    pooled: Tensor = forward_op(features, rois, levels, float_strides, output_size, sampling_ratio)
    return pooled


def check_arguments(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    strides: Sequence[float],
    output_size: int,
    sampling_ratio: int,
) -> None:
    """Raise ValueError or TypeError for arguments that `roi_align` cannot take."""
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


def _backend(tensor: Tensor) -> ModuleType:
    """Choose the module that computes: Triton on a GPU unless the dtype is float64."""
    if tensor.is_cuda and tensor.dtype != torch.float64:
        from detector.ops.kernels import roi_align as kernels  # not at the top: only machines with a GPU have triton

        return kernels
    return roi_align_cpu


@torch.library.custom_op("detector::roi_align", mutates_args=(), device_types=("cpu", "cuda"))
def forward_op(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    strides: list[float],
    output_size: int,
    sampling_ratio: int,
) -> Tensor:
    """Pool; arguments and result are those of `roi_align`."""
    geometry = RoIAlignGeometry(
        batch=features[0].shape[0],
        heights=tuple(feature.shape[2] for feature in features),
        widths=tuple(feature.shape[3] for feature in features),
        strides=tuple(strides),
        bins=output_size,
        sampling_ratio=sampling_ratio,
    )
    pooled: Tensor = _backend(features[0]).forward(geometry, features, rois, levels)
    return pooled


@forward_op.register_fake
def _forward_fake(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor,
    strides: list[float],
    output_size: int,
    sampling_ratio: int,
) -> Tensor:
    channels_last_shape = (rois.shape[0], output_size, output_size, features[0].shape[1])
    return features[0].new_empty(channels_last_shape).permute(0, 3, 1, 2)


@torch.library.custom_op("detector::roi_align_backward", mutates_args=(), device_types=("cpu", "cuda"))
def backward_op(
    grad: Tensor,
    rois: Tensor,
    levels: Tensor,
    batch: int,
    heights: list[int],
    widths: list[int],
    strides: list[float],
    sampling_ratio: int,
) -> Tensor:
    """Return the gradient of all levels as one (N, C) table: level after level, each in (B, Hl, Wl) order."""
    geometry = RoIAlignGeometry(
        batch=batch,
        heights=tuple(heights),
        widths=tuple(widths),
        strides=tuple(strides),
        bins=grad.shape[2],
        sampling_ratio=sampling_ratio,
    )
    table: Tensor = _backend(grad).backward(geometry, grad, rois, levels)
    return table


@backward_op.register_fake
def _backward_fake(
    grad: Tensor,
    rois: Tensor,
    levels: Tensor,
    batch: int,
    heights: list[int],
    widths: list[int],
    strides: list[float],
    sampling_ratio: int,
) -> Tensor:
    cells = sum(batch * height * width for height, width in zip(heights, widths, strict=True))
    return grad.new_empty(cells, grad.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, rois, levels, strides, _, sampling_ratio = inputs
    ctx.save_for_backward(rois, levels)
    ctx.batch = features[0].shape[0]
    ctx.heights = [feature.shape[2] for feature in features]
    ctx.widths = [feature.shape[3] for feature in features]
    ctx.strides = strides
    ctx.sampling_ratio = sampling_ratio


def _backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None, None, None, None, None]:
    rois, levels = ctx.saved_tensors
    table = backward_op(grad, rois, levels, ctx.batch, ctx.heights, ctx.widths, ctx.strides, ctx.sampling_ratio)
    sizes = list(zip(ctx.heights, ctx.widths, strict=True))
    level_tables = table.split([ctx.batch * height * width for height, width in sizes])
    grad_features = []
    for level_table, (height, width) in zip(level_tables, sizes, strict=True):
        channels_last = level_table.view(ctx.batch, height, width, table.shape[1])
        grad_features.append(channels_last.permute(0, 3, 1, 2))
    return grad_features, None, None, None, None, None


def _second_backward(ctx: Any, grad: Tensor) -> None:
    raise NotImplementedError("roi_align has no second derivatives")


forward_op.register_autograd(_backward, setup_context=_setup_context)
backward_op.register_autograd(_second_backward)


def _vmap_forward(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    """Run all elements as one call: their rois one after the other and, where features differ, more images.

    Args:
        info: `info.batch_size` is the number of elements.
        in_dims: the mapped dimension of each argument, None where all elements share it.
        arguments: of `forward_op`.

    Returns:
        The pooled features, and the dimension along which they are stacked.
    """
    features, rois, levels, *settings = arguments
    feature_dims, roi_dim, level_dim = in_dims[:3]
    elements = info.batch_size
    folded_rois = fold(rois, roi_dim, elements)
    if any(dim is not None for dim in feature_dims):
        batch = features[0].shape[0] if feature_dims[0] is None else features[0].movedim(feature_dims[0], 0).shape[1]
        folded_rois = _images_apart(folded_rois, batch, elements)
        features = [fold(feature, dim, elements) for feature, dim in zip(features, feature_dims, strict=True)]
    pooled = forward_op(features, folded_rois, fold(levels, level_dim, elements), *settings)
    return unfold(pooled, elements), 0


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    """Do as `_vmap_forward`: each element has images of its own, because it has a gradient of its own."""
    grad, rois, levels, batch, heights, widths, strides, sampling_ratio = arguments
    elements = info.batch_size
    folded_rois = _images_apart(fold(rois, in_dims[1], elements), batch, elements)
    table = backward_op(
        fold(grad, in_dims[0], elements),
        folded_rois,
        fold(levels, in_dims[2], elements),
        batch * elements,
        heights,
        widths,
        strides,
        sampling_ratio,
    )
    cells = [elements * batch * height * width for height, width in zip(heights, widths, strict=True)]
    return torch.cat([unfold(level_table, elements) for level_table in table.split(cells)], 1), 0


def _images_apart(rois: Tensor, batch: int, elements: int) -> Tensor:
    """Let the rois of the i-th element refer to the i-th `batch` images; -1 where they referred to none."""
    rois = rois.to(torch.promote_types(rois.dtype, torch.float32))  # in half precision few integers exist
    image = rois[:, 0].view(elements, -1)
    first_image = batch * torch.arange(elements, device=rois.device)[:, None]
    exists = (image >= 0) & (image < batch)  # not so for NaN
    image = torch.where(exists, image + first_image, -1).flatten()
    return torch.cat([image[:, None], rois[:, 1:]], 1)


forward_op.register_vmap(_vmap_forward)
backward_op.register_vmap(_vmap_backward)
