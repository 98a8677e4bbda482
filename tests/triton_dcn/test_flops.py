"""FLOPs of the operators as PyTorch counts them: those of a convolution of the same shape."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.triton_dcn.cases import CASES, device_of, make_case
from triton_dcn import deform_conv2d, launchers

NAMES = ("input", "offset", "mask", "weight")


def count_flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def leaves_of(case, device, needed):
    tensors = zip(NAMES, case.tensors, strict=True)
    return {name: None if t is None else t.to(device).requires_grad_(name in needed) for name, t in tensors}


@pytest.mark.parametrize(
    "needed", [NAMES, ("input",), ("offset",), ("mask",), ("weight",), ("offset", "weight")], ids=str
)
@pytest.mark.parametrize("name", ["plain", "odd"])
@pytest.mark.parametrize("backend", ["torch", "triton", "meta"])
def test_flops_are_those_of_a_convolution(backend, name, needed, monkeypatch):
    """Gradients that are not needed do not count; those of offset and mask come from the product for the input's."""
    monkeypatch.setattr(launchers, "launch", lambda *arguments, **constants: None)  # only the operators are counted
    case = make_case(CASES[name], torch.float32)
    device = "meta" if backend == "meta" else device_of(backend)
    backend = "torch" if backend == "meta" else backend
    leaves = leaves_of(case, device, needed)
    arguments = case.arguments | {"bias": None} | leaves
    x = leaves["input"].detach().requires_grad_(any(name in needed for name in NAMES[:3]))
    weight = leaves["weight"].detach().requires_grad_("weight" in needed)
    geom = case.geom
    settings = (None, geom.stride, geom.padding, geom.dilation, geom.groups)
    grad_output = case.grad_output.to(device)

    outputs = []
    for call in (lambda: deform_conv2d(**arguments, backend=backend), lambda: F.conv2d(x, weight, *settings)):
        forward = count_flops(lambda call=call: outputs.append(call()))
        backward = count_flops(lambda: outputs[-1].backward(grad_output))
        assert forward > 0
        assert backward == forward * (x.requires_grad + weight.requires_grad)
    found, expected = outputs
    assert found.shape == expected.shape


def test_flops_of_groups():
    """By hand, because PyTorch counts the gradient of a weight in groups as if it had none."""
    case = make_case(CASES["groups"], torch.float32)
    leaves = leaves_of(case, "cpu", NAMES)
    geom = case.geom
    channels = geom.in_channels // geom.groups
    product = 2 * geom.batch * geom.positions * geom.out_channels * geom.taps * channels
    output = None

    def forward():
        nonlocal output
        output = deform_conv2d(**(case.arguments | leaves))

    assert geom.groups > 1
    assert count_flops(forward) == product
    assert count_flops(lambda: output.backward(case.grad_output)) == 2 * product


def test_flops_of_a_compiled_function():
    """Some versions of torch run it uncompiled while operations are counted."""
    case = make_case(CASES["plain"], torch.float32)
    leaves = leaves_of(case, "cpu", NAMES)

    def both(function):
        function(**(case.arguments | leaves)).backward(case.grad_output)

    compiled = torch.compile(deform_conv2d, backend="aot_eager")
    both(compiled)
    assert count_flops(lambda: both(compiled)) == count_flops(lambda: both(deform_conv2d)) > 0
    torch._dynamo.reset()  # else other tests find the function marked as one that is not compiled


def test_flops_are_registered_by_the_package():
    program = """
import torch
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    from triton_dcn import DeformConv2dPack
assert torch.ops.triton_dcn.deform_conv2d not in counter.flop_registry  # made before the package was imported
with FlopCounterMode(display=False) as counter:
    DeformConv2dPack(4, 6, 3, padding=1)(torch.randn(1, 4, 5, 7)).sum().backward()
counted = counter.get_flop_counts()["Global"]
assert counted[torch.ops.triton_dcn.deform_conv2d] == 2 * 6 * 4 * 9 * 5 * 7
assert counted[torch.ops.triton_dcn.deform_conv2d_backward] > 0
"""
    subprocess.run([sys.executable, "-c", program], check=True)
