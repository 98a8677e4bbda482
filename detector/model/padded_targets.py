"""The ground truth of a batch as tensors of one shape.

Letters: B images, G ground truths of each image after padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detector.structures import NO_OBJECT, StackedTargets, Target


@dataclass(frozen=True)
class PaddedTargets:
    """Ground truth of a batch as three tensors.

    Attributes:
        boxes: (B, G, 4); G is the largest count of the batch and at least 1, or as `StackedTargets` has it.
        labels: (B, G) int64.
        valid: (B, G) bool, false on padding.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor


def pad_targets(targets: Sequence[Target], dtype: torch.dtype) -> PaddedTargets:
    """Put the boxes and labels of a batch into one tensor each; no value is read from the device.

    Args:
        targets: one per image, on one device; `StackedTargets` are padded already.
        dtype: of the boxes in the result.
    """
    stacked = targets if isinstance(targets, StackedTargets) else StackedTargets.of(targets)
    # labels are also indices, so a class stands in the place of NO_OBJECT
    return PaddedTargets(stacked.boxes.to(dtype), stacked.labels.clamp(min=0), stacked.labels != NO_OBJECT)


def pad_masks(targets: Sequence[Target], num_targets: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Put the bitmaps of a batch into one tensor, zero on padding.

    Args:
        targets: one per image, with masks.
        num_targets: G, as in the `PaddedTargets` of the same batch.
        size: height and width of the padded images. RoIAlign repeats the last pixels of a bitmap beyond its border, so
            this extent, which is MMDetection's, matters to objects that touch the border of their image.
        dtype: of the result.

    Returns:
        (B, G, H, W), 0 or 1.
    """
    height, width = size
    device = targets[0].boxes.device
    bitmaps = torch.zeros(len(targets), num_targets, height, width, dtype=dtype, device=device)

    for index, target in enumerate(targets):
        assert target.masks is not None
        count, mask_height, mask_width = target.masks.shape
        bitmaps[index, :count, :mask_height, :mask_width] = target.masks
    return bitmaps
