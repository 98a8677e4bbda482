"""Shared fixtures: seeds, threads, the golden numbers, and Triton's interpreter where there is no GPU."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at the first product of the process
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton at import, so before anything imports it

GOLDEN = Path(__file__).parent / "golden"


def speed_up_interpreter():
    """Spare Triton's interpreter what it does again and again, which takes longer than what most kernels compute.

    In each call of a device function it replaces every function of `triton.language`, as the launch has already done;
    for each operation it makes a dictionary of all dtypes.
    """
    import triton.language as tl
    from triton.runtime import interpreter

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


def pytest_collection_modifyitems(items):
    """Skip what is marked `gpu` on a machine without one."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
