"""Assigns boxes to ground truths, for a whole batch and with fixed shapes.

Letters: B images, G padded ground truths, N boxes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from detector.model.padded_targets import PaddedTargets
from detector.ops.boxes import iou


@dataclass(frozen=True)
class Matcher:
    """Assigns boxes to ground truths by IoU.

    Attributes:
        positive_iou: a box with at least this IoU is positive.
        negative_iou: a box with a lower IoU is negative; between the two it is ignored.
        low_quality_iou: each ground truth also takes the boxes that overlap it most, if their IoU is at least this.
            Where two ground truths take the same box, the later one gets it. None turns this off.

    Source:
        MMDetection's MaxIoUAssigner.
    """

    positive_iou: float
    negative_iou: float
    low_quality_iou: float | None = None

    def __call__(self, targets: PaddedTargets, boxes: Tensor, valid: Tensor) -> Tensor:
        """Assign boxes to ground truths.

        Args:
            targets: of B images.
            boxes: (B, N, 4).
            valid: (B, N) bool; the other boxes are ignored.

        Returns:
            (B, N) int64: -1 ignored, 0 background, g + 1 for ground truth g. A box that overlaps two ground truths
            equally takes the first.
        """
        overlaps = iou(targets.boxes, boxes)  # (B, G, N)
        overlaps = torch.where(targets.valid[:, :, None] & valid[:, None, :], overlaps, -1)

        max_overlap, best_target = overlaps.max(1)
        assigned = torch.where(max_overlap < self.negative_iou, 0, -1)
        assigned = torch.where(max_overlap >= self.positive_iou, best_target + 1, assigned)

        if self.low_quality_iou is not None and boxes.shape[1]:
            low_quality = _low_quality_matches(overlaps, self.low_quality_iou)
            assigned = torch.where(low_quality > 0, low_quality, assigned)
        return torch.where(valid, assigned, -1)


def _low_quality_matches(overlaps: Tensor, min_iou: float) -> Tensor:
    """Return (B, N) int32: g + 1 if no box overlaps ground truth g more than this one, else 0.

    Args:
        overlaps: (B, G, N).
        min_iou: ground truths whose best overlap is lower take no box.
    """
    max_overlap = overlaps.amax(2)[:, :, None]  # (B, G, 1)
    is_match = (overlaps == max_overlap) & (max_overlap >= min_iou)
    target_numbers = torch.arange(1, overlaps.shape[1] + 1, dtype=torch.int32, device=overlaps.device)
    return torch.where(is_match, target_numbers[None, :, None], 0).amax(1)
