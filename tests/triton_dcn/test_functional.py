"""Argument errors of `deform_conv2d`."""

import os
import subprocess
import sys

import pytest
import torch

from tests.triton_dcn.cases import CASES, make_case
from triton_dcn import deform_conv2d


def call(dtype=torch.float32, **change):
    case = make_case(CASES["plain"], dtype)
    x, offset, mask, weight = case.tensors
    arguments = {"input": x, "offset": offset, "weight": weight, **case.arguments, "mask": mask} | change
    return deform_conv2d(**arguments)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"input": torch.zeros(2, 8, 7, 9, dtype=torch.int32)}, TypeError, ["input", "int32"]),
        ({"input": [1.0]}, TypeError, ["input", "list"]),
        ({"weight": torch.zeros(6, 8, 3, 3, dtype=torch.float64)}, TypeError, ["weight", "float64", "float32"]),
        ({"offset": torch.zeros(2, 18, 7, 9).bfloat16()}, TypeError, ["offset", "bfloat16", "float32"]),
        ({"mask": torch.zeros(2, 9, 7, 9, device="meta")}, TypeError, ["mask", "meta", "cpu"]),
        ({"bias": torch.zeros(5)}, ValueError, ["bias", "(5,)", "(6,)"]),
        ({"stride": (1, 1, 1)}, ValueError, ["stride", "(1, 1, 1)"]),
        ({"padding": 0.5}, TypeError, ["float"]),
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


def test_triton_refuses_float64():
    with pytest.raises(ValueError, match="float64"):
        call(torch.float64, backend="triton")


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
