"""The operators as torch sees them: every backend through one door, autograd, compile, autocast, meta tensors."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tests.triton_dcn.cases import (
    CASES,
    QUIET,
    OperatorCase,
    device_of,
    golden_case,
    make_case,
    relative,
    run_operator,
)
from triton_dcn import DeformConv2d, deform_conv2d, torch_backend, triton_backend
from triton_dcn.functional import convolve
from triton_dcn.operator import backward_op, forward_op, forward_with_samples_op

OPERATOR_BACKENDS = ["torch", "triton"]
BACKENDS = ["reference", *OPERATOR_BACKENDS]
GOLDEN_NAMES = [f"c{i:02d}" for i in range(25)]
TWO_TAPS = {"kernel": (1, 2), "padding": (0, 1)}
"""Changes of a case for `opcheck`, which calls an operator many times; the interpreter's time grows with the taps."""


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@pytest.mark.parametrize(
    ("backend", "dtype", "limit"),
    [("reference", torch.float64, 1e-12), ("torch", torch.float64, 1e-12), ("torch", torch.float32, 2e-6),
     ("triton", torch.float32, 2e-6)],
)  # fmt: skip
def test_golden(golden, name, backend, dtype, limit):
    case = golden_case(golden, name, dtype)
    output, grads = run_operator(case, backend)
    assert relative(output, case.output) < limit
    for grad, expected in zip(grads, (*case.grads, case.grad_bias), strict=True):
        assert (grad is None) == (expected is None)
        assert grad is None or relative(grad, expected) < limit


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_is_as_good_as_the_reference_in_half(name, backend, dtype):
    """Error against float64 on the same rounded inputs: at most twice that of the reference in this dtype."""
    case = make_case(CASES[name], dtype)
    exact, exact_grads = run_operator(case.double(), "reference")
    output, grads = run_operator(case, backend)
    reference_output, reference_grads = run_operator(case, "reference")
    floor = 2 * torch.finfo(dtype).eps
    assert output.dtype == dtype
    assert relative(output, exact) <= 2 * relative(reference_output, exact) + floor
    for grad, reference_grad, exact_grad in zip(grads, reference_grads, exact_grads, strict=True):
        assert (grad is None) == (exact_grad is None)
        if grad is not None:
            assert grad.dtype == dtype
            assert relative(grad, exact_grad) <= 2 * relative(reference_grad, exact_grad) + floor


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_outside_the_image_do_not_count(backend):
    """Not even NaN, beside an offset that is NaN or leads far away: every result is that with another mask there."""
    case = make_case(OperatorCase("", 2, 4, 2, 3, 4, kernel=(1, 2), padding=(0, 1), offset_groups=2), torch.float32)
    _, offset, mask, _ = case.tensors
    mask[..., :2] = 0.5
    offset[..., 0] = torch.nan
    offset[..., 1] = 100
    expected, expected_grads = run_operator(case, backend)
    mask[..., :2] = torch.nan
    output, grads = run_operator(case, backend)
    assert not grads[2][..., :2].any()
    for result, expected_result in zip((output, *grads), (expected, *expected_grads), strict=True):
        assert result.isfinite().all()
        assert relative(result, expected_result) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_outside_the_image_do_not_count(backend):
    """Likewise for a predicted map, from a layer whose weights have a NaN: offset and logit are NaN together."""
    case = make_case(CASES["plain"], torch.float32, device_of(backend))
    x, offset, mask, weight = case.tensors
    predicted = torch.cat([offset, mask], 1)
    predicted[:, :, 2, 3] = torch.nan
    predicted.requires_grad_()
    settings = case.bias, case.geom.stride, case.geom.padding, case.geom.dilation
    output = convolve(x, predicted, weight, *settings, None, mask_logits=True, backend=backend)
    (grad,) = torch.autograd.grad(output, predicted, case.grad_output)
    assert output.isfinite().all()
    assert grad.isfinite().all()
    assert not grad[:, :, 2, 3].any()


