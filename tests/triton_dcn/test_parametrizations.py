"""Layers whose weight is a function of other parameters: weight and spectral norm of `torch.nn.utils`."""

import copy

import pytest
import torch
from torch.nn.utils import parametrizations

from tests.triton_dcn.cases import CASES, make_case
from triton_dcn import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack, fuse_batch_norm

KINDS = pytest.mark.parametrize("kind", [DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack])
NORMS = pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])


def make_layer(kind):
    """Return a layer, and what it is called with, in float64."""
    layer = kind(8, 6, 3, padding=1).double()
    x, offset, mask, _ = make_case(CASES["plain"], torch.float64).tensors
    if kind is DeformConv2d:
        return layer, (x, offset, mask)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.1)
    return layer, (x,)


@NORMS
@KINDS
def test_norms_of_the_weight(kind, norm):
    """Output and gradients are those of a plain layer that is given the weight; copies and checkpoints work."""
    plain, inputs = make_layer(kind)
    layer = norm(copy.deepcopy(plain)).eval()  # in training, spectral norm changes the weight at every call
    output = layer(*inputs)
    expected = torch.func.functional_call(plain, {"weight": layer.weight}, inputs)
    torch.testing.assert_close(output, expected)
    assert torch.allclose(layer.weight, plain.weight) == (norm is parametrizations.weight_norm)

    parameters = list(layer.parametrizations.weight.parameters())
    grads = torch.autograd.grad(output.square().sum(), parameters)
    expected_grads = torch.autograd.grad(expected.square().sum(), parameters)
    torch.testing.assert_close(grads, expected_grads)

    torch.testing.assert_close(copy.deepcopy(layer)(*inputs), output)
    loaded = norm(make_layer(kind)[0]).eval()
    loaded.load_state_dict(layer.state_dict())
    torch.testing.assert_close(loaded(*inputs), output)


@NORMS
@KINDS
def test_fused_layer_has_the_values_alone(kind, norm):
    plain, inputs = make_layer(kind)
    layer = norm(plain).eval()
    batch_norm = torch.nn.BatchNorm2d(6).double().eval()
    torch.nn.init.uniform_(batch_norm.running_var, 0.5, 2)
    torch.nn.init.uniform_(batch_norm.running_mean)
    fused = fuse_batch_norm(layer, batch_norm)
    assert type(fused) is kind
    assert fused.state_dict().keys() == (make_layer(kind)[0].state_dict() | {"bias": None}).keys()
    torch.testing.assert_close(fused(*inputs), batch_norm(layer(*inputs)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@KINDS
def test_weight_of_a_hook_is_not_fused(kind):
    layer = torch.nn.utils.weight_norm(make_layer(kind)[0])
    with pytest.raises(ValueError, match="layer: expected a weight that is a parameter.*remove_weight_norm"):
        fuse_batch_norm(layer, torch.nn.BatchNorm2d(6).double().eval())
