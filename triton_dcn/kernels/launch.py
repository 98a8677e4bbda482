"""How the kernels are launched: by Triton once for each variant, then by the compiled kernel itself.

A launch by Triton, `kernel[grid](...)`, inspects each argument to find the variant that it compiled for arguments of
this kind, which takes longer than small kernels run. Here the variant is found by what makes one, and the compiled
kernel is run as Triton's own launch runs it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from triton_dcn.kernels.sampling import TRITON_VERSION

try:
    from triton import knobs
    from triton.knobs import HookChain
except ImportError:  # an older Triton
    HookChain = None

LARGEST_INT32 = 2**31 - 1
ALIGNMENT = 16
"""Bytes; Triton compiles another variant where a pointer is not a multiple of it."""
PASSES_CONSTANTS = TRITON_VERSION >= (3, 3)
"""Whether a compiled kernel takes the constants, too; that of older versions takes the other arguments alone."""

_variants: dict[Hashable, tuple[Any, list[Any]]] = {}
"""By what makes a variant: the compiled kernel, and its constants in the order of the parameters."""


def launch(kernel: Any, programs: int, tensors: Sequence[Tensor], integers: Sequence[int], **constants: Any) -> None:
    """Launch a kernel on the current GPU, which holds the tensors, or in Triton's interpreter.

    Args:
        kernel: of `kernels.jit.kernel`.
        programs: size of the grid.
        tensors: the first parameters of the kernel, all of its pointers.
        integers: the next ones, all of its integers of the run time.
        constants: all of its other parameters by name, and options of the compiler.
    """
    # the interpreter compiles nothing; on AMD a variant also depends on how large the tensors are; integers that do not
    # fit 32 bits are rare
    if type(kernel) is not triton.JITFunction or torch.version.hip or max(integers) > LARGEST_INT32:
        kernel[(programs,)](*tensors, *integers, **constants)
        return

    device = tensors[0].device
    dtypes = [tensor.dtype for tensor in tensors]
    aligned = [tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors]
    key = (kernel.fn, device, *dtypes, *aligned, *constants.items())
    variant = _variants.get(key)
    if variant is None:
        compiled = kernel[(programs,)](*tensors, *integers, **constants)
        names = kernel.arg_names[len(tensors) + len(integers) :] if PASSES_CONSTANTS else ()
        _variants[key] = compiled, [constants[name] for name in names]
        return

    compiled, values = variant
    stream = driver.active.get_current_stream(device.index)
    if HookChain is None or _has_hooks():
        compiled[(programs, 1, 1)](*tensors, *integers, *values, stream=stream)
        return
    # the same without a description of the launch, which only hooks read
    compiled.run(
        programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
        *tensors, *integers, *values,
    )  # fmt: skip


def _has_hooks() -> bool:
    """Tell whether a profiler, or whoever else, asked Triton to call it at each launch."""
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        if type(hook) is not HookChain or hook.calls:
            return True
    return False
