"""Non-maximum suppression in plain PyTorch: the CPU path.

Receives checked tensors from `detector.ops.nms`, which has the rule, and returns which boxes are kept.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

BLOCK = 256
"""Largest number of boxes that are compared all at once; larger groups go block by block."""

PAIRS_AT_ONCE = 1 << 17
"""Pairs of boxes compared at a time, so that the temporaries stay in the cache."""


def batched_nms(boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    """Suppress inside each group; see `detector.ops.nms.batched_nms`. Returns (G, M) bool."""
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    live = valid & ~scores.isnan()
    group_size = max(scores.shape[1], 1)

    index = live.flatten().nonzero()[:, 0]
    index = index[scores.flatten()[index].sort(descending=True, stable=True).indices]
    index = index[(index // group_size).sort(stable=True).indices]  # by group, then score, then index
    sorted_boxes = boxes[index // group_size, index % group_size]

    keep = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    keep.view(-1)[index] = _suppress_groups(sorted_boxes, live.sum(1).tolist(), iou_threshold)
    return keep


def _suppress_groups(boxes: Tensor, counts: list[int], threshold: float) -> Tensor:
    """Return the kept boxes (N,) bool.

    Args:
        boxes: (N, 4), group after group, each by descending score.
        counts: boxes of each group.
        threshold: boxes that overlap by more are suppressed.
    """
    keep = torch.empty(len(boxes), dtype=torch.bool, device=boxes.device)
    small_groups: dict[int, list[tuple[int, int]]] = defaultdict(list)  # padded size -> (start, count) of its groups
    start = 0
    for count in counts:
        if count > BLOCK:
            keep[start : start + count] = _suppress_large_group(boxes[start : start + count], threshold)
        elif count:
            padded_size = 1 << (count - 1).bit_length()
            small_groups[padded_size].append((start, count))
        start += count

    for padded_size, spans in small_groups.items():
        groups_at_once = max(PAIRS_AT_ONCE // padded_size**2, 1)
        for first in range(0, len(spans), groups_at_once):
            _suppress_small_groups(keep, boxes, spans[first : first + groups_at_once], padded_size, threshold)
    return keep


def _suppress_small_groups(
    keep: Tensor, boxes: Tensor, spans: list[tuple[int, int]], padded_size: int, threshold: float
) -> None:
    """Fill `keep` (N,) for the groups with these spans (start, count), padded to `padded_size` boxes, all at once."""
    starts, counts = torch.tensor(spans, device=boxes.device).unbind(1)
    rank = torch.arange(padded_size, device=boxes.device)  # of a box in its group
    live = rank < counts[:, None]  # (groups, padded_size)
    index = (starts[:, None] + rank)[live]

    padded_boxes = boxes.new_zeros(*live.shape, 4)
    padded_boxes[live] = boxes[index]
    keep[index] = _suppress_block(padded_boxes, threshold)[live]


def _suppress_large_group(boxes: Tensor, threshold: float) -> Tensor:
    """Return the kept boxes (N,) bool of one group (N, 4), block by block.

    The kept boxes of a block suppress boxes among those that remain, before the next block is taken.
    """
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    remaining = torch.arange(len(boxes), device=boxes.device)
    while len(remaining):
        block = remaining[:BLOCK]
        kept = block[_suppress_block(boxes[block], threshold)]
        keep[kept] = True

        not_suppressed = [remaining[:0]]
        for part in remaining[BLOCK:].split(PAIRS_AT_ONCE // BLOCK):
            largest_iou = _iou(boxes[kept], boxes[part]).amax(0)
            not_suppressed.append(part[largest_iou <= threshold])
        remaining = torch.cat(not_suppressed)
    return keep


def _suppress_block(boxes: Tensor, threshold: float) -> Tensor:
    """Return (..., M) bool for boxes (..., M, 4), by repeating the rule on all boxes at once until nothing changes.

    After step n the first n boxes are final, because each depends on earlier ones only. So the result is unique, and it
    is reached after as many steps as the longest chain of suppressions.
    """
    suppresses = _iou(boxes, boxes).gt_(threshold).triu_(1)  # 0 or 1; (..., earlier box, later box)
    keep = torch.ones(*boxes.shape[:-2], 1, boxes.shape[-2], dtype=boxes.dtype, device=boxes.device)
    while True:
        new_keep = (keep @ suppresses == 0).to(boxes.dtype)
        if torch.equal(new_keep, keep):
            return keep.squeeze(-2).bool()
        keep = new_keep


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU (..., M, N) of a (..., M, 4) and b (..., N, 4), 0 where it is not a number."""
    ax1, ay1, ax2, ay2 = a[..., :, None, :].movedim(-1, 0).contiguous()
    bx1, by1, bx2, by2 = b[..., None, :, :].movedim(-1, 0).contiguous()
    width = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)
    height = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0)
    inter = width.mul_(height)
    union = ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1)).sub_(inter)
    return inter.div_(union).nan_to_num_(0)
