"""Draws detections beside the ground truth: receives rows of COCO's results format, writes PNG files."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from detector import Detections, Target
from detector.draw import draw_comparison
from detector.image import read_image, write_image
from detector.ops.rle import decode_mask
from detector.results import CocoRow
from train.data.coco_dataset import CocoDetection
from train.data.samplers import spread_evenly

MAX_STEM_BYTES = 240  # of the name of a picture; file systems have room for 255
CURVES = "precision-recall"
TRAINING_IMAGES = "training-images"
RESERVED_STEMS = (CURVES, TRAINING_IMAGES)
"""Names of other pictures in the folder, without their suffix."""


def draw_pictures(
    dataset: CocoDetection, rows: Sequence[CocoRow], folder: Path, count: int, min_score: float
) -> Iterator[tuple[Path, np.ndarray]]:
    """Draw `count` images, evenly spaced in the data set; write each picture, then yield its path and pixels.

    Args:
        dataset: images and ground truth, masks too if it has them.
        rows: detections of all images, in COCO's results format.
        folder: for the PNG files, named by the images' files, see `unique_stems`; created if missing.
        count: how many images; all if there are fewer.
        min_score: detections below it are not drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    indices = spread_evenly(len(dataset), count).tolist()
    image_stems = [_stem(str(dataset.file_names[index])) for index in indices]
    stems = unique_stems([*RESERVED_STEMS, *image_stems])[len(RESERVED_STEMS) :]
    for index, stem in zip(indices, stems, strict=True):
        try:
            image = read_image(dataset.image_path(index), dataset.max_pixels)
        except (OSError, ValueError):
            continue  # the evaluation has printed a message about it

        image_id = int(dataset.image_ids[index])
        drawn_rows = [row for row in rows if row["image_id"] == image_id and row["score"] >= min_score]
        detections = _to_detections(drawn_rows, dataset)
        masks = map(decode_mask, [row["segmentation"] for row in drawn_rows if "segmentation" in row])

        boxes, labels = dataset.ground_truth(index)
        target = Target(torch.from_numpy(boxes), torch.from_numpy(labels), check=False)  # also boxes too thin to train
        true_masks = dataset.masks(index)

        picture = draw_comparison(
            image, detections, target, dataset.classes, masks=masks, true_masks=true_masks, min_score=min_score
        )
        path = folder / f"{stem}.png"
        write_image(path, picture)
        yield path, picture


def _stem(file_name: str) -> str:
    """Return the name of a file without folder and suffix, cut so that a number and a suffix have room behind it."""
    return os.fsdecode(os.fsencode(Path(file_name).stem)[:MAX_STEM_BYTES])


def unique_stems(stems: Sequence[str]) -> list[str]:
    """Return names for files without their suffix, no two alike, not even on a file system that ignores upper case.

    The first of several equal stems stays as it is, as one that no other is equal to; the next ones get a number. The
    same stems get the same names in every epoch.
    """
    taken = {stem.casefold() for stem in stems}
    seen: set[str] = set()
    names = []
    for stem in stems:
        name = stem
        if stem.casefold() in seen:
            numbered = (f"{stem}-{number}" for number in itertools.count(2))
            name = next(candidate for candidate in numbered if candidate.casefold() not in taken)
            taken.add(name.casefold())
        seen.add(stem.casefold())
        names.append(name)
    return names


def _to_detections(rows: Sequence[CocoRow], dataset: CocoDetection) -> Detections:
    """Return rows of one image as boxes xyxy, scores and labels from 0."""
    label_of_category = {category_id: label for label, category_id in enumerate(dataset.category_ids.tolist())}
    boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores = torch.tensor([row["score"] for row in rows], dtype=torch.float32)
    labels = torch.tensor([label_of_category[row["category_id"]] for row in rows], dtype=torch.int64)
    return Detections(boxes.float(), scores, labels)
