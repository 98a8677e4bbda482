"""Annotations of generated objects: pycocotools reads the masks back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from train.synthetic.annotate import outlines, uncompressed_rle

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools.mask")


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**81 - 1))
@settings(max_examples=60, deadline=None)
def test_run_lengths_are_those_of_coco(height, width, bits):
    pixels = [bits >> position & 1 for position in range(height * width)]
    mask = np.array(pixels, bool).reshape(height, width)
    rle = uncompressed_rle(mask)
    assert sum(rle["counts"]) == mask.size
    assert np.array_equal(coco_mask.decode(coco_mask.frPyObjects(rle, height, width)), mask)


def test_outlines_follow_the_mask():
    mask = np.zeros((60, 80), bool)
    mask[10:30, 20:50] = True
    mask[40:50, 60:75] = True
    polygons = outlines(mask)
    assert len(polygons) == 2
    drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 60, 80))).astype(bool)
    assert (drawn & mask).sum() / (drawn | mask).sum() > 0.9
