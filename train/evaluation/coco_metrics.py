"""Average precision: receives rows of COCO's results format, compares them with the annotations, returns numbers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detector.ops.rle import fill_all, rle_size, rle_to_runs
from detector.results import CocoRow
from detector.text import shown
from train.data.coco_dataset import CocoDetection
from train.evaluation.score_curves import COUNTED_DETECTIONS, ScoreCurves, score_curves

try:
    import faster_coco_eval
except ModuleNotFoundError as error:
    if error.name != "faster_coco_eval":
        raise  # it is installed, but something that it needs is missing
    faster_coco_eval = None

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")  # the first of pycocotools' twelve numbers
DETECTION_LIMITS = [COUNTED_DETECTIONS, 300, 1000]  # per image; AP and AR100 use the first, AP50 to APl the last
ROWS_AT_ONCE = 1000  # whose masks are checked together
_COMPARED_FIELD = {"bbox": "bbox", "segm": "segmentation"}

EVALUATORS: dict[str, tuple[Any, Any]] = {"pycocotools": (COCO, COCOeval)}
"""Name of each installed evaluator -> its classes for annotations and for counting."""

DEFAULT_EVALUATOR = "pycocotools"
if faster_coco_eval is not None:
    EVALUATORS["faster-coco-eval"] = (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster)
    DEFAULT_EVALUATOR = "faster-coco-eval"


def coco_metrics(
    rows: Sequence[CocoRow], dataset: CocoDetection, evaluator: str = DEFAULT_EVALUATOR
) -> tuple[dict[str, Any], dict[str, ScoreCurves]]:
    """Compare detections with the ground truth of a data set.

    Args:
        rows: detections of all images, in COCO's results format.
        dataset: the split they were made for.
        evaluator: a key of `EVALUATORS`.

    Returns:
        The numbers. COCO's by `METRIC_NAMES`, and `classes`: name -> (AP, AP50, ground-truth boxes). At the score
        threshold with the highest F1, see `train.evaluation.score_curves`: `precision`, `recall`, `F1` and that
        `score_threshold` of all classes together, and `classes_F1`: name -> (precision, recall, F1, score threshold).
        -1 stands where there is no ground truth to count, or no threshold. The same for masks, where the data set has
        them, as `segm_AP`, ..., `segm_classes_F1`; then the name of the evaluator as `evaluator`.

        The curves behind these thresholds, by what was compared: "boxes" and "masks".

        Both are empty if the file has no annotations.
    """
    if not dataset.has_annotations:
        return {}, {}

    metrics: dict[str, Any] = {}
    curves: dict[str, ScoreCurves] = {}
    for kind, iou_type, prefix in (("boxes", "bbox", ""), ("masks", "segm", "segm_")):
        if iou_type == "segm" and dataset.segmentations is None:
            continue
        evaluation = run_coco_eval(rows, dataset, iou_type, evaluator)
        curves[kind] = find_score_curves(evaluation, dataset)
        numbers = dict(zip(METRIC_NAMES, evaluation.stats.tolist(), strict=False))
        numbers["classes"] = class_metrics(evaluation, dataset)
        numbers |= threshold_metrics(curves[kind])
        metrics |= {prefix + name: value for name, value in numbers.items()}
    metrics["evaluator"] = evaluator
    return metrics, curves


def run_coco_eval(
    rows: Sequence[CocoRow],
    dataset: CocoDetection,
    iou_type: str = "bbox",
    evaluator: str = DEFAULT_EVALUATOR,
) -> Any:
    """Match detections with the ground truth and summarize.

    The evaluators agree: matches and scores are equal, precisions to 15 digits (pycocotools adds 2.2e-16 to what it
    divides by). They see images and categories as numbers from 1, in the order of the ids in the file: faster-coco-eval
    confuses ids from 2 ** 53 on.

    Args:
        rows: detections of all images, in COCO's results format.
        dataset: the split they were made for, opened for evaluation; it must have annotations.
        iou_type: "bbox" compares boxes, "segm" masks; the areas of detections, for APs to APl, are of the same kind.
        evaluator: a key of `EVALUATORS`.

    Returns:
        The COCOeval object; its `stats` are pycocotools' twelve numbers.

    Raises:
        ValueError: a row is of another image or category, or its numbers are not finite; the data set is for training.

    Source:
        pycocotools' COCOeval with MMDetection's detection limits (100, 300, 1000).
    """
    coco_class, coco_eval_class = EVALUATORS[evaluator]
    compared_rows = _compared_rows(rows, dataset, iou_type)
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = coco_class()
        ground_truth.dataset = _ground_truth(dataset, iou_type)
        ground_truth.createIndex()
        detections = _index_detections(compared_rows, ground_truth, coco_class)

        evaluation = coco_eval_class(ground_truth, detections, iou_type)
        evaluation.params.catIds = numbers_from_one(dataset.category_ids).tolist()
        evaluation.params.imgIds = numbers_from_one(dataset.image_ids).tolist()
        evaluation.params.maxDets = DETECTION_LIMITS
        evaluation.evaluate()
        evaluation.accumulate()
        COCOeval.summarize(evaluation)  # faster-coco-eval's own would count more than 100 detections into AP
    return evaluation


def class_metrics(evaluation: Any, dataset: CocoDetection) -> dict[str, tuple[float, float, int]]:
    """Return name -> (AP, AP50, ground-truth boxes) of every class from a finished COCOeval."""
    # (IoU thresholds, recalls, classes, areas, limits): of all areas, with 100 detections
    precision = evaluation.eval["precision"][:, :, :, 0, 0]
    columns = numbers_from_one(dataset.category_ids) - 1
    box_counts = np.bincount(dataset.labels, minlength=len(dataset.classes))

    table = {}
    for label, name in enumerate(dataset.classes):
        precision_of_class = precision[:, :, columns[label]]
        ap = _mean_of_counted(precision_of_class)
        ap50 = _mean_of_counted(precision_of_class[0])
        table[name] = (ap, ap50, int(box_counts[label]))
    return table


def threshold_metrics(curves: ScoreCurves) -> dict[str, Any]:
    """Return `precision`, `recall`, `F1`, `score_threshold` and `classes_F1` as `coco_metrics` does."""
    best = curves.together.best
    return {
        "precision": best.precision,
        "recall": best.recall,
        "F1": best.f1,
        "score_threshold": best.score,
        "classes_F1": {name: astuple(curve.best) for name, curve in curves.of_classes.items()},
    }


def numbers_from_one(ids: np.ndarray) -> np.ndarray:
    """Return (N,) int64, the place of each of the ids (N,) in ascending order, from 1."""
    return np.searchsorted(np.unique(ids), ids) + 1


def find_score_curves(evaluation: Any, dataset: CocoDetection) -> ScoreCurves:
    """Return the curves of a finished COCOeval.

    faster-coco-eval keeps its matches to itself, so pycocotools makes them again, for one IoU and all areas.
    """
    if not isinstance(evaluation, COCOeval):
        matched = COCOeval(evaluation.cocoGt, evaluation.cocoDt, evaluation.params.iouType)
        matched.params.catIds = evaluation.params.catIds
        matched.params.imgIds = evaluation.params.imgIds
        matched.params.maxDets = [COUNTED_DETECTIONS]
        matched.params.iouThrs = evaluation.params.iouThrs[:1]
        matched.params.areaRng = evaluation.params.areaRng[:1]
        with contextlib.redirect_stdout(io.StringIO()):
            matched.evaluate()
        evaluation = matched
    columns = (numbers_from_one(dataset.category_ids) - 1).tolist()
    return score_curves(evaluation, dict(zip(dataset.classes, columns, strict=True)))


def _ground_truth(dataset: CocoDetection, iou_type: str) -> dict[str, Any]:
    """Return the annotations of a data set as the evaluators want them, with `numbers_from_one` for ids."""
    annotations = dataset.all_annotations
    if annotations is None:
        raise ValueError("dataset: expected one that was opened for evaluation (training=False), got one for training")

    image_numbers = numbers_from_one(dataset.image_ids)
    category_numbers = numbers_from_one(dataset.category_ids)
    image_fields = zip(image_numbers.tolist(), dataset.heights.tolist(), dataset.widths.tolist(), strict=True)
    annotation_fields = zip(
        image_numbers[annotations.image_indices].tolist(),
        category_numbers[annotations.labels].tolist(),
        annotations.boxes.tolist(),
        annotations.areas.tolist(),
        annotations.is_crowd.astype(int).tolist(),
        strict=True,
    )
    entries: list[dict[str, Any]] = []
    for image_id, category_id, bbox, area, iscrowd in annotation_fields:
        number = len(entries) + 1  # the evaluators take 0 for "no match"
        entry = {"id": number, "image_id": image_id, "category_id": category_id}
        entries.append({**entry, "bbox": bbox, "area": area, "iscrowd": iscrowd})

    if iou_type == "segm":
        segmentations = dataset.all_segmentations
        if segmentations is None:
            raise ValueError("dataset: expected one that was opened with masks, got one without")
        for row, entry in enumerate(entries):
            index = annotations.image_indices[row]
            entry["segmentation"] = segmentations.to_coco(row, int(dataset.heights[index]), int(dataset.widths[index]))

    return {
        "info": {},  # pycocotools 2.0.9 and 2.0.10 do not work without
        "images": [{"id": number, "height": height, "width": width} for number, height, width in image_fields],
        "categories": [{"id": number} for number in category_numbers.tolist()],
        "annotations": entries,
    }


def _compared_rows(rows: Sequence[CocoRow], dataset: CocoDetection, iou_type: str) -> list[CocoRow]:
    """Return copies of the rows with the compared field alone, and with `numbers_from_one` for ids.

    loadRes changes its rows, and would take boxes where masks are compared.
    """
    field = _COMPARED_FIELD[iou_type]
    image_ids = dataset.image_ids.tolist()
    category_ids = dataset.category_ids.tolist()
    image_numbers = dict(zip(image_ids, numbers_from_one(dataset.image_ids).tolist(), strict=True))
    category_numbers = dict(zip(category_ids, numbers_from_one(dataset.category_ids).tolist(), strict=True))

    compared = []
    for index, row in enumerate(rows):
        image_id = image_numbers.get(row["image_id"])
        category_id = category_numbers.get(row["category_id"])
        if image_id is None or category_id is None:
            found = f"image {shown(row['image_id'])} and category {shown(row['category_id'])}"
            raise ValueError(f"rows[{index}]: expected an image and a category of the data set, got {found}")
        if not np.isfinite([row["score"], *row.get("bbox", ())]).all():
            found = f"score {row['score']}, bbox {shown(row.get('bbox'))}"
            raise ValueError(f"rows[{index}]: expected finite numbers, got {found}")
        compared.append({"image_id": image_id, "category_id": category_id, "score": row["score"], field: row[field]})
    if iou_type == "segm":
        sizes = dict(zip(image_ids, zip(dataset.heights.tolist(), dataset.widths.tolist(), strict=True), strict=True))
        for start in range(0, len(rows), ROWS_AT_ONCE):
            _check_masks(rows[start : start + ROWS_AT_ONCE], start, sizes)
    return compared


def _check_masks(rows: Sequence[CocoRow], start: int, sizes: dict[int, tuple[int, int]]) -> None:
    """Check the masks of detections: with a malformed one pycocotools reads and writes beyond its memory.

    Args:
        rows: the detections.
        start: number of the first one, for messages.
        sizes: image id -> height and width.

    Raises:
        ValueError: a mask has another size than its image, or not the compressed run lengths of such a mask.
    """
    texts = []
    pixels = []
    for index, row in enumerate(rows, start=start):
        rle = row["segmentation"]
        height, width = sizes[row["image_id"]]
        try:
            if rle_size(rle) != (height, width):
                raise ValueError(f"expected the size of its image, {height} x {width}, got {shown(rle['size'])}")
            if not isinstance(rle.get("counts"), (str, bytes)):
                raise ValueError(f"expected compressed run lengths, got {shown(rle.get('counts'))}")
        except ValueError as error:
            raise ValueError(f"rows[{index}]: 'segmentation': {error}") from error
        texts.append(rle["counts"])
        pixels.append(height * width)

    if not fill_all(texts, np.array(pixels)):
        for index, row in enumerate(rows, start=start):
            try:
                rle_to_runs(row["segmentation"])
            except ValueError as error:
                raise ValueError(f"rows[{index}]: 'segmentation': {error}") from error


def _index_detections(rows: list[CocoRow], ground_truth: Any, coco_class: Any) -> Any:
    """Return the detections as an object of `coco_class`, the evaluator's class for annotations."""
    if not rows:  # loadRes does not take an empty list
        detections = coco_class()
        detections.dataset = {**ground_truth.dataset, "annotations": []}
        detections.createIndex()
        return detections
    return ground_truth.loadRes(rows)


def _mean_of_counted(values: np.ndarray) -> float:
    """Return the mean of the values without those that are -1; -1 if no value is left."""
    counted = values[values > -1]
    if not counted.size:
        return -1.0
    return float(counted.mean())
