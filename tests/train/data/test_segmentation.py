"""Segmentations: drawn as pycocotools draws them, kept as flat arrays; what cannot be drawn is counted or named."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from detector.ops.rle import encode_mask
from tests.train.data.datasets import edit, open_coco
from train.data.coco_dataset import UnreadableImageError
from train.data.segmentation import read_segmentations, take_rows
from train.synthetic.annotate import uncompressed_rle

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools.mask")
SIZE = 31, 47


def pycocotools_draws(segmentation):
    coco = COCO()
    coco.imgs = {1: {"height": SIZE[0], "width": SIZE[1]}}
    return coco.annToMask({"image_id": 1, "segmentation": segmentation})


def parse(values, training=True):
    """Return the segmentations of objects of one image; one more is read, as not all may lie between 0 and 1."""
    entries = [{"segmentation": value} for value in [*values, [[0, 0, 30, 0, 30, 30]]]]
    count = len(entries)
    sizes = np.tile(SIZE, (count, 1))
    segmentations, *_ = read_segmentations(entries, np.arange(count), np.zeros(count, int), sizes, training=training)
    return segmentations.take(np.arange(len(values)))


def flatten(points):
    return [coordinate for point in points for coordinate in point]


COORDINATE = st.floats(-20, 60).map(lambda value: round(value, 2))
POLYGON = st.lists(st.tuples(COORDINATE, COORDINATE), min_size=3, max_size=8).map(flatten)


def random_mask(seed):
    return np.random.default_rng(seed).random(SIZE) < 0.4


@given(st.lists(st.lists(POLYGON, min_size=1, max_size=3), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_polygons_are_drawn_as_pycocotools_draws_them(objects):
    segmentations = parse(objects)
    assert len(segmentations) == len(objects)
    for index, value in enumerate(objects):
        mask = segmentations.draw(index, *SIZE)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, pycocotools_draws(value))


def test_all_three_forms_side_by_side():
    values = [
        encode_mask(random_mask(0)),
        [[3, 4, 30, 5.5, 20, 25]],
        uncompressed_rle(random_mask(1)),
        [[1, 1, 9, 1, 9, 9], [20, 20, 40, 20, 30, 30, 25, 28]],
        encode_mask(np.zeros(SIZE, bool)),
    ]
    segmentations = parse(values)
    order = np.array([4, 1, 1, 2, 0, 3])
    cases = [
        (segmentations, range(5)),
        (segmentations.take(order), order),
        (segmentations.take(order[:0]), []),
    ]
    for taken, numbers in cases:
        assert len(taken) == len(numbers)
        for index, number in enumerate(numbers):
            np.testing.assert_array_equal(taken.draw(index, *SIZE), pycocotools_draws(values[number]))
    assert not any(array.dtype.hasobject for array in vars(segmentations).values())


def test_parts_that_are_no_polygons_are_left_out():
    triangle = [3, 4, 30, 5.5, 20, 25]
    segmentations = parse([[[1, 1, 30, 30], triangle, [5, 5, 9, 9, 5]]])
    np.testing.assert_array_equal(segmentations.draw(0, *SIZE), pycocotools_draws([triangle]))


@given(st.lists(st.lists(COORDINATE, min_size=5, max_size=13), min_size=1, max_size=3))
@settings(deadline=None, max_examples=60)
def test_evaluation_draws_polygons_of_any_count_as_pycocotools_does(polygons):
    segmentations = parse([polygons], training=False)
    np.testing.assert_array_equal(segmentations.draw(0, *SIZE), pycocotools_draws(polygons))
    np.testing.assert_array_equal(pycocotools_draws(segmentations.to_coco(0, *SIZE)), pycocotools_draws(polygons))


@pytest.mark.parametrize("count", range(5))
def test_short_polygons_behind_others_draw_nothing(count):
    polygons = [[3, 4, 30, 5.5, 20, 25, 7], [10, 40, 40, 2, 9][:count]]
    segmentations = parse([polygons], training=False)
    np.testing.assert_array_equal(segmentations.draw(0, *SIZE), pycocotools_draws(polygons))


TRIANGLE = [3, 4, 30, 5.5, 20, 25]


@pytest.mark.parametrize(
    ("polygons", "training", "pixels_of", "notes"),
    [
        pytest.param([TRIANGLE], True, [TRIANGLE], [], id="triangle"),
        pytest.param([TRIANGLE, [40, 2, 45, 2, 45, 30, 9]], True, [TRIANGLE], ["odd, left out: 1"], id="training"),
        pytest.param(
            [TRIANGLE, [40, 2, 45, 2, 45, 30, 9]],
            False,
            [TRIANGLE, [40, 2, 45, 2, 45, 30]],
            ["odd, drawn without the last one: 1"],
            id="evaluation",
        ),
        pytest.param(
            [[1, 2, 3, 4], TRIANGLE, [5], [*TRIANGLE, 1], [*TRIANGLE, 1, 2, 3]],
            True,
            [TRIANGLE],
            ["odd, left out: 2", "short, left out: 2"],
            id="both",
        ),
    ],
)
def test_polygons_that_are_not_drawn_are_told(coco, polygons, training, pixels_of, notes):
    split = "train2017" if training else "val2017"
    edit(coco, lambda content: content["annotations"][0].update(segmentation=polygons), split)
    dataset = open_coco(coco, split, masks=True)
    names = {"odd": "polygons with an odd count of numbers", "short": "polygons with less than three corners"}
    expected = [f"{names[kind]}, {text}" for kind, text in (note.split(", ") for note in notes)]
    assert dataset.mistakes == expected
    drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(pixels_of, 96, 128)))
    np.testing.assert_array_equal(next(dataset.masks(0)), drawn)
    assert open_coco(coco, split).mistakes == []


def test_take_rows():
    members, starts = take_rows(np.array([0, 2, 2, 5]), np.array([2, 0, 1, 2]))
    assert members.tolist() == [2, 3, 4, 0, 1, 2, 3, 4]
    assert starts.tolist() == [0, 3, 5, 5, 8]


def test_masks_stand_in_the_order_of_the_boxes(coco):
    edit(coco, lambda content: content["annotations"].reverse())
    for dataset in (open_coco(coco, masks=True), open_coco(coco, masks=True, limit=3)):
        for index in range(len(dataset)):
            boxes, _ = dataset.ground_truth(index)
            masks = list(dataset.masks(index))
            assert len(boxes) == len(masks)
            for (x1, y1, x2, y2), mask in zip(boxes.astype(int), masks, strict=True):
                assert mask.shape == (96, 128)
                assert mask[y1:y2, x1:x2].all()
                assert mask.sum() == (x2 - x1) * (y2 - y1)
    assert open_coco(coco).segmentations is None


@pytest.mark.parametrize(
    "value", [[], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [[1, 2, 3, 4, 5]], {"size": [96, 128]}, {"counts": []}]
)
def test_objects_without_a_polygon_are_not_trained_on(coco, value):
    whole = open_coco(coco, masks=True)
    edit(coco, lambda content: content["annotations"][3].update(segmentation=value))
    dataset = open_coco(coco, masks=True)
    assert dataset.counts.no_polygon == 1
    assert "1 without a valid polygon" in str(dataset.counts)
    assert len(dataset.boxes) == len(dataset.segmentations) == len(whole.boxes) - 1
    assert len(dataset) == len(whole)  # the image stays
    assert open_coco(coco).counts.no_polygon == 0


@pytest.mark.parametrize("value", [[], [[1, 2, 3, 4]], [[1, 2, 3]], {"size": [96, 128]}, {"counts": []}])
def test_what_pycocotools_does_not_read_is_not_evaluated(coco, value):
    edit(coco, lambda content: content["annotations"][3].update(segmentation=value))
    with pytest.raises(ValueError, match=r"annotations\[3\] .*expected a valid polygon to compare masks with"):
        open_coco(coco, masks=True, training=False)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param(None, "expected one, which a model with masks", id="null"),
        pytest.param("abc", "expected polygons or run lengths, got 'abc'", id="string"),
        pytest.param([1, 2, 3, 4, 5, 6], "expected polygons or run lengths", id="flat"),
        pytest.param([[1, 2, 3, 4, 5, "6"]], "expected polygons of numbers", id="word"),
        pytest.param([[1, 2, 3, 4, 5, float("nan")]], "expected polygons of numbers", id="nan"),
        pytest.param({"size": [128, 96], "counts": [12288]}, "expected the size of its image, 96 x 128", id="size"),
        pytest.param({"size": [96, 128], "counts": [7]}, "expected lengths that fill 96 x 128 pixels", id="short"),
        pytest.param({"size": [96, 128], "counts": "~"}, "expected lengths that fill 96 x 128 pixels", id="garbage"),
    ],
)
def test_malformed_segmentations_are_named(coco, value, message):
    edit(coco, lambda content: content["annotations"][3].update(segmentation=value))
    with pytest.raises(ValueError, match=rf"instances_train2017.json: annotations\[3\] \(id 4\): .*{message}"):
        open_coco(coco, masks=True)
    open_coco(coco)


SQUARE = [[10, 10], [60, 10], [60, 60], [10, 60]]
COMB = [coordinate for x in range(128) for coordinate in (x, 0, x, 96)]  # 128 edges of 96 pixels


@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param([SQUARE], "polygons .* without a list for every point", id="polygon of points"),
        pytest.param(SQUARE, "polygons .* without a list for every point", id="points"),
        pytest.param([SQUARE[:3]], "polygons .* without a list for every point", id="triangle of points"),
        pytest.param([[0, 0, 9, 0, 9, 9], SQUARE], "polygons .* without a list for every point", id="mixed"),
        pytest.param([{"x": 1, "y": 2}], "expected polygons or run lengths", id="objects"),
        pytest.param([[0, 0, 9, 0, 9, True]], "expected polygons of numbers", id="bool"),
        pytest.param([[0, 0, 9, 0, 9, None]], "expected polygons of numbers", id="none"),
        pytest.param(
            [[0, 0, 9, 0, 9, float("inf")]], r"expected polygons of numbers, got the corner \(9, inf\)", id="inf"
        ),
        pytest.param([[0, 0, 9, 0, 9, 10**400]], "expected polygons of numbers", id="400 digits"),
        pytest.param([[0, 0, 9, 0, 9, 1e9]], r"at most 1280 pixels outside .*, got \(9, 1e\+09\)", id="far below"),
        pytest.param([[0, 0, 9, 0, -1e308, 9]], "at most 1280 pixels outside", id="far left"),
        pytest.param([[0, 0, 1409, 0, 9, 9]], "at most 1280 pixels outside", id="just beyond the margin"),
        pytest.param([COMB * 500], "at most 8388608 pixels of outline in one image", id="outline"),
        pytest.param([COMB * 250] * 2, "at most 8388608 pixels of outline in one image", id="outlines"),
        pytest.param({"size": [96, 128], "counts": [2**62] * 4 + [12288]}, "counts: expected lengths", id="wraps"),
        pytest.param({"size": [96, 128], "counts": [-6, 12294]}, "counts: expected lengths", id="negative"),
        pytest.param({"size": [96, 128], "counts": [12280, 9]}, "counts: expected lengths", id="a pixel too many"),
        pytest.param({"size": [96, 128], "counts": [12280, 7.5]}, "counts: expected lengths", id="half a pixel"),
        pytest.param({"size": [96, 128], "counts": []}, "counts: expected lengths", id="no run"),
        pytest.param([{"size": [96, 128], "counts": [12288]}], "expected polygons or run lengths", id="list of runs"),
        pytest.param({"size": [96.0, 128.0], "counts": [12288]}, "size: expected whole numbers", id="float size"),
        pytest.param({"size": "96x128", "counts": [12288]}, "expected the size of its image", id="size as text"),
        pytest.param({"size": [96, 128], "counts": 12288}, "counts: expected lengths", id="number"),
        pytest.param({"size": [96, 128], "counts": "\udc80"}, "counts: expected lengths", id="half a character"),
    ],
)
def test_nothing_hostile_reaches_native_code(coco, value, message):
    def change(content):
        for annotation in content["annotations"][2:]:
            annotation.update(segmentation=value)

    edit(coco, change)
    for training in (True, False):
        with pytest.raises(ValueError, match=rf"annotations\[2\] \(id 3\): 'segmentation': .*{message}") as caught:
            open_coco(coco, masks=True, training=training)
        line = str(caught.value)
        assert "\n" not in line
        assert len(line) < 1200
        if "outline" not in message:  # of which the longest one of each image is named
            assert re.search(r"annotations\[3\] .*annotations\[4\] .*; 10 in all$", line)


def test_problems_of_two_kinds_are_counted_together(coco):
    def change(content):
        content["annotations"][1].update(segmentation=[[0, 0, 9, 0, 9, 1e9]])
        content["annotations"][2].update(segmentation="abc")

    edit(coco, change)
    with pytest.raises(ValueError, match=r"annotations\[1\] .*outside.*; annotations\[2\] .*got 'abc'$"):
        open_coco(coco, masks=True)


@pytest.mark.parametrize("value", [-0.5, 131.25, -1280, 1408])
def test_corners_within_the_margin_are_drawn(coco, value):
    polygon = [20, 20, value, 20, 60, 60]
    edit(coco, lambda content: content["annotations"][0].update(segmentation=[polygon]))
    dataset = open_coco(coco, masks=True)
    drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([polygon], 96, 128)))
    np.testing.assert_array_equal(next(dataset.masks(0)), drawn)


@pytest.mark.parametrize("sides", [(128, 96), (2**17, 2**17)])
def test_polygons_in_shares_of_the_image_are_refused(coco, sides):
    def change(content):
        for annotation in content["annotations"]:
            x1, y1, *_, x2, y2 = (value / sides[index % 2] for index, value in enumerate(annotation["segmentation"][0]))
            annotation["segmentation"] = [[x1, y1, x2, y2, x2, y1]]

    edit(coco, change)
    with pytest.raises(ValueError, match="'segmentation': expected polygons in pixels, got all of them between 0 and"):
        open_coco(coco, masks=True)
    edit(coco, lambda content: content["annotations"][0].update(segmentation=[[0, 0, 9, 0, 9, 9]]))
    open_coco(coco, masks=True)


def test_images_too_large_for_masks_are_named(coco):
    edit(coco, lambda content: [image.update(width=2**20, height=2**20) for image in content["images"]])
    with pytest.raises(ValueError, match=r"annotations\[0\] .*: expected an image of at most 536870912 pixels"):
        open_coco(coco, masks=True)
    open_coco(coco)


def drop_segmentations(content):
    for annotation in content["annotations"]:
        del annotation["segmentation"]


def test_data_without_masks_names_the_flag(coco):
    for split in ("train2017", "val2017"):
        edit(coco, drop_segmentations, split)
        message = rf"{split}.json: annotations\[0\] .*'segmentation': expected one.*--model.mask"
        with pytest.raises(ValueError, match=message):
            open_coco(coco, split, masks=True)


def test_crowds_need_a_mask_in_evaluation_only(coco):
    def crowd(content):
        content["annotations"][0].update(iscrowd=1)
        del content["annotations"][0]["segmentation"]

    edit(coco, crowd)
    assert open_coco(coco, masks=True).counts.crowd == 1
    with pytest.raises(ValueError, match=r"annotations\[0\]"):
        open_coco(coco, masks=True, training=False)


def test_image_of_another_size_is_unreadable(coco):
    def shrink(content):
        content["images"][0].update(height=95)

    edit(coco, shrink)
    for masks in (False, True):
        message = "000100.png: expected 128 x 95 pixels, as listed, got 128 x 96$"
        with pytest.raises(UnreadableImageError, match=message):
            open_coco(coco, masks=masks)[0, 0]
