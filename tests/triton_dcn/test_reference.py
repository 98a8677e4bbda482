"""The reference itself: by hand, against a plain convolution, against torchvision's numbers, by gradcheck."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.triton_dcn.cases import CASES, QUANTITIES, QUIET, golden_case, make_case, relative, run_backend
from triton_dcn import reference
from triton_dcn.geometry import ConvGeometry
from triton_dcn.offset_mask import OffsetMask

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/deform_conv.json").read_text())


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("c")])
def test_golden(golden, name):
    case = golden_case(golden, name, torch.float64)
    found = run_backend(case, reference)
    for key, expected in zip(QUANTITIES, (case.output, *case.grads), strict=True):
        assert (found[key] is None) == (expected is None)
        assert expected is None or relative(found[key], expected) < 1e-12


def test_zero_offset_is_a_convolution():
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 2, dtype=torch.float64)
    expected = F.conv2d(x, weight, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
    offset = torch.zeros(2, 12, *expected.shape[2:], dtype=torch.float64)
    geom = ConvGeometry.of(x, offset, weight, None, (2, 1), (1, 2), (1, 2))
    assert relative(reference.forward(geom, x, OffsetMask(offset, None), weight, None), expected) < 1e-14


def test_one_sample_by_hand():
    """A 1x1 kernel at (0, 0) moved by (0.25, 1.5) and scaled by 2."""
    x = torch.arange(12.0, dtype=torch.float64).view(1, 1, 3, 4)
    offset = torch.tensor([0.25, 1.5], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 3, 4)
    mask = torch.full((1, 1, 3, 4), 2.0, dtype=torch.float64)
    weight = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    geom = ConvGeometry.of(x, offset, weight, mask, (1, 1), (0, 0), (1, 1))
    output = reference.forward(geom, x, OffsetMask(offset, mask), weight, None)
    assert output[0, 0, 0, 0] == 6 * (0.75 * 1.5 + 0.25 * 5.5)
    assert output[0, 0, 2, 3] == 0  # x = 4.5 is outside
    assert output[0, 0, 2, 2] == 6 * 0.75 * 0.5 * 11  # the neighbors below and to the right do not exist


def leaves_and_function(name, mask_logits=False):
    """The tensors of a small case that exist, requiring gradients, and the output as a function of them."""
    case = make_case(CASES[name], torch.float64)
    tensors = (*case.tensors, case.bias)
    leaves = [tensor.requires_grad_() for tensor in tensors if tensor is not None]

    def function(*leaves):
        given = iter(leaves)
        x, offset, mask, weight, bias = [None if tensor is None else next(given) for tensor in tensors]
        return reference.forward(case.geom, x, OffsetMask(offset, mask, mask_logits), weight, bias)

    return leaves, function


@QUIET
@pytest.mark.parametrize(("name", "mask_logits"), [("groups", False), ("groups", True), ("v1", False), ("odd", False)])
def test_gradcheck(name, mask_logits):
    """In reverse and forward mode."""
    leaves, function = leaves_and_function(name, mask_logits)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, check_forward_ad=True)


@QUIET
@pytest.mark.parametrize(("name", "mask_logits"), [("groups", False), ("groups", True), ("v1", False)])
def test_gradgradcheck(name, mask_logits):
    """Reverse over reverse, and forward over reverse."""
    leaves, function = leaves_and_function(name, mask_logits)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("mask_logits", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
def test_samples_outside_read_zero_and_have_no_gradient(value, mask_logits):
    case = make_case(CASES["groups"], torch.float64)
    _, offset, mask, _ = case.tensors
    offset[:, :, 1, 2] = value
    mask[:, :, 1, 2] = torch.nan
    case.bias = None
    case.grad_output = torch.ones_like(case.grad_output)

    found = run_backend(case, reference, mask_logits=mask_logits)
    assert found["output"][:, :, 1, 2].abs().max() == 0
    assert all(value.isfinite().all() for value in found.values())
    assert found["grad_offset"][:, :, 1, 2].abs().max() == 0
    assert found["grad_mask"][:, :, 1, 2].abs().max() == 0


@pytest.mark.parametrize("axis", [0, 1], ids=["y", "x"])
def test_whole_pixels_and_borders(axis):
    """The derivative at a whole pixel is the one to the right; at -1, H and W it is 0, as in mmcv."""
    size = (4, 5)[axis]
    x = torch.arange(1.0, size + 1, dtype=torch.float64).square()
    x = (x[:, None] if axis == 0 else x).expand(1, 1, 4, 5)
    weight = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    padded = [0, *((torch.arange(size) + 1.0) ** 2).tolist(), 0]  # at -1, 0, ..., size

    for position in range(-1, size + 1):
        offset = torch.zeros(1, 2, 4, 5, dtype=torch.float64)
        offset[0, axis] = position - torch.arange(size).view((-1, 1) if axis == 0 else (1, -1))
        offset.requires_grad_()
        geom = ConvGeometry.of(x, offset, weight, None, (1, 1), (0, 0), (1, 1))
        output = reference.forward(geom, x, OffsetMask(offset, None), weight, None)
        (grad,) = torch.autograd.grad(output.sum(), offset)

        outside = position in (-1, size)
        slope = 0 if outside else padded[position + 2] - padded[position + 1]
        assert (output == padded[position + 1]).all()
        assert (grad[0, axis] == slope).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_blends_in_float32(dtype):
    """Where columns are exact in half precision, so are the results; many samples of one pixel add up in float32."""
    count = 4096
    x = torch.ones(1, 1, 1, count, dtype=dtype)
    offset = torch.zeros(1, 2, 1, count, dtype=torch.float32)
    offset[0, 1, 0] = -torch.arange(count)  # all samples read the first pixel
    weight = torch.ones(1, 1, 1, 1, dtype=dtype)
    geom = ConvGeometry.of(x, offset, weight, None, (1, 1), (0, 0), (1, 1))
    output = reference.forward(geom, x.requires_grad_(), OffsetMask(offset, None), weight, None)
    (grad,) = torch.autograd.grad(output.sum(), x)
    assert output.dtype == grad.dtype == dtype
    assert (output == 1).all()
    assert grad[0, 0, 0, 0] == count
    assert not grad[0, 0, 0, 1:].any()


def test_meta_tensors():
    case = make_case(CASES["groups"], torch.float32, "meta")
    leaves = [tensor.requires_grad_() for tensor in case.tensors]
    x, offset, mask, weight = leaves
    output = reference.forward(case.geom, x, OffsetMask(offset, mask), weight, case.bias)
    grads = torch.autograd.grad(output, leaves, case.grad_output)
    assert output.shape == case.geom.output_shape
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
