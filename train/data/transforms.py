"""From an image, its boxes and masks to what the model is given: resize, flip; every choice follows from a key."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np

from detector.image import resize_keep_ratio


@dataclass(frozen=True)
class Sample:
    """One image on its way to a batch.

    Attributes:
        image: (H, W, 3) uint8 RGB, contiguous.
        boxes: (N, 4) float32, xyxy in pixels of `image`; boxes that the clipping left empty are still there.
        labels: (N,) int64 from 0.
        image_id: of the annotation file.
        scale: (x, y), size of `image` over size of the file.
        seed: of the samplers inside the model.
        size: height and width of the file's image.
        masks: (N, H, W) uint8, 1 inside the object; None if they were not asked for.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    image_id: int
    scale: tuple[float, float]
    seed: int
    size: tuple[int, int]
    masks: np.ndarray | None = None


def resize(image: np.ndarray, boxes: np.ndarray, scale: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, tuple]:
    """Resize to fit `scale`, ratio kept, and clip the boxes to the image.

    Args:
        image: (H, W, 3) uint8.
        boxes: (N, 4) float32 xyxy.
        scale: bounds of the long and the short side.

    Returns:
        image, boxes and the factors (x, y).
    """
    image, factor = resize_keep_ratio(image, scale)
    height, width = image.shape[:2]
    boxes = boxes * np.array(factor * 2, np.float32)
    return image, np.clip(boxes, 0, np.array([width, height] * 2, np.float32)), factor


def flip(image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mirror image (H, W, 3), in place, and boxes (N, 4) left to right."""
    width = np.float32(image.shape[1])
    mirrored = boxes.copy()
    mirrored[:, 0], mirrored[:, 2] = width - boxes[:, 2], width - boxes[:, 0]
    return cv2.flip(image, 1, image), mirrored


def resize_masks(masks: Iterable[np.ndarray], count: int, size: tuple[int, int]) -> np.ndarray:
    """Resize masks to those of a resized image, each pixel that of the nearest one.

    Args:
        masks: `count` of (H, W) uint8; one at a time, because many masks of a large file would fill the memory.
        count: of masks.
        size: height and width of the result.

    Returns:
        (count, *size) uint8.

    Source:
        MMDetection's BitmapMasks.rescale.
    """
    resized = np.empty((count, *size), np.uint8)
    for into, mask in zip(resized, masks, strict=True):
        into[:] = mask if mask.shape == size else cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)
    return resized


@dataclass(frozen=True)
class Transform:
    """Resize and, in training, mirror.

    Every random choice is a function of (seed, epoch, index of the image) alone, so neither the number of processes and
    workers nor an interruption can change it.

    Attributes:
        scale: bounds of the long and the short side.
        flip: probability of mirroring; 0 in evaluation.
        seed: of the run.
        short_sides: if any, the bound of the short side is drawn from these.
    """

    scale: tuple[int, int]
    flip: float = 0.0
    seed: int = 0
    short_sides: tuple[int, ...] = ()

    def __call__(
        self,
        image: np.ndarray,
        boxes: np.ndarray,
        labels: np.ndarray,
        image_id: int,
        epoch: int,
        index: int,
        masks: Iterable[np.ndarray] | None = None,
    ) -> Sample:
        """Transform an image (H, W, 3) uint8 with boxes (N, 4) float32 xyxy, labels (N,) and N masks (H, W) uint8.

        The image may be overwritten.
        """
        random = np.random.default_rng((self.seed, epoch, index))
        mirrored = random.random() < self.flip
        seed = int(random.integers(1 << 62))
        scale = self.scale
        if self.short_sides:
            scale = (max(scale), int(random.choice(self.short_sides)))
        size = image.shape[:2]
        image, boxes, factor = resize(image, boxes, scale)
        if masks is not None:
            masks = resize_masks(masks, len(labels), image.shape[:2])
        if mirrored:
            image, boxes = flip(image, boxes)
            masks = masks if masks is None else np.ascontiguousarray(masks[:, :, ::-1])
        return Sample(image, boxes, labels, image_id, factor, seed, size, masks)
