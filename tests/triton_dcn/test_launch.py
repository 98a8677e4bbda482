"""Launches without Triton's binder, and how much Python one call of the operator takes."""

import cProfile
import os
import pstats
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from triton_dcn import deform_conv2d, launchers, tile_table
from triton_dcn.kernels import launch

MOST_CALLS = {"forward": 145, "backward": 260}
"""Python functions and built-in ones that a call may take, without those of Triton's launches."""


def test_later_launches_pass_what_the_first_one_does():
    """A variant for each dtype and alignment; integers beyond 32 bits are left to Triton; hooks learn of launches."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")])
    program = Path(__file__).parent / "launch_program.py"
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    launches, variants, hooked = lines[:7], lines[7], lines[8:]
    assert variants == "variants 3"
    first, second, unaligned, unaligned_again, half, far_apart, far_apart_again = launches
    assert first == second == unaligned == unaligned_again
    assert hooked == [] if launch.HookChain is None else hooked == ["enters sampling_kernel", first]
    assert first.startswith("sampling_kernel | (3, 1, 1) | 7 | torch.float32 | ")
    assert half != first
    assert far_apart == far_apart_again
    assert str(1 << 31) in far_apart


def count_calls(function):
    profile = cProfile.Profile()
    profile.enable()
    function()
    profile.disable()
    return pstats.Stats(profile).total_calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts calls on CPU tensors")
def test_python_calls_of_a_small_image(monkeypatch):
    """At small sizes the host decides how long a call takes; launches and products are left out here."""
    monkeypatch.setattr(tile_table, "architecture", lambda device: "sm90")
    monkeypatch.setattr(launchers, "launch", lambda *arguments, **constants: None)
    monkeypatch.setattr("triton_dcn.triton_backend.multiply", lambda *arguments: None)
    monkeypatch.setattr("triton_dcn.triton_backend.accumulate", lambda *arguments: weight_matrix_grad)
    x = torch.randn(2, 128, 20, 20, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    offset = torch.randn(2, 18, 20, 20, dtype=torch.bfloat16)
    mask = torch.rand(2, 9, 20, 20, dtype=torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in (x, offset, mask, weight)]
    grad_output = torch.randn_like(x)
    weight_matrix_grad = torch.randn(1, 9 * 128, 128)
    outputs = []

    def forward():
        outputs.append(deform_conv2d(x, offset, weight, padding=1, mask=mask, backend="triton"))

    def backward():
        torch.autograd.grad(outputs.pop(), leaves, grad_output)

    for _ in range(2):
        forward()
        backward()
    calls = {"forward": count_calls(forward), "backward": count_calls(backward)}
    for name, most in MOST_CALLS.items():
        assert calls[name] <= most, (name, calls[name])
