"""How much the host does in a training step: bounds, so that what costs more is noticed without a GPU."""

import pytest
import torch

from bench.host_step import HostStep, count, table

MOST = {"kernels": 1290, "triton": 113, "waits": 0, "calls": 12_600}
"""Of one step of the recipe; a little above what `python -m bench.host_step` counts."""
MOST_WITH_GRAPHS = {"kernels": 14, "triton": 0, "waits": 0, "calls": 170}
"""The same around the two graphs of a step, with `--graph`."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts on CPU tensors")
@pytest.mark.parametrize(("graph", "most"), [(False, MOST), (True, MOST_WITH_GRAPHS)], ids=["plain", "graph"])
def test_a_step_takes_no_more_of_the_host_than_before(graph, most, tmp_path):
    counts = count(HostStep(tmp_path, graph=graph), steps=2)
    counted = {name: getattr(counts, name).total() for name in most}
    assert all(counted[name] <= limit for name, limit in most.items()), counted
    assert table(counts).splitlines()[-1].split()[1:3] == ["whole", "step"]
