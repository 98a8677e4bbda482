import json
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import train.evaluation.coco_metrics
from detector.ops.rle import encode_mask
from detector.results import coco_rows
from tests.train.data.datasets import edit, open_coco, open_content, open_golden
from train.evaluation.coco_metrics import (
    DETECTION_LIMITS,
    EVALUATORS,
    METRIC_NAMES,
    numbers_from_one,
    run_coco_eval,
)


def coco_metrics(*arguments):
    """Return the numbers of a comparison without its curves."""
    return train.evaluation.coco_metrics.coco_metrics(*arguments)[0]


needs_both_evaluators = pytest.mark.skipif(len(EVALUATORS) < 2, reason="the extra fast-eval is not installed")


def golden_rows(predictions, dataset):
    """Return MMDetection's predictions as rows of COCO's results format."""
    rows = []
    for image in predictions:
        labels = np.array(image["labels"], np.int64)
        rows += coco_rows(
            np.full(len(labels), image["img_id"]),
            dataset.category_ids[labels],
            np.array(image["bboxes"], np.float32).reshape(-1, 4),
            np.array(image["scores"], np.float32),
            image.get("masks"),
        )
    return rows


def ground_truth_rows(dataset):
    """Return the ground truth of a data set as detections with score 1."""
    image_ids = np.repeat(dataset.image_ids, np.diff(dataset.box_starts))
    scores = np.ones(len(image_ids), np.float32)
    return coco_rows(image_ids, dataset.category_ids[dataset.labels], dataset.boxes, scores)


def test_numbers_equal_mmdetection(golden, tmp_path):
    expected = golden("dataset")[1]
    dataset = open_golden(tmp_path, False)
    rows = golden_rows(expected["predictions"], dataset)
    metrics = coco_metrics(rows, dataset)
    assert run_coco_eval(rows, dataset).stats == pytest.approx(expected["coco_stats"], abs=1e-9)
    keys = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
    for name, key in zip(METRIC_NAMES, keys, strict=False):
        assert round(metrics[name], 3) == expected["metrics"][f"coco/bbox_{key}"]
    counted = [ap for ap, _, _ in metrics["classes"].values() if ap > -1]
    assert np.mean(counted) == pytest.approx(metrics["AP"])


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_numbers_of_masks_equal_mmdetection(golden, tmp_path, evaluator, iou_type):
    expected = golden("segm_eval")[1]
    dataset = open_golden(tmp_path, False, "segm_eval", masks=True)
    assert list(dataset.classes) == expected["classes"]
    assert len(dataset.image_ids) == expected["count"]["images"]
    assert len(dataset.all_annotations.boxes) == expected["count"]["annotations"]
    assert dataset.all_annotations.is_crowd.sum() == expected["count"]["crowds"]
    rows = golden_rows(expected["predictions"], dataset)
    assert len(rows) == expected["count"]["predictions"]

    evaluation = run_coco_eval(rows, dataset, iou_type, evaluator)
    assert evaluation.stats == pytest.approx(expected["coco"][iou_type]["stats"], rel=0, abs=1e-9)
    metrics = coco_metrics(rows, dataset, evaluator)
    prefix = "segm_" if iou_type == "segm" else ""
    keys = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
    for name, key in zip(METRIC_NAMES, keys, strict=False):
        assert round(metrics[prefix + name], 3) == expected["metrics"][f"coco/{iou_type}_{key}"]

    per_class = expected["coco"][iou_type]["per_class"]
    assert set(per_class) == set(dataset.classes)
    columns = numbers_from_one(dataset.category_ids) - 1
    for column, (name, (ap, ap50, _)) in zip(columns, metrics[prefix + "classes"].items(), strict=True):
        numbers = per_class[name]
        assert ap == pytest.approx(numbers["AP_100"], rel=0, abs=1e-9)
        assert ap50 == pytest.approx(numbers["AP50_100"], rel=0, abs=1e-9)
        most = evaluation.eval["precision"][:, :, column, 0, -1]
        assert most[most > -1].mean() == pytest.approx(numbers["AP_1000"], rel=0, abs=1e-9)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools.mask")
