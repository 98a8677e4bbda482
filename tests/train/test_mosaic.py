"""The picture of the first training images."""

import numpy as np
import torch

from detector.draw import class_color
from tests.train.data.datasets import edit, open_coco
from train import mosaic
from train.mosaic import TILE_SIDE, draw_training_images


def has_color(picture, label):
    """Tell whether something was drawn in the color of a class."""
    return bool((picture == class_color(label)).all(-1).any())


def test_images_are_drawn_with_their_boxes(coco):
    dataset = open_coco(coco)
    torch.manual_seed(0)
    np.random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    picture = draw_training_images(dataset, [(0, index) for index in range(8)])
    assert (picture.dtype, picture.ndim) == (np.uint8, 3)
    tile_height = TILE_SIDE * 96 // 128
    assert 2 * tile_height < picture.shape[0] < 3 * tile_height
    assert 4 * TILE_SIDE <= picture.shape[1] < 4.1 * TILE_SIDE
    assert has_color(picture, 0)
    assert has_color(picture, 1)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()
    assert (picture == draw_training_images(dataset, [(0, index) for index in range(8)])).all()


def test_boxes_labels_and_titles_are_those_of_the_samples(coco, monkeypatch):
    dataset = open_coco(coco)
    drawn = []
    titles = []

    def draw_boxes(image, boxes, labels, names, masks):
        drawn.append((boxes, labels))
        return image

    def side_by_side(tiles, texts):
        titles.extend(texts)
        return np.hstack(tiles)

    monkeypatch.setattr(mosaic, "draw_boxes", draw_boxes)
    monkeypatch.setattr(mosaic, "side_by_side", side_by_side)
    keys = [(0, index) for index in range(5)]
    draw_training_images(dataset, keys)

    samples = [dataset[key] for key in keys]
    for sample, (boxes, labels) in zip(samples, drawn, strict=True):
        factor = TILE_SIDE / max(sample.image.shape[:2])
        assert factor != 1
        np.testing.assert_allclose(boxes.numpy(), sample.boxes * factor)
        assert labels.tolist() == sample.labels.tolist()
    assert {0, 1} <= {label for sample in samples for label in sample.labels.tolist()}
    sizes = [sample.image.shape[:2] for sample in samples]
    expected = [
        f"image {sample.image_id}, {width} x {height}" for sample, (height, width) in zip(samples, sizes, strict=True)
    ]
    assert titles == [*expected, "", "", ""]


def test_images_look_as_the_model_gets_them(coco):
    dataset = open_coco(coco)
    epochs = [draw_training_images(dataset, [(epoch, 0)]) for epoch in range(8)]
    dataset.transform = type(dataset.transform)((64, 64), flip=0.5)
    flipped = [draw_training_images(dataset, [(epoch, 0)]) for epoch in range(8)]
    assert all((picture == epochs[0]).all() for picture in epochs)
    same = [bool((picture == epochs[0]).all()) for picture in flipped]
    assert True in same
    assert False in same


def test_what_cannot_be_read_is_left_out(coco):
    dataset = open_coco(coco)
    expected = draw_training_images(dataset, [(0, 0), (0, 2)])
    dataset.image_path(1).unlink()
    assert (draw_training_images(dataset, [(0, 0), (0, 1), (0, 2)]) == expected).all()
    assert draw_training_images(dataset, [(0, 1)]) is None


def test_masks_are_drawn(coco):
    with_masks = draw_training_images(open_coco(coco, masks=True), [(0, 0)])
    assert (with_masks != draw_training_images(open_coco(coco), [(0, 0)])).any()


def test_images_of_all_shapes_and_without_boxes(coco):
    edit(coco, lambda content: content["annotations"][0].update(bbox=[5, 5, 0.5, 20]))
    dataset = open_coco(coco)
    dataset.transform = type(dataset.transform)((64, 64), short_sides=(32, 48, 600))
    picture = draw_training_images(dataset, [(epoch, epoch) for epoch in range(5)])
    assert picture.shape[1] >= 4 * TILE_SIDE
