"""Initial values of single layers: weights as named, biases zero.

Source:
    mmengine's `normal_init`, `xavier_init` and `kaiming_init`.
"""

from __future__ import annotations

from torch import nn

Layer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear


def normal_init(layer: Layer, std: float) -> None:
    """Draw the weights from a normal distribution around 0."""
    nn.init.normal_(layer.weight, std=std)
    _zero_bias(layer)


def xavier_init(layer: Layer) -> None:
    """Draw the weights uniformly, with Xavier's bound."""
    nn.init.xavier_uniform_(layer.weight)
    _zero_bias(layer)


def kaiming_init(layer: Layer) -> None:
    """Draw the weights from Kaiming's normal distribution for a ReLU, by the outputs of the layer."""
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    _zero_bias(layer)


def _zero_bias(layer: Layer) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
