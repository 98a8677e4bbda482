"""The types that travel through the detector: plain dataclasses of tensors, which can only be moved to a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

SIZE_DIVISOR = 32
"""The sides of the images of a `Batch` are multiples of this."""
NO_OBJECT = -1
"""Label of a ground truth that is none: it pads a `Target` to a fixed length."""


def padded_side(side: int) -> int:
    """Return a side of an image, in pixels, rounded up to a multiple of `SIZE_DIVISOR`."""
    return -(-side // SIZE_DIVISOR) * SIZE_DIVISOR


@dataclass(frozen=True)
class Target:
    """Ground truth of one image.

    Attributes:
        boxes: (N, 4) float32, x1 y1 x2 y2 in pixels of the resized image; N can be 0.
        labels: (N,) int64, classes from 0, or `NO_OBJECT`.
        masks: (N, H, W) uint8 or bool, not 0 inside the object; H, W is the size of the resized image, padded or not.
            None where the model predicts boxes only.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        """Return the target on `device`."""
        masks = self.masks
        if masks is not None:
            masks = masks.to(device, non_blocking=non_blocking)
        return Target(
            boxes=self.boxes.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            masks=masks,
        )

    def pin_memory(self) -> Target:
        """Return the target in page-locked memory."""
        masks = self.masks
        if masks is not None:
            masks = masks.pin_memory()
        return Target(
            boxes=self.boxes.pin_memory(),
            labels=self.labels.pin_memory(),
            masks=masks,
        )


@dataclass(frozen=True)
class StackedTargets(Sequence[Target]):
    """Ground truths of a batch in one tensor of boxes and one of labels; a sequence with a `Target` for each image.

    To copy them to a device, or to pad them for the model, takes the same few calls for any number of images.

    Attributes:
        boxes: (B, G, 4) float32, with zeros behind the boxes of an image.
        labels: (B, G) int64, with `NO_OBJECT` there.
        counts: ground truths of each image.
        masks: (N, H, W) of each image; None where the model predicts boxes only.
    """

    boxes: Tensor
    labels: Tensor
    counts: tuple[int, ...]
    masks: tuple[Tensor, ...] | None = None

    @staticmethod
    def of(targets: Sequence[Target], capacity: int = 1) -> StackedTargets:
        """Stack targets, all with masks or all without, and copy boxes and labels.

        Args:
            targets: one per image, at least one.
            capacity: G, if no image has more ground truths; else G is the largest number of an image.
        """
        counts = tuple(len(target.labels) for target in targets)
        first = targets[0]
        capacity = max(capacity, *counts)
        boxes = first.boxes.new_zeros(len(targets), capacity, 4)
        labels = first.labels.new_full((len(targets), capacity), NO_OBJECT)
        for target, count, boxes_of_image, labels_of_image in zip(targets, counts, boxes, labels, strict=True):
            boxes_of_image[:count] = target.boxes
            labels_of_image[:count] = target.labels
        masks = tuple(target.masks for target in targets if target.masks is not None)
        return StackedTargets(boxes, labels, counts, masks or None)

    def __len__(self) -> int:
        return len(self.counts)

    @overload
    def __getitem__(self, index: int) -> Target: ...

    @overload
    def __getitem__(self, index: slice) -> list[Target]: ...

    def __getitem__(self, index: int | slice) -> Target | list[Target]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        count = self.counts[index]
        masks = None if self.masks is None else self.masks[index]
        return Target(self.boxes[index, :count], self.labels[index, :count], masks)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StackedTargets:
        """Return the targets on `device`."""
        masks = self.masks
        if masks is not None:
            masks = tuple(mask.to(device, non_blocking=non_blocking) for mask in masks)
        return StackedTargets(
            boxes=self.boxes.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            counts=self.counts,
            masks=masks,
        )

    def pin_memory(self) -> StackedTargets:
        """Return the targets in page-locked memory."""
        masks = self.masks
        if masks is not None:
            masks = tuple(mask.pin_memory() for mask in masks)
        return StackedTargets(
            boxes=self.boxes.pin_memory(),
            labels=self.labels.pin_memory(),
            counts=self.counts,
            masks=masks,
        )


@dataclass(frozen=True)
class Batch:
    """Images of one step, padded to a common size.

    Attributes:
        images: (B, 3, Hp, Wp) uint8 RGB, Hp and Wp multiples of `SIZE_DIVISOR`; every row and column outside an image's
            own size is padding of any value.
        sizes: (B, 2) int64, height and width of each image before padding.
        targets: one `Target` per image, for example `StackedTargets`, or None when there is no ground truth.
        seeds: (B,) int64, one per image, for the random samplers of the model: the samples of an image depend on its
            seed and the padded size, not on the other images of the batch. None draws seeds from torch's global
            generator.
    """

    images: Tensor
    sizes: Tensor
    targets: Sequence[Target] | None = None
    seeds: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch on `device`."""
        targets = self.targets
        if isinstance(targets, StackedTargets):
            targets = targets.to(device, non_blocking)
        elif targets is not None:
            targets = [target.to(device, non_blocking) for target in targets]
        seeds = self.seeds
        if seeds is not None:
            seeds = seeds.to(device, non_blocking=non_blocking)
        return Batch(
            images=self.images.to(device, non_blocking=non_blocking),
            sizes=self.sizes.to(device, non_blocking=non_blocking),
            targets=targets,
            seeds=seeds,
        )

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, so that `to(..., non_blocking=True)` does not wait."""
        targets = self.targets
        if isinstance(targets, StackedTargets):
            targets = targets.pin_memory()
        elif targets is not None:
            targets = [target.pin_memory() for target in targets]
        seeds = self.seeds
        if seeds is not None:
            seeds = seeds.pin_memory()
        return Batch(
            images=self.images.pin_memory(),
            sizes=self.sizes.pin_memory(),
            targets=targets,
            seeds=seeds,
        )


@dataclass(frozen=True)
class Detections:
    """The objects detected in one image, highest score first.

    Attributes:
        boxes: (N, 4), x1 y1 x2 y2 in pixels of the resized image.
        scores: (N,) in [0, 1], highest first.
        labels: (N,) int64, classes from 0.
        masks: (N, 28, 28) in [0, 1], probability that a point of the box is on the object, on a regular grid; None if
            the model predicts boxes only. `detector.ops.paste_masks.paste_masks` draws them into an image.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
