"""The samples of a forward pass serve the backward pass of the Triton kernels, where they are kept."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.triton_dcn.cases import CASES, QUIET, deterministic, device_of, make_case
from triton_dcn import deform_conv2d, launchers, workspace
from triton_dcn.operator import backward_op, forward_with_samples_op

DEVICE = device_of("triton")
PLAIN = replace(CASES["plain"], kernel=(1, 2), padding=(0, 1))  # the interpreter's time grows with the taps
ODD = replace(CASES["odd"], channels=2, kernel=(1, 2), padding=(0, 1), offset_groups=2)


@pytest.fixture
def sampled(monkeypatch):
    """A list that grows by the number of images whenever the sampling kernel is launched."""
    launches = []
    sample_into = launchers.sample_into

    def counted(buffer, geom, offset_mask):
        launches.append(geom.batch)
        return sample_into(buffer, geom, offset_mask)

    monkeypatch.setattr(launchers, "sample_into", counted)
    return launches


def leaves_of(case):
    return [None if tensor is None else tensor.clone().requires_grad_() for tensor in case.tensors]


def call(case, leaves):
    x, offset, mask, weight = leaves
    return deform_conv2d(x, offset, weight, **(case.arguments | {"mask": mask}), backend="triton")


def gradients(case, leaves, output, **options):
    needed = [leaf for leaf in leaves if leaf is not None]
    return torch.autograd.grad(output, needed, case.grad_output, **options)


@pytest.mark.parametrize("name", ["plain", "groups", "v1", "odd"])
def test_samples_come_once(name, sampled, monkeypatch):
    """The gradients are those of samples that are computed twice, bit for bit."""
    case = make_case(CASES[name], torch.float32, DEVICE)
    leaves = leaves_of(case)
    with deterministic():
        once = gradients(case, leaves, call(case, leaves))
        assert len(sampled) == 1
        monkeypatch.setattr(workspace, "KEPT_SAMPLE_BYTES", 0)
        twice = gradients(case, leaves, call(case, leaves))
        assert len(sampled) == 3
    for first, second in zip(once, twice, strict=True):
        assert torch.equal(first, second)


def test_slices_of_a_backward_pass_compute_their_own(sampled, monkeypatch):
    case = make_case(PLAIN, torch.float32, DEVICE)
    leaves = leaves_of(case)
    expected = gradients(case, leaves, call(case, leaves))
    sampled.clear()
    output = call(case, leaves)
    samples_of_an_image = case.geom.positions * case.geom.taps * case.geom.offset_groups
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", samples_of_an_image * workspace.SAMPLE_BYTES["ranks"])
    found = gradients(case, leaves, output)
    assert sampled == [case.geom.batch] + [1] * case.geom.batch
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("needed", [None, "bias"])
def test_nothing_is_kept_without_a_use(needed, sampled, monkeypatch):
    """Without gradients, and for the gradient of the bias, which needs no samples."""
    monkeypatch.setattr("triton_dcn.operator.forward_with_samples_op", None)
    case = make_case(PLAIN, torch.float32, DEVICE)
    bias = case.bias.clone().requires_grad_(needed == "bias")
    x, offset, mask, weight = case.tensors
    output = deform_conv2d(x, offset, weight, **(case.arguments | {"mask": mask, "bias": bias}), backend="triton")
    assert output.requires_grad == (needed == "bias")
    if output.requires_grad:
        output.backward(case.grad_output)
    with torch.no_grad():
        call(case, leaves_of(case))
    assert len(sampled) == 2


def test_graph_used_twice(sampled):
    case = make_case(PLAIN, torch.float32, DEVICE)
    leaves = leaves_of(case)
    with deterministic():
        output = call(case, leaves)
        first = gradients(case, leaves, output, retain_graph=True)
        second = gradients(case, leaves, output)
    assert len(sampled) == 1
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_offset_changed_after_the_forward_pass_is_an_error():
    case = make_case(PLAIN, torch.float32, DEVICE)
    leaves = leaves_of(case)
    output = call(case, leaves)
    with torch.no_grad():
        leaves[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(case.grad_output)


@QUIET
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_computes_them_again(use_reentrant, sampled):
    case = make_case(PLAIN, torch.float32, DEVICE)
    leaves = leaves_of(case)
    call(case, leaves).backward(case.grad_output)
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    sampled.clear()
    checkpoint(lambda *tensors: call(case, tensors), *leaves, use_reentrant=use_reentrant).backward(case.grad_output)
    assert len(sampled) == 2
    torch.testing.assert_close([leaf.grad for leaf in leaves], expected)


def test_saved_tensor_hooks_see_them():
    case = make_case(PLAIN, torch.float32, DEVICE)
    leaves = leaves_of(case)
    expected = gradients(case, leaves, call(case, leaves))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        output = call(case, leaves)
    torch.testing.assert_close(gradients(case, leaves, output), expected)


def test_hooks_that_round_saved_tensors_leave_them_alone():
    """A rounded cell would be another address."""
    case = make_case(PLAIN, torch.float32, DEVICE)
    rounded = make_case(PLAIN, torch.float32, DEVICE)
    for tensor in rounded.tensors:
        tensor.copy_(tensor.bfloat16())
    leaves = leaves_of(rounded)
    expected = gradients(case, leaves, call(rounded, leaves))

    def pack(tensor):
        return tensor.bfloat16() if tensor.is_floating_point() else tensor

    def unpack(tensor):
        return tensor.float() if tensor.is_floating_point() else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        output = call(rounded, leaves)
    torch.testing.assert_close(gradients(case, leaves, output), expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic, sampled):
    case = make_case(PLAIN, torch.float32, DEVICE)
    leaves = leaves_of(case)
    expected = gradients(case, leaves, call(case, leaves))
    sampled.clear()
    compiled = torch.compile(lambda *tensors: call(case, tensors), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    found = gradients(case, leaves, compiled(*leaves))
    assert len(sampled) == 1
    torch.testing.assert_close(found, expected)


def test_no_images():
    case = make_case(replace(PLAIN, batch=0), torch.float32, DEVICE)
    leaves = leaves_of(case)
    for leaf, gradient in zip(leaves, gradients(case, leaves, call(case, leaves)), strict=True):
        assert gradient.shape == leaf.shape
    settings = (list(case.geom.stride), list(case.geom.padding), list(case.geom.dilation))
    torch.library.opcheck(forward_with_samples_op, (*case.tensors, case.bias, *settings))


@pytest.mark.parametrize("limit", [0, workspace.KEPT_SAMPLE_BYTES])
def test_opcheck(limit, monkeypatch):
    """The operator that returns them, which autograd calls, so without gradients of its own."""
    monkeypatch.setattr(workspace, "KEPT_SAMPLE_BYTES", limit)
    case = make_case(ODD, torch.float32, DEVICE)
    settings = (list(case.geom.stride), list(case.geom.padding), list(case.geom.dilation))
    torch.library.opcheck(forward_with_samples_op, (*case.tensors, case.bias, *settings))
    _, samples = forward_with_samples_op(*case.tensors, case.bias, *settings)
    assert (samples.numel() == 0) == (limit == 0)
    if limit == 0:
        return  # an empty tensor is as none, with which test_operator checks the backward operator
    needs = [True, True, case.tensors[2] is not None, True]
    arguments = (case.grad_output, *case.tensors, *settings, "triton", needs, False, samples)
    torch.library.opcheck(backward_op, arguments)


def test_bound_counts_all_samples():
    """Those of all images, taps and offset groups; and pixels that fit one slice."""
    geom = make_case(CASES["groups"], torch.float32, "meta").geom
    samples = geom.batch * geom.positions * geom.taps * geom.offset_groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace, "KEPT_SAMPLE_BYTES", 16 * samples)
        assert workspace.keeps_samples(geom)
        patch.setattr(workspace, "KEPT_SAMPLE_BYTES", 16 * samples - 1)
        assert not workspace.keeps_samples(geom)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace, "MAX_PIXELS", geom.batch * geom.height * geom.width)
        assert not workspace.keeps_samples(geom)
