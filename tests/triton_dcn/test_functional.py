"""Argument errors of `deform_conv2d` and its layers."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.triton_dcn.cases import CASES, DEVICE, make_case
from triton_dcn import DeformConv2d, deform_conv2d


def call(dtype=torch.float32, device="cpu", **change):
    case = make_case(CASES["plain"], dtype, device)
    x, offset, mask, weight = case.tensors
    arguments = {"input": x, "offset": offset, "weight": weight, **case.arguments, "mask": mask} | change
    return deform_conv2d(**arguments)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"input": torch.zeros(2, 8, 7, 9, dtype=torch.int32)}, TypeError, ["input", "int32"]),
        ({"input": [1.0]}, TypeError, ["input", "list"]),
        ({"input": torch.zeros(2, 8, 7, 9).to_sparse()}, TypeError, ["input", "torch.sparse_coo"]),
        ({"weight": torch.zeros(6, 8, 3, 3, dtype=torch.float64)}, TypeError, ["weight", "float64", "float32"]),
        ({"offset": torch.zeros(2, 18, 7, 9).bfloat16()}, TypeError, ["offset", "bfloat16", "float32"]),
        ({"mask": torch.zeros(2, 9, 7, 9, device="meta")}, TypeError, ["mask", "meta", "cpu"]),
        ({"bias": torch.zeros(5)}, ValueError, ["bias", "(5,)", "(6,)"]),
        ({"stride": (1, 1, 1)}, ValueError, ["stride", "(1, 1, 1)"]),
        ({"stride": None}, ValueError, ["stride", "None"]),
        ({"padding": 0.5}, ValueError, ["padding", "0.5"]),
        ({"dilation": (1, 1.5)}, ValueError, ["dilation", "1.5"]),
        ({"mask": torch.zeros(2, 9, 7, 8)}, ValueError, ["mask", "(2, 9, 7, 8)", "(2, 9, 7, 9)"]),
        ({"backend": "cuda"}, ValueError, ["backend", "'cuda'", "reference"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_errors(change, kind, words):
    with pytest.raises(kind) as error:
        call(**change)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": torch.zeros(2, 8, 7, 9, dtype=torch.int64)}, ["input", "int64"]),
        ({"input": torch.zeros(2, 8, 7, 9, dtype=torch.complex64)}, ["input", "complex64"]),
        ({"weight": torch.zeros(6, 8, 3, 3, dtype=torch.float64)}, ["weight", "float64", "bfloat16"]),
        ({"offset": torch.zeros(2, 18, 7, 9, dtype=torch.float16)}, ["offset", "float16", "float32"]),
    ],
    ids=["int64", "complex64", "weight", "offset"],
)
def test_autocast_hides_no_error(change, words):
    with torch.autocast("cpu"), pytest.raises(TypeError) as error:
        call(**change)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [None, 3.0, (1, 3.0)], ids=str)
def test_layers_name_what_is_no_int(name, value):
    with pytest.raises(ValueError, match=name):
        DeformConv2d(4, 4, **({"kernel_size": 3} | {name: value}))


def test_ints_of_numpy_are_ints():
    one = np.int64(1)
    expected = call(stride=1, padding=1, dilation=(1, 1))
    assert torch.equal(call(stride=one, padding=one, dilation=(one, one)), expected)


def test_triton_refuses_float64():
    with pytest.raises(ValueError, match="float64"):
        call(torch.float64, DEVICE, backend="triton")


def test_triton_on_cpu_tells_about_the_interpreter():
    program = (
        "import torch, triton_dcn\n"
        "x = torch.zeros(1, 1, 3, 3)\n"
        "triton_dcn.deform_conv2d(x, torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 1, 1), backend='triton')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "TRITON_INTERPRET=1" in done.stderr.splitlines()[-1]