@pytest.mark.parametrize("name", ["groups", "v1", "odd", "empty"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(name, backend):
    case = make_case(CASES[name], torch.float64)
    x, offset, mask, weight = case.tensors
    arguments = {"input": x, "offset": offset, "weight": weight, "mask": mask, "bias": case.bias}
    leaves = {key: tensor.requires_grad_() for key, tensor in arguments.items() if tensor is not None}

    def call(*tensors):
        given = dict(zip(leaves, tensors, strict=True))
        return deform_conv2d(**(case.arguments | given), backend=backend)

    assert torch.autograd.gradcheck(call, list(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("backend", OPERATOR_BACKENDS)
@pytest.mark.parametrize("name", ["plain", "v1"])
def test_opcheck(name, backend):
    case = make_case(replace(CASES[name], **TWO_TAPS), torch.float32, device_of(backend))
    x, offset, mask, weight = (None if t is None else t.requires_grad_() for t in case.tensors)
    settings = (list(case.geom.stride), list(case.geom.padding), list(case.geom.dilation), backend)
    torch.library.opcheck(forward_op, (x, offset, mask, weight, case.bias, *settings))
    detached = [None if t is None else t.detach() for t in (x, offset, mask, weight)]
    needs = [True, False, mask is not None, True]
    torch.library.opcheck(backward_op, (case.grad_output, *detached, *settings, needs))


@pytest.mark.parametrize("backend", OPERATOR_BACKENDS)
def test_opcheck_with_mask_logits_and_relu(backend):
    case = make_case(replace(CASES["plain"], **TWO_TAPS), torch.float32, device_of(backend))
    x, offset, mask, weight = case.tensors
    predicted = torch.cat([offset, mask], 1).contiguous(memory_format=torch.channels_last)
    settings = (list(case.geom.stride), list(case.geom.padding), list(case.geom.dilation), backend)
    leaves = [t.requires_grad_() for t in (x, predicted)]
    torch.library.opcheck(forward_op, (*leaves, None, weight.requires_grad_(), case.bias, *settings, True, True))
    detached = [None if t is None else t.detach() for t in (*leaves, None, weight)]
    torch.library.opcheck(
        backward_op, (case.grad_output, *detached, *settings, [True, True, False, True], True)
    )  # fmt: skip


def permuted(tensor, order):
    """Return the same values, stored with the dimensions in another order."""
    places = [order.index(dimension) for dimension in range(4)]
    return tensor.permute(order).contiguous().permute(places)


@pytest.mark.parametrize("backend", OPERATOR_BACKENDS)
def test_permuted_tensors(backend):
    """Layouts that are neither contiguous nor channels-last, as from a transposed image; masks of both signs."""
    case = make_case(OperatorCase("", 2, 4, 2, 3, 4, offset_groups=2, **TWO_TAPS), torch.float32)
    x, offset, mask, weight = case.tensors
    mask.mul_(4).sub_(2)
    expected, expected_grads = run_operator(case.double(), "reference")
    tensors = (
        permuted(x, (0, 1, 3, 2)),
        permuted(offset, (1, 3, 0, 2)),
        permuted(mask, (1, 3, 0, 2)),
        permuted(weight, (3, 2, 0, 1)),
    )
    case.tensors = tuple(tensor.to(device_of(backend)) for tensor in tensors)
    case.grad_output = permuted(case.grad_output, (1, 3, 0, 2)).to(device_of(backend))
    assert not any(tensor.is_contiguous() for tensor in (*case.tensors, case.grad_output))
    output, grads = run_operator(case, backend)
    for found, exact in zip((output, *grads), (expected, *expected_grads), strict=True):
        assert relative(found, exact) < 2e-6

    settings = (list(case.geom.stride), list(case.geom.padding), list(case.geom.dilation), backend)
    leaves = [tensor.clone().requires_grad_() for tensor in case.tensors]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")  # what depends on layouts
    torch.library.opcheck(forward_op, (*leaves, None, *settings), test_utils=checks)
    arguments = (case.grad_output, *case.tensors, *settings, [True] * 4)
    torch.library.opcheck(backward_op, arguments, test_utils=checks)


@pytest.mark.parametrize("needed", range(5))
def test_each_gradient_alone(needed):
    case = make_case(CASES["groups"], torch.float64)
    _, expected = run_operator(case, "reference")
    for backend in ("reference", "torch"):
        leaves = []
        for index, tensor in enumerate((*case.tensors, case.bias)):
            leaves.append(tensor.clone().requires_grad_(index == needed))
        x, offset, mask, weight, bias = leaves
        arguments = case.arguments | {"mask": mask, "bias": bias}
        deform_conv2d(x, offset, weight, backend=backend, **arguments).backward(case.grad_output)
        for index, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (index == needed)
        assert relative(leaves[needed].grad, expected[needed]) < 1e-12


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    """Without a break, static and dynamic shapes, forward and backward, by the default backend."""
    compiled = torch.compile(deform_conv2d, fullgraph=True, dynamic=dynamic)
    for size in ((7, 9), (8, 6)):
        case = make_case(replace(CASES["plain"], height=size[0], width=size[1]), torch.float32)
        leaves = [t.clone().requires_grad_() for t in case.tensors]
        x, offset, mask, weight = leaves
        output = compiled(x, offset, weight, **(case.arguments | {"mask": mask}))
        output.backward(case.grad_output)
        expected, grads = run_operator(case, "torch")
        assert torch.equal(output, expected)
        for leaf, grad in zip(leaves, grads, strict=False):
            assert torch.equal(leaf.grad, grad)


def test_compile_once_for_maps_of_every_size():
    counter = CompileCounter()
    torch._dynamo.reset()
    layer = DeformConv2d(4, 4, 3, padding=1)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for size in ((80, 72), (72, 80)):
        x, offset, mask = (torch.rand(1, channels, *size) for channels in (4, 18, 9))
        assert torch.equal(compiled(x, offset, mask), layer(x, offset, mask))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", [None, "reference", "torch"])
def test_meta_tensors(backend):
    """Shapes and layouts without numbers, as when a model is built on device meta."""
    case = make_case(CASES["odd"], torch.float32, "meta")
    x, offset, mask, weight = (tensor.requires_grad_() for tensor in case.tensors)
    x = x.to(memory_format=torch.channels_last)
    output = deform_conv2d(x, offset, weight, backend=backend, **case.arguments)
    assert output.is_meta
    assert output.shape == case.geom.output_shape
    assert output.is_contiguous(memory_format=torch.channels_last)
    grads = torch.autograd.grad(output, (x, offset, mask, weight), case.grad_output)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in case.tensors]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_channels_last_in_channels_last_out(backend):
    case = make_case(CASES["plain"], torch.float32)
    expected, grads = run_operator(case, backend)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_takes_coordinates_of_its_dtype(dtype):
    """As they come from a convolution under autocast, beside an input that does not."""
    case = make_case(CASES["plain"], torch.float32)
    x, offset, mask, weight = case.tensors
    offset = offset.to(dtype)
    mask = mask.to(dtype)
    with torch.autocast("cpu", dtype):
        output = deform_conv2d(x, offset, weight, **(case.arguments | {"mask": mask}))
    half = case.arguments | {"mask": mask, "bias": case.bias.to(dtype)}
    assert torch.equal(output, deform_conv2d(x.to(dtype), offset, weight.to(dtype), **half))


def test_modes_and_hooks():
    """no_grad, inference mode, tensor hooks and activation checkpointing."""
    case = make_case(CASES["plain"], torch.float32)
    expected, grads = run_operator(case, "torch")
    x, offset, mask, weight = (t.clone().requires_grad_() for t in case.tensors)
    arguments = case.arguments | {"mask": mask}
    with torch.no_grad():
        assert not deform_conv2d(x, offset, weight, **arguments).requires_grad
    with torch.inference_mode():
        assert torch.equal(deform_conv2d(x, offset, weight, **arguments), expected)
    seen = []
    hook = x.register_hook(lambda grad: seen.append(grad.clone()))
    deform_conv2d(x, offset, weight, **arguments).backward(case.grad_output)
    hook.remove()  # torch 2.7 forgets hooks where any operator of torch.library is checkpointed
    assert torch.equal(seen[0], grads[0])
    x.grad = None
    output = torch.utils.checkpoint.checkpoint(
        lambda x: deform_conv2d(x, offset, weight, **arguments), x, use_reentrant=False
    )
    output.backward(case.grad_output)
    assert torch.equal(x.grad, grads[0])


def leaves_and_convolution(backend):
    """Return tensors that require gradients, and a function of them that convolves between two other operations."""
    case = make_case(replace(CASES["plain"], **TWO_TAPS), torch.float32, device_of(backend))
    leaves = [tensor.requires_grad_() for tensor in (*case.tensors, case.bias)]
    arguments = {name: value for name, value in case.arguments.items() if name not in ("mask", "bias")}

    def function(x, offset, mask, weight, bias):
        return deform_conv2d(x.sin(), offset, weight, bias, mask=mask, backend=backend, **arguments).cos()

    return leaves, function


@pytest.mark.parametrize(("backend", "compiled"), [("torch", False), ("torch", True), ("triton", False)])
@pytest.mark.parametrize("saved", [True, False])
def test_selective_checkpointing(backend, saved, compiled, monkeypatch):
    """A policy that saves the operator spares its second forward pass; the operations around it run twice."""
    module, name, operator = {
        "torch": (torch_backend, "forward", forward_op),
        "triton": (triton_backend, "forward_with_samples", forward_with_samples_op),
    }[backend]
    leaves, function = leaves_and_convolution(backend)
    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    run_forward = getattr(module, name)
    runs = []

    def counted(*arguments, **options):
        runs.append(name)
        return run_forward(*arguments, **options)

    monkeypatch.setattr(module, name, counted)
    contexts = partial(create_selective_checkpoint_contexts, [operator] if saved else [])

    def checkpointed(*tensors):
        return checkpoint(function, *tensors, use_reentrant=False, context_fn=contexts)

    if compiled:
        checkpointed = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(checkpointed(*leaves).sum(), leaves)
    torch.testing.assert_close(grads, expected)
    assert len(runs) == (1 if saved else 2)


@pytest.mark.parametrize("backend", OPERATOR_BACKENDS)
def test_compiled_autograd(backend):
    """The backward pass is captured as a graph too, with the operator in it."""
    leaves, function = leaves_and_convolution(backend)
    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    operators = []

    def record(graph_module, inputs):
        operators.extend(node.target for node in graph_module.graph.nodes if node.op == "call_function")
        return graph_module

    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda *tensors: function(*tensors).sum().backward(), backend=record)(*leaves)
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))
    assert operators.count(forward_op) == 1
    assert operators.count(backward_op) == 1


