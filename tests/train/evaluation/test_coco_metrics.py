import json
import sys

import numpy as np
import pytest
import torch

from detector import Detections
from tests.train.data.test_coco_dataset import edit, open_coco, open_golden
from train.evaluation.coco_metrics import NAMES, CocoDetections, measure, results, write_results


def golden_found(predictions):
    parts = [
        CocoDetections(
            np.full(len(image["labels"]), image["img_id"]),
            np.array(image["bboxes"], np.float32).reshape(-1, 4),
            np.array(image["scores"], np.float32),
            np.array(image["labels"], np.int64),
        )
        for image in predictions
    ]
    return CocoDetections.join(parts)


def test_numbers_equal_mmdetection(golden, tmp_path):
    expected = golden("dataset")[1]
    dataset = open_golden(golden, tmp_path, False)
    metrics = measure(results(golden_found(expected["predictions"]), dataset.category_ids), dataset)
    assert metrics.stats == pytest.approx(expected["coco_stats"], abs=1e-9)
    keys = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
    for name, key in zip(NAMES, keys, strict=False):
        assert round(metrics.values[name], 3) == expected["metrics"][f"coco/bbox_{key}"]
    counted = [ap for ap, _, _ in metrics.per_class.values() if ap > -1]
    assert np.mean(counted) == pytest.approx(metrics.values["AP"])


def test_order_of_images_changes_nothing(golden, tmp_path):
    dataset = open_golden(golden, tmp_path, False)
    predictions = golden("dataset")[1]["predictions"]
    numbers = {
        measure(results(golden_found(order), dataset.category_ids), dataset).stats
        for order in (predictions, predictions[::-1])
    }
    assert len(numbers) == 1


def truth_as_found(dataset):
    ids = np.repeat(dataset.image_ids, np.diff(dataset.box_starts))
    return CocoDetections(ids, dataset.boxes, np.ones(len(ids), np.float32), dataset.labels)


def test_ground_truth_scores_one(coco):
    dataset = open_coco(coco, "val2017")
    metrics = measure(results(truth_as_found(dataset), dataset.category_ids), dataset)
    assert metrics.values["AP"] == pytest.approx(1)
    assert sum(count for _, _, count in metrics.per_class.values()) == len(dataset.boxes)


def test_nothing_found_is_zero(coco):
    metrics = measure([], open_coco(coco, "val2017"))
    assert metrics.values["AP"] == 0
    assert metrics.values["AR100"] == 0


def test_no_images_is_minus_one(coco):
    edit(coco, lambda content: (content["images"].clear(), content["annotations"].clear()), "val2017")
    assert set(measure([], open_coco(coco, "val2017")).values.values()) == {-1.0}


def test_no_annotations_is_none(coco):
    edit(coco, lambda content: content.pop("annotations"), "val2017")
    assert measure([], open_coco(coco, "val2017")) is None


def test_limit_counts_only_those_images(coco):
    dataset = open_coco(coco, "val2017", limit=1)
    metrics = measure(results(truth_as_found(dataset), dataset.category_ids), dataset)
    assert metrics.values["AP"] == pytest.approx(1)


def test_annotations_need_neither_flag_nor_id(coco):
    def forget(content):
        for annotation in content["annotations"]:
            del annotation["iscrowd"], annotation["id"]

    edit(coco, forget, "val2017")
    dataset = open_coco(coco, "val2017")
    assert measure(results(truth_as_found(dataset), dataset.category_ids), dataset).values["AP"] == pytest.approx(1)


def crowded(content):
    """Copy the annotations to other places, some as crowds and some marked `ignore`."""
    random = np.random.default_rng(0)
    for annotation in [annotation for annotation in content["annotations"] for _ in range(30)]:
        x, y, width, height = annotation["bbox"]
        other = {"bbox": [x + int(random.integers(-9, 9)), y + int(random.integers(-9, 9)), width, height]}
        flags = {"iscrowd": int(random.random() < 0.1), "ignore": int(random.random() < 0.1)}
        content["annotations"].append({**annotation, **other, **flags, "id": len(content["annotations"]) + 1})


def test_faster_evaluator_agrees(coco):
    pytest.importorskip("faster_coco_eval", reason="the extra fast-eval is not installed")
    edit(coco, crowded, "val2017")
    dataset = open_coco(coco, "val2017")
    random, count = np.random.default_rng(1), 400  # an image: more than AP counts
    ids, chosen = np.repeat(dataset.image_ids, count), random.integers(0, len(dataset.boxes), 3 * count)
    boxes = dataset.boxes[chosen] + random.normal(0, 3, (3 * count, 4)).astype(np.float32)
    scores = random.integers(1, 50, 3 * count).astype(np.float32) / 50  # with many ties
    found = CocoDetections(ids, boxes, scores, dataset.labels[chosen])
    one, two = (measure(results(found, dataset.category_ids), dataset, name) for name in ("pycocotools", "faster"))
    assert 0 < one.values["AP"] < 1
    assert one.stats[6] < one.stats[7]  # the limits bind
    assert two.stats == pytest.approx(one.stats, rel=0, abs=1e-15)
    for name, numbers in one.per_class.items():
        assert two.per_class[name] == pytest.approx(numbers, rel=0, abs=1e-15)
    assert measure([], dataset, "faster") == measure([], dataset)


def test_missing_evaluator_names_the_cure(coco, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ValueError, match="--evaluator faster needs faster-coco-eval: pip install faster-coco-eval"):
        measure([], open_coco(coco, "val2017"), "faster")


def test_results_are_in_coco_format(tmp_path):
    detections = Detections(torch.tensor([[2.0, 4.0, 12.0, 10.0]]), torch.tensor([0.5]), torch.tensor([1]))
    found = CocoDetections.of(detections, 42, (2.0, 0.5), (32, 8))
    rows = results(found, np.array([7, 3]))
    assert rows == [{"image_id": 42, "category_id": 3, "bbox": [1.0, 8.0, 5.0, 12.0], "score": 0.5}]
    write_results(tmp_path / "detections.json", rows)
    assert json.loads((tmp_path / "detections.json").read_text()) == rows
    assert [path.name for path in tmp_path.iterdir()] == ["detections.json"]


def test_join_of_nothing():
    found = CocoDetections.join([])
    assert found.boxes.shape == (0, 4)
    assert results(found, np.array([7, 3])) == []
