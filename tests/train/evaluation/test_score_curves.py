"""Precision, recall and F1 by score, beside matches that are made one detection at a time."""

import math
from dataclasses import astuple

import numpy as np
import pytest

from tests.train.data.datasets import edit, open_coco
from tests.train.evaluation.test_coco_metrics import crowded, noisy_rows
from train.evaluation.coco_metrics import EVALUATORS, coco_metrics
from train.evaluation.curve_picture import NAMED_CLASSES, draw_score_curves
from train.evaluation.score_curves import BestF1, ScoreCurve, ScoreCurves, format_best


def curve(scores, is_right, boxes):
    return ScoreCurve.of(np.array(scores, np.float64), np.array(is_right, bool), boxes)


def test_by_hand():
    found = curve([0.3, 0.9, 0.5, 0.5, 0.8], [True, True, True, False, False], 4)
    assert found.scores.tolist() == [0.9, 0.8, 0.5, 0.3]  # no threshold divides equal scores
    assert found.precision.tolist() == [1 / 1, 1 / 2, 2 / 4, 3 / 5]
    assert found.recall.tolist() == [1 / 4, 1 / 4, 2 / 4, 3 / 4]
    assert found.f1.tolist() == [2 / 5, 2 / 6, 4 / 8, 6 / 9]
    assert found.best == BestF1(3 / 5, 3 / 4, 6 / 9, 0.3)


def test_of_equal_f1_the_highest_score_is_taken():
    found = curve([0.9, 0.8, 0.7, 0.6], [True, False, False, True], 1)
    assert found.best.score == 0.9
    found = curve([0.9, 0.8, 0.7], [True, False, True], 3)
    assert found.f1.tolist() == [2 / 4, 2 / 5, 4 / 6]
    assert found.best.score == 0.7


@pytest.mark.parametrize(
    ("found", "best", "text"),
    [
        (curve([0.5], [False], 0), BestF1(-1.0, -1.0, -1.0, -1.0), "-"),
        (curve([], [], 3), BestF1(0.0, 0.0, 0.0, -1.0), "0.000"),
        (curve([0.5], [False], 3), BestF1(0.0, 0.0, 0.0, -1.0), "0.000"),
        (curve([0.579], [True], 1), BestF1(1.0, 1.0, 1.0, 0.579), "1.000 at 0.57"),
    ],
    ids=["no ground truth", "no detections", "nothing right", "all right"],
)
def test_without_ground_truth_or_right_detections(found, best, text):
    assert found.best == best
    assert format_best(best) == text


def iou(box, other, is_crowd):
    """Return COCO's overlap of two boxes x, y, width, height; with a crowd, the share of the first one."""
    width = min(box[0] + box[2], other[0] + other[2]) - max(box[0], other[0])
    height = min(box[1] + box[3], other[1] + other[3]) - max(box[1], other[1])
    common = max(width, 0) * max(height, 0)
    area = box[2] * box[3]
    return common / (area if is_crowd else area + other[2] * other[3] - common)


def count_one_by_one(rows, annotations, score):
    """Return right and wrong detections with a score or more, and the boxes, of one class and image.

    Each detection takes the free object with which it overlaps most, the last of several; without one, a crowd, which
    stays free.
    """
    best_first = sorted(rows, key=lambda row: -row["score"])[:100]
    free = [annotation for annotation in annotations if not annotation["iscrowd"]]
    crowds = [annotation["bbox"] for annotation in annotations if annotation["iscrowd"]]
    boxes = len(free)
    right = wrong = 0
    for row in best_first:
        if row["score"] < score:
            break
        overlaps = [iou(row["bbox"], annotation["bbox"], False) for annotation in free]
        if overlaps and max(overlaps) >= 0.5:
            right += 1
            free.pop(max(range(len(free)), key=lambda index: (overlaps[index], index)))
        elif not any(iou(row["bbox"], crowd, True) >= 0.5 for crowd in crowds):
            wrong += 1
    return right, wrong, boxes


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_curves_are_those_of_matches_made_one_by_one(coco, evaluator):
    content = {}
    edit(coco, crowded, "val2017")
    edit(coco, content.update, "val2017")
    dataset = open_coco(coco, "val2017")
    rows = noisy_rows(dataset, per_image=300)  # more than count, and many equal scores
    for row in rows:
        row["score"] -= 0.001 * (hash((row["image_id"], *row["bbox"])) % 7)
    metrics, curves = coco_metrics(rows, dataset, evaluator)
    assert any(annotation["iscrowd"] for annotation in content["annotations"])

    def count(category_ids, score):
        counts = []
        for category_id in category_ids:
            for image_id in dataset.image_ids.tolist():
                key = (image_id, category_id)
                own_rows = [row for row in rows if (row["image_id"], row["category_id"]) == key]
                own = [item for item in content["annotations"] if (item["image_id"], item["category_id"]) == key]
                counts.append(count_one_by_one(own_rows, own, score))
        return np.sum(counts, 0).tolist()

    cases = {name: [category_id] for name, category_id in zip(dataset.classes, dataset.category_ids, strict=True)}
    all_curves = {**curves["boxes"].of_classes, "": curves["boxes"].together}
    for name, found in all_curves.items():
        for index in [*range(0, len(found.scores), 37), int(found.f1.argmax())]:
            right, wrong, boxes = count(cases.get(name, dataset.category_ids.tolist()), found.scores[index])
            assert found.boxes == boxes
            assert found.precision[index] == pytest.approx(right / (right + wrong), abs=1e-12)
            assert found.recall[index] == pytest.approx(right / boxes, abs=1e-12)
    assert metrics["classes_F1"]["red"][2] == max(curves["boxes"].of_classes["red"].f1)
    best = curves["boxes"].together.best
    assert best.f1 == max(curves["boxes"].together.f1) > 0
    assert [metrics[name] for name in ("precision", "recall", "F1", "score_threshold")] == list(astuple(best))
    assert len(set(astuple(best))) == 4  # so that none can stand for another


@pytest.mark.filterwarnings("error::UserWarning", "ignore::DeprecationWarning")
def test_picture_of_any_curves():
    nothing = curve([], [], 0)
    names = [f"class {number}" for number in range(NAMED_CLASSES + 3)] + ["$x$", "_hidden", "猫", "n" * 300]
    many = {name: curve([0.9, 0.4], [True, False], 2 + number) for number, name in enumerate(names)}
    cases = [ScoreCurves(many, curve([0.9, 0.4], [True, False], 5)), ScoreCurves({"a": nothing}, nothing)]
    for curves in cases:
        picture = draw_score_curves({"boxes": curves})
        assert (picture.shape, picture.dtype) == ((450, 1200, 3), np.uint8)
        assert picture.min() < 50
    both = draw_score_curves({"boxes": cases[0], "masks": cases[1]})
    assert both.shape == (900, 1200, 3)
    assert math.isclose(float(both[:5].mean()), 255, abs_tol=40)


def test_precision_is_drawn_over_recall():
    few = curve([0.9, 0.8], [False, True], 10)  # up to a recall of 0.1 and a precision of 0.5
    picture = draw_score_curves({"boxes": ScoreCurves({}, few)})
    is_black = (picture < 60).all(-1)
    right_of_the_curve = is_black[40:400, 200:460]
    assert not right_of_the_curve.any()
    assert is_black[150:400, 70:130].sum() > 100
