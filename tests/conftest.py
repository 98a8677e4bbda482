"""Shared fixtures: seeds, threads, the golden numbers, and Triton's interpreter where there is no GPU."""

import dataclasses
import gc
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at the first product of the process
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # else Inductor compiles programs for each kind of vectors
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton at import, so before anything imports it

GOLDEN = Path(__file__).parent / "golden"


def speed_up_interpreter():
    """Spare Triton's interpreter what it does again and again, which takes longer than what most kernels compute.

    In each call of a device function it replaces every function of `triton.language`, as the launch has already done;
    for each operation it makes a dictionary of all dtypes, and types and tensors of shapes that it has made before;
    each sum and product of integers it computes once more, in 64 bits, for an assertion that it leaves out where
    Triton's debugging is off.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    patch = interpreter._patch_lang

    def patch_unless_done(function):
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if not languages or any(tl.core.is_builtin(language.load) for language in languages):
            return patch(function)
        return None  # read by launches only, and they begin with builtins

    interpreter._patch_lang = patch_unless_done

    find_dtype = interpreter._get_np_dtype
    found = {}

    def find_dtype_once(dtype):
        if dtype.name not in found:
            found[dtype.name] = find_dtype(dtype)
        return found[dtype.name]

    interpreter._get_np_dtype = find_dtype_once

    make_type = tl.core.block_type.__init__
    types = {}

    def make_type_once(self, element_ty, shape):
        sides = tuple(side.value if isinstance(side, tl.core.constexpr) else side for side in shape)
        key = element_ty.name, sides
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}
        vars(self).update(types[key], element_ty=element_ty)

    tl.core.block_type.__init__ = make_type_once

    make_tensor = tl.core.tensor.__init__
    sizes = {}

    def make_tensor_once(self, handle, type):
        shape = type.shape if type.is_block() else None
        if id(shape) not in sizes:
            make_tensor(self, handle, type)
            sizes[id(shape)] = shape, {"shape": self.shape, "numel": self.numel}
        vars(self).update(sizes[id(shape)][1], handle=handle, type=type, dtype=type.scalar)

    tl.core.tensor.__init__ = make_tensor_once


if "TRITON_INTERPRET" in os.environ and importlib.util.find_spec("triton"):
    speed_up_interpreter()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def golden():
    """Function: group name -> (arrays, parameters) of `tests/golden`."""
    cache = {}

    def load(group: str):
        if group not in cache:
            arrays = dict(np.load(GOLDEN / f"{group}.npz")) if (GOLDEN / f"{group}.npz").exists() else {}
            cache[group] = arrays, json.loads((GOLDEN / f"{group}.json").read_text())
        return cache[group]

    return load


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Look for garbage neither in the imports nor later in what they leave, which lives to the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items):
    """Skip what is marked `gpu` on a machine without one."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
