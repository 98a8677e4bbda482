"""Which parameters of a kernel Triton must not specialize for."""

from __future__ import annotations

import triton.language as tl

from bench.atomics import scatter_kernel
from triton_dcn.kernels.jit import runtime_integers


def example(x_ptr, positions, stride_b, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    pass


def test_constexprs_are_known_where_annotations_are_strings():
    assert example.__annotations__["BLOCK"] == "tl.constexpr"
    assert runtime_integers(example) == ["positions", "stride_b"]


def test_kernel_of_the_benchmark():
    """Its file has string annotations; Triton refuses to compile a kernel whose constexprs are listed."""
    integers = runtime_integers(scatter_kernel.fn)
    assert integers == ["positions", "first_position", "rows", "width"]
