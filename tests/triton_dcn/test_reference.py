"""The oracle itself: by hand, against a plain convolution, against torchvision's numbers, by gradcheck."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.triton_dcn.cases import CASES, golden_case, make_case, relative
from triton_dcn import reference
from triton_dcn.geometry import ConvGeometry

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/deform_conv.json").read_text())


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("c")])
def test_golden(golden, name):
    case = golden_case(golden, name, torch.float64)
    output = reference.forward(case.geom, *case.tensors, case.bias)
    grads = reference.backward(case.geom, case.grad_output, *case.tensors, case.needs)
    assert relative(output, case.output) < 1e-12
    for found, expected in zip(grads, case.grads, strict=True):
        assert (found is None) == (expected is None)
        assert found is None or relative(found, expected) < 1e-12


def test_zero_offset_is_a_convolution():
    x, weight = torch.randn(2, 6, 9, 8, dtype=torch.float64), torch.randn(4, 3, 3, 2, dtype=torch.float64)
    expected = F.conv2d(x, weight, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
    offset = torch.zeros(2, 12, *expected.shape[2:], dtype=torch.float64)
    geom = ConvGeometry.of(x, offset, weight, None, (2, 1), (1, 2), (1, 2))
    assert relative(reference.forward(geom, x, offset, None, weight, None), expected) < 1e-14


def test_one_sample_by_hand():
    """A 1x1 kernel at (0, 0) moved by (0.25, 1.5) and scaled by 2."""
    x = torch.arange(12.0, dtype=torch.float64).view(1, 1, 3, 4)
    offset = torch.tensor([0.25, 1.5], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 3, 4)
    mask = torch.full((1, 1, 3, 4), 2.0, dtype=torch.float64)
    weight = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    geom = ConvGeometry.of(x, offset, weight, mask, (1, 1), (0, 0), (1, 1))
    output = reference.forward(geom, x, offset, mask, weight, None)
    assert output[0, 0, 0, 0] == 6 * (0.75 * 1.5 + 0.25 * 5.5)
    assert output[0, 0, 2, 3] == 0  # x = 4.5 is outside
    assert output[0, 0, 2, 2] == 6 * 0.75 * 0.5 * 11  # the neighbors below and to the right do not exist


@pytest.mark.parametrize("name", ["groups", "v1", "odd"])
def test_gradcheck(name):
    case = make_case(CASES[name], torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (*case.tensors, case.bias) if tensor is not None]
    present = [tensor is not None for tensor in (*case.tensors, case.bias)]

    def run(*leaves):
        given = iter(leaves)
        return reference.forward(case.geom, *[next(given) if there else None for there in present])

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    output = run(*leaves)
    expected = iter(torch.autograd.grad(output, leaves, case.grad_output))
    grads = reference.backward(
        case.geom, case.grad_output, *[t if t is None else t.detach() for t in case.tensors], case.needs
    )
    for found in grads:
        assert found is None or relative(found, next(expected)) < 1e-14


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
def test_samples_that_are_nowhere_read_zero(value):
    case = make_case(CASES["groups"], torch.float64)
    x, offset, mask, weight = case.tensors
    offset[:, :, 1, 2] = value
    output = reference.forward(case.geom, x, offset, mask, weight, None)
    assert output[:, :, 1, 2].abs().max() == 0
    grads = reference.backward(case.geom, torch.ones_like(output), x, offset, mask, weight, (True,) * 4)
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[1][:, :, 1, 2].abs().max() == 0
    assert grads[2][:, :, 1, 2].abs().max() == 0
