"""The box head: its values by hand, its initial values."""

import pytest
import torch
import torch.nn.functional as F

from detector.model.box_head import BoxHead


def test_by_hand():
    head = BoxHead(2, 8, 3)
    pooled = torch.randn(4, 2, 7, 7)
    logits, deltas = head(pooled)
    hidden = pooled.flatten(1)
    for layer in head.shared_fcs:
        hidden = F.relu(hidden @ layer.weight.T + layer.bias)
    torch.testing.assert_close(logits, hidden @ head.fc_cls.weight.T + head.fc_cls.bias)
    expected = hidden @ head.fc_reg.weight.T + head.fc_reg.bias
    torch.testing.assert_close(deltas, expected.view(4, 3, 4))


def test_initial_values():
    head = BoxHead(16, 256, 80)
    assert head.fc_cls.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert head.fc_reg.weight.std().item() == pytest.approx(0.001, rel=0.05)
    for layer in (*head.shared_fcs, head.fc_cls, head.fc_reg):
        assert not layer.bias.any()
