"""`deform_conv2d`: argument errors, and what backend "reference" can do because it runs outside the operator."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.triton_dcn.cases import CASES, DEVICE, QUIET, make_case
from triton_dcn import DeformConv2d, deform_conv2d
from triton_dcn.functional import convolve


def call(dtype=torch.float32, device="cpu", **change):
    case = make_case(CASES["plain"], dtype, device)
    x, offset, mask, weight = case.tensors
    arguments = {"input": x, "offset": offset, "weight": weight, **case.arguments, "mask": mask} | change
    return deform_conv2d(**arguments)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"input": torch.zeros(2, 8, 7, 9, dtype=torch.int32)}, TypeError, ["input", "int32"]),
        ({"input": [1.0]}, TypeError, ["input", "list"]),
        ({"input": torch.zeros(2, 8, 7, 9).to_sparse()}, TypeError, ["input", "torch.sparse_coo"]),
        ({"weight": torch.zeros(6, 8, 3, 3, dtype=torch.float64)}, TypeError, ["weight", "float64", "float32"]),
        ({"offset": torch.zeros(2, 18, 7, 9).bfloat16()}, TypeError, ["offset", "bfloat16", "float32"]),
        ({"mask": torch.zeros(2, 9, 7, 9, device="meta")}, TypeError, ["mask", "meta", "cpu"]),
        ({"bias": torch.zeros(5)}, ValueError, ["bias", "(5,)", "(6,)"]),
        ({"stride": (1, 1, 1)}, ValueError, ["stride", "(1, 1, 1)"]),
        ({"stride": None}, ValueError, ["stride", "None"]),
        ({"padding": 0.5}, ValueError, ["padding", "0.5"]),
        ({"dilation": (1, 1.5)}, ValueError, ["dilation", "1.5"]),
        ({"mask": torch.zeros(2, 9, 7, 8)}, ValueError, ["mask", "(2, 9, 7, 8)", "(2, 9, 7, 9)"]),
        ({"backend": "cuda"}, ValueError, ["backend", "'cuda'", "reference"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_errors(change, kind, words):
    with pytest.raises(kind) as error:
        call(**change)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": torch.zeros(2, 8, 7, 9, dtype=torch.int64)}, ["input", "int64"]),
        ({"input": torch.zeros(2, 8, 7, 9, dtype=torch.complex64)}, ["input", "complex64"]),
        ({"weight": torch.zeros(6, 8, 3, 3, dtype=torch.float64)}, ["weight", "float64", "bfloat16"]),
        ({"offset": torch.zeros(2, 18, 7, 9, dtype=torch.float16)}, ["offset", "float16", "float32"]),
    ],
    ids=["int64", "complex64", "weight", "offset"],
)
def test_autocast_hides_no_error(change, words):
    with torch.autocast("cpu"), pytest.raises(TypeError) as error:
        call(**change)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [None, 3.0, (1, 3.0)], ids=str)
def test_layers_name_what_is_no_int(name, value):
    with pytest.raises(ValueError, match=name):
        DeformConv2d(4, 4, **({"kernel_size": 3} | {name: value}))


def test_ints_of_numpy_are_ints():
    one = np.int64(1)
    expected = call(stride=1, padding=1, dilation=(1, 1))
    assert torch.equal(call(stride=one, padding=one, dilation=(one, one)), expected)


def test_triton_refuses_float64():
    with pytest.raises(ValueError, match="float64"):
        call(torch.float64, DEVICE, backend="triton")


def test_triton_on_cpu_tells_about_the_interpreter():
    program = (
        "import torch, triton_dcn\n"
        "x = torch.zeros(1, 1, 3, 3)\n"
        "triton_dcn.deform_conv2d(x, torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 1, 1), backend='triton')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "TRITON_INTERPRET=1" in done.stderr.splitlines()[-1]


def reference_call(name="groups", mask_logits=False):
    """Return float64 leaves that require gradients, and the function of them that runs backend "reference".

    The case has stride, padding and dilation 1.

    With `mask_logits` the second leaf is the map that a layer predicts, and there is no mask.
    """
    case = make_case(CASES[name], torch.float64)
    input, offset, mask, weight = case.tensors
    if mask_logits:
        leaves = [input, torch.cat([offset, mask], 1), weight, case.bias]
    else:
        leaves = [input, offset, weight, case.bias, mask]

    def function(input, offset, weight, bias, mask=None):
        # literals, because torch.compile with dynamic shapes takes integers from outside for sizes, too
        return convolve(input, offset, weight, bias, 1, 1, 1, mask, mask_logits=mask_logits, backend="reference")

    return [leaf.requires_grad_() for leaf in leaves], function


@pytest.mark.parametrize("mask_logits", [False, True])
def test_reference_has_second_derivatives(mask_logits):
    leaves, function = reference_call("groups", mask_logits)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@QUIET
@pytest.mark.parametrize("mask_logits", [False, True])
def test_reference_has_forward_mode(mask_logits):
    """jvp against the product of Jacobian and tangent by reverse mode, jacfwd against jacrev."""
    leaves, function = reference_call("plain", mask_logits)
    leaves = [leaf.detach() for leaf in leaves]
    tangents = tuple(torch.randn_like(leaf) for leaf in leaves)
    output, tangent = torch.func.jvp(function, tuple(leaves), tangents)
    torch.testing.assert_close(output, function(*leaves))

    def along_tangents(step):
        return function(*(leaf + step * direction for leaf, direction in zip(leaves, tangents, strict=True)))

    zero = torch.zeros((), dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(along_tangents, zero)
    torch.testing.assert_close(tangent, expected)
    torch.testing.assert_close(torch.func.jacfwd(along_tangents)(zero), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_reference_under_vmap(layout):
    """Over inputs and offsets with shared weights; gradients per element by torch.func."""
    leaves, function = reference_call("groups")
    input, offset, weight, bias, mask = (leaf.detach() for leaf in leaves)
    inputs = torch.stack([input, 2 * input, -input])
    offsets = torch.stack([offset, offset + 0.05, offset - 0.05])

    if layout == torch.channels_last:
        inputs = inputs.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)

    def convolve_one(input, offset):
        return function(input, offset, weight, bias, mask)

    def loss(input, offset):
        return convolve_one(input, offset).square().sum()

    gradients = torch.func.grad(loss, argnums=(0, 1))
    outputs = torch.func.vmap(convolve_one)(inputs, offsets)
    input_grads, offset_grads = torch.func.vmap(gradients)(inputs, offsets)
    for index in range(3):
        one = inputs[index], offsets[index]
        torch.testing.assert_close(outputs[index], convolve_one(*one))
        torch.testing.assert_close((input_grads[index], offset_grads[index]), gradients(*one))


@pytest.mark.parametrize("mask_logits", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_reference_compiles_without_a_break(dynamic, mask_logits):
    """With dynamic shapes, once for images of every size."""
    leaves, function = reference_call("plain", mask_logits)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    maps = (0, 1, *range(4, len(leaves)))  # all but the weight and the bias
    narrow = list(leaves)
    for index in maps:
        narrow[index] = leaves[index].detach()[..., :6].contiguous().requires_grad_()

    for arguments in (leaves, narrow):
        # in a network, the sizes of parameters and the channels that follow from them are static
        for index, tensor in enumerate(arguments):
            torch._dynamo.mark_static(tensor, 1 if index in maps else None)
        output = compiled(*arguments)
        expected = function(*arguments)
        torch.testing.assert_close(output, expected)

        grad_output = torch.randn_like(expected)
        grads = torch.autograd.grad(output, arguments, grad_output)
        torch.testing.assert_close(grads, torch.autograd.grad(expected, arguments, grad_output))
    assert counter.frame_count == (1 if dynamic else 2)


class ByReference(torch.nn.Module):
    """A call of backend "reference", for torch.export."""

    def forward(self, input, offset, weight, mask):
        return deform_conv2d(input, offset, weight, padding=1, mask=mask, backend="reference")


def test_reference_is_exported():
    """With an open batch; the program holds operators of PyTorch only."""
    case = make_case(CASES["plain"], torch.float64)
    input, offset, mask, weight = case.tensors
    batch = torch.export.Dim("batch", min=1, max=8)
    shapes = ({0: batch}, {0: batch}, None, {0: batch})
    program = torch.export.export(ByReference(), (input, offset, weight, mask), dynamic_shapes=shapes)
    assert "triton_dcn" not in str(program.graph)
    larger = [torch.cat([tensor, tensor, tensor]) for tensor in (input, offset, mask)]
    found = program.module()(larger[0], larger[1], weight, larger[2])
    torch.testing.assert_close(found, ByReference()(larger[0], larger[1], weight, larger[2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_reference_under_autocast(dtype):
    """Input and weight are computed in the autocast dtype, positions are not."""
    case = make_case(CASES["plain"], torch.float32)
    input, offset, _, weight = case.tensors
    arguments = case.arguments | {"bias": None}
    with torch.autocast("cpu", dtype):
        output = deform_conv2d(input, offset, weight, backend="reference", **arguments)
    assert output.dtype == dtype
    rounded = deform_conv2d(input.to(dtype), offset, weight.to(dtype), backend="reference", **arguments)
    assert torch.equal(output, rounded)