def test_double_backward_is_a_clear_error():
    case = make_case(CASES["plain"], torch.float64)
    x, offset, _, weight = case.tensors
    output = deform_conv2d(x.requires_grad_(), offset, weight, **case.arguments)
    (grad,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        grad.sum().backward()


def dual(call, tensor):
    with forward_ad.dual_level():
        return call(forward_ad.make_dual(tensor, torch.ones_like(tensor)))


@QUIET
@pytest.mark.parametrize("name", ["input", "offset", "mask", "weight", "bias"])
@pytest.mark.parametrize(
    "way", [dual, lambda call, tensor: torch.func.jvp(call, (tensor,), (tensor,)),
            lambda call, tensor: torch.func.jacfwd(call)(tensor)],
    ids=["dual_level", "jvp", "jacfwd"],
)  # fmt: skip
def test_forward_mode_is_a_clear_error(way, name):
    """In the place of a derivative of zero, which torch gives an operator without a formula."""
    case = make_case(CASES["plain"], torch.float32)
    x, offset, _, weight = case.tensors
    arguments = {"input": x, "offset": offset, "weight": weight, **case.arguments}
    with pytest.raises(NotImplementedError, match="deform_conv2d"):
        way(lambda tensor: deform_conv2d(**(arguments | {name: tensor})), arguments[name])


@QUIET
def test_constants_in_forward_mode():
    """What has no tangent may be convolved while others have one."""
    case = make_case(CASES["plain"], torch.float32)
    x, offset, _, weight = case.tensors
    output = deform_conv2d(x, offset, weight, **case.arguments)

    def scaled(factor):
        return factor * deform_conv2d(x, offset, weight, **case.arguments)

    found, tangent = torch.func.jvp(scaled, (torch.tensor(2.0),), (torch.tensor(3.0),))
    torch.testing.assert_close((found, tangent), (2 * output, 3 * output))
