"""From detections of all processes to COCO's numbers: flat arrays, the results file, pycocotools, tables."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detector import Detections
from detector.ops.rle import encode_mask
from detector.predict import full_masks
from train.data.coco_dataset import CocoDetection
from train.data.segmentation import valid_polygons

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
_STATS = (0, 1, 2, 3, 4, 5, 6)  # where they are among pycocotools' twelve
_SHAPES = {"bbox": "bbox", "segm": "segmentation"}  # what each type of overlap compares
_LIMITS = [100, 300, 1000]  # detections per image that pycocotools counts; AP uses the first


@dataclass(frozen=True)
class CocoDetections:
    """Detections of many images in pixels of the files.

    Attributes:
        image_ids: (N,) int64; an image's detections stand together, best first.
        boxes: (N, 4) float32 xyxy; scores: (N,) float32; labels: (N,) int64 from 0.
        masks: (N,) objects, COCO's compressed run lengths of `detector.ops.rle.encode_mask`; None if the model
            predicts boxes only, or nothing was found.
    """

    image_ids: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None

    @classmethod
    def of(
        cls, detections: Detections, image_id: int, scale: tuple[float, float], size: tuple[int, int]
    ) -> CocoDetections:
        """Take one image's detections back from its resized pixels to those of its file, of `size` (height, width)."""
        boxes = detections.boxes.float().cpu() / torch.tensor(scale * 2)
        scores, labels = detections.scores.float().cpu(), detections.labels.cpu()
        masks = None
        if detections.masks is not None:
            small = Detections(boxes, scores, labels, detections.masks.float().cpu())
            masks = np.empty(len(boxes), object)
            masks[:] = [encode_mask(mask) for mask in full_masks(small, *size)]
        return cls(np.full(len(boxes), image_id), boxes.numpy(), scores.numpy(), labels.numpy(), masks)

    @classmethod
    def join(cls, parts: Sequence[CocoDetections]) -> CocoDetections:
        """Put parts one behind the other."""
        empty = cls(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
        parts = [part for part in parts if len(part.labels)] or [empty]
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(None if column[0] is None else np.concatenate(column) for column in columns))

    def take(self, which: np.ndarray) -> CocoDetections:
        """Return the detections with these numbers, or those where `which` (N,) bool holds."""
        return CocoDetections(*(None if column is None else column[which] for column in vars(self).values()))

    def of_image(self, image_id: int) -> CocoDetections:
        """Return the detections of one image."""
        return self.take(self.image_ids == image_id)


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


def results(found: CocoDetections, category_ids: np.ndarray) -> list[dict]:
    """Return detections as COCO's results format has them: boxes as x, y, width, height; category ids of the file.

    Masks, if there are any, are `segmentation`.
    """
    corner, size = found.boxes[:, :2].astype(float), (found.boxes[:, 2:] - found.boxes[:, :2]).astype(float)
    columns = zip(
        found.image_ids.tolist(),
        category_ids[found.labels].tolist(),
        np.concatenate([corner, size], 1).tolist(),
        found.scores.astype(float).tolist(),
        strict=True,
    )
    rows = [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in columns
    ]
    for row, mask in zip(rows, () if found.masks is None else found.masks, strict=False):
        row["segmentation"] = mask
    return rows


def write_results(path: Path, content: list[dict] | dict) -> None:
    """Write a results file, or one that holds results; it appears under its name only when it is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w") as file:
            file.write(json.dumps(content))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def evaluator_classes(name: str) -> tuple[type, type]:
    """Return the classes COCO and COCOeval of "pycocotools" or "faster", which is faster-coco-eval.

    Raises:
        ValueError: faster-coco-eval is asked for and not installed.
    """
    if name == "pycocotools":
        return COCO, COCOeval
    try:
        package = importlib.import_module("faster_coco_eval")
    except ModuleNotFoundError as error:
        raise ValueError("--evaluator faster needs faster-coco-eval: pip install faster-coco-eval") from error
    return package.COCO, package.COCOeval_faster


def measure(
    rows: list[dict], dataset: CocoDetection, evaluator: str = "pycocotools", iou_type: str = "bbox"
) -> Metrics | None:
    """Compare detections with the ground truth of the data set's images.

    Args:
        rows: `results` of every image.
        dataset: the split they were found in.
        evaluator: see `evaluator_classes`. Matches and scores are the same, precisions to 15 digits: pycocotools adds
            2.2e-16 to what it divides by.
        iou_type: "bbox" compares boxes, "segm" masks, whose areas are then those of the detections.

    Returns:
        None if the split's file has no annotations.

    Source:
        pycocotools' COCOeval with MMDetection's detection limits (100, 300, 1000).
    """
    if not dataset.has_annotations:
        return None
    coco, coco_eval = evaluator_classes(evaluator)
    used = ("image_id", "category_id", "score", _SHAPES[iou_type])
    rows = [{key: row[key] for key in used} for row in rows]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco()
        truth.dataset = json.loads(dataset.annotation_file.read_bytes())
        for number, annotation in enumerate(truth.dataset["annotations"], 1):
            annotation["id"] = number  # some files have none; pycocotools wants each once, and takes 0 for no match
            annotation.setdefault("iscrowd", 0)
            if iou_type == "segm" and isinstance(annotation.get("segmentation"), list):
                annotation["segmentation"] = valid_polygons(annotation["segmentation"])
        truth.createIndex()
        if rows:
            found = truth.loadRes(rows)
        else:  # which loadRes does not take
            found = coco()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        evaluation = coco_eval(truth, found, iou_type)
        evaluation.params.catIds = dataset.category_ids.tolist()
        evaluation.params.imgIds = dataset.image_ids.tolist()
        evaluation.params.maxDets = _LIMITS
        evaluation.evaluate()
        evaluation.accumulate()
        COCOeval.summarize(evaluation)  # the other one would count more than 100 detections into AP
    stats = tuple(float(value) for value in evaluation.stats)
    values = {name: stats[place] for name, place in zip(NAMES, _STATS, strict=True)}
    return Metrics(values, _per_class(evaluation, dataset), stats)


def _per_class(evaluation: Any, dataset: CocoDetection) -> dict[str, tuple[float, float, int]]:
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
