"""Random shapes, groups, dtypes and kinds of offsets through the operator, by backends "triton" and "torch"."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.triton_dcn.cases import (
    OperatorCall,
    OperatorCase,
    device_of,
    make_case,
    relative,
    two_threads,
)
from triton_dcn import deform_conv2d

UNUSUAL = (float("nan"), float("inf"), -float("inf"), 1e30, -3e9, 4e4, -7.0)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
OFFSET_KINDS = st.sampled_from(["fractional", "whole", "unusual"])


@st.composite
def specs(draw):
    """A case's sizes, see `cases.CASES`; the output is at least 1x1."""
    integers = st.integers
    groups, offset_groups = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (2, 3)]))
    channels = groups * offset_groups * draw(integers(1, 4))
    kernel = draw(st.tuples(integers(1, 3), integers(1, 3)))
    stride = draw(st.tuples(integers(1, 3), integers(1, 3)))
    dilation = draw(st.tuples(integers(1, 2), integers(1, 2)))
    padding = draw(st.tuples(integers(0, 2), integers(0, 2)))

    size = []
    for axis in (0, 1):
        window = dilation[axis] * (kernel[axis] - 1) + 1
        size.append(draw(integers(max(1, window - 2 * padding[axis]), 10)))

    out_channels = groups * draw(integers(1, 5))
    batch = draw(integers(1, 2))
    with_mask = draw(st.booleans())
    with_bias = draw(st.booleans())
    return OperatorCase(
        "",
        batch,
        channels,
        out_channels,
        *size,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_groups=offset_groups,
        has_mask=with_mask,
        has_bias=with_bias,
    )


def change_offsets(case: OperatorCall, kind: str) -> None:
    """Round the offsets of a case to whole pixels, or replace some by values that are not finite or far away."""
    offset = case.tensors[1]
    if kind == "whole":
        offset.round_()
    elif kind == "unusual":
        generator = torch.Generator().manual_seed(1)
        replaced = torch.rand(offset.shape, generator=generator) < 0.3
        values = torch.tensor(UNUSUAL)[torch.randint(len(UNUSUAL), offset.shape, generator=generator)]
        offset.copy_(torch.where(replaced.to(offset.device), values.to(offset), offset))


def run(case: OperatorCall, backend: str, dtype: torch.dtype):
    """Output and gradients of input, offset, mask, weight, bias, all in `dtype`."""
    leaves = []
    for tensor in (*case.tensors, case.bias):
        leaves.append(None if tensor is None else tensor.to(dtype, copy=True).requires_grad_())
    x, offset, mask, weight, bias = leaves
    output = deform_conv2d(x, offset, weight, backend=backend, **(case.arguments | {"mask": mask, "bias": bias}))
    output.backward(case.grad_output.to(dtype))
    return output, *(None if leaf is None else leaf.grad for leaf in leaves)


def check_against_reference(backend: str, spec: OperatorCase, dtype: torch.dtype, kind: str) -> None:
    """Error against float64 on the same rounded inputs: at most twice that of the reference in this dtype."""
    case = make_case(spec, dtype, device_of(backend))
    change_offsets(case, kind)
    exact = run(case, "reference", torch.float64)
    in_same_dtype = run(case, "reference", dtype)
    found = run(case, backend, dtype)

    floor = 2 * torch.finfo(dtype).eps
    for target, by_reference, value in zip(exact, in_same_dtype, found, strict=True):
        assert (value is None) == (target is None)
        if target is not None:
            assert value.dtype == dtype
            assert relative(value, target) <= 2 * relative(by_reference, target) + floor


@settings(max_examples=15, deadline=None, derandomize=True)
@given(specs(), DTYPES, OFFSET_KINDS)
def test_triton(spec, dtype, kind):
    check_against_reference("triton", spec, dtype, kind)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(specs(), DTYPES, OFFSET_KINDS)
def test_torch_on_two_threads(spec, dtype, kind):
    with two_threads():
        check_against_reference("torch", spec, dtype, kind)