@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_polygons_of_odd_count_are_compared_as_pycocotools_draws_them(coco, evaluator):
    """The reference is pycocotools with the file itself."""
    shapes = [
        [[9, 9, 60, 10, 30, 70, 5]],
        [[9, 9, 60, 10, 3]],
        [[9, 9, 60, 10, 30, 70], [80, 9, 90, 10, 84, 60, 5, 6, 7]],
    ]

    def change(content):
        for number, annotation in enumerate(content["annotations"]):
            annotation["segmentation"] = shapes[number % len(shapes)]

    edit(coco, change, "val2017")
    dataset = open_coco(coco, "val2017", masks=True)
    found = [[9, 9, 60, 10, 30, 70], [80, 9, 90, 10, 84, 60]]
    mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(found, 96, 128))).astype(bool)
    boxes = dataset.boxes
    rows = coco_rows(
        np.repeat(dataset.image_ids, np.diff(dataset.box_starts)),
        dataset.category_ids[dataset.labels],
        boxes,
        np.linspace(1, 0.5, len(boxes), dtype=np.float32),
        [encode_mask(mask)] * len(boxes),
    )
    actual = run_coco_eval(rows, dataset, "segm", evaluator)

    reference = COCO(str(dataset.annotation_file))
    detections = reference.loadRes([{key: row[key] for key in row if key != "bbox"} for row in rows])
    expected = COCOeval(reference, detections, "segm")
    expected.params.maxDets = DETECTION_LIMITS
    expected.evaluate()
    expected.accumulate()
    expected.summarize()
    assert 0 < expected.stats[0] < 1
    assert actual.stats == pytest.approx(expected.stats, rel=0, abs=1e-15)


def test_order_of_images_changes_nothing(golden, tmp_path):
    dataset = open_golden(tmp_path, False)
    predictions = golden("dataset")[1]["predictions"]
    numbers = set()
    for order in (predictions, predictions[::-1]):
        evaluation = run_coco_eval(golden_rows(order, dataset), dataset)
        numbers.add(tuple(evaluation.stats))
    assert len(numbers) == 1


def shuffle_categories(content):
    """Give the categories other ids, of another order, and another order in the file."""
    random = np.random.default_rng(0)
    ids = [category["id"] for category in content["categories"]]
    new_ids = dict(zip(ids, random.permutation(500)[: len(ids)].tolist(), strict=True))
    for category in content["categories"]:
        category["id"] = new_ids[category["id"]]
    for annotation in content["annotations"]:
        annotation["category_id"] = new_ids[annotation["category_id"]]
    random.shuffle(content["categories"])


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("names_are_given", [True, False])
def test_order_of_categories_changes_nothing(golden, tmp_path, names_are_given, evaluator):
    """Labels are those of the names, in their order or in that of the file; the ids of rows are those of the file."""
    dataset = open_golden(tmp_path, False)
    predictions = golden("dataset")[1]["predictions"]
    expected = coco_metrics(golden_rows(predictions, dataset), dataset, evaluator)

    content = json.loads(dataset.annotation_file.read_text())
    content["categories"] = [category for category in content["categories"] if category["name"] in dataset.classes]
    kept_ids = {category["id"] for category in content["categories"]}
    content["annotations"] = [row for row in content["annotations"] if row["category_id"] in kept_ids]
    shuffle_categories(content)
    shuffled = open_content(tmp_path, content, training=False, classes=dataset.classes if names_are_given else None)
    assert shuffled.category_ids.tolist() != sorted(shuffled.category_ids)
    assert (shuffled.classes == dataset.classes) == names_are_given
    of_name = {name: label for label, name in enumerate(shuffled.classes)}
    relabeled = []
    for image in predictions:
        labels = [of_name[dataset.classes[label]] for label in image["labels"]]
        relabeled.append({**image, "labels": labels})

    found = coco_metrics(golden_rows(relabeled, shuffled), shuffled, evaluator)
    for name in METRIC_NAMES:
        assert found[name] == pytest.approx(expected[name], rel=0, abs=1e-15)
    assert found["classes"] == expected["classes"]
    assert 0 < found["AP"] < 1


def test_ground_truth_scores_one(coco):
    dataset = open_coco(coco, "val2017")
    metrics = coco_metrics(ground_truth_rows(dataset), dataset)
    assert metrics["AP"] == pytest.approx(1)
    assert sum(count for _, _, count in metrics["classes"].values()) == len(dataset.boxes)


def test_nothing_found_is_zero(coco):
    metrics = coco_metrics([], open_coco(coco, "val2017"))
    assert metrics["AP"] == 0
    assert metrics["AR100"] == 0


def test_no_images_is_minus_one(coco):
    edit(coco, lambda content: (content["images"].clear(), content["annotations"].clear()), "val2017")
    metrics = coco_metrics([], open_coco(coco, "val2017"))
    assert {metrics[name] for name in METRIC_NAMES} == {-1.0}


def test_no_annotations_gives_no_numbers(coco):
    edit(coco, lambda content: content.pop("annotations"), "val2017")
    assert coco_metrics([], open_coco(coco, "val2017")) == {}


def test_limit_counts_only_those_images(coco):
    dataset = open_coco(coco, "val2017", limit=1)
    assert coco_metrics(ground_truth_rows(dataset), dataset)["AP"] == pytest.approx(1)


