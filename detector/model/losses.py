"""The loss of boxes, and the average of a loss over samples, for the RPN and the box heads."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps  # also in float64, as in MMDetection


def average_loss(loss: Tensor, included: Tensor, average_factor: Tensor) -> Tensor:
    """Divide the summed loss of the included samples by `average_factor` + `EPS`.

    Args:
        loss: one value per sample, any shape.
        included: bool, same shape.
        average_factor: scalar, of the dtype of `loss`.

    Source:
        MMDetection's weight_reduce_loss.
    """
    total = torch.where(included, loss, 0).sum()
    return total / (average_factor + EPS)


def smooth_l1(deltas: Tensor, target_deltas: Tensor, included: Tensor, beta: float) -> Tensor:
    """Return the loss of each box, (B, S), summed over its four numbers; finite also for those that are not included.

    Args:
        deltas: (B, S, 4).
        target_deltas: same shape; where not included they may be NaN.
        included: (B, S) bool.
        beta: below this difference the loss is quadratic; 0 is the L1 loss.

    Source:
        Girshick, Fast R-CNN, ICCV 2015, equation 3.
    """
    target_deltas = torch.where(included[:, :, None], target_deltas, 0)
    distance = (deltas - target_deltas).abs()
    if beta > 0:
        distance = torch.where(distance < beta, 0.5 * distance.square() / beta, distance - 0.5 * beta)
    return distance.sum(2)
