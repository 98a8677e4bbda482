"""Malformed annotation files: the message names the file and the entry."""

import pytest

from tests.train.data.datasets import edit, open_coco


def drop_images(content):
    del content["images"]


def drop_width(content):
    del content["images"][0]["width"]


def drop_bbox(content):
    del content["annotations"][0]["bbox"]


def shorten_bbox(content):
    content["annotations"][0]["bbox"] = [1, 2, 3]


def clear_bbox(content):
    content["annotations"][1]["bbox"] = None


def name_image_by_text(content):
    content["annotations"][0]["image_id"] = "a"


def add_list(content):
    content["annotations"].append([])


def clear_annotations(content):
    content["annotations"] = None


def repeat_image(content):
    content["images"].append(content["images"][0])


def repeat_category_id(content):
    content["categories"].append({"id": 7, "name": "x"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_images, "expected a COCO file with a list 'images', got none"),
        (drop_width, r"images\[0\] \(id 100\): 'width': expected a whole number from 1 to 1048576, got no such field"),
        (
            drop_bbox,
            r"annotations\[0\] \(id 1\): 'bbox': expected 4 finite numbers, none beyond 1e9, got no such field",
        ),
        (shorten_bbox, r"\[0\] \(id 1\): 'bbox': expected 4 finite numbers, none beyond 1e9, got \[1, 2, 3\]"),
        (clear_bbox, r"\[1\] .*'bbox': expected 4 finite numbers, none beyond 1e9, got None"),
        (name_image_by_text, "'image_id': expected a whole number of 64 bits, got 'a'"),
        (add_list, r"\]: expected an object with fields, got \[\]"),
        (clear_annotations, "expected a COCO file with a list 'annotations', got None"),
        (repeat_image, r"images: 'id': expected every value once, got 100 at images\[0\] \(id 100\) and images\[8\]"),
        (
            repeat_category_id,
            r"categories: 'id': expected every value once, got 7 at categories\[0\] \(id 7\) and categories\[2\]",
        ),
    ],
)
def test_malformed_file_is_named(coco, change, message):
    edit(coco, change)
    with pytest.raises(ValueError, match=message) as caught:
        open_coco(coco)
    assert "instances_train2017.json" in str(caught.value)


def test_file_that_is_cut_off(coco):
    (coco / "annotations" / "instances_val2017.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="expected valid JSON"):
        open_coco(coco, "val2017")
