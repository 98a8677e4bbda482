"""Greedy non-maximum suppression: many groups of boxes at once, fixed shapes in and out.

`batched_nms` -> custom operator -> plain PyTorch here (CPU) | `kernels.nms` (Triton, CUDA, no host round trip).
`nms` and `nms_by_id` return indices, so their shape depends on the data: for people and tests, not for the hot path.

The rule everywhere: walk the boxes by falling score, lower index first among equals; a kept box suppresses every later
box of its group with inter / (area_a + area_b - inter) > threshold, in exactly this arithmetic. 0 / 0 does not
suppress. A box with a NaN score is never kept and suppresses nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
"""Boxes of a group that are compared all with all; larger groups go block by block."""

PAIRS = 1 << 17
"""Pairs compared at a time, so that the temporaries stay in the cache."""


def batched_nms(boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    """Suppress overlapping boxes inside each of G independent groups.

    Args:
        boxes: (G, M, 4) floating, x1 y1 x2 y2; 16-bit boxes are compared in float32.
        scores: (G, M) floating.
        valid: (G, M) bool; the other entries are padding, never kept.
        iou_threshold: boxes that overlap by more than this are suppressed.

    Returns:
        (G, M) bool, True where the box is kept; in the order of the input. Not differentiable.

    Raises:
        ValueError: shapes disagree.
        TypeError: dtypes or devices disagree.
    """
    if boxes.dim() != 3 or boxes.shape[2] != 4:
        raise ValueError(f"boxes: expected (G, M, 4), got {tuple(boxes.shape)}")
    for name, tensor in (("scores", scores), ("valid", valid)):
        if tensor.shape != boxes.shape[:2]:
            raise ValueError(f"{name}: expected {tuple(boxes.shape[:2])}, got {tuple(tensor.shape)}")
        if tensor.device != boxes.device:
            raise TypeError(f"{name}: expected device {boxes.device}, got {tensor.device}")
    for name, tensor in (("boxes", boxes), ("scores", scores)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if valid.dtype != torch.bool:
        raise TypeError(f"valid: expected torch.bool, got {valid.dtype}")
    return _batched_nms(boxes.detach(), scores.detach(), valid, float(iou_threshold))


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Return the indices (K,) int64 of the kept boxes by falling score; boxes (N, 4), scores (N,)."""
    keep = batched_nms(boxes[None], scores[None], torch.ones_like(scores, dtype=torch.bool)[None], iou_threshold)[0]
    return _by_score(keep, scores)