def test_annotations_need_neither_flag_nor_id(coco):
    def forget(content):
        for annotation in content["annotations"]:
            del annotation["iscrowd"], annotation["id"]

    edit(coco, forget, "val2017")
    dataset = open_coco(coco, "val2017")
    assert coco_metrics(ground_truth_rows(dataset), dataset)["AP"] == pytest.approx(1)


def test_rows_stay_as_they_are(coco):
    dataset = open_coco(coco, "val2017")
    rows = ground_truth_rows(dataset)
    coco_metrics(rows, dataset)
    assert rows == ground_truth_rows(dataset)


def crowded(content):
    """Copy the annotations to other places, some as crowds and some marked `ignore`."""
    random = np.random.default_rng(0)
    for annotation in [annotation for annotation in content["annotations"] for _ in range(30)]:
        x, y, width, height = annotation["bbox"]
        other = {"bbox": [x + int(random.integers(-9, 9)), y + int(random.integers(-9, 9)), width, height]}
        flags = {"iscrowd": int(random.random() < 0.1), "ignore": int(random.random() < 0.1)}
        content["annotations"].append({**annotation, **other, **flags, "id": len(content["annotations"]) + 1})


def crowded_in_all_sizes(content):
    """Like `crowded`, with objects that COCO counts as small, medium and large."""
    large_image = {"width": 400, "height": 300}
    for image in content["images"]:
        image |= large_image
    for scale in (0.4, 1.0, 4.0):
        for annotation in content["annotations"][: len(content["images"])]:
            x, y, width, height = annotation["bbox"]
            bbox = [x, y, scale * width, scale * height]
            number = len(content["annotations"]) + 1
            content["annotations"].append({**annotation, "id": number, "bbox": bbox, "area": bbox[2] * bbox[3]})
    crowded(content)


def noisy_rows(dataset, per_image):
    """Return `per_image` shifted boxes of the ground truth for every image, with many equal scores."""
    random = np.random.default_rng(1)
    total = per_image * len(dataset)
    chosen = random.integers(0, len(dataset.boxes), total)
    boxes = dataset.boxes[chosen] + random.normal(0, 3, (total, 4)).astype(np.float32)
    scores = random.integers(1, 50, total).astype(np.float32) / 50
    image_ids = np.repeat(dataset.image_ids, per_image)
    return coco_rows(image_ids, dataset.category_ids[dataset.labels[chosen]], boxes, scores)


@needs_both_evaluators
@pytest.mark.parametrize("change", [crowded, crowded_in_all_sizes])
def test_evaluators_agree(coco, change):
    edit(coco, change, "val2017")
    dataset = open_coco(coco, "val2017")
    rows = noisy_rows(dataset, per_image=400)  # more than AP counts
    slow = run_coco_eval(rows, dataset, evaluator="pycocotools")
    assert 0 < slow.stats[0] < 1
    assert slow.stats[6] < slow.stats[7]  # the limits bind
    if change is crowded_in_all_sizes:
        assert min(slow.stats[3:6]) > 0  # small, medium and large objects

    fast = run_coco_eval(rows, dataset, evaluator="faster-coco-eval")
    assert fast.stats.tolist() == pytest.approx(slow.stats.tolist(), rel=0, abs=1e-15)
    for field in ("scores", "recall"):
        np.testing.assert_array_equal(fast.eval[field], slow.eval[field])
    np.testing.assert_allclose(fast.eval["precision"], slow.eval["precision"], rtol=0, atol=1e-15)

    expected = coco_metrics(rows, dataset, "pycocotools")
    found = coco_metrics(rows, dataset, "faster-coco-eval")
    for name, numbers in found["classes"].items():
        assert numbers == pytest.approx(expected["classes"][name], rel=0, abs=1e-15)
    for name in ("precision", "recall", "F1", "score_threshold", "classes_F1"):
        assert found[name] == expected[name]


@needs_both_evaluators
def test_evaluators_agree_on_nothing(coco):
    edit(coco, crowded, "val2017")
    dataset = open_coco(coco, "val2017")
    slow = coco_metrics([], dataset, "pycocotools")
    fast = coco_metrics([], dataset, "faster-coco-eval")
    assert fast.pop("evaluator") == "faster-coco-eval"
    assert slow.pop("evaluator") == "pycocotools"
    assert fast == slow


@needs_both_evaluators
def test_faster_one_counts_where_it_is_installed(coco):
    assert coco_metrics([], open_coco(coco, "val2017"))["evaluator"] == "faster-coco-eval"


