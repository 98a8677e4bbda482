"""Selects boxes of every image of a batch: by index, or those with the highest scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_dcn.vmapping import fold, unfold


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
    return top_k(kept, min(count, kept.shape[1]))


def top_k(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the highest scores of each row; lower index first among equals, which `torch.topk` does not promise.

    Args:
        scores: (B, N) floating; with NaN in it any of its indices may be returned.
        count: how many to return, N at most.

    Returns:
        scores (B, count) descending, and their indices (B, count) int64.
    """
    values: tuple[Tensor, Tensor] = top_k_op(scores, count)
    return values


@torch.library.custom_op("detector::top_k", mutates_args=())
def top_k_op(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Compute `top_k`."""
    batch, total = scores.shape
    if total < 4 * count:
        values, index = scores.sort(dim=1, descending=True, stable=True)
        return values[:, :count].contiguous(), index[:, :count].contiguous()
    if count == 0:
        return scores.new_empty(batch, 0), scores.new_empty(batch, 0, dtype=torch.int64)

    # Of the scores equal to the lowest that is returned, the first ones fill the places that are left.
    lowest = scores.topk(count, 1).values[:, -1:]
    above = ~(scores <= lowest)  # NaN, too
    equal = scores == lowest
    places = count - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1) <= places))

    # The chosen ones by ascending index, then by score.
    distance_to_end = torch.arange(total, 0, -1, device=scores.device)
    index = total - torch.where(chosen, distance_to_end, 0).topk(count, 1).values
    values, order = scores.gather(1, index).sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, order)


@top_k_op.register_fake
def _top_k_fake(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values = scores.new_empty(scores.shape[0], count)
    return values, values.new_empty(values.shape, dtype=torch.int64)


@top_k_op.register_vmap
def _vmap_top_k(
    info: Any, in_dims: tuple[int | None, ...], scores: Tensor, count: int
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Run the rows of all elements in one call."""
    values, index = top_k_op(fold(scores, in_dims[0], info.batch_size), count)
    return (unfold(values, info.batch_size), unfold(index, info.batch_size)), (0, 0)
