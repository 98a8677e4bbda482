"""Sizes in the annotation file beside those of the files: other ones and exchanged ones, with EXIF rotation or not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.train.conftest import write_annotations
from tests.train.data.datasets import open_coco
from train.build import open_split
from train.config import PRESETS, Config, DataConfig
from train.data import image_sizes
from train.data.coco_dataset import UnreadableImageError
from train.data.samplers import spread_evenly
from train.distributed import World

WIDTH = 128
HEIGHT = 96
ORIENTATION_TAG = 0x0112


def make_photographs(root: Path, count: int, listed: list[tuple[int, int]], orientation: int, suffix: str) -> None:
    """Write pictures that are seen with `WIDTH` x `HEIGHT`, listed with other sizes (width, height) in turns.

    Each has a box in its left half and one in its right half.
    """
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    stored = (HEIGHT, WIDTH) if orientation >= 5 else (WIDTH, HEIGHT)
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    for index in range(count):
        name = f"{index:03d}.{suffix}"
        Image.new("RGB", stored, "gray").save(root / "train2017" / name, exif=exif)
        width, height = listed[index % len(listed)]
        content["images"].append({"id": index, "file_name": name, "width": width, "height": height})
        for x in (4, 100):
            box = [x, 10, 20, 40]
            annotation = {"id": len(content["annotations"]), "image_id": index, "category_id": 1, "bbox": box}
            polygon = [x, 10, x + 20, 10, x + 20, 50, x, 50]
            content["annotations"].append(annotation | {"area": 800, "iscrowd": 0, "segmentation": [polygon]})
    write_annotations(root, "train2017", content)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(("orientation", "suffix"), [(6, "jpg"), (8, "png"), (5, "webp"), (1, "jpg"), (1, "bmp")])
def test_boxes_are_meant_as_the_image_is_seen(tmp_path, orientation, suffix, masks):
    """Of images that are listed the wrong way round, the boxes in the right half would be outside."""
    listed = [(WIDTH, HEIGHT), (HEIGHT, WIDTH)]
    make_photographs(tmp_path, 8, listed, orientation, suffix)
    dataset = open_coco(tmp_path, masks=masks)
    assert len(dataset.boxes) == 16
    assert (dataset.widths == WIDTH).all()
    assert (dataset.heights == HEIGHT).all()
    (note,) = dataset.mistakes
    assert note.startswith("width and height of 4 of 8 images are listed the wrong way round")
    assert "fit only" not in note
    for index in range(8):
        sample = dataset[0, index]
        assert len(sample.boxes) == 2
        assert sample.original_size == (HEIGHT, WIDTH)
        if masks:
            assert sample.masks.any((1, 2)).all()


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_right_sizes_are_not_mentioned(tmp_path, orientation):
    make_photographs(tmp_path, 4, [(WIDTH, HEIGHT)], orientation, "jpg")
    dataset = open_coco(tmp_path)
    assert dataset.mistakes == []
    assert dataset.other_sizes == ""
    assert len(dataset.boxes) == 8


def test_boxes_that_fit_the_stored_image_are_told(tmp_path):
    """The picture is seen upright, and the boxes were drawn on the picture as it is stored."""
    make_photographs(tmp_path, 3, [(WIDTH, HEIGHT)], 1, "jpg")
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    for path in (tmp_path / "train2017").iterdir():
        Image.new("RGB", (WIDTH, HEIGHT)).save(path, exif=exif)
    (note,) = open_coco(tmp_path).mistakes
    assert note.endswith("3 of their boxes fit only the image that is not rotated: look at the pictures")


@pytest.mark.parametrize("limit", [0, 3])
def test_image_outside_of_the_sample_is_found_by_its_boxes(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(image_sizes, "MAX_SAMPLE", 1)
    make_photographs(tmp_path, 6, [(WIDTH, HEIGHT), (WIDTH, HEIGHT), (HEIGHT, WIDTH)], 6, "jpg")
    dataset = open_coco(tmp_path, limit=limit)
    assert (dataset.widths == WIDTH).all()
    assert len(dataset.boxes) == 2 * len(dataset)


@pytest.mark.parametrize("masks", [False, True])
def test_image_that_was_not_compared(tmp_path, monkeypatch, masks):
    """Its boxes are those of the seen image, whichever way round it is listed; its masks had another size."""
    monkeypatch.setattr("train.data.coco_dataset.correct_sizes", lambda images, *_: (images, "", ""))
    make_photographs(tmp_path, 1, [(HEIGHT, WIDTH)], 6, "jpg")
    dataset = open_coco(tmp_path, masks=masks)
    if masks:
        with pytest.raises(UnreadableImageError, match=r"000\.jpg: expected 96 x 128 pixels, as listed, got 128 x 96"):
            dataset[0, 0]
    else:
        assert dataset[0, 0].original_size == (HEIGHT, WIDTH)


@pytest.mark.parametrize("listed", [(64, 48), (WIDTH + 1, HEIGHT), (HEIGHT - 1, WIDTH), (1280, 960)])
def test_another_size_names_both(tmp_path, listed):
    make_photographs(tmp_path, 20, [(WIDTH, HEIGHT)] * 19 + [listed], 6, "jpg")
    dataset = open_coco(tmp_path)
    assert dataset.other_sizes == ""  # one of twenty: the training decides
    message = rf"019\.jpg: expected {listed[0]} x {listed[1]} pixels, as listed, got 128 x 96"
    with pytest.raises(UnreadableImageError, match=message):
        dataset[0, 19]


@pytest.mark.parametrize("wrong", [1, 4, 8])
def test_data_set_of_other_sizes_does_not_start(tmp_path, wrong):
    make_photographs(tmp_path, 8, [(64, 48)] * wrong + [(WIDTH, HEIGHT)] * (8 - wrong), 1, "jpg")
    config = Config(data=DataConfig(root=tmp_path), model=PRESETS["tiny"].model)
    with pytest.raises(ValueError, match=rf"instances_train2017\.json: .* {wrong} of 8 that were compared") as error:
        open_split(config, World(0, 1, 0, torch.device("cpu")), "train")
    assert "000.jpg has 128 x 96, listed are 64 x 48" in str(error.value)
    assert str(error.value).count("listed are") == min(wrong, 3)


def test_files_that_cannot_be_read_are_left_to_the_training(tmp_path):
    make_photographs(tmp_path, 4, [(WIDTH, HEIGHT)], 1, "jpg")
    images = sorted((tmp_path / "train2017").iterdir())
    images[0].unlink()
    images[1].write_bytes(b"")
    images[2].write_bytes(images[2].read_bytes()[:100])
    dataset = open_coco(tmp_path)
    assert dataset.other_sizes == ""
    assert dataset.mistakes == []


def test_sample_is_the_same_at_every_start():
    np.testing.assert_array_equal(spread_evenly(1001, 5), [0, 250, 500, 750, 1000])
    np.testing.assert_array_equal(spread_evenly(3, 500), [0, 1, 2])
    assert len(spread_evenly(0, 500)) == 0
