"""The average of a loss over samples."""

import torch

from detector.model.losses import EPS, average_loss


def test_average_by_hand():
    loss = torch.tensor([[1.0, 2.0], [float("nan"), 4.0]], dtype=torch.float64)
    included = torch.tensor([[True, False], [False, True]])
    factor = torch.tensor(2.0, dtype=torch.float64)
    assert average_loss(loss, included, factor).item() == 5 / (2 + EPS)


def test_nothing_included_is_zero():
    loss = torch.ones(3)
    assert average_loss(loss, torch.zeros(3, dtype=torch.bool), torch.tensor(0.0)) == 0
