"""How the kernels are compiled: once, and not again for sizes that are 1 or a multiple of 16."""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def kernel(function: Callable[..., None]) -> Any:
    """Make a Triton kernel without a variant for each of its run-time integers.

    Triton would compile a kernel again when one of them becomes 1 or divisible by 16, or is so no longer: in a training
    run on images of many sizes about ten times per kernel, for machine code that is the same where it matters
    (`bench.compiled_code` reads that of the one variant). Pointers keep their variants: wide loads need the alignment.
    """
    integers = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.annotation is not tl.constexpr and not name.endswith("_ptr"):
            integers.append(name)
    return triton.jit(function, do_not_specialize=integers)
