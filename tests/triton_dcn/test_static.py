"""The compiled code of the kernels for GPUs that are not here: no spills, wide loads, tensor cores, no float atomics.

A reduced set; `python -m bench.static` compiles the whole table.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from triton_dcn import configs

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arch", configs.TESTED)
def test_code_for(arch, tmp_path):
    """In a process of its own: where the interpreter is on, nothing can be compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    report = tmp_path / "report.jsonl"
    run = subprocess.run(
        [sys.executable, "-m", "bench.static", "--arch", arch, "--first", "--json", str(report)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    kernels = {json.loads(line)["row"]["kernel"] for line in report.read_text().splitlines()}
    assert kernels >= {"sampling", "bins", "columns", "grad_sample", "grad_sample_fused", "t_columns", "g_form"}
    assert kernels & {"forward_prefetch", "forward_transposed"}


def test_every_stage_has_a_tile_everywhere():
    """Whatever the sizes, the general way exists on every architecture and for every arithmetic."""
    for arch in (*configs.GPUS, *configs.HOST):
        for kind in ("half", "tf32", "float32"):
            for stage in ("sampling", "bins", "columns", "grad_sample", "t_columns", "g_form"):
                assert configs.choose(stage, arch, kind, 999, 1001) is not None


@pytest.mark.parametrize("row", configs.TABLE, ids=lambda row: f"{row.kernel}-{row.archs[0]}-{row.arithmetic}")
def test_row_is_complete(row):
    assert len(configs.TABLE) < 40
    assert row.archs == configs.HOST or len(row.registers) == len(row.archs)
    assert row.shared <= configs.SHARED_LIMIT
