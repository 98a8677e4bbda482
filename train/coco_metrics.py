"""From detections of all processes to COCO's numbers: flat arrays, the results file, pycocotools, tables."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detector import Detections
from train.coco_data import CocoDetection

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
_STATS = (0, 1, 2, 3, 4, 5, 6)  # where they are among pycocotools' twelve
_LIMITS = [100, 300, 1000]  # detections per image that pycocotools counts; AP uses the first


@dataclass(frozen=True)
class Found:
    """Detections of many images in pixels of the files.

    Attributes:
        image_ids: (N,) int64; an image's detections stand together, best first.
        boxes: (N, 4) float32 xyxy; scores: (N,) float32; labels: (N,) int64 from 0.
    """

    image_ids: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, detections: Detections, image_id: int, scale: tuple[float, float]) -> Found:
        """Take one image's detections back from its resized pixels to those of its file."""
        boxes = detections.boxes.float().cpu().numpy() / np.array(scale * 2, np.float32)
        labels = detections.labels.cpu().numpy()
        return cls(np.full(len(boxes), image_id), boxes, detections.scores.float().cpu().numpy(), labels)

    @classmethod
    def join(cls, parts: Sequence[Found]) -> Found:
        """Put parts one behind the other."""
        empty = cls(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
        columns = zip(*(vars(part).values() for part in (empty, *parts)), strict=True)
        return cls(*(np.concatenate(column) for column in columns))

    def of_image(self, image_id: int) -> Found:
        """Return the detections of one image."""
        mine = self.image_ids == image_id
        return Found(*(column[mine] for column in vars(self).values()))


@dataclass(frozen=True)
class Metrics:
    """COCO's numbers; -1 where there is no ground truth to count.

    Attributes:
        values: by the names in `NAMES`.
        per_class: class -> (AP, AP50, ground-truth boxes).
        stats: pycocotools' twelve.
    """

    values: dict[str, float]
    per_class: dict[str, tuple[float, float, int]]
    stats: tuple[float, ...]


def results(found: Found, category_ids: np.ndarray) -> list[dict]:
    """Return detections as COCO's results format has them: boxes as x, y, width, height; category ids of the file."""
    corner, size = found.boxes[:, :2].astype(float), (found.boxes[:, 2:] - found.boxes[:, :2]).astype(float)
    rows = zip(
        found.image_ids.tolist(),
        category_ids[found.labels].tolist(),
        np.concatenate([corner, size], 1).tolist(),
        found.scores.astype(float).tolist(),
        strict=True,
    )
    return [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in rows
    ]


def write_results(path: Path, rows: list[dict]) -> None:
    """Write a results file; it appears under its name only when it is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(rows))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def measure(rows: list[dict], dataset: CocoDetection) -> Metrics | None:
    """Compare detections with the ground truth of the data set's images.

    Args:
        rows: `results` of every image.
        dataset: the split they were found in.

    Returns:
        None if the split's file has no annotations.

    Source:
        pycocotools' COCOeval with MMDetection's detection limits (100, 300, 1000).
    """
    if not dataset.annotated:
        return None
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(dataset.annotations.read_bytes())
        for number, annotation in enumerate(truth.dataset["annotations"], 1):
            annotation["id"] = number  # some files have none; pycocotools wants each once, and takes 0 for no match
            annotation.setdefault("iscrowd", 0)
        truth.createIndex()
        if rows:
            found = truth.loadRes(rows)
        else:  # which loadRes does not take
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.catIds = dataset.category_ids.tolist()
        evaluation.params.imgIds = dataset.image_ids.tolist()
        evaluation.params.maxDets = _LIMITS
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = tuple(float(value) for value in evaluation.stats)
    values = {name: stats[place] for name, place in zip(NAMES, _STATS, strict=True)}
    return Metrics(values, _per_class(evaluation, dataset), stats)


def _per_class(evaluation: COCOeval, dataset: CocoDetection) -> dict[str, tuple[float, float, int]]:
    # (IoU thresholds, recalls, classes, areas, limits): all areas, 100 detections; pycocotools sorts the category ids
    precision = evaluation.eval["precision"][:, :, :, 0, 0]
    place = {category: index for index, category in enumerate(evaluation.params.catIds)}
    counts = np.bincount(dataset.labels, minlength=len(dataset.classes))
    table = {}
    for label, (name, category) in enumerate(zip(dataset.classes, dataset.category_ids.tolist(), strict=True)):
        mine = precision[:, :, place[category]]
        table[name] = _mean(mine), _mean(mine[0]), int(counts[label])
    return table


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0
