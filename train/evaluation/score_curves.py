"""Precision, recall and F1 as functions of the score from which on detections count: receives COCO's matches.

At an IoU of 0.5, with COCO's matches: in each image the detections of a class are taken by descending score, and each
gets the free ground truth with which it overlaps most. Those that get a crowd count neither as right nor as wrong, and
crowds need not be found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

COUNTED_DETECTIONS = 100  # of an image and a class, those with the highest scores, as in AP


@dataclass(frozen=True)
class BestF1:
    """The score threshold with the highest F1, and what it gives; of several, the highest one.

    Attributes:
        precision: right detections / detections; 0 where no detection is right, -1 where there is no ground truth.
        recall: right detections / boxes; likewise.
        f1: their harmonic mean; likewise.
        score: detections with this score or more count; -1 where no detection is right.
    """

    precision: float
    recall: float
    f1: float
    score: float


def format_best(best: BestF1) -> str:
    """Return "F1 at score" with the score rounded down, so that the detection with this score counts, too."""
    if best.score < 0:
        return "-" if best.f1 < 0 else f"{best.f1:.3f}"
    return f"{best.f1:.3f} at {math.floor(100 * best.score) / 100:.2f}"


@dataclass(frozen=True)
class ScoreCurve:
    """What of the detections with a score or more is right.

    Attributes:
        scores: (n,) float64, those of the detections, each once, highest first.
        precision: (n,) right detections / detections.
        recall: (n,) right detections / boxes.
        f1: (n,) harmonic mean of both.
        boxes: of the ground truth, without crowds; without any, the arrays are empty.
    """

    scores: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    boxes: int

    @classmethod
    def of(cls, scores: np.ndarray, is_right: np.ndarray, boxes: int) -> ScoreCurve:
        """Make the curve of detections with `scores` (n,), of which some are right (n,) bool."""
        if not boxes:
            scores = scores[:0]
            is_right = is_right[:0]
        order = np.argsort(-scores, kind="stable")
        sorted_scores = scores[order].astype(np.float64)
        is_last = np.diff(sorted_scores, append=-np.inf) != 0  # a threshold does not divide equal scores
        right = np.cumsum(is_right[order])[is_last]
        detections = np.flatnonzero(is_last) + 1
        return cls(
            scores=sorted_scores[is_last],
            precision=right / detections,
            recall=right / max(boxes, 1),
            f1=2 * right / (detections + boxes),
            boxes=boxes,
        )

    @property
    def best(self) -> BestF1:
        """The threshold with the highest F1."""
        if not self.boxes:
            return BestF1(-1.0, -1.0, -1.0, -1.0)
        if not self.f1.any():
            return BestF1(0.0, 0.0, 0.0, -1.0)
        index = int(self.f1.argmax())
        return BestF1(
            float(self.precision[index]), float(self.recall[index]), float(self.f1[index]), float(self.scores[index])
        )


@dataclass(frozen=True)
class ScoreCurves:
    """The curves of a comparison.

    Attributes:
        of_classes: name -> curve.
        together: of the detections of all classes that have ground truth, with one threshold for all of them.
    """

    of_classes: dict[str, ScoreCurve]
    together: ScoreCurve


def score_curves(evaluation: Any, columns: dict[str, int]) -> ScoreCurves:
    """Return the curves of pycocotools' matches.

    Args:
        evaluation: a COCOeval of pycocotools after `evaluate`, whose first IoU threshold is 0.5 and whose first range
            of areas has all of them.
        columns: class name -> place of its category among those of the evaluation.
    """
    images = len(evaluation.params.imgIds)
    images_of_category = images * len(evaluation.params.areaRng)
    matches = {}
    for name, column in columns.items():
        start = column * images_of_category
        matches[name] = _join(evaluation.evalImgs[start : start + images])

    curves = {name: ScoreCurve.of(*match) for name, match in matches.items()}
    counted = [match for match in matches.values() if match[2]]
    together = ScoreCurve.of(
        np.concatenate([np.zeros(0), *[scores for scores, _, _ in counted]]),
        np.concatenate([np.zeros(0, bool), *[is_right for _, is_right, _ in counted]]),
        sum(boxes for _, _, boxes in counted),
    )
    return ScoreCurves(curves, together)


def _join(images: list[dict[str, Any] | None]) -> tuple[np.ndarray, np.ndarray, int]:
    """Return scores (n,) of the detections of a class that count, which are right (n,) bool, and how many boxes."""
    found = [image for image in images if image is not None]  # None has neither detections nor ground truth
    first = slice(COUNTED_DETECTIONS)
    scores = np.concatenate([np.zeros(0), *[image["dtScores"][first] for image in found]])
    is_matched = np.concatenate([np.zeros(0), *[image["dtMatches"][0, first] for image in found]]) > 0
    is_ignored = np.concatenate([np.zeros(0), *[image["dtIgnore"][0, first] for image in found]]) > 0
    boxes = sum(int(np.count_nonzero(np.asarray(image["gtIgnore"]) == 0)) for image in found)
    return scores[~is_ignored], is_matched[~is_ignored], boxes
