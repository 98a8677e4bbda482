"""The operators as torch sees them: every backend through one door, autograd, compile, autocast, checkpointing."""

import copy

import pytest
import torch

from tests.triton_dcn.cases import CASES, golden_case, make_case, relative
from triton_dcn import deform_conv2d
from triton_dcn.op import backward_op, forward_op

BACKENDS = ["reference", "torch", "triton"]
GOLDEN_NAMES = [f"c{i:02d}" for i in range(25)]


def run(case, backend, needs_grad=True):
    """Return the output and the gradients of input, offset, mask, weight, bias."""
    leaves = [None if t is None else t.clone().requires_grad_(needs_grad) for t in (*case.tensors, case.bias)]
    x, offset, mask, weight, bias = leaves
    arguments = case.arguments | {"mask": mask, "bias": bias}
    output = deform_conv2d(x, offset, weight, backend=backend, **arguments)
    if needs_grad:
        output.backward(case.grad_output)
    return output, [None if leaf is None else leaf.grad for leaf in leaves]


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@pytest.mark.parametrize(
    ("backend", "dtype", "limit"),
    [("reference", torch.float64, 1e-12), ("torch", torch.float64, 1e-12), ("torch", torch.float32, 2e-6),
     ("triton", torch.float32, 2e-6)],
)  # fmt: skip
def test_golden(golden, name, backend, dtype, limit):
    case = golden_case(golden, name, dtype)
    output, grads = run(case, backend)
    assert relative(output, case.output) < limit
    for found, expected in zip(grads, (*case.grads, case.grad_bias), strict=True):
        assert (found is None) == (expected is None)
        assert found is None or relative(found, expected) < limit


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_is_as_good_as_the_reference_in_half(name, backend, dtype):
    """Error against float64 on the same rounded inputs: at most twice that of the reference in this dtype."""
    case = make_case(CASES[name], dtype)
    rounded = copy.copy(case)
    rounded.tensors = tuple(None if t is None else t.double() for t in case.tensors)
    rounded.bias = None if case.bias is None else case.bias.double()
    rounded.grad_output = case.grad_output.double()
    truth, true_grads = run(rounded, "reference")
    output, grads = run(case, backend)
    plain, plain_grads = run(case, "reference")
    floor = 2 * torch.finfo(dtype).eps
    assert output.dtype == dtype
    assert relative(output, truth) <= 2 * relative(plain, truth) + floor
    for found, reference, expected in zip(grads, plain_grads, true_grads, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.dtype == dtype
            assert relative(found, expected) <= 2 * relative(reference, expected) + floor


@pytest.mark.parametrize("name", ["groups", "v1", "odd", "empty"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(name, backend):
    case = make_case(CASES[name], torch.float64)
    x, offset, mask, weight = case.tensors
    leaves = [t.requires_grad_() for t in (x, offset, mask, weight, case.bias) if t is not None]

    def call(x, offset, *rest):
        rest = iter(rest)
        m = next(rest) if mask is not None else None
        w = next(rest)
        b = next(rest) if case.bias is not None else None
        return deform_conv2d(x, offset, w, backend=backend, **(case.arguments | {"mask": m, "bias": b}))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["plain", "v1"])
def test_opcheck(name, backend):
    case = make_case(CASES[name], torch.float32)
    x, offset, mask, weight = (None if t is None else t.requires_grad_() for t in case.tensors)
    settings = (list(case.geom.stride), list(case.geom.padding), list(case.geom.dilation), backend)
    torch.library.opcheck(forward_op, (x, offset, mask, weight, case.bias, *settings))
    detached = [None if t is None else t.detach() for t in (x, offset, mask, weight)]
    needs = [True, False, mask is not None, True]
    torch.library.opcheck(backward_op, (case.grad_output, *detached, *settings, needs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_packed_and_rectified(backend):
    case = make_case(CASES["plain"], torch.float32)
    x, offset, mask, weight = case.tensors
    packed = torch.cat([offset, mask], 1).contiguous(memory_format=torch.channels_last)
    settings = (list(case.geom.stride), list(case.geom.padding), list(case.geom.dilation), backend)
    leaves = [t.requires_grad_() for t in (x, packed)]
    torch.library.opcheck(forward_op, (*leaves, None, weight.requires_grad_(), case.bias, *settings, True, True))
    detached = [None if t is None else t.detach() for t in (*leaves, None, weight)]
    torch.library.opcheck(
        backward_op, (case.grad_output, *detached, *settings, [True, True, False, True], True)
    )  # fmt: skip


@pytest.mark.parametrize("needed", range(5))
def test_each_gradient_alone(needed):
    case = make_case(CASES["groups"], torch.float64)
    _, every = run(case, "reference")
    for backend in ("reference", "torch"):
        leaves = [t.clone().requires_grad_(i == needed) for i, t in enumerate((*case.tensors, case.bias))]
        x, offset, mask, weight, bias = leaves
        arguments = case.arguments | {"mask": mask, "bias": bias}
        deform_conv2d(x, offset, weight, backend=backend, **arguments).backward(case.grad_output)
        for i, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (i == needed)
        assert relative(leaves[needed].grad, every[needed]) < 1e-12


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    """Without a break, static and dynamic shapes, forward and backward."""
    compiled = torch.compile(deform_conv2d, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((7, 9), (8, 6)):
        case = make_case((2, 8, 6, size, *CASES["plain"][4:]), torch.float32)
        leaves = [t.clone().requires_grad_() for t in case.tensors]
        x, offset, mask, weight = leaves
        output = compiled(x, offset, weight, **(case.arguments | {"mask": mask}))
        output.backward(case.grad_output)
        expected, grads = run(case, "torch")
        assert torch.equal(output, expected)
        for leaf, grad in zip(leaves, grads, strict=False):
            assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_channels_last_in_channels_last_out(backend):
    case = make_case(CASES["plain"], torch.float32)
    expected, grads = run(case, backend)
    assert expected.is_contiguous()
    x, offset, _, weight = case.tensors
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    output = deform_conv2d(x, offset, weight, backend=backend, **case.arguments)
    output.backward(case.grad_output)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(x.grad, grads[0])


def test_autocast_leaves_coordinates_alone():
    """Input and weight are computed in the autocast dtype; offset, mask and their gradients stay float32."""
    case = make_case(CASES["plain"], torch.float32)
    leaves = [t.clone().requires_grad_() for t in case.tensors]
    x, offset, mask, weight = leaves
    with torch.autocast("cpu", torch.bfloat16):
        output = deform_conv2d(x, offset, weight, **(case.arguments | {"mask": mask}))
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)
    rounded = deform_conv2d(
        x.bfloat16(), offset, weight.bfloat16(), **(case.arguments | {"mask": mask, "bias": case.bias.bfloat16()})
    )
    assert torch.equal(output, rounded)


def test_modes_and_hooks():
    """no_grad, inference mode, tensor hooks and activation checkpointing."""
    case = make_case(CASES["plain"], torch.float32)
    expected, grads = run(case, "torch")
    x, offset, mask, weight = (t.clone().requires_grad_() for t in case.tensors)
    arguments = case.arguments | {"mask": mask}
    with torch.no_grad():
        assert not deform_conv2d(x, offset, weight, **arguments).requires_grad
    with torch.inference_mode():
        assert torch.equal(deform_conv2d(x, offset, weight, **arguments), expected)
    seen = []
    x.register_hook(lambda grad: seen.append(grad.clone()))
    output = torch.utils.checkpoint.checkpoint(
        lambda x: deform_conv2d(x, offset, weight, **arguments), x, use_reentrant=False
    )
    output.backward(case.grad_output)
    assert torch.equal(seen[0], grads[0])


def test_double_backward_is_a_clear_error():
    case = make_case(CASES["plain"], torch.float64)
    x, offset, _, weight = case.tensors
    output = deform_conv2d(x.requires_grad_(), offset, weight, **case.arguments)
    (grad,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="deform_conv2d"):
        grad.sum().backward()