def load_without(monkeypatch, missing):
    """Return the names of the module of the evaluators, executed where the module `missing` cannot be found."""

    class Finder:
        def find_spec(self, name, *_):
            if name == missing:
                raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    for name in list(sys.modules):
        if name.split(".")[0] == "faster_coco_eval" or name == missing:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    names = {"__name__": "copy"}
    exec(Path(train.evaluation.coco_metrics.__file__).read_text(), names)
    return names


def test_pycocotools_counts_elsewhere(coco, monkeypatch):
    names = load_without(monkeypatch, "faster_coco_eval")
    assert list(names["EVALUATORS"]) == ["pycocotools"]
    assert names["coco_metrics"]([], open_coco(coco, "val2017"))[0]["evaluator"] == "pycocotools"


@needs_both_evaluators
def test_broken_installation_is_not_hidden(monkeypatch):
    with pytest.raises(ModuleNotFoundError, match="faster_eval_api_cpp"):
        load_without(monkeypatch, "faster_coco_eval.faster_eval_api_cpp")


def minimal(content):
    """Leave only the keys that are read, and give the ids as floats."""
    for name in ("info", "licenses"):
        content.pop(name, None)
    for annotation in content["annotations"]:
        for field in ("iscrowd", "id"):
            del annotation[field]
        annotation["image_id"] = float(annotation["image_id"])


def degenerate(content):
    """Give images without annotations, boxes without area, or beyond the image, and marks of all kinds."""
    zero, line, far, crowd, ignored, huge = content["annotations"][:6]
    zero.update(bbox=[5, 5, 0, 0], area=0)
    line.update(bbox=[5.5, 5, 10, 0], area=0)
    far.update(bbox=[1e6, -1e6, 10, 10])
    crowd.update(iscrowd=True)
    ignored.update(ignore=1)
    huge.update(bbox=[-1e9, -1e9, 1e9, 1e9], area=1e308)
    content["images"].append({"id": 7, "file_name": "none.png", "width": 128, "height": 96})


def shift_ids(image_offset, category_offset):
    """Return a change that adds numbers to all ids."""

    def change(content):
        for image in content["images"]:
            image["id"] += image_offset
        for category in content["categories"]:
            category["id"] += category_offset
        for annotation in content["annotations"]:
            annotation["image_id"] += image_offset
            annotation["category_id"] += category_offset

    return change


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("offsets", [(2**31, 0), (2**53, 2**31), (2**62, 2**62), (-(2**62), -(2**53)), (-100, -1)])
def test_ids_of_any_size_give_the_same_numbers(coco, evaluator, offsets):
    edit(coco, crowded, "val2017")
    dataset = open_coco(coco, "val2017")
    expected = coco_metrics(noisy_rows(dataset, per_image=20), dataset, evaluator)
    edit(coco, shift_ids(*offsets), "val2017")
    dataset = open_coco(coco, "val2017")
    assert coco_metrics(noisy_rows(dataset, per_image=20), dataset, evaluator) == expected


@needs_both_evaluators
@pytest.mark.parametrize("change", [minimal, degenerate])
def test_evaluators_agree_on_what_the_reading_accepts(coco, change):
    edit(coco, crowded, "val2017")
    edit(coco, change, "val2017")
    dataset = open_coco(coco, "val2017")
    rows = noisy_rows(dataset, per_image=30)
    slow = run_coco_eval(rows, dataset, evaluator="pycocotools")
    fast = run_coco_eval(rows, dataset, evaluator="faster-coco-eval")
    assert 0 < slow.stats[0] < 1
    assert fast.stats.tolist() == pytest.approx(slow.stats.tolist(), rel=0, abs=1e-15)


def test_annotation_file_is_read_once(coco):
    dataset = open_coco(coco, "val2017")
    dataset.annotation_file.unlink()
    assert coco_metrics(ground_truth_rows(dataset), dataset)["AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"image_id": 99999}, r"rows\[1\]: expected an image and a category of the data set", id="image"),
        pytest.param({"category_id": 2**70}, r"rows\[1\]: expected an image and a category", id="category"),
        pytest.param({"score": float("nan")}, r"rows\[1\]: expected finite numbers, got score nan", id="score"),
        pytest.param({"bbox": [0, 0, float("inf"), 1]}, r"rows\[1\]: expected finite numbers, got", id="box"),
    ],
)
def test_rows_that_cannot_be_compared_are_named(coco, change, message):
    dataset = open_coco(coco, "val2017")
    rows = ground_truth_rows(dataset)
    rows[1].update(change)
    with pytest.raises(ValueError, match=message):
        coco_metrics(rows, dataset)


def test_data_for_training_are_not_evaluated(coco):
    with pytest.raises(ValueError, match="dataset: expected one that was opened for evaluation"):
        coco_metrics([], open_coco(coco))
