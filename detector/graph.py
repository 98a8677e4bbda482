"""CUDA graphs: what a function of static tensors launches is recorded once and replayed with new contents.

A replay costs the host one launch, whatever the function launches. It runs no Python: the function must read its inputs
from tensors that stay where they are, must not depend on values that the host would have to read, and must not wait for
the device. Everything else about it (shapes, branches, numbers of Python) is fixed by its key in `Graphs`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

import torch

from triton_dcn.functional import HAS_TRITON
from triton_dcn.tile_table import serves

T = TypeVar("T")


class Recorder(Protocol):
    """Runs and records functions. Tests have one for the CPU, see `tests/replay.py`."""

    def run(self, function: Callable[[], T]) -> T:
        """Run the function as it is."""

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Run the function once; return its results, and what runs it again and puts the new results into them."""


class CudaRecorder:
    """Records CUDA graphs that share their memory.

    The results of a graph are valid until the next one is replayed, so whoever needs them longer copies them at once,
    on the same stream.

    Args:
        device: a GPU.

    Raises:
        ValueError: no Triton for this GPU. Without it NMS and RoIAlign wait for the host.
    """

    def __init__(self, device: torch.device) -> None:
        if not HAS_TRITON:
            raise ValueError("--graph: expected the package triton, got none installed")
        if not serves(device):
            raise ValueError(
                "--graph: expected an AMD GPU or an NVIDIA GPU of compute capability 8.0 or later, got "
                f"{torch.cuda.get_device_name(device)}"
            )
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], T]) -> T:
        """Run the function on the stream that records, so that the libraries get their memory for it."""
        current_stream = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current_stream)
        with torch.cuda.stream(self._stream):
            result = function()
        current_stream.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Record the function and replay it once.

        Other threads may use the GPU meanwhile, as that of the loader does, which takes page-locked memory.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            result = function()
        graph.replay()
        return result, graph.replay


class Graphs:
    """Runs functions from recordings of them, one for each key.

    The first call with a key runs the function itself, which compiles kernels and allocates what stays; the second
    records it. So no call is made only to warm up, and what is seen once is never recorded.

    Args:
        recorder: makes the recordings.
        limit: of recordings; functions with further keys run as they are.
    """

    def __init__(self, recorder: Recorder, limit: int) -> None:
        self.recorder = recorder
        self.limit = limit
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, tuple[Any, Callable[[], None]]] = {}

    @property
    def is_full(self) -> bool:
        """Whether no further function is recorded."""
        return len(self._recorded) >= self.limit

    def __call__(self, key: Hashable, function: Callable[[], T]) -> T:
        """Return the result of the function, or the tensors of an earlier result with what is new in them.

        Args:
            key: of the function: equal keys stand for the same work on the same tensors.
            function: reads static tensors and writes static tensors, or new ones that it returns.
        """
        result: T
        if key in self._recorded:
            result, replay = self._recorded[key]
            replay()
        elif key in self._seen and not self.is_full:
            result, replay = self.recorder.record(function)
            self._recorded[key] = result, replay
        else:
            result = self.recorder.run(function)
            self._seen.add(key)
        return result
