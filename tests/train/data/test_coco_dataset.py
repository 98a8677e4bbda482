import json

import numpy as np
import pytest

from detector.image import read_image
from tests.conftest import GOLDEN
from tests.train.conftest import write_annotations
from train.data.coco_dataset import CocoDetection, UnreadableImageError
from train.data.transforms import Transform

SCALE = Transform((64, 64))


def open_golden(golden, tmp_path, training):
    content = json.loads((GOLDEN / "dataset_ann.json").read_text())
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    classes = [category["name"] for category in content["categories"]][:80]
    return CocoDetection(path, tmp_path, SCALE, training=training, classes=classes)


@pytest.mark.parametrize("split", ["train", "test"])
def test_keeps_what_mmdetection_keeps(golden, tmp_path, split):
    expected = golden("dataset")[1][split]
    dataset = open_golden(golden, tmp_path, split == "train")
    assert dataset.image_ids.tolist() == [image["img_id"] for image in expected]
    assert dataset.widths.tolist() == [image["width"] for image in expected]
    assert dataset.heights.tolist() == [image["height"] for image in expected]
    for index, image in enumerate(expected):
        truth = [box for box in image["instances"] if not box["ignore_flag"]]
        boxes, labels = dataset.ground_truth(index)
        assert boxes.tolist() == [box["bbox"] for box in truth]
        assert labels.tolist() == [box["label"] for box in truth]
        assert boxes.dtype == np.float32


def test_counts_every_annotation(golden, tmp_path):
    dataset = open_golden(golden, tmp_path, True)
    counts = vars(dataset.counts)
    content = json.loads(dataset.annotation_file.read_text())
    assert sum(counts.values()) == len(content["annotations"])
    assert counts["ignored"] == sum(annotation.get("ignore", 0) for annotation in content["annotations"])
    assert counts["other_category"]
    assert all(counts[reason] for reason in ("empty", "outside", "crowd", "used"))
    assert "thinner than a pixel" in str(dataset.counts)


def open_coco(root, split="train2017", **options):
    options = {"training": split == "train2017"} | options
    return CocoDetection(root / "annotations" / f"instances_{split}.json", root / split, SCALE, **options)


def edit(root, change, split="train2017"):
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    write_annotations(root, split, content)


def test_labels_follow_the_file_or_the_given_names(coco):
    dataset = open_coco(coco)
    assert dataset.classes == ("red", "blue")
    assert dataset.category_ids.tolist() == [7, 3]
    turned = open_coco(coco, classes=("blue", "red"))
    assert turned.category_ids.tolist() == [3, 7]
    assert (turned.labels == 1 - dataset.labels).all()
    with pytest.raises(ValueError, match="'green' is missing"):
        open_coco(coco, classes=("red", "green"))


def test_reads_a_sample(coco):
    dataset = open_coco(coco)
    sample = dataset[0, 2]
    assert sample.image.shape == (48, 64, 3)
    assert sample.image_id == 102
    assert sample.scale_factor == (0.5, 0.5)
    assert sample.boxes == pytest.approx(dataset.ground_truth(2)[0] / 2)
    assert read_image(dataset.image_path(2)).shape == (96, 128, 3)


def test_limit_takes_the_first_images(coco):
    dataset, whole = open_coco(coco, limit=3), open_coco(coco)
    assert dataset.image_ids.tolist() == [100, 101, 102]
    assert len(dataset.boxes) == whole.box_starts[3]


def test_annotations_of_a_missing_image_are_counted(coco):
    edit(coco, lambda content: content["images"].pop(0))
    dataset = open_coco(coco)
    assert dataset.counts.unlisted_image == 1
    assert len(dataset) == 7


def test_zero_width_box_is_counted(coco):
    edit(coco, lambda content: content["annotations"][0].update(bbox=[5, 5, 0, 20]))
    assert open_coco(coco).counts.empty == 1
    assert "1 without area" in str(open_coco(coco).counts)


def test_empty_split(coco):
    edit(coco, lambda content: (content["images"].clear(), content["annotations"].clear()), "val2017")
    dataset = open_coco(coco, "val2017")
    assert len(dataset) == 0
    assert dataset.boxes.shape == (0, 4)


def test_split_without_annotations(coco):
    edit(coco, lambda content: content.pop("annotations"), "val2017")
    dataset = open_coco(coco, "val2017")
    assert len(dataset) == 3
    assert not dataset.has_annotations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda c: c.pop("images"), "no list 'images'", id="no-images"),
        pytest.param(
            lambda c: c["images"][0].pop("width"), r"images\[0\] \(id 100\): 'width' is missing", id="no-width"
        ),
        pytest.param(
            lambda c: c["annotations"][0].pop("bbox"), r"annotations\[0\] \(id 1\): 'bbox' is missing", id="no-bbox"
        ),
        pytest.param(
            lambda c: c["annotations"][0].update(bbox=[1, 2, 3]),
            r"\[0\] \(id 1\): 'bbox': expected 4 numbers, got",
            id="short-bbox",
        ),
        pytest.param(lambda c: c["annotations"][1].update(bbox=None), r"\[1\] .*'bbox': expected 4", id="null-bbox"),
        pytest.param(
            lambda c: c["annotations"][0].update(image_id="a"), "expected a whole number, got 'a'", id="string-id"
        ),
        pytest.param(
            lambda c: c["annotations"].append([]), r"\]: expected an object with fields, got \[\]", id="no-object"
        ),
        pytest.param(lambda c: c.update(annotations=None), "'annotations' is not a list", id="null-annotations"),
        pytest.param(lambda c: c["images"].append(c["images"][0]), "two images have the id 100", id="twice"),
        pytest.param(lambda c: c["categories"].append({"id": 7, "name": "x"}), "two categories", id="category-twice"),
    ],
)
def test_malformed_file_is_named(coco, change, message):
    edit(coco, change)
    with pytest.raises(ValueError, match=message) as caught:
        open_coco(coco)
    assert "instances_train2017.json" in str(caught.value)


def test_what_is_missing_is_named(coco, tmp_path):
    with pytest.raises(FileNotFoundError, match="instances_test2017.json"):
        open_coco(coco, "test2017")
    (coco / "annotations" / "instances_val2017.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="not valid JSON"):
        open_coco(coco, "val2017")
    with pytest.raises(FileNotFoundError, match="folder of images"):
        CocoDetection(coco / "annotations" / "instances_train2017.json", tmp_path / "no", SCALE, training=True)


def test_unreadable_images_are_described(coco):
    dataset = open_coco(coco)
    dataset.image_path(0).write_bytes(dataset.image_path(0).read_bytes()[:200])
    dataset.image_path(1).unlink()
    for index in (0, 1):
        with pytest.raises(UnreadableImageError, match=dataset.image_path(index).name):
            dataset[0, index]


def test_arrays_hold_no_python_objects(coco):
    dataset = open_coco(coco)
    arrays = [value for value in vars(dataset).values() if isinstance(value, np.ndarray)]
    assert len(arrays) == 8
    assert not any(array.dtype.hasobject for array in arrays)
