"""Drawn shapes, groups, dtypes and offsets of every kind through the operator, by backends "triton" and "torch"."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.triton_dcn.cases import Case, device_of, make_case, relative, two_threads
from triton_dcn import deform_conv2d

STRANGE = (float("nan"), float("inf"), -float("inf"), 1e30, -3e9, 4e4, -7.0)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
KINDS = st.sampled_from(["fractional", "whole", "strange"])


@st.composite
def specs(draw):
    """A case's sizes, see `cases.CASES`; the output is never empty."""
    groups, offset_groups = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (2, 3)]))
    channels = groups * offset_groups * draw(st.integers(1, 4))
    kernel, stride, dilation, padding = (
        draw(st.tuples(st.integers(low, high), st.integers(low, high)))
        for low, high in ((1, 3), (1, 3), (1, 2), (0, 2))
    )
    size = tuple(
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 10))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    )  # fmt: skip
    out = groups * draw(st.integers(1, 5))
    return (
        draw(st.integers(1, 2)), channels, out, size, kernel, stride, padding, dilation, groups, offset_groups,
        draw(st.booleans()), draw(st.booleans()),
    )  # fmt: skip


def place(case: Case, kind: str) -> None:
    """Change the offsets of a case: to whole pixels, or some to values that no image holds."""
    offset = case.tensors[1]
    if kind == "whole":
        offset.round_()
    elif kind == "strange":
        draw = torch.Generator().manual_seed(1)
        where = torch.rand(offset.shape, generator=draw) < 0.3
        values = torch.tensor(STRANGE)[torch.randint(len(STRANGE), offset.shape, generator=draw)]
        offset.copy_(torch.where(where.to(offset.device), values.to(offset), offset))


def run(case: Case, backend: str, dtype: torch.dtype):
    """Output and gradients of input, offset, mask, weight, bias, all in `dtype`."""
    leaves = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in (*case.tensors, case.bias)]
    x, offset, mask, weight, bias = leaves
    output = deform_conv2d(x, offset, weight, backend=backend, **(case.arguments | {"mask": mask, "bias": bias}))
    output.backward(case.grad_output.to(dtype))
    return output, *(None if leaf is None else leaf.grad for leaf in leaves)


def as_good_as_the_reference(backend: str, spec: tuple, dtype: torch.dtype, kind: str) -> None:
    """Error against float64 on the same rounded inputs: at most twice that of the reference in this dtype."""
    case = make_case(spec, dtype, device_of(backend))
    place(case, kind)
    truth, plain, found = (
        run(case, *how) for how in (("reference", torch.float64), ("reference", dtype), (backend, dtype))
    )
    floor = 2 * torch.finfo(dtype).eps
    for exact, reference, value in zip(truth, plain, found, strict=True):
        assert (value is None) == (exact is None)
        if exact is not None:
            assert value.dtype == dtype
            assert relative(value, exact) <= 2 * relative(reference, exact) + floor


@settings(max_examples=15, deadline=None, derandomize=True)
@given(specs(), DTYPES, KINDS)
def test_triton(spec, dtype, kind):
    as_good_as_the_reference("triton", spec, dtype, kind)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(specs(), DTYPES, KINDS)
def test_torch_on_two_threads(spec, dtype, kind):
    with two_threads():
        as_good_as_the_reference("torch", spec, dtype, kind)
