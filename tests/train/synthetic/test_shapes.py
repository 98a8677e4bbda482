"""Painted objects: well formed, and their class does not follow from their color."""

import numpy as np
import pytest

from train.synthetic.shapes import CLASSES, DISTRACTOR


@pytest.mark.parametrize("name", [*CLASSES, "distractor"])
@pytest.mark.parametrize("size", [64, 150])
def test_paintings_are_well_formed(name, size):
    object_class = CLASSES.get(name, DISTRACTOR)
    for seed in range(8):
        painting = object_class.paint(np.random.default_rng(seed), size)
        assert painting.color.shape == (3, size, size)
        assert painting.alpha.shape == painting.relief.shape == (size, size)
        for layer in (painting.color, painting.alpha, painting.relief):
            assert layer.dtype == np.float32
            assert np.isfinite(layer).all()
        assert 0 <= painting.alpha.min() <= painting.alpha.max() <= 1
        assert 0.03 < painting.alpha.mean() < 0.7


def test_color_alone_does_not_tell_the_classes_apart():
    """The nearest mean color, fitted on the same paintings it is asked about, is often wrong."""
    colors = []
    labels = []
    for label, object_class in enumerate(CLASSES.values()):
        for seed in range(80):
            painting = object_class.paint(np.random.default_rng([label, seed]), 48)
            colors.append((painting.color * painting.alpha).sum((1, 2)) / painting.alpha.sum())
            labels.append(label)
    colors = np.array(colors)
    labels = np.array(labels)
    means = np.stack([colors[labels == label].mean(0) for label in range(len(CLASSES))])
    distances = ((colors[:, None] - means) ** 2).sum(2)
    assert (distances.argmin(1) == labels).mean() < 0.75
