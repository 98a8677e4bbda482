"""Pictures: what is drawn where, what is left alone, and labels that do not cover each other."""

import itertools

import numpy as np
import pytest
import torch

from detector import Detections, Target, draw
from detector.draw import class_color, draw_boxes, draw_comparison

NAMES = ["disc", "ring", "traffic light"]
ODD_NAMES = [
    "",
    "猫",
    "Größe",
    "two\nlines",
    "\x1b[2J",
    "\x00",
    "\ud800",
    "\u202eabc",
    "x" * 10_000,
    "e" + "\u0301" * 500,
]


def test_colors_of_neighboring_classes_differ():
    colors = np.array([class_color(label) for label in range(80)], int)
    distances = np.abs(colors[1:] - colors[:-1]).sum(1)
    assert distances.min() > 100
    assert len({tuple(color) for color in colors}) == 80


def test_box_is_drawn_in_its_color_and_the_input_left_alone():
    image = np.full((200, 300, 3), 77, np.uint8)
    boxes = torch.tensor([[60.0, 80.0, 160.0, 150.0]], requires_grad=True)
    labels = torch.tensor([1])
    picture = draw_boxes(image, boxes, labels, NAMES, torch.tensor([0.5]))
    assert (image == 77).all()
    assert picture.shape == image.shape
    for x, y in ((60, 120), (160, 120), (110, 150)):
        assert tuple(picture[y, x]) == class_color(1)
    np.testing.assert_array_equal(picture[90:140, 70:150], image[90:140, 70:150])
    np.testing.assert_array_equal(picture[160:], image[160:])


def test_masks_are_tinted():
    image = np.full((100, 100, 3), 100, np.uint8)
    mask = np.zeros((100, 100), bool)
    mask[20:60, 30:70] = True
    boxes = torch.tensor([[5.0, 5.0, 95.0, 95.0]])
    picture = draw_boxes(image, boxes, torch.tensor([1]), NAMES, masks=[mask])
    np.testing.assert_array_equal(picture[40, 50], (60 + 0.4 * np.array(class_color(1))).astype(int))
    assert (picture[70:90, 70:90] == 100).all()


def test_nothing_to_draw():
    image = np.full((20, 30, 3), 77, np.uint8)
    np.testing.assert_array_equal(draw_boxes(image, torch.zeros(0, 4), torch.zeros(0).long(), NAMES), image)


def test_covered_areas():
    one = [(0, 0, 4, 4), (10, 10, 12, 12), (-5, 1, 1, 9)]
    other = [(2, 2, 6, 6), (3, 0, 5, 1)]
    assert draw._covered_areas(one, other).tolist() == [2 * 2 + 1, 0, 0]
    assert draw._covered_areas(one, one).tolist() == [16 + 3, 4, 48 + 3]
    assert draw._covered_areas(one, []).tolist() == [0, 0, 0]


def test_text_of_a_narrow_picture_leaves_room():
    narrow = draw.font_scale(np.zeros((1440, 320, 3), np.uint8))
    assert narrow == draw.font_scale(np.zeros((320, 1440, 3), np.uint8)) == 0.64
    assert draw.font_scale(np.zeros((1440, 1080, 3), np.uint8)) == 1440 / 1100


def test_labels_do_not_cover_each_other(monkeypatch):
    placed = []
    draw_label = draw._draw_label

    def record(*arguments):
        rectangle = draw_label(*arguments)
        placed.append(rectangle)
        return rectangle

    monkeypatch.setattr(draw, "_draw_label", record)
    image = np.zeros((480, 640, 3), np.uint8)
    boxes = torch.tensor([300.0, 200.0, 380.0, 260.0]) + torch.arange(6).view(-1, 1) * 3  # nearly the same place
    labels = torch.tensor([0, 1, 2] * 2)
    draw_boxes(image, boxes, labels, NAMES, torch.linspace(1, 0.5, 6))
    assert len(placed) == 6
    assert all(draw._covered_areas([a], [b]) == 0 for a, b in itertools.combinations(placed, 2))
    assert all(0 <= x1 < x2 <= 640 and 0 <= y1 < y2 <= 480 for x1, y1, x2, y2 in placed)


@pytest.mark.parametrize("size", [(3, 3), (40, 25), (2000, 1500)])
def test_boxes_outside_or_without_area_and_small_images(size):
    boxes = torch.tensor([[-50.0, -50, 5000, 5000], [10, 10, 10, 10], [20, 20, 4, 4], [float("nan")] * 4, [1e30] * 4])
    picture = draw_boxes(np.zeros((*size, 3), np.uint8), boxes, torch.zeros(5).long(), NAMES, torch.rand(5))
    assert picture.shape == (*size, 3)
    assert picture.any()


def test_wrong_labels_and_lengths_are_named():
    image = np.zeros((20, 30, 3), np.uint8)
    boxes = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="labels: expected 0 to 2 for 3 class names, got 3 to 3"):
        draw_boxes(image, boxes, torch.tensor([3]), NAMES)
    with pytest.raises(ValueError, match="boxes, labels, scores: expected equal lengths, got 1, 2 and 2"):
        draw_boxes(image, boxes, torch.tensor([0, 1]), NAMES)


@pytest.mark.parametrize("size", [(64, 48), (300, 700)])
@pytest.mark.parametrize("count", [0, 3])
def test_comparison_has_both_halves_and_a_legend(size, count):
    image = np.full((*size, 3), 77, np.uint8)
    boxes = torch.tensor([[4.0, 20.0, 30.0, 40.0]] * count).view(-1, 4)
    labels = torch.arange(count)
    detections = Detections(boxes, torch.linspace(0.9, 0.5, count), labels)
    picture = draw_comparison(image, detections, Target(boxes[:1], labels[:1]), NAMES)
    assert picture.dtype == np.uint8
    assert picture.shape[1] > 2 * size[1]
    assert max(picture.shape[0], picture.shape[1] // 2) >= 640
    middle = picture.shape[1] // 2
    left = picture[:, : middle - 8]
    right = picture[:, middle + 8 :]
    if count:
        third = np.array(class_color(2))  # detected, but not in the ground truth; in the legend once
        assert (left == third).all(-1).sum() > 2 * (right == third).all(-1).sum()
        assert (right == np.array(class_color(0))).all(-1).any()


def test_long_legend_wraps():
    names = [f"a class with a long name {label}" for label in range(30)]
    labels = torch.arange(30)
    detections = Detections(torch.rand(30, 4) * 100, torch.rand(30), labels)
    image = np.zeros((100, 100, 3), np.uint8)
    nothing = Target(torch.zeros(0, 4), labels[:0])
    long_legend = draw_comparison(image, detections, nothing, names)
    one_detection = Detections(detections.boxes[:1], detections.scores[:1], labels[:1])
    short_legend = draw_comparison(image, one_detection, nothing, names)
    assert long_legend.shape[1] == short_legend.shape[1]
    assert long_legend.shape[0] > short_legend.shape[0]


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_any_name_can_be_drawn(name):
    image = np.zeros((60, 600, 3), np.uint8)
    boxes = torch.tensor([[10.0, 30.0, 40.0, 50.0]])
    labels = torch.tensor([0])
    picture = draw_boxes(image, boxes, labels, [name], torch.tensor([0.5]))
    assert (picture[:, -60:] == 0).all()  # a long name is shortened, and its score is still there
    comparison = draw_comparison(image, Detections(boxes, torch.tensor([0.5]), labels), Target(boxes, labels), [name])
    assert comparison.shape[0] < 200
