"""Placing sprites: no object is hidden too far, and pixels of sprite and canvas are paired."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from train.synthetic.canvas import NO_OBJECT, Canvas, overlap
from train.synthetic.render import Light, Sprite


def square(side: int) -> Sprite:
    return Sprite(np.ones((3, side, side), np.float32), np.ones((side, side), np.float32))


def test_canvas_hides_no_object_too_far():
    light = Light(np.array([0, 0, 1], np.float32), ambient=0.5)
    canvas = Canvas(np.zeros((3, 100, 120), np.float32), light)
    under = canvas.add_object(0)
    over = canvas.add_object(1)
    outside = canvas.add_object(2)
    assert canvas.place(square(20), 50, 50, under)
    assert not canvas.place(square(20), 53, 53, over), "hides more than half"
    assert canvas.place(square(20), 65, 50, over)
    assert not canvas.place(square(20), 0, 0, outside), "three quarters out of the frame"
    assert not canvas.place(square(60), 55, 50, NO_OBJECT), "a distractor hides two objects"
    objects = canvas.objects()
    assert [seen.label for seen in objects] == [0, 1]
    assert [int(seen.mask.sum()) for seen in objects] == [300, 400]


@given(st.integers(-30, 40), st.integers(-30, 40))
@settings(max_examples=40, deadline=None)
def test_overlap_pairs_the_same_pixels(left, top):
    small = np.zeros((7, 5))
    large = np.zeros((20, 30))
    in_small, in_large = overlap(left, top, small.shape, large.shape)
    assert small[in_small].shape == large[in_large].shape
    small[in_small] = 1
    expected = sum(0 <= top + y < 20 and 0 <= left + x < 30 for y in range(7) for x in range(5))
    assert small.sum() == expected