def nms_by_id(boxes: Tensor, scores: Tensor, ids: Tensor, iou_threshold: float) -> Tensor:
    """Suppress only among boxes with the same id.

    Args:
        boxes: (N, 4) floating, x1 y1 x2 y2, any sign.
        scores: (N,) floating.
        ids: (N,) integer, for example classes.
        iou_threshold: boxes of one id that overlap by more than this are suppressed.

    Returns:
        (K,) int64, indices of the kept boxes by falling score.
    """
    if ids.shape != scores.shape:
        raise ValueError(f"ids: expected {tuple(scores.shape)}, got {tuple(ids.shape)}")
    group, counts = torch.unique(ids, return_inverse=True, return_counts=True)[1:]
    size = int(counts.max()) if len(counts) else 0
    order = group.sort(stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[group[order]]
    padded_boxes = boxes.new_zeros(len(counts), size, 4)
    padded_scores = scores.new_zeros(len(counts), size)
    valid = torch.zeros_like(padded_scores, dtype=torch.bool)
    padded_boxes[group, rank], padded_scores[group, rank], valid[group, rank] = boxes, scores, True
    keep = batched_nms(padded_boxes, padded_scores, valid, iou_threshold)[group, rank]
    return _by_score(keep, scores)


def _by_score(keep: Tensor, scores: Tensor) -> Tensor:
    """Return the indices of the kept boxes by falling score, lower index first among equals."""
    index = keep.nonzero()[:, 0]
    return index[scores[index].sort(descending=True, stable=True).indices]


@torch.library.custom_op("detector::batched_nms", mutates_args=(), device_types="cpu")
def _batched_nms(boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    live = valid & ~scores.isnan()
    index = live.flatten().nonzero()[:, 0]
    index = index[scores.flatten()[index].sort(descending=True, stable=True).indices]
    size = max(scores.shape[1], 1)
    index = index[(index // size).sort(stable=True).indices]  # by group, then score, then index
    keep = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    keep.view(-1)[index] = _suppress_groups(boxes[index // size, index % size], live.sum(1).tolist(), iou_threshold)
    return keep


@_batched_nms.register_fake
def _(boxes, scores, valid, iou_threshold):
    return torch.empty_like(valid, memory_format=torch.contiguous_format)


@_batched_nms.register_kernel("cuda")
def _(boxes, scores, valid, iou_threshold):
    from detector.ops.kernels import nms as kernels  # triton, absent where there is no GPU

    return kernels.batched_nms(boxes, scores, valid, iou_threshold)


def _suppress_groups(boxes: Tensor, counts: list[int], threshold: float) -> Tensor:
    """Return (N,) bool, the kept boxes; `boxes` (N, 4) come group after group, each by falling score."""
    keep = torch.empty(len(boxes), dtype=torch.bool, device=boxes.device)
    small: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for count in counts:
        if count > BLOCK:
            keep[start : start + count] = _suppress_large(boxes[start : start + count], threshold)
        elif count:
            small.setdefault(1 << (count - 1).bit_length(), []).append((start, count))
        start += count
    for size, spans in small.items():
        limit = max(PAIRS // size**2, 1)
        for first in range(0, len(spans), limit):
            starts, lengths = torch.tensor(spans[first : first + limit], device=boxes.device).unbind(1)
            lane = torch.arange(size, device=boxes.device)
            live = lane < lengths[:, None]  # (groups, size)
            index = (starts[:, None] + lane)[live]
            padded = boxes.new_zeros(*live.shape, 4)
            padded[live] = boxes[index]
            keep[index] = _suppress_block(padded, threshold)[live]
    return keep


def _suppress_large(boxes: Tensor, threshold: float) -> Tensor:
    """Return (N,) bool for one group of boxes (N, 4): block by block, what a block keeps thins out the rest."""
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    rest = torch.arange(len(boxes), device=boxes.device)
    while len(rest):
        block = rest[:BLOCK]
        block = block[_suppress_block(boxes[block], threshold)]
        keep[block] = True
        slabs = rest[BLOCK:].split(PAIRS // BLOCK)
        rest = torch.cat([rest[:0], *(slab[_iou(boxes[block], boxes[slab]).amax(0) <= threshold] for slab in slabs)])
    return keep


def _suppress_block(boxes: Tensor, threshold: float) -> Tensor:
    """Return (..., M) bool for boxes (..., M, 4), by repeating the rule on all boxes at once until nothing changes.

    After step n the first n boxes are final, because each depends on earlier ones only: the fixpoint is unique, and it
    is reached after as many steps as the longest chain of suppressions.
    """
    suppresses = _iou(boxes, boxes).gt_(threshold).triu_(1)  # 0 or 1
    keep = torch.ones(*boxes.shape[:-2], 1, boxes.shape[-2], dtype=boxes.dtype, device=boxes.device)
    while True:
        after = (keep @ suppresses == 0).to(boxes.dtype)
        if torch.equal(after, keep):
            return keep.squeeze(-2).bool()
        keep = after


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU (..., M, N) of a (..., M, 4) and b (..., N, 4), 0 where it is not a number."""
    ax1, ay1, ax2, ay2 = a[..., :, None, :].movedim(-1, 0).contiguous()
    bx1, by1, bx2, by2 = b[..., None, :, :].movedim(-1, 0).contiguous()
    inter = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)
    inter.mul_(torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0))
    union = ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1)).sub_(inter)
    return inter.div_(union).nan_to_num_(0)
