"""Which annotations are used: what MMDetection uses, and every other one is counted."""

import json

import numpy as np
import pytest

from tests.train.data.datasets import edit, open_coco, open_golden


@pytest.mark.parametrize("split", ["train", "test"])
def test_keeps_what_mmdetection_keeps(golden, tmp_path, split):
    expected = golden("dataset")[1][split]
    dataset = open_golden(tmp_path, split == "train")
    assert dataset.image_ids.tolist() == [image["img_id"] for image in expected]
    assert dataset.widths.tolist() == [image["width"] for image in expected]
    assert dataset.heights.tolist() == [image["height"] for image in expected]
    for index, image in enumerate(expected):
        instances = [instance for instance in image["instances"] if not instance["ignore_flag"]]
        boxes, labels = dataset.ground_truth(index)
        assert boxes.tolist() == [instance["bbox"] for instance in instances]
        assert labels.tolist() == [instance["label"] for instance in instances]
        assert boxes.dtype == np.float32


def test_counts_every_annotation(tmp_path):
    dataset = open_golden(tmp_path, True)
    counts = vars(dataset.counts)
    annotations = json.loads(dataset.annotation_file.read_text())["annotations"]
    assert sum(counts.values()) == len(annotations)
    assert dataset.counts.total == len(annotations)
    assert counts["used"] == len(dataset.boxes)
    assert all(counts[reason] for reason in ("ignored", "other_category", "thin", "no_area", "outside", "crowd"))
    assert "thinner than a pixel" in str(dataset.counts)


def test_a_limit_counts_its_images_only(coco):
    def damage(content):
        for annotation in content["annotations"]:
            del annotation["area"]
        content["annotations"][0]["iscrowd"] = 1
        content["annotations"].append({**content["annotations"][0], "image_id": 999})

    edit(coco, damage)
    whole = open_coco(coco)
    assert (whole.counts.total, whole.boxes_without_area) == (13, 13)
    dataset = open_coco(coco, limit=2)
    assert dataset.image_counts.beyond_limit == 6
    assert (dataset.counts.used, len(dataset.boxes)) == (2, 2)
    assert str(dataset.counts) == "1 crowd, 1 of images that are not listed"
    assert (dataset.counts.total, dataset.boxes_without_area) == (4, 4)
    assert open_coco(coco, limit=8).counts == whole.counts


def test_annotations_of_a_missing_image_are_counted(coco):
    edit(coco, lambda content: content["images"].pop(0))
    dataset = open_coco(coco)
    assert dataset.counts.unlisted_image == 1
    assert len(dataset) == 7


def test_zero_width_box_is_counted(coco):
    edit(coco, lambda content: content["annotations"][0].update(bbox=[5, 5, 0, 20]))
    counts = open_coco(coco).counts
    assert counts.thin == 1
    assert "1 thinner than a pixel" in str(counts)


def test_labels_follow_the_file_or_the_given_names(coco):
    dataset = open_coco(coco)
    assert dataset.classes == ("red", "blue")
    assert dataset.category_ids.tolist() == [7, 3]

    reordered = open_coco(coco, classes=("blue", "red"))
    assert reordered.category_ids.tolist() == [3, 7]
    assert (reordered.labels == 1 - dataset.labels).all()

    with pytest.raises(ValueError, match="categories: expected one with the name 'green', got red, blue"):
        open_coco(coco, classes=("red", "green"))


def test_evaluation_keeps_what_training_drops(coco):
    def drop(content):
        content["annotations"].reverse()
        crowd, ignored, empty, unlisted, *_ = content["annotations"]
        crowd.update(iscrowd=1)
        ignored.update(ignore=1)
        empty.update(bbox=[1, 2, 0, 0], area=0)
        unlisted.update(image_id=12345)

    edit(coco, drop)
    content = json.loads((coco / "annotations" / "instances_train2017.json").read_text())
    dataset = open_coco(coco, training=False, masks=True)
    annotations = dataset.all_annotations
    expected = [entry for entry in content["annotations"] if entry["image_id"] != 12345]
    assert annotations.boxes.tolist() == [entry["bbox"] for entry in expected]
    assert dataset.image_ids[annotations.image_indices].tolist() == [entry["image_id"] for entry in expected]
    assert annotations.is_crowd.tolist() == [bool(entry["iscrowd"]) for entry in expected]
    assert len(dataset.all_segmentations) == len(expected)

    first = open_coco(coco, training=False, limit=1)
    assert set(first.image_ids[first.all_annotations.image_indices]) == {content["images"][0]["id"]}
    assert first.all_segmentations is None
    assert open_coco(coco, masks=True).all_annotations is None
