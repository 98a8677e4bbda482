"""Files whose boxes mean something else: the run does not start, or a note tells."""

import json
from dataclasses import replace

import pytest
import torch

from tests.train.data.datasets import open_content, small_content
from train.build import open_split
from train.config import PRESETS
from train.distributed import World
from train.report import training_notes, validation_notes

CPU = World(0, 1, 0, torch.device("cpu"))
CROWDS = "every annotation has an iscrowd of 1"
NO_AREA = "every annotation has an area of 0"
SHARES = "every bbox lies between 0 and 1: COCO's are in pixels"
CORNERS = "bbox looks like x1, y1, x2, y2"


def open_training_split(folder, content):
    (folder / "annotations").mkdir()
    (folder / "train2017").mkdir()
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    tiny = PRESETS["tiny"]
    config = replace(tiny, data=replace(tiny.data, root=folder))
    return open_split(config, CPU, "train")


def with_fields(**fields):
    content = small_content()
    for annotation in content["annotations"]:
        annotation.update(fields)
    return content


def with_boxes(convert):
    content = small_content()
    for annotation in content["annotations"]:
        annotation["bbox"] = convert(*annotation["bbox"])
    return content


def small_images():
    content = small_content()
    for image in content["images"]:
        image["width"] = 31
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (with_fields(iscrowd=1), f"6 annotations: 6 crowds; {CROWDS}"),
        (with_fields(iscrowd=True), f"6 annotations: 6 crowds; {CROWDS}"),
        (with_fields(area=0), f"6 annotations: 6 whose area is 0 or less; {NO_AREA}"),
        (with_fields(area=-1.0), f"6 annotations: 6 whose area is 0 or less; {NO_AREA}"),
        (with_boxes(lambda x, y, w, h: [x / 128, y / 96, w / 128, h / 96]), f"6 thinner than a pixel; {SHARES}"),
        (with_boxes(lambda x, y, w, h: [0, 0, 1e-6, 1]), f"6 annotations: 6 thinner than a pixel; {SHARES}"),
        (with_boxes(lambda x, y, w, h: [x, y, 0, 0]), "6 annotations: 6 thinner than a pixel"),
        (with_boxes(lambda x, y, w, h: [x + w, y + h, -w, -h]), "6 annotations: 6 with a negative side"),
        (with_boxes(lambda x, y, w, h: [x + 128, y, w, h]), "6 annotations: 6 outside their image"),
        (with_boxes(lambda x, y, w, h: [127.9999999, y, w, h]), "6 annotations: 6 outside their image"),
        (with_boxes(lambda x, y, w, h: [-40, y, 40 + 1e-7, h]), None),
        (with_fields(ignore=1), "6 annotations: 6 marked ignore"),
        (with_fields(image_id=1), "6 of images that are not listed; 3 images: 3 without annotations"),
        (with_fields(category_id=0), "6 of other categories; 3 images: 3 with other categories only"),
        (small_images(), "6 of images that are left out; 3 images: 3 with a side below 32 pixels"),
        (small_content() | {"annotations": []}, "the file has no annotations"),
        (small_content() | {"images": []}, "the file lists no images"),
        (small_content() | {"categories": []}, "the file lists no categories"),
    ],
)
def test_run_that_cannot_learn_does_not_start(tmp_path, content, message):
    if message is None:  # a trace of the box is left, also in float32
        assert len(open_training_split(tmp_path, content).boxes) == 6
        return
    with pytest.raises(ValueError, match="instances_train2017.json: expected boxes to train on, got none: ") as caught:
        open_training_split(tmp_path, content)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "mistakes"),
    [
        (small_content(), []),
        (with_boxes(lambda x, y, w, h: [x + 60, y + 50, x + 60 + w, y + 50 + h]), [CORNERS]),
        (with_boxes(lambda x, y, w, h: [10, 10, 128, 96]), [CORNERS]),
        (with_boxes(lambda x, y, w, h: [0, 0, 128, 96]), []),  # whole images
        (with_boxes(lambda x, y, w, h: [x + 95, y, w, h]), []),  # reach beyond their images, and are no corners
        (with_boxes(lambda x, y, w, h: [x + 60, y + 50, w + 90, h + 50]), []),  # too wide
        (with_boxes(lambda x, y, w, h: [0.5, 0, 1, 1]), [SHARES]),
        (with_boxes(lambda x, y, w, h: [x / 128, y / 96, w, h]), []),
    ],
)
def test_mistakes_of_both_splits_are_noted(tmp_path, content, mistakes):
    for training in (True, False):
        dataset = open_content(tmp_path, content, training=training)
        assert len(dataset.mistakes) == len(mistakes)
        assert all(found.startswith(text) for found, text in zip(dataset.mistakes, mistakes, strict=True))


def notes_of(tmp_path, train_content, val_content=None):
    train_set = open_content(tmp_path, train_content)
    val_set = open_content(tmp_path, val_content or train_content, training=False, classes=train_set.classes)
    return training_notes(train_set) + validation_notes(val_set)


def test_well_formed_data_needs_no_notes(tmp_path):
    assert notes_of(tmp_path, small_content()) == []


def test_classes_that_cannot_be_learned_are_noted(tmp_path):
    content = small_content()
    for annotation in content["annotations"]:
        annotation["iscrowd"] = int(annotation["category_id"] == 6)
    assert notes_of(tmp_path, content) == ["classes of which no box is left to train on: red (1 of 2)"]

    content = small_content()
    content["categories"].insert(0, {"id": 0, "name": "cells", "supercategory": "none"})
    (note,) = notes_of(tmp_path, content)
    assert note.startswith(
        "classes without annotations: cells (1 of 3); the one with the id 0 may be the root category"
    )

    content["categories"] += [{"id": number, "name": f"species {number}"} for number in range(1000, 2000)]
    (note,) = notes_of(tmp_path, content)
    assert "species 1008 and 991 more (1001 of 1003)" in note
    assert len(note) < 400


@pytest.mark.parametrize("fields", [{"iscrowd": 1}, {"bbox": [60, 60, -5, -5]}, {"ignore": 1}, {"image_id": 1}])
def test_validation_without_boxes_is_noted(tmp_path, fields):
    notes = notes_of(tmp_path, small_content(), with_fields(**fields))
    assert notes[0] == "no usable box in the validation data: AP will say nothing"
    assert open_content(tmp_path, with_fields(**fields), training=False).counts.used == 0

    without = small_content()
    del without["annotations"]
    assert notes_of(tmp_path, small_content(), without) == []


def test_missing_areas_are_counted(tmp_path):
    content = small_content()
    for annotation in content["annotations"][:4]:
        del annotation["area"]
    assert notes_of(tmp_path, content, small_content()) == [
        "4 training annotations without area: width x height of their box"
    ]
