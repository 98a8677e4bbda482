"""Operator and layers under torch.compile with its default backend: Inductor's code equals eager PyTorch."""

import pytest
import torch
from torch import nn

from tests.triton_dcn.cases import CASES, make_case
from triton_dcn import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack, fuse_batch_norm
from triton_dcn.functional import convolve


def compare(function, leaves, calls, tolerance=1e-11):
    """Call a function and its compiled form with the same tensors, and differentiate both.

    Args:
        function: to be compiled, with all shapes dynamic.
        leaves: whose gradients are compared.
        calls: arguments of each call.
        tolerance: relative and absolute.
    """
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for arguments in calls:
        expected = function(*arguments)
        found = compiled(*arguments)
        grad_output = torch.randn_like(expected)
        expected_grads = torch.autograd.grad(expected, leaves, grad_output)
        found_grads = torch.autograd.grad(found, leaves, grad_output)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found_grads, expected_grads, rtol=tolerance, atol=tolerance)


def test_layers():
    """Version 2 with two offset groups, a ReLU, version 1 with a stride and groups; one graph for every size."""
    first = ModulatedDeformConv2dPack(4, 6, 3, padding=1, deform_groups=2)
    second = DeformConv2dPack(6, 4, 3, stride=2, padding=1, groups=2)
    layers = nn.Sequential(first, nn.ReLU(), second).double()
    for pack in (first, second):
        nn.init.normal_(pack.conv_offset.weight, std=0.2)
        nn.init.uniform_(pack.conv_offset.bias, 0.2, 0.8)
    maps = [torch.randn(2, 4, *size, dtype=torch.float64) for size in ((9, 8), (7, 12))]
    compare(layers, list(layers.parameters()), [[x] for x in maps])


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the reference is open to Inductor: its C++ takes minutes to compile
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "empty"])
@pytest.mark.parametrize("options", [{}, {"mask_logits": True, "relu": True}], ids=["plain", "layer"])
def test_operator(name, backend, options):
    case = make_case(CASES[name], torch.float64)
    x, offset, mask, weight = (None if tensor is None else tensor.requires_grad_() for tensor in case.tensors)
    if options and mask is None:
        pytest.skip("version 1 has no mask logits")
    geom = case.geom

    def run(x, offset, weight, mask):
        if options:
            offset = torch.cat([offset, mask], 1)
            mask = None
        return convolve(
            x, offset, weight, case.bias, geom.stride, geom.padding, geom.dilation, mask, backend=backend, **options
        )

    leaves = [tensor for tensor in (x, offset, weight, mask) if tensor is not None]
    compare(run, leaves, [[x, offset, weight, mask]])


@pytest.mark.slow
def test_fused_layer():
    layer = fuse_batch_norm(DeformConv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6).eval(), relu=True).double()
    case = make_case(CASES["plain"], torch.float64)
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64, requires_grad=True)
    compare(layer, [x, *layer.parameters()], [[x, case.tensors[1], case.tensors[2]]])
