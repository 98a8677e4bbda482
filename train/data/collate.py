"""From samples to a batch: receives `Sample`s, returns a `LoadedBatch` with the `Batch` for the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import get_worker_info

from detector import Batch, Target
from detector.image import stack_images
from detector.structures import StackedTargets
from train.data.transforms import Sample


@dataclass(frozen=True)
class LoadedBatch:
    """A batch and what evaluation and log need to know about its images.

    Attributes:
        batch: for the model; None where no image could be read.
        image_ids: in the annotation file, one per image of the batch.
        scale_factors: (x, y) of each image's resize.
        original_sizes: height and width of each image's file.
        unreadable: image id -> reason, of the images that could not be read and are not in the batch.
        lost_boxes: image id -> boxes x1, y1, x2, y2 in pixels of the file, of the images with boxes that the batch does
            not have because nothing of them is left inside the image.
    """

    batch: Batch | None
    image_ids: list[int]
    scale_factors: list[tuple[float, float]]
    original_sizes: list[tuple[int, int]]
    unreadable: dict[int, str]
    lost_boxes: dict[int, list[list[float]]] = field(default_factory=dict)

    def to(self, device: torch.device, non_blocking: bool = False) -> LoadedBatch:
        """Return the same with its tensors on `device`."""
        if self.batch is None:
            return self
        return replace(self, batch=self.batch.to(device, non_blocking))

    def pin_memory(self) -> LoadedBatch:
        """Return the same with its tensors in page-locked memory."""
        if self.batch is None:
            return self
        return replace(self, batch=self.batch.pin_memory())

    def __reduce__(self) -> tuple[Any, ...]:
        """Let workers send small tensors as arrays inside the message: in shared memory each needs an open file.

        A thread of the worker comes here. It would only print that shared memory is full, and the training process
        would wait for the batch, so the error is sent in its place.
        """
        worker = get_worker_info()
        if worker is not None:
            try:
                self._share_memory()
            except RuntimeError as error:
                full = RuntimeError(f"no shared memory for a batch: {error}")
                where = f"in DataLoader worker process {worker.id}"
                return _itself, (ExceptionWrapper((RuntimeError, full, error.__traceback__), where),)

        batch = self.batch
        if batch is not None:
            batch = _convert_small_tensors(batch, Tensor.numpy)
        return _rebuild, (
            batch,
            self.image_ids,
            self.scale_factors,
            self.original_sizes,
            self.unreadable,
            self.lost_boxes,
        )

    def _share_memory(self) -> None:
        """Move the large tensors, images and masks, to shared memory.

        Raises:
            RuntimeError: it is full.
        """
        if self.batch is None:
            return
        self.batch.images.share_memory_()
        for target in self.batch.targets or ():
            if target.masks is not None:
                target.masks.share_memory_()


def _itself(error: ExceptionWrapper) -> ExceptionWrapper:
    """Return what was sent in the place of a batch; the loader raises it."""
    return error


def _rebuild(batch: Batch | None, *fields: Any) -> LoadedBatch:
    """Undo `LoadedBatch.__reduce__`."""
    if batch is not None:
        batch = _convert_small_tensors(batch, torch.from_numpy)
    return LoadedBatch(batch, *fields)


def _convert_small_tensors(batch: Batch, convert: Callable[[Any], Any]) -> Batch:
    """Apply `convert`, from tensor to array or back, to everything but images and masks."""
    targets = batch.targets
    if isinstance(targets, StackedTargets):
        targets = replace(targets, boxes=convert(targets.boxes), labels=convert(targets.labels))
    elif targets is not None:
        targets = [
            replace(target, boxes=convert(target.boxes), labels=convert(target.labels), check=False)
            for target in targets
        ]
    seeds = batch.seeds
    if seeds is not None:
        seeds = convert(seeds)
    return replace(batch, sizes=convert(batch.sizes), targets=targets, seeds=seeds)


def collate(samples: Sequence[Sample], unreadable: Mapping[int, str] | None = None) -> LoadedBatch:
    """Put the images of a batch into one tensor, padded with zeros; boxes and masks become `StackedTargets`.

    Args:
        samples: images of the batch; may be empty if none could be read.
        unreadable: image id -> reason, of images that could not be read.
    """
    batch = None
    if samples:
        images, sizes = stack_images([sample.image for sample in samples])
        targets = StackedTargets.of([_target(sample) for sample in samples])
        seeds = torch.tensor([sample.seed for sample in samples])
        batch = Batch(images, sizes, targets, seeds)
    return LoadedBatch(
        batch=batch,
        image_ids=[sample.image_id for sample in samples],
        scale_factors=[sample.scale_factor for sample in samples],
        original_sizes=[sample.original_size for sample in samples],
        unreadable=dict(unreadable or {}),
        lost_boxes={sample.image_id: sample.lost_boxes.tolist() for sample in samples if len(sample.lost_boxes)},
    )


def _target(sample: Sample) -> Target:
    masks = None if sample.masks is None else torch.from_numpy(sample.masks)
    return Target(torch.from_numpy(sample.boxes), torch.from_numpy(sample.labels), masks)
