"""Run lengths: what pycocotools writes, and reads back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask

from detector.ops.rle import decode_mask, encode_mask, mask_to_runs, rle_to_runs, runs_to_mask

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
