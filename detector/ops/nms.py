"""Greedy non-maximum suppression: checks the arguments and hands them to the operator `detector::batched_nms`.

The operator hands them on to `nms_cpu` (plain PyTorch) or to `kernels.nms` (Triton on a GPU, the host reads nothing
back). It works on many groups of boxes at once, and its shapes do not depend on the data. The shapes of `nms` and
`nms_by_id`, which return indices, do: they are for users and tests, the model does not call them.

The rule everywhere: go through the boxes by descending score, lower index first among equals; a kept box suppresses
every later box of its group with inter / (area_a + area_b - inter) > threshold, in exactly this arithmetic. 0 / 0 does
not suppress. A box with a NaN score is never kept and suppresses nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detector.ops import nms_cpu
from triton_dcn.vmapping import fold, unfold


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

    keep: Tensor = batched_nms_op(boxes.detach(), scores.detach(), valid, float(iou_threshold))
    return keep


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Return the indices (K,) int64 of the kept boxes by descending score; boxes (N, 4), scores (N,)."""
    valid = torch.ones_like(scores, dtype=torch.bool)
    keep = batched_nms(boxes[None], scores[None], valid[None], iou_threshold)[0]
    return _kept_by_score(keep, scores)


def nms_by_id(boxes: Tensor, scores: Tensor, ids: Tensor, iou_threshold: float) -> Tensor:
    """Suppress only among boxes with the same id.

    Args:
        boxes: (N, 4) floating, x1 y1 x2 y2, any sign.
        scores: (N,) floating.
        ids: (N,) integer, for example classes.
        iou_threshold: boxes of one id that overlap by more than this are suppressed.

    Returns:
        (K,) int64, indices of the kept boxes by descending score.

    Raises:
        ValueError, TypeError: as `batched_nms`, or `ids` has another shape than `scores`.
    """
    if ids.shape != scores.shape:
        raise ValueError(f"ids: expected {tuple(scores.shape)}, got {tuple(ids.shape)}")

    _, group, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    group_starts = counts.cumsum(0) - counts
    order = group.sort(stable=True).indices
    rank = torch.empty_like(order)  # of a box in its group
    rank[order] = torch.arange(len(order), device=order.device) - group_starts[group[order]]

    max_group_size = int(counts.max()) if len(counts) else 0
    padded_boxes = boxes.new_zeros(len(counts), max_group_size, 4)
    padded_scores = scores.new_zeros(len(counts), max_group_size)
    valid = torch.zeros_like(padded_scores, dtype=torch.bool)
    padded_boxes[group, rank] = boxes
    padded_scores[group, rank] = scores
    valid[group, rank] = True
    keep = batched_nms(padded_boxes, padded_scores, valid, iou_threshold)[group, rank]
    return _kept_by_score(keep, scores)


def _kept_by_score(keep: Tensor, scores: Tensor) -> Tensor:
    """Return the indices of the kept boxes by descending score, lower index first among equals."""
    index = keep.nonzero()[:, 0]
    return index[scores[index].sort(descending=True, stable=True).indices]


@torch.library.custom_op("detector::batched_nms", mutates_args=(), device_types="cpu")
def batched_nms_op(boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    """Suppress on a CPU; arguments and result are those of `batched_nms`."""
    return nms_cpu.batched_nms(boxes, scores, valid, iou_threshold)


@batched_nms_op.register_kernel("cuda")
def _batched_nms_cuda(boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    from detector.ops.kernels import nms as kernels  # not at the top: only machines with a GPU have triton

    return kernels.batched_nms(boxes, scores, valid, iou_threshold)


@batched_nms_op.register_fake
def _batched_nms_fake(boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    return torch.empty_like(valid, memory_format=torch.contiguous_format)


@batched_nms_op.register_vmap
def _vmap_batched_nms(
    info: Any, in_dims: tuple[int | None, ...], boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float
) -> tuple[Tensor, int]:
    """Run the groups of all elements in one call."""
    tensors = (boxes, scores, valid)
    folded = [fold(tensor, dim, info.batch_size) for tensor, dim in zip(tensors, in_dims[:3], strict=True)]
    return unfold(batched_nms_op(*folded, iou_threshold), info.batch_size), 0
