"""What the compiler makes of the detector's kernels, for GPUs that this machine need not have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_kernels_compile_without_spills_or_atomics():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.detector.ops.compile_kernels"]
    output = subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    facts_by_kernel = json.loads(output)
    assert {name.split()[-1] for name in facts_by_kernel} == {"sm80", "sm90", "gfx942"}
    for name, facts in facts_by_kernel.items():
        assert facts["atomics"] == 0, name
        assert facts["spills"] == 0 or "fp64" in name, name  # a division in float64 is a call
        assert facts["wide_loads"] > 0 or not name.startswith(("forward", "backward")), name
