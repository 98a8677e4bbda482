"""Which images form which batch on which process, and the workers that make them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from detector import Batch, Target
from detector.image import stack_images
from train.data.coco_dataset import BrokenImage, CocoDetection
from train.data.transforms import Sample

ATTEMPTS = 5  # images tried in the place of one
Key = tuple[int, int]  # (epoch, index): what a data set is asked for


@dataclass(frozen=True)
class Loaded:
    """A batch and what it was made of.

    Attributes:
        batch: for the model; None where no image could be read.
        image_ids: of the annotation file, one per image of the batch.
        scales: (x, y) of each image's resize.
        sizes: height and width of each image's file.
        broken: images that could not be read and are not in the batch.
    """

    batch: Batch | None
    image_ids: list[int]
    scales: list[tuple[float, float]]
    sizes: list[tuple[int, int]]
    broken: list[BrokenImage]

    def pin_memory(self) -> Loaded:
        """Return the same with its tensors in page-locked memory."""
        return replace(self, batch=self.batch and self.batch.pin_memory())

    def __reduce__(self) -> tuple:
        """Travel from a worker: small tensors inside the message, as each of them in shared memory costs a file."""
        batch = self.batch and _replace_small(self.batch, Tensor.numpy)
        return _received, (batch, self.image_ids, self.scales, self.sizes, self.broken)


def _received(batch: Batch | None, *rest: list) -> Loaded:
    return Loaded(batch and _replace_small(batch, torch.from_numpy), *rest)


def _replace_small(batch: Batch, change: Callable) -> Batch:
    """Apply `change` to all tensors (or arrays) but images and masks."""
    targets = batch.targets and [
        replace(target, boxes=change(target.boxes), labels=change(target.labels)) for target in batch.targets
    ]
    seeds = None if batch.seeds is None else change(batch.seeds)
    return replace(batch, sizes=change(batch.sizes), targets=targets, seeds=seeds)


class AspectRatioBatchSampler:
    """Batches of images of one orientation: the epoch's permutation, dealt to the processes, sorted into two buckets.

    Iterating gives the batches of `epoch` from number `start` on, as lists of (epoch, index).

    Args:
        upright: (N,) bool, whether an image is higher than wide.
        batch: images per batch.
        seed: of the run.
        rank, world: this process and how many there are.

    Source:
        MMEngine's DefaultSampler and MMDetection's AspectRatioBatchSampler.
    """

    def __init__(self, upright: np.ndarray, batch: int, seed: int = 0, rank: int = 0, world: int = 1):
        self.upright, self.batch, self.seed, self.rank, self.world = upright, batch, seed, rank, world
        self.epoch = self.start = 0

    def __len__(self) -> int:
        per_rank = -(-len(self.upright) // self.world)
        return -(-per_rank // self.batch)

    def __iter__(self) -> Iterator[list[Key]]:
        for indices in self.of_epoch(self.epoch)[self.start :]:
            yield [(self.epoch, index) for index in indices]

    def of_epoch(self, epoch: int) -> list[list[int]]:
        """Return all batches of an epoch on this process, as indices; every process has equally many."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.upright), generator=generator).numpy()
        total = -(-len(order) // self.world) * self.world
        mine = np.resize(order, total)[self.rank :: self.world]
        batches, buckets = [], ([], [])
        for index in mine.tolist():
            bucket = buckets[0 if self.upright[index] else 1]
            bucket.append(index)
            if len(bucket) == self.batch:
                batches.append(bucket[:])
                bucket.clear()
        rest = buckets[0] + buckets[1]
        return batches + [rest[i : i + self.batch] for i in range(0, len(rest), self.batch)]


def collate(samples: Sequence[Sample | BrokenImage]) -> Loaded:
    """Put images (uint8, padded with zeros on the right and bottom), boxes and masks (not padded) together."""
    broken = [sample for sample in samples if isinstance(sample, BrokenImage)]
    samples = [sample for sample in samples if isinstance(sample, Sample)]
    if not samples:
        return Loaded(None, [], [], [], broken)
    images, sizes = stack_images([sample.image for sample in samples])
    targets = [Target(*map(_tensor, (sample.boxes, sample.labels, sample.masks))) for sample in samples]
    seeds = torch.tensor([sample.seed for sample in samples])
    about = zip(*((sample.image_id, sample.scale, sample.size) for sample in samples), strict=True)
    return Loaded(Batch(images, sizes, targets, seeds), *map(list, about), broken)


def _tensor(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)


class Readable:
    """A data set whose unreadable images are replaced by the next readable one, so that batches stay full.

    What replaces an image depends on its index alone. Items are a list: the images that failed, then the sample, if one
    was found soon.
    """

    def __init__(self, dataset: CocoDetection):
        self.dataset = dataset

    def __getitem__(self, key: Key) -> list[Sample | BrokenImage]:
        epoch, index = key
        found: list[Sample | BrokenImage] = []
        for step in range(min(ATTEMPTS, len(self.dataset))):
            found.append(self.dataset[epoch, (index + step) % len(self.dataset)])
            if isinstance(found[-1], Sample):
                break
        return found


def _collate_readable(found: Sequence[list[Sample | BrokenImage]]) -> Loaded:
    return collate([item for items in found for item in items])


def training_loader(dataset: CocoDetection, batches: AspectRatioBatchSampler, workers: int, pin: bool) -> DataLoader:
    """Load `batches`; set `batches.epoch` and `batches.start` before each pass."""
    return DataLoader(
        Readable(dataset), batch_sampler=batches, collate_fn=_collate_readable, **_worker_options(workers, pin)
    )


def evaluation_loader(dataset: CocoDetection, workers: int, pin: bool, rank: int = 0, world: int = 1) -> DataLoader:
    """Load every world-th image once, one per batch: nothing is padded to a neighbor's size or seen twice."""
    keys = [[(0, index)] for index in range(rank, len(dataset), world)]
    return DataLoader(dataset, batch_sampler=keys, collate_fn=collate, **_worker_options(min(workers, len(keys)), pin))


def _worker_options(workers: int, pin: bool) -> dict:
    options = {"num_workers": workers, "pin_memory": pin}
    if workers:
        # Forked workers share the arrays of the data set; other start methods would copy them.
        options |= {"worker_init_fn": _start_worker, "multiprocessing_context": "fork"}
    return options


def _start_worker(_: int) -> None:
    """Leave signals to the training process, with which a worker ends, and one core to each worker."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    cv2.setNumThreads(0)


def on_device(loader: Iterable[Loaded], device: torch.device) -> Iterator[Loaded]:
    """Move batches to `device`, one ahead: the copy of the next batch runs beside the work on this one."""
    if device.type != "cuda":
        yield from loader
        return
    stream, ready = torch.cuda.Stream(device), None
    for loaded in loader:
        with torch.cuda.stream(stream):
            moved = _move(loaded, device)
        if ready is not None:
            yield ready
        torch.cuda.current_stream(device).wait_stream(stream)
        for tensor in _tensors(moved.batch):
            tensor.record_stream(torch.cuda.current_stream(device))
        ready = moved
    if ready is not None:
        yield ready


def _move(loaded: Loaded, device: torch.device) -> Loaded:
    batch = loaded.batch and loaded.batch.to(device, non_blocking=True)
    return replace(loaded, batch=batch)


def _tensors(batch: Batch | None) -> Iterator[Tensor]:
    if batch is not None:
        yield from (batch.images, batch.sizes)
        for target in batch.targets or ():
            yield from (target.boxes, target.labels)
            if target.masks is not None:
                yield target.masks
        if batch.seeds is not None:
            yield batch.seeds
