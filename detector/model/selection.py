"""Selects boxes of every image of a batch: by index, or those with the highest scores."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_boxes(boxes: Tensor, index: Tensor) -> Tensor:
    """Return boxes (or deltas) by index.

    Args:
        boxes: (B, N, 4).
        index: (B, S) int64 into the N boxes of each image.

    Returns:
        (B, S, 4).
    """
    return boxes.gather(1, index[:, :, None].expand(-1, -1, 4))


def top_scores(scores: Tensor, keep: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the highest scores of each image; lower index first among equals.

    Args:
        scores: (B, ...), not negative.
        keep: same shape, bool; the other scores count as -1.
        count: how many to return, at most.

    Returns:
        scores (B, n) descending, and their indices (B, n) int64 into the flattened scores of the image; n is `count` or
        the number of scores, if that is smaller.
    """
    kept = torch.where(keep, scores, -1).flatten(1)
    scores, index = kept.sort(dim=1, descending=True, stable=True)
    return scores[:, :count], index[:, :count]
