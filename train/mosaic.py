"""A picture of the first training images as the model gets them, with their boxes, to look at before the training."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch

from detector.draw import class_color, draw_boxes
from detector.picture import font_scale, legend, pad, side_by_side
from detector.text import short_name
from train.data.coco_dataset import CocoDetection, UnreadableImageError
from train.data.samplers import ImageKey
from train.data.transforms import Sample

COLUMNS = 4
TILE_SIDE = 480  # pixels of the long side of an image


def draw_training_images(dataset: CocoDetection, keys: Sequence[ImageKey]) -> np.ndarray | None:
    """Draw images side by side after resizing and mirroring, with boxes, names of classes, and masks if there are any.

    Nothing random is drawn from any generator of the run: how an image looks depends on its key alone.

    Args:
        dataset: opened for training.
        keys: (epoch, index) of each image. One that cannot be read is left out: the training tells about it.

    Returns:
        (H, W, 3) uint8, RGB; None where no image can be read.
    """
    tiles = []
    titles = []
    labels: set[int] = set()
    for key in keys:
        try:
            sample = dataset[key]
        except UnreadableImageError:
            continue
        tiles.append(_draw_sample(sample, dataset.classes))
        height, width = sample.image.shape[:2]
        titles.append(f"image {sample.image_id}, {width} x {height}")
        labels.update(sample.labels.tolist())
    if not tiles:
        return None

    columns = min(COLUMNS, len(tiles))
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    tiles = [pad(tile, height, width) for tile in tiles]
    while len(tiles) % columns:
        tiles.append(pad(tiles[0][:0, :0], height, width))
        titles.append("")
    rows = [
        side_by_side(tiles[start : start + columns], titles[start : start + columns])
        for start in range(0, len(tiles), columns)
    ]
    entries = [(short_name(dataset.classes[label]), class_color(label)) for label in sorted(labels)]
    picture = np.vstack(rows)
    return np.vstack([picture, legend(entries, picture.shape[1], font_scale(tiles[0]))])


def _draw_sample(sample: Sample, classes: Sequence[str]) -> np.ndarray:
    """Draw an image at the size of a tile."""
    height, width = sample.image.shape[:2]
    factor = TILE_SIDE / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    image = cv2.resize(sample.image, size, interpolation=cv2.INTER_CUBIC if factor > 1 else cv2.INTER_AREA)
    masks = () if sample.masks is None else sample.masks
    return draw_boxes(
        image,
        torch.from_numpy(sample.boxes) * factor,
        torch.from_numpy(sample.labels),
        classes,
        masks=[cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST).astype(bool) for mask in masks],
    )
