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
    if isinstance(targets, StackedTargets):
        return _hide_padding(targets.boxes.to(dtype), targets.labels)

    num_images = len(targets)
    num_targets = max(1, *(len(target.labels) for target in targets))
    device = targets[0].boxes.device

    boxes = torch.zeros(num_images, num_targets, 4, dtype=dtype, device=device)
    labels = torch.full((num_images, num_targets), NO_OBJECT, dtype=torch.int64, device=device)

    for index, target in enumerate(targets):
        count = len(target.labels)
        boxes[index, :count] = target.boxes
        labels[index, :count] = target.labels
    return _hide_padding(boxes, labels)


def _hide_padding(boxes: Tensor, labels: Tensor) -> PaddedTargets:
    """Return the targets with a class in place of `NO_OBJECT`, since labels are also indices."""
    return PaddedTargets(boxes, labels.clamp(min=0), labels != NO_OBJECT)


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
