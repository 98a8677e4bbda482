"""Detections beside the ground truth, for eyes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from detector import Detections, Target
from detector.draw import draw_comparison
from detector.image import read_image, write_image
from detector.ops.rle import decode_mask
from train.data.coco_dataset import CocoDetection
from train.evaluation.coco_metrics import CocoDetections

SCORE = 0.3  # detections below are not drawn


def draw_pictures(
    dataset: CocoDetection, found: CocoDetections, folder: Path, count: int
) -> Iterator[tuple[Path, np.ndarray]]:
    """Draw `count` images spread evenly over a data set, write them and yield path and picture.

    Args:
        dataset: images and ground truth, masks too if it has them.
        found: detections in pixels of the files.
        folder: for the PNG files, named by the images' files; made if missing.
        count: images, or all there are if fewer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index in np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)):
        try:
            image = read_image(dataset.image_path(index))
        except (OSError, ValueError):
            continue  # the evaluation has named it
        mine = found.of_image(dataset.image_ids[index])
        mine = mine.take(mine.scores >= SCORE)
        detections = Detections(*(torch.from_numpy(column) for column in (mine.boxes, mine.scores, mine.labels)))
        target = Target(*(torch.from_numpy(column) for column in dataset.ground_truth(index)))
        masks = () if mine.masks is None else map(decode_mask, mine.masks)
        true_masks = dataset.masks(index)
        picture = draw_comparison(image, detections, target, dataset.classes, masks=masks, true_masks=true_masks)
        path = folder / f"{Path(str(dataset.file_names[index])).stem}.png"
        write_image(path, picture)
        yield path, picture
