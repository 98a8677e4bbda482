"""The loaders of a run: worker processes that read, transform and collate the images of a batch."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import cv2
from torch.utils.data import DataLoader, Dataset

from train.data.coco_dataset import CocoDetection, UnreadableImageError
from train.data.collate import LoadedBatch, collate
from train.data.samplers import AspectRatioBatchSampler, ImageKey

T = TypeVar("T")

LONGEST_WAIT = 600.0  # seconds, as --timeout has it by default
MAX_ATTEMPTS = 5  # images that training tries for one place in a batch


class BatchReader(Dataset[LoadedBatch]):
    """The images of a data set, a whole batch at a time.

    Args:
        dataset: the images.
        attempts: how many images to try for a key: the image itself, then the ones after it in the data set, so that
            batches stay full. The replacement depends only on the index of the image.
    """

    def __init__(self, dataset: CocoDetection, attempts: int):
        self.dataset = dataset
        self.attempts = min(attempts, len(dataset))

    def __getitem__(self, keys: Sequence[ImageKey]) -> LoadedBatch:
        """Read the images with these keys, or what replaces them."""
        samples = []
        unreadable = {}
        for epoch, index in keys:
            for attempt in range(self.attempts):
                candidate = (index + attempt) % len(self.dataset)
                try:
                    samples.append(self.dataset[epoch, candidate])
                    break
                except UnreadableImageError as error:
                    image_id = int(self.dataset.image_ids[candidate])
                    unreadable[image_id] = str(error)
        return collate(samples, unreadable)


def training_loader(
    dataset: CocoDetection,
    batch_sampler: AspectRatioBatchSampler,
    workers: int,
    pin_memory: bool,
    timeout: float = LONGEST_WAIT,
) -> DataLoader[LoadedBatch]:
    """Load the batches of `batch_sampler`; call its `set_epoch` before each pass.

    Args:
        dataset: the images.
        batch_sampler: which of them form a batch.
        workers: processes that load; 0 loads in this one.
        pin_memory: whether tensors go to page-locked memory, for a GPU.
        timeout: seconds to wait for a batch of a worker.
    """
    reader = BatchReader(dataset, MAX_ATTEMPTS)
    return _loader(reader, batch_sampler, workers, pin_memory, timeout)


def evaluation_loader(
    dataset: CocoDetection,
    workers: int,
    pin_memory: bool,
    rank: int = 0,
    world_size: int = 1,
    timeout: float = LONGEST_WAIT,
) -> DataLoader[LoadedBatch]:
    """Load this process's share of the images, each once and in a batch of its own, so without padding to other sizes.

    Args:
        dataset: the images.
        workers: processes that load; 0 loads in this one.
        pin_memory: whether tensors go to page-locked memory, for a GPU.
        rank: number of this process.
        world_size: how many processes there are; each takes every world_size-th image.
        timeout: seconds to wait for a batch of a worker.
    """
    batches = [[(0, index)] for index in range(rank, len(dataset), world_size)]
    reader = BatchReader(dataset, attempts=1)
    return _loader(reader, batches, min(workers, len(batches)), pin_memory, timeout)


def _loader(
    reader: BatchReader,
    batches: AspectRatioBatchSampler | list[list[ImageKey]],
    workers: int,
    pin_memory: bool,
    timeout: float,
) -> DataLoader[LoadedBatch]:
    options: dict[str, Any] = {}
    if workers:
        # Forked workers share the arrays of the data set; other start methods would copy them.
        options = {"worker_init_fn": _start_worker, "multiprocessing_context": "fork", "timeout": timeout}
    # With batch_size=None the loader hands each item of the sampler, the keys of a batch, to the reader as it is.
    return DataLoader(reader, batch_size=None, sampler=batches, num_workers=workers, pin_memory=pin_memory, **options)


def from_living_workers(items: Iterable[T]) -> Iterator[T]:
    """Yield what workers load; what one that is killed while it sends an item leaves is the error of a lost worker."""
    try:
        yield from items
    except (ConnectionError, EOFError) as error:
        if "DataLoader worker" in str(error):  # the worker's own, which it could still send
            raise
        raise RuntimeError("DataLoader worker exited unexpectedly while it sent an item") from error


def _start_worker(_: int) -> None:
    """Ignore signals, which the training process handles for its workers, and let OpenCV use one core."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)
