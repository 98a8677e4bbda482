"""The average of a loss over samples, for the RPN and the box head."""

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
