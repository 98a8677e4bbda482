"""Shared fixtures: seeds, threads, the golden numbers, and Triton's interpreter where there is no GPU."""

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
