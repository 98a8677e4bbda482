"""Moves batches to the GPU while it computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from detector import Batch
from detector.structures import StackedTargets
from train.data.collate import LoadedBatch
from train.data.loader import from_living_workers


def prefetch_to_device(batches: Iterable[LoadedBatch], device: torch.device) -> Iterator[LoadedBatch]:
    """Move batches to `device`, one ahead: the next batch is copied while the GPU works on this one.

    Raises:
        RuntimeError: a process that loads images is gone.
    """
    batches = from_living_workers(batches)
    if device.type != "cuda":
        yield from batches
        return

    copy_stream = torch.cuda.Stream(device)
    ready = None
    for loaded in batches:
        with torch.cuda.stream(copy_stream):
            moved = loaded.to(device, non_blocking=True)
        if ready is not None:
            yield ready
        compute_stream = torch.cuda.current_stream(device)
        compute_stream.wait_stream(copy_stream)
        for tensor in batch_tensors(moved.batch):
            tensor.record_stream(compute_stream)
        ready = moved
    if ready is not None:
        yield ready


def batch_tensors(batch: Batch | None) -> Iterator[Tensor]:
    """Yield all tensors of a batch."""
    if batch is None:
        return
    yield batch.images
    yield batch.sizes
    if isinstance(batch.targets, StackedTargets):
        yield batch.targets.boxes
        yield batch.targets.labels
        yield from batch.targets.masks or ()
    elif batch.targets is not None:
        for target in batch.targets:
            yield target.boxes
            yield target.labels
            if target.masks is not None:
                yield target.masks
    if batch.seeds is not None:
        yield batch.seeds
