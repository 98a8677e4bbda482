"""RoIAlign over the levels of a feature pyramid, which is RoI pooling without an offset: see `triton_dcn.roi_pool`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from triton_dcn.roi_pool.functional import roi_pool

NO_FORWARD_MODE = "roi_align has no forward-mode derivative (jvp, jacfwd): use torch.autograd.grad"


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
    output_size: int | tuple[int, int] = 7,
    sampling_ratio: int = 0,
    offset: Tensor | None = None,
    gamma: float = 0.1,
) -> Tensor:
    """Average bilinear samples of the features on a regular grid in every roi; with an offset, bins are moved.

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
        output_size: bins per side, S, or (y, x).
        sampling_ratio: samples per bin and axis; 0 takes ceil(roi side in cells / S), at least one per cell
            (at most 2**20).
        offset: (R, 2, S, S), how far each bin is moved in x and y, in units of gamma * the size of the roi, or None;
            see `triton_dcn.deform_roi_pool`.
        gamma: what offsets are multiplied by.

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
    check_strides(features, strides)
    return roi_pool(
        features,
        rois,
        levels,
        offset,
        scales=[1 / stride for stride in strides],
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        gamma=gamma,
        no_forward_mode=NO_FORWARD_MODE,
    )


def check_strides(features: Sequence[Tensor], strides: Sequence[float]) -> None:
    """Raise ValueError unless there is one stride per level, and a level at all."""
    if not features or len(features) != len(strides):
        raise ValueError(f"strides: expected one per feature level ({len(features)}, at least 1), got {len(strides)}")
