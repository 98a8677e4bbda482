"""`deform_roi_pool` over one map and `roi_pool` over a pyramid: argument checks, autocast, choice of the backend.

Receives tensors from users, from the layers of `roi_pool.nn` and from the detector's RoIAlign, as they come. Hands
checked tensors in their compute dtype to `roi_pool.operator`, or, for backend "reference", to `roi_pool.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from triton_dcn.forward_mode import refuse_tangents
from triton_dcn.functional import DTYPES, HALF_DTYPES, HAS_TRITON, are_tensors, choose_backend, pair, untraced
from triton_dcn.operator import without_autocast
from triton_dcn.roi_pool import reference
from triton_dcn.roi_pool.geometry import RoIPoolGeometry
from triton_dcn.roi_pool.operator import forward_op, needs_gradient

NO_FORWARD_MODE = (
    "deform_roi_pool has no forward-mode derivative (jvp, jacfwd): use torch.autograd.grad, or backend='reference'"
)

MAX_SAMPLING_RATIO = 1024
LARGEST_SCALE = torch.finfo(torch.float32).max  # positions are computed in float32


def deform_roi_pool(
    features: Tensor,
    rois: Tensor,
    offset: Tensor | None = None,
    *,
    output_size: int | tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    backend: str | None = None,
) -> Tensor:
    """Average bilinear samples of the features in every bin of every roi, each bin moved by its offset.

    Bin (i, j) of a roi of w x h cells is moved by (gamma * w * offset[0, i, j], gamma * h * offset[1, i, j]) cells in x
    and y; without an offset this is RoIAlign. Coordinates are shifted by half a cell (`aligned=True`). A sample outside
    [-1, size] reads 0, otherwise it is clamped to the border cells. A roi is ignored (output 0, no gradient) if its
    batch index does not exist (-1 marks padding), if a coordinate is not finite or, with adaptive sampling, if a side
    is not positive; so is a bin whose offset is not finite. Under autocast, `features` are cast to the autocast dtype,
    while `rois` and `offset` stay as they are.

    Args:
        features: (B, C, H, W), float16, bfloat16, float32 or float64; any strides, channels_last saves a copy.
        rois: (R, 5) floating, [batch index, x1, y1, x2, y2] in pixels of the image. Not differentiable. Sampling
            positions are computed in float32; in float64 if rois and features are, or on a CPU if the rois are.
        offset: (R, 2, Ph, Pw), x first, in units of gamma * the size of the roi; or None. The dtype of `features`, or
            float32 beside features in half precision.
        output_size: bins of a roi, int or (Ph, Pw).
        spatial_scale: cells of `features` per pixel of the image.
        sampling_ratio: samples per bin and axis, up to 1024; 0 takes ceil(side of a bin in cells), at most 2**20.
        gamma: what offsets are multiplied by.
        backend: None chooses by device and dtype; "triton"; "torch", fast on a CPU, runs on any device; "reference",
            slow, plain PyTorch, with second derivatives and forward-mode differentiation.

    Returns:
        (R, C, Ph, Pw), dtype of the features, channels_last strides.

    Raises:
        ValueError: shapes or numbers disagree with the above, or the backend cannot run here.
        TypeError: dtypes, layouts or devices disagree.
        NotImplementedError: second derivatives, or forward-mode differentiation outside of torch.compile, with another
            backend than "reference".

    Source:
        Dai et al., Deformable Convolutional Networks, ICCV 2017, section 2.2; mmcv.ops.deform_roi_pool, also for the
        gradient of the offset at the border, where it is not the derivative.
    """
    if not are_tensors(("offset",), features=features, rois=rois, offset=offset):
        pooled: Tensor = handle_torch_function(
            deform_roi_pool,
            (features, rois, offset),
            features,
            rois,
            offset,
            output_size=output_size,
            spatial_scale=spatial_scale,
            sampling_ratio=sampling_ratio,
            gamma=gamma,
            backend=backend,
        )
        return pooled

    shape = untraced(features.size)
    if len(shape) != 4 or 0 in shape[1:]:
        raise ValueError(f"features: expected (B, C, H, W) with C, H, W > 0, got {tuple(shape)}")
    check_settings(spatial_scale, sampling_ratio, gamma)
    device = features.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and features.dtype in (*HALF_DTYPES, torch.float32):
        features = features.to(torch.get_autocast_dtype(device))
    levels = torch.zeros(rois.shape[:1], dtype=torch.int64, device=rois.device)
    return roi_pool(
        [features],
        rois,
        levels,
        offset,
        scales=[spatial_scale],
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        gamma=gamma,
        backend=backend,
    )


def roi_pool(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    offset: Tensor | None = None,
    *,
    scales: Sequence[float],
    output_size: int | tuple[int, int],
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    backend: str | None = None,
    no_forward_mode: str = NO_FORWARD_MODE,
) -> Tensor:
    """Pool as `deform_roi_pool` does, each roi from its level of a pyramid, all in one call.

    Args:
        features: one (B, C, Hl, Wl) tensor per level.
        rois, offset, output_size, sampling_ratio, gamma, backend: as in `deform_roi_pool`.
        levels: (R,) int64, index into `features`; a roi whose level does not exist is ignored.
        scales: cells per pixel of each level.
        no_forward_mode: the message of the error that forward-mode differentiation is.

    Returns:
        (R, C, Ph, Pw), dtype of the features, channels_last strides.

    Raises:
        ValueError, TypeError, NotImplementedError: as `deform_roi_pool`.
    """
    features = list(features)
    bins = pair("output_size", output_size)
    untraced(check_arguments, features, rois, levels, offset, bins, sampling_ratio)
    if offset is not None:
        untraced(_check_offset, offset, rois, bins, features[0].dtype)

    if backend is None:
        on_triton = HAS_TRITON and rois.is_cuda and features[0].dtype != torch.float64
        backend = "triton" if on_triton else "torch"
    else:
        backend = choose_backend(backend, features[0])
    float_scales = [float(scale) for scale in scales]
    if backend == "reference":
        geometry = RoIPoolGeometry(
            batch=features[0].shape[0],
            heights=tuple(feature.shape[2] for feature in features),
            widths=tuple(feature.shape[3] for feature in features),
            scales=tuple(float_scales),
            bins=bins,
            sampling_ratio=sampling_ratio,
            gamma=gamma,
        )
        with without_autocast(rois.device.type):
            return reference.forward(geometry, features, rois, levels, offset)
    refuse_tangents(no_forward_mode, *features, rois, offset)
    # what torch.jit.trace records may run with gradients or without
    keep_cells = offset is not None and (needs_gradient(offset) or torch._C._get_tracing_state() is not None)
    settings = (float_scales, list(bins), sampling_ratio, float(gamma), backend, keep_cells)
    pooled: Tensor
    pooled, _ = forward_op(features, rois, levels, offset, *settings)
    return pooled


def check_settings(spatial_scale: float, sampling_ratio: int, gamma: float) -> None:
    """Raise ValueError for numbers that `deform_roi_pool` and its layers cannot take."""
    if not _is_number(spatial_scale) or not 0 < spatial_scale <= LARGEST_SCALE:
        raise ValueError(f"spatial_scale: expected a positive number, got {spatial_scale!r}")
    if not isinstance(sampling_ratio, Integral) or not 0 <= sampling_ratio <= MAX_SAMPLING_RATIO:
        raise ValueError(
            f"sampling_ratio: expected 0 (adaptive) or more, up to {MAX_SAMPLING_RATIO}, got {sampling_ratio!r}"
        )
    if not _is_number(gamma) or not abs(gamma) < math.inf:
        raise ValueError(f"gamma: expected a finite number, got {gamma!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_arguments(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    offset: Tensor | None,
    bins: tuple[int, int],
    sampling_ratio: int,
) -> None:
    """Raise ValueError or TypeError for arguments that `roi_pool` cannot take."""
    first = features[0]
    for index, feature in enumerate(features):
        if feature.dim() != 4 or feature.shape[:2] != first.shape[:2] or 0 in feature.shape[1:]:
            raise ValueError(
                f"features[{index}]: expected (B, C, H, W) with B, C = {tuple(first.shape[:2])} and C, H, W > 0, "
                f"got {tuple(feature.shape)}"
            )
        if feature.dtype != first.dtype or not feature.is_floating_point():
            raise TypeError(f"features[{index}]: expected one floating dtype ({first.dtype}), got {feature.dtype}")
    if first.dtype not in DTYPES:
        raise TypeError(f"features: expected one of {DTYPES}, got {first.dtype}")

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
    if bins[0] < 1 or bins[1] < 1:
        raise ValueError(f"output_size: expected at least 1, got {bins[0] if bins[0] == bins[1] else bins}")
    if sampling_ratio < 0:
        raise ValueError(f"sampling_ratio: expected 0 (adaptive) or more, got {sampling_ratio}")


def _check_offset(offset: Tensor, rois: Tensor, bins: tuple[int, int], dtype: torch.dtype) -> None:
    """Raise ValueError or TypeError where the offset does not fit the rois, or features of this dtype."""
    expected_shape = (rois.shape[0], 2, *bins)
    if offset.shape != expected_shape:
        raise ValueError(f"offset: expected {tuple(expected_shape)}, got {tuple(offset.shape)}")
    allowed = {dtype, torch.float32} if dtype in HALF_DTYPES else {dtype}
    if offset.dtype not in allowed:
        expected = " or ".join(sorted(map(str, allowed)))
        raise TypeError(f"offset: expected {expected} beside features of {dtype}, got {offset.dtype}")
    if offset.device != rois.device:
        raise TypeError(f"offset: expected device {rois.device} like features, got {offset.device}")
