"""Resizes and flips an image with its boxes and masks; receives what a data set has read, returns a `Sample`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import cv2
import numpy as np

from detector.image import resize_keep_ratio

SMALLEST_SIDE = np.finfo(np.float32).tiny  # of a box, in pixels; GPUs may take smaller numbers for 0


@dataclass(frozen=True)
class Sample:
    """One image on its way to a batch.

    Attributes:
        image: (H, W, 3) uint8 RGB, contiguous.
        boxes: (N, 4) float32, xyxy in pixels of `image`; each has an area.
        labels: (N,) int64 from 0.
        image_id: id in the annotation file.
        scale_factor: (x, y), size of `image` divided by the size in the file.
        seed: of the box samplers inside the model.
        original_size: height and width of the file's image.
        masks: (N, H, W) uint8, 1 inside the object; None if they were not asked for.
        lost_boxes: (K, 4) float32, xyxy in pixels of the file: those of which nothing is left inside the image.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    image_id: int
    scale_factor: tuple[float, float]
    seed: int
    original_size: tuple[int, int]
    masks: np.ndarray | None = None
    lost_boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))


def resize(
    image: np.ndarray, boxes: np.ndarray, scale: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Resize to fit `scale`, ratio kept, and clip the boxes to the image.

    Args:
        image: (H, W, 3) uint8.
        boxes: (N, 4) float32 xyxy.
        scale: bounds of the long and the short side.

    Returns:
        image, boxes and the factors (x, y).
    """
    image, scale_factor = resize_keep_ratio(image, scale)
    height, width = image.shape[:2]
    boxes = boxes * np.array(scale_factor * 2, np.float32)
    upper_bound = np.array([width, height, width, height], np.float32)
    return image, np.clip(boxes, 0, upper_bound), scale_factor


def horizontal_flip(image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mirror image (H, W, 3), in place, and boxes (N, 4) left to right."""
    width = np.float32(image.shape[1])
    flipped_boxes = boxes.copy()
    flipped_boxes[:, 0] = width - boxes[:, 2]
    flipped_boxes[:, 2] = width - boxes[:, 0]
    return cv2.flip(image, 1, image), flipped_boxes


def resize_masks(masks: Iterable[np.ndarray], count: int, size: tuple[int, int]) -> np.ndarray:
    """Resize masks to the size of a resized image; each pixel takes the value of the nearest one.

    Args:
        masks: (H, W) uint8 each; drawn one at a time, because all masks of a large image would need too much memory.
        count: number of masks.
        size: height and width of the result.

    Returns:
        (count, *size) uint8.

    Source:
        MMDetection's BitmapMasks.rescale.
    """
    height, width = size
    resized_masks = np.empty((count, height, width), np.uint8)
    for resized, mask in zip(resized_masks, masks, strict=True):
        if mask.shape == size:
            resized[:] = mask
        else:
            resized[:] = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
    return resized_masks


@dataclass(frozen=True)
class Transform:
    """Resize and, in training, mirror.

    Every random choice depends only on the seed, the epoch and the index of the image, so it stays the same with any
    number of processes and workers, and after an interruption.

    Attributes:
        scale: bounds of the long and the short side.
        flip: probability of mirroring; 0 in evaluation.
        seed: of the run.
        short_sides: if not empty, the bound of the short side is drawn from these for every image.
        half_size_epochs: the first epochs, so many, see the images at half the size.
    """

    scale: tuple[int, int]
    flip: float = 0.0
    seed: int = 0
    short_sides: tuple[int, ...] = ()
    half_size_epochs: int = 0

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

        Boxes of which nothing is left after resizing, clipping and mirroring are dropped with their labels and masks.
        They are judged here, in the arithmetic that the model gets them from: a box that begins at 159.999999 in an
        image of 160 pixels begins at 160 in float32. The image may be overwritten.
        """
        file_boxes = boxes
        # The order of the draws is fixed: another order would change the samples of a seed.
        random = np.random.default_rng((self.seed, epoch, index))
        is_flipped = random.random() < self.flip
        seed = int(random.integers(1 << 62))
        scale = self.scale
        if self.short_sides:
            scale = (max(scale), int(random.choice(self.short_sides)))
        if epoch < self.half_size_epochs:
            scale = (max(scale[0] // 2, 1), max(scale[1] // 2, 1))

        original_height, original_width = image.shape[:2]
        image, boxes, scale_factor = resize(image, boxes, scale)
        height, width = image.shape[:2]
        resized_masks = None
        if masks is not None:
            resized_masks = resize_masks(masks, len(labels), (height, width))

        if is_flipped:
            image, boxes = horizontal_flip(image, boxes)
            if resized_masks is not None:
                resized_masks = np.ascontiguousarray(resized_masks[:, :, ::-1])

        is_left = (boxes[:, 2:] - boxes[:, :2] >= SMALLEST_SIDE).all(1)
        if resized_masks is not None and not is_left.all():
            resized_masks = resized_masks[is_left]
        return Sample(
            image=image,
            boxes=boxes[is_left],
            labels=labels[is_left],
            image_id=image_id,
            scale_factor=scale_factor,
            seed=seed,
            original_size=(original_height, original_width),
            masks=resized_masks,
            lost_boxes=file_boxes[~is_left],
        )
