"""Warping keeps an object whole and inside its patch."""

import cv2
import numpy as np

from train.synthetic.paint import Painting
from train.synthetic.render import warp


def test_warping_is_smooth_and_keeps_the_object():
    color = np.ones((3, 96, 96), np.float32)
    alpha = np.zeros((96, 96), np.float32)
    cv2.circle(alpha, (48, 48), 36, 1.0, -1)
    disc = Painting(color, alpha, relief=np.zeros((96, 96), np.float32), gloss=0)
    for seed in range(20):
        color, alpha, relief = warp(np.random.default_rng(seed), disc, 96.0, 180.0)
        assert color.shape == (3, *alpha.shape)
        assert relief.shape == alpha.shape
        assert 0.6 < alpha.sum() / disc.alpha.sum() < 1.6
        components, _ = cv2.connectedComponents((alpha > 0.5).astype(np.uint8))
        assert components == 2, "torn apart"
        border = [alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]]
        assert max(side.max() for side in border) < 1, "cut off"
