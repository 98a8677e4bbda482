"""Arithmetic of boxes: tensors in, tensors out. A box is x1 y1 x2 y2 in pixels, width = x2 - x1.

The operations have the order of MMDetection, and so the same rounding, which decides the labels of anchors whose exact
overlaps are equal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detector.ops.tensor_memory import TensorMemory

LOG_RATIO_LIMIT = abs(math.log(16 / 1000))
"""Largest |dw| and |dh| that `decode` applies."""

_CONSTANTS: TensorMemory[Tensor] = TensorMemory(64)


def area(boxes: Tensor) -> Tensor:
    """Return the areas of (..., 4) boxes, (...)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return the intersection over union of every pair.

    Args:
        boxes1: (..., N, 4).
        boxes2: (..., M, 4), same leading shape.

    Returns:
        (..., N, M); the union is clamped to at least 1e-6, so two empty boxes give 0.
    """
    boxes1 = boxes1[..., :, None, :]
    boxes2 = boxes2[..., None, :, :]

    left = torch.maximum(boxes1[..., 0], boxes2[..., 0])
    right = torch.minimum(boxes1[..., 2], boxes2[..., 2])
    width = right.sub_(left).clamp_(min=0)

    top = torch.maximum(boxes1[..., 1], boxes2[..., 1])
    bottom = torch.minimum(boxes1[..., 3], boxes2[..., 3])
    height = bottom.sub_(top).clamp_(min=0)

    intersection = width.mul_(height)
    union = (area(boxes1) + area(boxes2)).sub_(intersection)
    return intersection / union.clamp_(min=1e-6)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Return the boxes cut to [0, width] x [0, height].

    Args:
        boxes: (B, ..., 4).
        sizes: (B, 2), height and width.
    """
    limit = sizes.flip(-1).repeat(1, 2).to(boxes.dtype)  # (B, 4): width, height, width, height
    middle_dimensions = [1] * (boxes.dim() - 2)
    limit = limit.reshape(limit.shape[0], *middle_dimensions, 4)
    return torch.minimum(boxes.clamp(min=0), limit)


def encode(boxes: Tensor, targets: Tensor, stds: tuple[float, float, float, float]) -> Tensor:
    """Return the deltas (dx, dy, dw, dh) / stds that turn `boxes` into `targets`; both (..., 4).

    Source:
        Girshick et al., R-CNN, appendix C; MMDetection's DeltaXYWHBBoxCoder with zero means.
    """
    centers, sizes = _centers_and_sizes(boxes)
    target_centers, target_sizes = _centers_and_sizes(targets)
    shifts = (target_centers - centers) / sizes
    log_ratios = (target_sizes / sizes).log()
    deltas = torch.cat([shifts, log_ratios], -1)
    return deltas / _tensor_of(stds, deltas)


def decode(boxes: Tensor, deltas: Tensor, stds: tuple[float, float, float, float]) -> Tensor:
    """Apply deltas to boxes; the inverse of `encode`, with |dw| and |dh| limited to ln(1000 / 16).

    Args:
        boxes: (..., 4).
        deltas: (..., 4), broadcast against `boxes`.
        stds: those that `encode` divided by.
    """
    deltas = deltas * _tensor_of(stds, deltas)
    centers, sizes = _centers_and_sizes(boxes)
    new_centers = centers + sizes * deltas[..., :2]
    half_sizes = sizes * deltas[..., 2:].clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp() * 0.5
    return torch.cat([new_centers - half_sizes, new_centers + half_sizes], -1)


def _centers_and_sizes(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centers and the sizes of (..., 4) boxes, both (..., 2), x first."""
    centers = (boxes[..., :2] + boxes[..., 2:]) * 0.5
    sizes = boxes[..., 2:] - boxes[..., :2]
    return centers, sizes


def _tensor_of(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Return the values as a tensor with the dtype and device of `like`.

    Each value is filled in on the device: a copy from the host would make the host wait for the GPU.
    """
    return _CONSTANTS.get(like, values, lambda: torch.stack([like.new_full((), value) for value in values]))
