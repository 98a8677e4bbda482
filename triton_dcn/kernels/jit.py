"""How the kernels are compiled: not again for run-time integers that are 1 or a multiple of 16."""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def kernel(function: Callable[..., None]) -> Any:
    """Make a Triton kernel that is not specialized for the values of its run-time integers.

    By default Triton compiles another variant whenever one of them becomes 1 or divisible by 16, or stops being so: in
    a training run on images of many sizes about ten variants per kernel, whose machine code is the same where it
    matters (`bench.compiled_code` examines that of the only variant here). Pointers are still specialized, because wide
    loads need to know their alignment.
    """
    return triton.jit(function, do_not_specialize=runtime_integers(function))


def runtime_integers(function: Callable[..., None]) -> list[str]:
    """Return the names of the parameters that are neither constexpr nor, by the ending `_ptr`, pointers."""
    # evaluated, because `from __future__ import annotations` in the file of the kernel makes strings of them
    parameters = inspect.signature(function, eval_str=True).parameters
    integers = []
    for name, parameter in parameters.items():
        if parameter.annotation is not tl.constexpr and not name.endswith("_ptr"):
            integers.append(name)
    return integers
