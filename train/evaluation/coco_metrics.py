"""Average precision: receives rows of COCO's results format, compares them with the annotations, returns numbers."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detector.results import CocoRow
from train.data.coco_dataset import CocoDetection
from train.data.segmentation import valid_polygons

try:
    import faster_coco_eval
except ModuleNotFoundError as error:
    if error.name != "faster_coco_eval":
        raise  # it is installed, but something that it needs is missing
    faster_coco_eval = None

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")  # the first of pycocotools' twelve numbers
DETECTION_LIMITS = [100, 300, 1000]  # per image; AP and AR100 use the first, AP50 to APl the last
_COMPARED_FIELD = {"bbox": "bbox", "segm": "segmentation"}

EVALUATORS: dict[str, tuple[Any, Any]] = {"pycocotools": (COCO, COCOeval)}
"""Name of each installed evaluator -> its classes for annotations and for counting."""

DEFAULT_EVALUATOR = "pycocotools"
if faster_coco_eval is not None:
    EVALUATORS["faster-coco-eval"] = (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster)
    DEFAULT_EVALUATOR = "faster-coco-eval"


def coco_metrics(rows: Sequence[CocoRow], dataset: CocoDetection, evaluator: str = DEFAULT_EVALUATOR) -> dict[str, Any]:
    """Compare detections with the ground truth of a data set.

    Args:
        rows: detections of all images, in COCO's results format.
        dataset: the split they were made for.
        evaluator: a key of `EVALUATORS`.

    Returns:
        COCO's numbers by `METRIC_NAMES`, and `classes`: name -> (AP, AP50, ground-truth boxes); -1 where there is no
        ground truth to count. The same for masks, where the data set has them, as `segm_AP`, ..., `segm_classes`; then
        the name of the evaluator as `evaluator`. An empty dict if the file has no annotations.
    """
    if not dataset.has_annotations:
        return {}

    metrics: dict[str, Any] = {}
    evaluation = run_coco_eval(rows, dataset, "bbox", evaluator)
    metrics |= dict(zip(METRIC_NAMES, evaluation.stats.tolist(), strict=False))
    metrics["classes"] = class_metrics(evaluation, dataset)

    if dataset.segmentations is not None:
        evaluation = run_coco_eval(rows, dataset, "segm", evaluator)
        for name, value in zip(METRIC_NAMES, evaluation.stats.tolist(), strict=False):
            metrics[f"segm_{name}"] = value
        metrics["segm_classes"] = class_metrics(evaluation, dataset)

    metrics["evaluator"] = evaluator
    return metrics


def run_coco_eval(
    rows: Sequence[CocoRow],
    dataset: CocoDetection,
    iou_type: str = "bbox",
    evaluator: str = DEFAULT_EVALUATOR,
) -> Any:
    """Match detections with the ground truth and summarize.

    The evaluators agree: matches and scores are equal, precisions to 15 digits (pycocotools adds 2.2e-16 to what it
    divides by).

    Args:
        rows: detections of all images, in COCO's results format.
        dataset: the split they were made for; it must have annotations.
        iou_type: "bbox" compares boxes, "segm" masks; the areas of detections, for APs to APl, are of the same kind.
        evaluator: a key of `EVALUATORS`.

    Returns:
        The COCOeval object; its `stats` are pycocotools' twelve numbers.

    Source:
        pycocotools' COCOeval with MMDetection's detection limits (100, 300, 1000).
    """
    coco_class, coco_eval_class = EVALUATORS[evaluator]
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = coco_class()
        ground_truth.dataset = _read_annotations(dataset, iou_type)
        ground_truth.createIndex()
        detections = _index_detections(rows, ground_truth, coco_class, iou_type)

        evaluation = coco_eval_class(ground_truth, detections, iou_type)
        evaluation.params.catIds = dataset.category_ids.tolist()
        evaluation.params.imgIds = dataset.image_ids.tolist()
        evaluation.params.maxDets = DETECTION_LIMITS
        evaluation.evaluate()
        evaluation.accumulate()
        COCOeval.summarize(evaluation)  # faster-coco-eval's own would count more than 100 detections into AP
    return evaluation


def class_metrics(evaluation: Any, dataset: CocoDetection) -> dict[str, tuple[float, float, int]]:
    """Return name -> (AP, AP50, ground-truth boxes) of every class from a finished COCOeval."""
    # (IoU thresholds, recalls, classes, areas, limits): of all areas, with 100 detections
    precision = evaluation.eval["precision"][:, :, :, 0, 0]
    column_of_category = {category_id: column for column, category_id in enumerate(evaluation.params.catIds)}
    box_counts = np.bincount(dataset.labels, minlength=len(dataset.classes))

    table = {}
    for label, name in enumerate(dataset.classes):
        category_id = int(dataset.category_ids[label])
        precision_of_class = precision[:, :, column_of_category[category_id]]
        ap = _mean_of_counted(precision_of_class)
        ap50 = _mean_of_counted(precision_of_class[0])
        table[name] = (ap, ap50, int(box_counts[label]))
    return table


def _read_annotations(dataset: CocoDetection, iou_type: str) -> dict[str, Any]:
    """Return the content of the annotation file as the evaluators need it."""
    content: dict[str, Any] = json.loads(dataset.annotation_file.read_bytes())
    for number, annotation in enumerate(content["annotations"], start=1):
        # Some files have no ids. The evaluators need unique ones, and take 0 for "no match".
        annotation["id"] = number
        annotation.setdefault("iscrowd", 0)
        if iou_type == "segm" and isinstance(annotation.get("segmentation"), list):
            annotation["segmentation"] = valid_polygons(annotation["segmentation"])
    return content


def _index_detections(rows: Sequence[CocoRow], ground_truth: Any, coco_class: Any, iou_type: str) -> Any:
    """Return the detections as an object of `coco_class`, the evaluator's class for annotations."""
    if not rows:  # loadRes does not take an empty list
        detections = coco_class()
        detections.dataset = {**ground_truth.dataset, "annotations": []}
        detections.createIndex()
        return detections

    # Copies with the compared field alone: loadRes changes the rows, and would take boxes where masks are compared.
    used_fields = ("image_id", "category_id", "score", _COMPARED_FIELD[iou_type])
    return ground_truth.loadRes([{field: row[field] for field in used_fields} for row in rows])


def _mean_of_counted(values: np.ndarray) -> float:
    """Return the mean of the values without those that are -1; -1 if no value is left."""
    counted = values[values > -1]
    if not counted.size:
        return -1.0
    return float(counted.mean())
