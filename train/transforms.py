"""From a decoded image and its boxes to what the model is given: resize, flip; every choice follows from a key."""

from __future__ import annotations

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
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    image_id: int
    scale: tuple[float, float]
    seed: int


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
    """Mirror image (H, W, 3) and boxes (N, 4) left to right."""
    width = np.float32(image.shape[1])
    mirrored = boxes.copy()
    mirrored[:, 0], mirrored[:, 2] = width - boxes[:, 2], width - boxes[:, 0]
    return cv2.flip(image, 1), mirrored


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
        self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, image_id: int, epoch: int, index: int
    ) -> Sample:
        """Transform an image (H, W, 3) uint8 with boxes (N, 4) float32 xyxy and labels (N,)."""
        random = np.random.default_rng((self.seed, epoch, index))
        mirrored = random.random() < self.flip
        seed = int(random.integers(1 << 62))
        scale = self.scale
        if self.short_sides:
            scale = (max(scale), int(random.choice(self.short_sides)))
        image, boxes, factor = resize(image, boxes, scale)
        if mirrored:
            image, boxes = flip(image, boxes)
        return Sample(image, boxes, labels, image_id, factor, seed)
