"""Run lengths: what pycocotools writes, and reads back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask

from detector.ops.rle import decode_mask, encode_mask, fill_all, mask_to_runs, rle_to_runs, runs_to_mask

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own


def check(mask):
    rle = encode_mask(mask)
    coco_rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert rle == {"size": coco_rle["size"], "counts": coco_rle["counts"].decode()}
    np.testing.assert_array_equal(coco_mask.decode(rle), mask)
    np.testing.assert_array_equal(decode_mask(rle), mask)
    np.testing.assert_array_equal(decode_mask(coco_rle), mask)

    runs = mask_to_runs(mask)
    np.testing.assert_array_equal(rle_to_runs(rle), runs)
    np.testing.assert_array_equal(runs_to_mask(runs, *mask.shape), mask)
    uncompressed = {"size": list(mask.shape), "counts": runs.tolist()}
    np.testing.assert_array_equal(coco_mask.decode(coco_mask.frPyObjects(uncompressed, *mask.shape)), mask)


@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
@settings(deadline=None, max_examples=100)
def test_small_masks(mask):
    check(mask)


@pytest.mark.parametrize("value", [True, False])
def test_long_runs(value):
    mask = np.full((700, 900), value)
    check(mask)
    mask[100:500, 300:420] = not value
    check(mask)
    y, x = np.mgrid[:700, :900]
    disk = (y - 350) ** 2 + (x - 400) ** 2 < 200**2
    check(disk)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"mask: expected \(H, W\) bool, got \(2, 3\) uint8"):
        encode_mask(np.zeros((2, 3), np.uint8))


def test_empty_masks_have_one_empty_run():
    assert mask_to_runs(np.zeros((0, 4), bool)).tolist() == [0]


def test_lengths_may_be_uncompressed():
    mask = decode_mask({"size": [2, 3], "counts": [1, 3, 2]})
    np.testing.assert_array_equal(mask, [[False, True, False], [True, True, False]])
    assert mask.dtype == bool


@pytest.mark.parametrize(
    "counts",
    ["", "garbage!~", "6o", "5", "7", "é", "0" * 7 + "o" * 12 + "0", [], [7], [5], [8, -2], [1.0, 5.0], ["6"], [[6]]],
)
def test_lengths_that_do_not_fill_the_mask_are_refused(counts):
    with pytest.raises(ValueError, match="counts: expected lengths that fill 2 x 3 pixels"):
        decode_mask({"size": [2, 3], "counts": counts})


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param([2**62, 2**62, 2**62, 2**62, 6], id="sum of 64 bits wraps"),
        pytest.param([2**32, 6], id="sum of 32 bits wraps"),
        pytest.param([2**70], id="too large for 64 bits"),
        pytest.param([0, 7, -1], id="negative"),
        pytest.param([True, 5], id="bool"),
        pytest.param([2.0, 4.0], id="float"),
        pytest.param([[1], 5], id="ragged"),
        pytest.param([None], id="none"),
        pytest.param({"0": 6}, id="object"),
        pytest.param(6, id="number"),
        pytest.param(None, id="missing"),
        pytest.param("\udc80", id="lone surrogate"),
        pytest.param("٦", id="digit that is not ASCII"),
        pytest.param("6\0", id="character 0"),
        pytest.param("oooooooooo1", id="number too long"),
        pytest.param("1" + "oooooo?" * 30000, id="differences whose sum wraps"),
        pytest.param("0" * 10**6, id="more runs than pixels"),
        pytest.param(b"o", id="cut off"),
    ],
)
def test_hostile_lengths_are_refused(counts):
    with pytest.raises(ValueError, match="counts: expected lengths that fill 2 x 3 pixels, got") as caught:
        decode_mask({"size": [2, 3], "counts": counts})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "size",
    [
        [10**9, 10**9],
        [2**32, 2**32],
        [-2, -3],
        [2.0, 3],
        [True, 6],
        ["2", "3"],
        "23",
        [6],
        [1, 2, 3],
        [[2], [3]],
        None,
        {"h": 2},
    ],
)
def test_hostile_sizes_are_refused(size):
    for counts in ([6], [10**18], "6"):
        with pytest.raises(ValueError, match=r"size: expected whole numbers \[height, width\] of at most 536870912"):
            decode_mask({"size": size, "counts": counts})


@pytest.mark.parametrize("rle", [None, [], "6", {}, {"counts": [6]}])
def test_what_is_no_run_lengths_is_refused(rle):
    with pytest.raises(ValueError, match=r"size: expected"):
        decode_mask(rle)


@pytest.mark.parametrize("runs", [[2**62, 2**62, 2**62, 2**62, 6], [-6, 12], [5], []])
def test_runs_that_do_not_fill_the_mask_are_refused(runs):
    with pytest.raises(ValueError, match="runs: expected lengths that fill 2 x 3 pixels"):
        runs_to_mask(np.array(runs, np.int64), 2, 3)


def test_empty_masks_come_back():
    for shape in ((0, 4), (4, 0), (0, 0)):
        assert decode_mask(encode_mask(np.zeros(shape, bool))).shape == shape


def test_many_texts_are_judged_as_each_alone():
    random = np.random.default_rng(0)
    masks = [random.random((4, 5)) < share for share in np.linspace(0, 1, 30)]
    good = [encode_mask(mask)["counts"] for mask in masks]
    pixels = np.full(31, 20)
    assert fill_all(good, pixels[:30])
    assert fill_all([text.encode() for text in good], pixels[:30])
    for _ in range(300):
        text = "".join(map(chr, random.integers(46, 114, random.integers(0, 5))))
        try:
            rle_to_runs({"size": [4, 5], "counts": text})
            is_good = True
        except ValueError:
            is_good = False
        for place in (0, 15, 30):
            assert fill_all([*good[:place], text, *good[place:]], pixels) == is_good
    assert not fill_all(["o", *good], pixels)  # its number would go on in the next text
    assert not fill_all(["\udc80", *good], pixels)
