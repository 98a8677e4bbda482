"""The data set: samples, limits, empty splits, and files that are missing or cannot be read."""

import numpy as np
import pytest

from detector.image import read_image
from tests.train.data.datasets import TRANSFORM, edit, open_coco
from train.data.coco_dataset import CocoDetection, UnreadableImageError


def test_reads_a_sample(coco):
    dataset = open_coco(coco)
    sample = dataset[0, 2]
    boxes, _ = dataset.ground_truth(2)
    assert sample.image.shape == (48, 64, 3)
    assert sample.image_id == 102
    assert sample.scale_factor == (0.5, 0.5)
    assert sample.boxes == pytest.approx(boxes / 2)
    assert read_image(dataset.image_path(2)).shape == (96, 128, 3)


def test_limit_takes_the_first_images(coco):
    dataset = open_coco(coco, limit=3)
    whole = open_coco(coco)
    assert dataset.image_ids.tolist() == [100, 101, 102]
    assert len(dataset.boxes) == whole.box_starts[3]


def test_empty_split(coco):
    def clear(content):
        content["images"].clear()
        content["annotations"].clear()

    edit(coco, clear, "val2017")
    dataset = open_coco(coco, "val2017")
    assert len(dataset) == 0
    assert dataset.boxes.shape == (0, 4)


def test_split_without_annotations(coco):
    edit(coco, lambda content: content.pop("annotations"), "val2017")
    dataset = open_coco(coco, "val2017")
    assert len(dataset) == 3
    assert not dataset.has_annotations


def test_missing_file_or_folder_is_named(coco, tmp_path):
    with pytest.raises(FileNotFoundError, match="instances_test2017.json"):
        open_coco(coco, "test2017")

    annotation_file = coco / "annotations" / "instances_train2017.json"
    with pytest.raises(FileNotFoundError, match="images: expected a folder"):
        CocoDetection(annotation_file, tmp_path / "no", TRANSFORM, training=True)


def test_unreadable_images_are_named(coco):
    dataset = open_coco(coco)
    cut_off = dataset.image_path(0)
    cut_off.write_bytes(cut_off.read_bytes()[:200])
    dataset.image_path(1).unlink()
    for index in (0, 1):
        with pytest.raises(UnreadableImageError, match=dataset.image_path(index).name):
            dataset[0, index]


def test_arrays_hold_no_python_objects(coco):
    dataset = open_coco(coco)
    arrays = [value for value in vars(dataset).values() if isinstance(value, np.ndarray)]
    assert len(arrays) == 9
    assert not any(array.dtype.hasobject for array in arrays)
