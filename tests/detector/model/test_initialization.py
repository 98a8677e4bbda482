"""Initial values of single layers."""

import math

import pytest
import torch
from torch import nn

from detector.model.initialization import kaiming_init, normal_init, xavier_init


@pytest.mark.parametrize(
    ("init", "std"),
    [
        (lambda layer: normal_init(layer, std=0.01), 0.01),
        (xavier_init, math.sqrt(2 / (9 * 64 + 9 * 128))),
        (kaiming_init, math.sqrt(2 / (9 * 128))),
    ],
    ids=["normal", "xavier", "kaiming"],
)
def test_spread_of_the_weights(init, std):
    layer = nn.Conv2d(64, 128, 3)
    init(layer)
    assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
    assert not layer.bias.any()


def test_layer_without_bias():
    layer = nn.Linear(8, 8, bias=False)
    torch.nn.init.zeros_(layer.weight)
    xavier_init(layer)
    assert layer.weight.any()
