"""The types that travel through the detector: plain dataclasses of tensors, which can only be moved to a device.

Ground truth is checked where it comes in, which is where a `Target` is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass, replace
from math import isfinite
from typing import SupportsIndex, TypeVar, overload

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
        boxes: (N, 4) floating, finite, x1 y1 x2 y2 in pixels of the resized image; x2 > x1 and y2 > y1 but where the
            label is `NO_OBJECT`; N can be 0.
        labels: (N,) int64, classes from 0, or `NO_OBJECT`.
        masks: (N, H, W) uint8 or bool, not 0 inside the object; H, W is the size of the resized image, padded or not.
            None where the model predicts boxes only.

    Args:
        boxes, labels, masks: the attributes.
        check: whether to check boxes and labels. Only on a CPU are their numbers looked at: elsewhere that would wait
            for the device. The model checks the masks, which depend on the size of the images.

    Raises:
        ValueError: boxes or labels are not as above; names the first row that is not.
        TypeError: they are no tensors.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None
    check: InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        """Check boxes and labels."""
        if check:
            _check_boxes_and_labels(self.boxes, self.labels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        """Return the target on `device`."""
        masks = self.masks
        if masks is not None:
            masks = masks.to(device, non_blocking=non_blocking)
        return Target(
            boxes=self.boxes.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            masks=masks,
            check=False,
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
            check=False,
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
        if type(index) is slice:  # has no subclasses
            return [self[number] for number in range(len(self))[index]]
        count = self.counts[index]
        masks = None if self.masks is None else self.masks[index]
        return Target(self.boxes[index, :count], self.labels[index, :count], masks, check=False)

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


AnyDetections = TypeVar("AnyDetections", bound="Detections")


@dataclass(frozen=True, eq=False)
class Detections:
    """The objects detected in one image, highest score first.

    `len(detections)` is the number of objects. `detections[i]`, `detections[:3]`, `detections[detections.labels == 2]`
    and `detections[indices]` are detections of the same type with these objects, and a loop gives them one by one.

    Attributes:
        boxes: (N, 4), x1 y1 x2 y2 in pixels of the image that was searched: for the model the resized one.
        scores: (N,) in [0, 1], highest first.
        labels: (N,) int64, classes from 0.
        masks: (N, 28, 28) in [0, 1], probability that a point of the box is on the object, on a regular grid; None if
            the model predicts boxes only. `detector.ops.paste_masks.paste_masks` draws them into an image.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self: AnyDetections) -> Iterator[AnyDetections]:
        return (self[index] for index in range(len(self)))

    def __getitem__(
        self: AnyDetections, index: SupportsIndex | slice | Tensor | Sequence[int] | Sequence[bool]
    ) -> AnyDetections:
        """Return the objects at an index, in a slice, at several indices (k,), or where a mask (N,) of bool is true.

        Raises:
            IndexError: there are fewer objects.
        """
        chosen = index if isinstance(index, slice) else torch.atleast_1d(torch.as_tensor(index))
        if isinstance(chosen, Tensor) and not chosen.numel() and chosen.dtype != torch.bool:
            chosen = chosen.long()  # an empty list has no type of its own
        return replace(
            self,
            boxes=self.boxes[chosen],
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            masks=None if self.masks is None else self.masks[chosen],
        )


def _check_boxes_and_labels(boxes: Tensor, labels: Tensor) -> None:
    """Raise TypeError or ValueError where boxes or labels are not as `Target` says."""
    for name, tensor in (("boxes", boxes), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes: expected shape (N, 4), got {tuple(boxes.shape)}")
    if not boxes.is_floating_point():
        raise ValueError(f"boxes: expected a floating dtype, got {boxes.dtype}")
    if labels.shape != boxes.shape[:1]:
        raise ValueError(f"labels: expected shape ({len(boxes)},) like boxes, got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected torch.int64, got {labels.dtype}")

    if torch.compiler.is_compiling() or not boxes.device.type == labels.device.type == "cpu":
        return
    # in float32, as the model takes them: there, two numbers of float64 may be one
    for row, (box, label) in enumerate(zip(boxes.float().tolist(), labels.tolist(), strict=True)):
        if label < NO_OBJECT:
            raise ValueError(f"labels[{row}]: expected 0 or more, or {NO_OBJECT} for no object, got {label}")
        x1, y1, x2, y2 = box
        has_area = x1 < x2 and y1 < y2
        if not all(map(isfinite, box)) or not (has_area or label == NO_OBJECT):
            raise ValueError(f"boxes[{row}]: expected finite x1 y1 x2 y2 with x2 > x1 and y2 > y1, got {box}")
