"""The types that travel through the detector: plain dataclasses, tensors inside, no behavior beyond moving them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """Ground truth of one image.

    Attributes:
        boxes: (N, 4) float32, x1 y1 x2 y2 in pixels of the resized image; N may be 0.
        labels: (N,) int64, classes from 0.
        masks: (N, H, W) uint8 or bool, not 0 inside the object; H, W is the size of the resized image, padded or not.
            None where the model predicts boxes only.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        """Return the target on `device`."""
        move = {"device": device, "non_blocking": non_blocking}
        return Target(
            self.boxes.to(**move), self.labels.to(**move), None if self.masks is None else self.masks.to(**move)
        )

    def pin_memory(self) -> Target:
        """Return the target in page-locked memory."""
        return Target(
            self.boxes.pin_memory(),
            self.labels.pin_memory(),
            None if self.masks is None else self.masks.pin_memory(),
        )


@dataclass(frozen=True)
class Batch:
    """Images of one step, padded to a common size.

    Attributes:
        images: (B, 3, Hp, Wp) uint8 RGB; every row and column outside an image's own size is padding of any value.
        sizes: (B, 2) int64, height and width of each image before padding.
        targets: one `Target` per image, or None when there is no ground truth.
        seeds: (B,) int64 or None. Seeds of the random samplers, one per image: equal seeds give equal samples whatever
            images are beside it, at the same padded size. None draws them from torch's global generator.
    """

    images: Tensor
    sizes: Tensor
    targets: Sequence[Target] | None = None
    seeds: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch on `device`."""
        move = {"device": device, "non_blocking": non_blocking}
        return Batch(
            self.images.to(**move),
            self.sizes.to(**move),
            None if self.targets is None else [target.to(**move) for target in self.targets],
            None if self.seeds is None else self.seeds.to(**move),
        )

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, so that `to(..., non_blocking=True)` does not wait."""
        return Batch(
            self.images.pin_memory(),
            self.sizes.pin_memory(),
            None if self.targets is None else [target.pin_memory() for target in self.targets],
            None if self.seeds is None else self.seeds.pin_memory(),
        )


@dataclass(frozen=True)
class Detections:
    """What the detector found in one image, best first.

    Attributes:
        boxes: (N, 4), x1 y1 x2 y2 in pixels of the resized image.
        scores: (N,) in [0, 1], falling.
        labels: (N,) int64, classes from 0.
        masks: (N, 28, 28) in [0, 1], how likely each cell of the box belongs to the object; None if the model predicts
            boxes only. `detector.model.mask_head.paste_masks` draws them into an image.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
