"""Arithmetic of boxes: tensors in, tensors out. A box is x1 y1 x2 y2 in pixels, width = x2 - x1.

The order of the operations is MMDetection's, and so is the rounding: it decides the labels of anchors that tie
mathematically.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_RATIO_LIMIT = abs(math.log(16 / 1000))


def area(boxes: Tensor) -> Tensor:
    """Return the areas of (..., 4) boxes, (...)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the intersection over union of every pair.

    Args:
        a: (..., N, 4).
        b: (..., M, 4), same leading shape.

    Returns:
        (..., N, M); the union is clamped to at least 1e-6, so two empty boxes give 0.
    """
    a, b = a[..., :, None, :], b[..., None, :, :]
    width = torch.minimum(a[..., 2], b[..., 2]).sub_(torch.maximum(a[..., 0], b[..., 0])).clamp_(min=0)
    height = torch.minimum(a[..., 3], b[..., 3]).sub_(torch.maximum(a[..., 1], b[..., 1])).clamp_(min=0)
    overlap = width.mul_(height)
    return overlap / (area(a) + area(b)).sub_(overlap).clamp_(min=1e-6)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Return the boxes cut to [0, width] x [0, height].

    Args:
        boxes: (B, ..., 4).
        sizes: (B, 2), height and width.
    """
    limit = sizes.flip(-1).repeat(1, 2).to(boxes.dtype)  # (B, 4): width, height, width, height
    limit = limit.reshape(limit.shape[0], *[1] * (boxes.dim() - 2), 4)
    return torch.minimum(boxes.clamp(min=0), limit)


def encode(boxes: Tensor, targets: Tensor, stds: tuple[float, float, float, float]) -> Tensor:
    """Return the deltas (dx, dy, dw, dh) / stds that turn `boxes` into `targets`; both (..., 4).

    Source:
        Girshick et al., R-CNN, appendix C; MMDetection's DeltaXYWHBBoxCoder with zero means.
    """
    sizes, target_sizes = boxes[..., 2:] - boxes[..., :2], targets[..., 2:] - targets[..., :2]
    centers, target_centers = (boxes[..., :2] + boxes[..., 2:]) * 0.5, (targets[..., :2] + targets[..., 2:]) * 0.5
    deltas = torch.cat([(target_centers - centers) / sizes, (target_sizes / sizes).log()], -1)
    return deltas / _row(stds, deltas)


def decode(boxes: Tensor, deltas: Tensor, stds: tuple[float, float, float, float]) -> Tensor:
    """Apply deltas to boxes; the inverse of `encode`, with |dw| and |dh| limited to ln(1000 / 16).

    Args:
        boxes: (..., 4).
        deltas: (..., 4), broadcast against `boxes`.
    """
    deltas = deltas * _row(stds, deltas)
    sizes, centers = boxes[..., 2:] - boxes[..., :2], (boxes[..., :2] + boxes[..., 2:]) * 0.5
    centers = centers + sizes * deltas[..., :2]
    half = sizes * deltas[..., 2:].clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp() * 0.5
    return torch.cat([centers - half, centers + half], -1)


def _row(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Return the values as a tensor of the type of `like`, written on its device: a copy from the host would wait."""
    return torch.stack([like.new_full((), value) for value in values])
