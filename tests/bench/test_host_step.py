"""How much the host does in a training step: bounds, so that what costs more is noticed without a GPU."""

import pytest
import torch

from bench.host_step import HostStep, count, table

MOST = {"kernels": 1500, "triton": 113, "waits": 0, "calls": 18_500}
"""Of one step of the recipe; a little above what `python -m bench.host_step` counts."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts on CPU tensors")
def test_a_step_takes_no_more_of_the_host_than_before(tmp_path):
    counts = count(HostStep(tmp_path), steps=2)
    counted = {name: getattr(counts, name).total() for name in MOST}
    assert all(counted[name] <= most for name, most in MOST.items()), counted
    assert table(counts).splitlines()[-1].split()[1:3] == ["whole", "step"]
