"""Photographs: varied, and the same from the same seed."""

import numpy as np

from train.synthetic.scene import photograph
from train.synthetic.shapes import CLASSES


def test_photographs_vary():
    objects_of_pictures = [photograph(np.random.default_rng([0, seed]))[1] for seed in range(150)]
    objects = [seen for objects in objects_of_pictures for seen in objects]
    areas = np.array([seen.mask.sum() for seen in objects])
    assert {seen.label for seen in objects} == set(range(len(CLASSES)))
    assert any(seen.is_crowd for seen in objects)
    assert [] in objects_of_pictures, "no picture without objects"
    assert areas.min() < 200
    assert areas.max() > 64**2


def test_same_seed_same_picture():
    image, objects = photograph(np.random.default_rng([0, 5]))
    same_image, same_objects = photograph(np.random.default_rng([0, 5]))
    other_image, _ = photograph(np.random.default_rng([0, 6]))
    assert np.array_equal(image, same_image)
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(objects, same_objects, strict=True))
    assert image.shape != other_image.shape or not np.array_equal(image, other_image)
