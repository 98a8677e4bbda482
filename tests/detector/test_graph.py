"""Functions run from recordings; `tests/replay.py` stands in for CUDA graphs."""

from contextlib import contextmanager

import pytest
import torch

from detector.graph import CudaRecorder, Graphs
from tests.replay import OperatorRecorder


def test_the_first_call_runs_the_second_records_the_others_replay():
    recorder = OperatorRecorder()
    graphs = Graphs(recorder, limit=4)
    number = torch.zeros(3)
    total = torch.zeros(3)
    factor = 2.0

    def function():
        total.add_(number)
        return {"scaled": number * factor, "total": total[1:] + 0}

    results = []
    for step in range(5):
        number.fill_(step)
        result = graphs("key", function)
        results.append((result["scaled"].tolist(), result["total"].tolist()))
    assert results == [([2.0 * step] * 3, [sum(range(step + 1))] * 2) for step in range(5)]
    assert (recorder.runs, recorder.recordings, recorder.replays) == (1, 1, 3)

    factor = 9.0  # a replay runs no Python
    number.fill_(1)
    assert graphs("key", function)["scaled"].tolist() == [2.0] * 3
    assert graphs("other key", function)["scaled"].tolist() == [9.0] * 3


def test_the_limit():
    recorder = OperatorRecorder()
    graphs = Graphs(recorder, limit=1)
    value = torch.ones(1)
    assert not graphs.is_full
    for key in "aabbbba":
        assert graphs(key, lambda: value + 1).item() == 2
    assert graphs.is_full
    assert (recorder.runs, recorder.recordings, recorder.replays) == (5, 1, 1)


def test_the_stand_in_refuses_what_a_graph_cannot_do():
    graphs = Graphs(OperatorRecorder(), limit=4)
    value = torch.ones(2)
    graphs("item", lambda: value.sum().item())
    with pytest.raises(AssertionError, match="waits for the device"):
        graphs("item", lambda: value.sum().item())
    for _ in range(2):
        graphs("shape", lambda: value.nonzero())
    value[0] = 0
    with pytest.raises(AssertionError, match="another shape"):
        graphs("shape", lambda: value.nonzero())


def test_cuda_graphs_are_recorded_on_one_stream_and_share_their_memory(monkeypatch):
    """What is called on a GPU, with stand-ins for PyTorch's objects."""
    calls = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            calls.append("replay")

    @contextmanager
    def stream(stream):
        calls.append(f"on {stream.name}")
        yield

    @contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        calls.append(f"record into {pool} on {stream.name}, {capture_error_mode}")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)

    graphs = Graphs(CudaRecorder(torch.device("cuda")), limit=4)
    for _ in range(3):
        assert graphs("key", lambda: calls.append("function") or 7) == 7
    assert calls == [
        *["side waits for main", "on side", "function", "main waits for side"],
        *["record into pool on side, thread_local", "function", "replay"],
        "replay",
    ]


@pytest.mark.parametrize(
    ("has_triton", "message"),
    [
        pytest.param(False, "^--graph: expected the package triton, got none installed$", id="no-triton"),
        pytest.param(True, "^--graph: expected .* capability 8.0 or later, got Old GPU$", id="old-gpu"),
    ],
)
def test_graphs_need_triton(monkeypatch, has_triton, message):
    monkeypatch.setattr("detector.graph.HAS_TRITON", has_triton)
    monkeypatch.setattr("detector.graph.serves", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    with pytest.raises(ValueError, match=message):
        CudaRecorder(torch.device("cuda"))
