"""Non-maximum suppression in plain PyTorch: the CPU path.

Receives checked tensors from `detector.ops.nms`, which has the rule, and returns which boxes are kept.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

BLOCK = 256
"""Boxes of a group that are compared all at once; a larger group goes block by block."""

PAIRS_AT_ONCE = 1 << 18
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
    x1, y1, x2, y2 = boxes.unbind(1)
    boxes_and_areas = torch.stack([x1, y1, x2, y2, (x2 - x1) * (y2 - y1)])
    spans_by_size: dict[int, list[tuple[int, int]]] = defaultdict(list)  # (start, count) of groups of similar size
    start = 0
    for count in counts:
        if count:
            spans_by_size[(count - 1).bit_length()].append((start, count))
        start += count

    for bits, spans in spans_by_size.items():
        groups_at_once = max(PAIRS_AT_ONCE // min(1 << bits, BLOCK) ** 2, 1)
        for first in range(0, len(spans), groups_at_once):
            _suppress_similar_groups(keep, boxes_and_areas, spans[first : first + groups_at_once], threshold)
    return keep


def _suppress_similar_groups(keep: Tensor, boxes: Tensor, spans: list[tuple[int, int]], threshold: float) -> None:
    """Fill `keep` (N,) for the groups with these spans (start, count), padded to the largest, all at once.

    Args:
        keep: of all groups.
        boxes: (5, N), coordinates and areas.
        spans: of the groups.
        threshold: as above.
    """
    starts, counts = torch.tensor(spans, device=boxes.device).unbind(1)
    rank = torch.arange(max(count for _, count in spans), device=boxes.device)  # of a box in its group
    live = rank < counts[:, None]  # (groups, largest count)
    index = (starts[:, None] + rank).clamp(max=boxes.shape[1] - 1)
    keep[index[live]] = _suppress(boxes[:, index], live, threshold)[live]


def _suppress(boxes: Tensor, live: Tensor, threshold: float) -> Tensor:
    """Return the kept boxes (G, M) bool of groups padded to the same size, block by block.

    The kept boxes of a block suppress boxes among those that remain, before the next block is taken.

    Args:
        boxes: (5, G, M), coordinates and areas, each group by descending score.
        live: (G, M) bool, False for padding.
        threshold: boxes that overlap by more are suppressed.
    """
    block_keep = _suppress_block(boxes[..., :BLOCK], live[:, :BLOCK], threshold)
    if live.shape[1] <= BLOCK:
        return block_keep

    keep = torch.zeros_like(live)
    rank = torch.arange(live.shape[1], device=live.device).expand_as(live)
    while True:
        keep.scatter_(1, rank[:, :BLOCK], block_keep)
        rest_live = live[:, BLOCK:]
        if not rest_live.any():
            return keep
        kept_boxes, kept, _ = _compact(boxes[..., :BLOCK], block_keep, rank[:, :BLOCK])
        suppressed = _overlaps(kept_boxes, kept, boxes[..., BLOCK:], threshold)
        boxes, live, rank = _compact(boxes[..., BLOCK:], rest_live & ~suppressed, rank[:, BLOCK:])
        block_keep = _suppress_block(boxes[..., :BLOCK], live[:, :BLOCK], threshold)


def _compact(boxes: Tensor, live: Tensor, rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move the live boxes of each group to its front, in their order; cut off what then is live in no group."""
    longest = int(live.sum(1).max())
    order = live.sort(dim=1, descending=True, stable=True).indices[:, :longest]
    return boxes.gather(2, order.expand(5, -1, -1)), live.gather(1, order), rank.gather(1, order)


def _overlaps(kept_boxes: Tensor, kept: Tensor, boxes: Tensor, threshold: float) -> Tensor:
    """Tell which boxes (5, G, N) a kept one suppresses: (G, N) bool; kept_boxes (5, G, M), kept (G, M) bool."""
    keep = kept.to(boxes.dtype).unsqueeze(1)
    boxes_at_once = max(PAIRS_AT_ONCE // max(kept.numel(), 1), 1)
    counts = [keep @ _iou(kept_boxes, part).gt_(threshold) for part in boxes.split(boxes_at_once, dim=2)]
    return torch.cat(counts, dim=2).squeeze(1) > 0


def _suppress_block(boxes: Tensor, live: Tensor, threshold: float) -> Tensor:
    """Return the kept boxes (G, M) bool for (5, G, M), by repeating the rule on all boxes until nothing changes.

    After step n the first n boxes are final, because each depends on earlier ones only. So the result is unique, and it
    is reached after as many steps as the longest chain of suppressions.
    """
    suppresses = _iou(boxes, boxes).gt_(threshold).triu_(1)  # 0 or 1; (G, earlier box, later box)
    keep = live
    while True:
        new_keep = (keep.to(boxes.dtype).unsqueeze(1) @ suppresses).squeeze(1) == 0
        new_keep &= live
        if torch.equal(new_keep, keep):
            return keep
        keep = new_keep


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU (G, M, N) of a (5, G, M) and b (5, G, N), coordinates and areas, 0 where it is not a number."""
    ax1, ay1, ax2, ay2, a_area = a.unsqueeze(3).unbind()
    bx1, by1, bx2, by2, b_area = b.unsqueeze(2).unbind()
    width = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)
    height = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0)
    inter = width.mul_(height)
    union = (a_area + b_area).sub_(inter)
    return inter.div_(union).nan_to_num_(0)
