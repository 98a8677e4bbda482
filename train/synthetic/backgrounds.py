"""Backgrounds of the generated photographs: ground, wood, cloth, a blurred distance, and a table before a wall."""

from __future__ import annotations

import cv2
import numpy as np
from numpy import ndarray
from numpy.random import Generator

from train.synthetic.paint import blend, noise, palette


def muted(rng: Generator) -> tuple[ndarray, ndarray, ndarray]:
    """Draw a palette as rooms and landscapes have it: mostly earth or sky, seldom vivid."""
    return palette(rng, rng.normal(0.09, 0.06) if rng.uniform() < 0.6 else rng.normal(0.5, 0.12), vivid=0.5)


def ground(rng: Generator, height: int, width: int) -> ndarray:
    """Sand, soil or moss: rough mottled color with pebbles of light and shade."""
    base, accent, dark = muted(rng)
    rough = noise(rng, height, width, (3, 4), 6)
    image = blend(base, accent, np.clip(0.4 + 0.3 * noise(rng, height, width, (2, 3), 3), 0, 1))
    image = blend(image, dark, np.clip(0.25 * rough, 0, 0.7))
    grain = noise(rng, height, width, (height / 3, width / 3), 2)
    return image * (1 + rng.uniform(0.03, 0.14) * grain + 0.06 * rough)


def wood(rng: Generator, height: int, width: int) -> ndarray:
    """Planks: stretched grain, rings, dark gaps."""
    base, accent, _ = muted(rng)
    grain = noise(rng, height, width, (24, 2), 3)
    rings = np.sin(rng.uniform(4, 12) * noise(rng, height, width, (4, 0.5), 2))
    image = blend(base, accent, np.clip(0.4 + 0.15 * grain + 0.2 * rings, 0, 1))
    planks = rng.integers(2, 7)
    row = (np.arange(height) + rng.uniform(0, height)) * planks / height
    gap = np.exp(-((((row % 1) - 0.5) * height / planks / 1.2) ** 2))
    tone = 1 + 0.12 * rng.standard_normal(2 * planks + 1)[row.astype(int)]
    image *= (tone * (1 - 0.6 * gap)).astype(np.float32)[:, None]
    return image


def cloth(rng: Generator, height: int, width: int) -> ndarray:
    """A woven, striped or checked cloth with soft folds."""
    base, accent, _ = muted(rng)
    folds = noise(rng, height, width, (1.5, 2), 3)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = x + 3 * folds, y + 3 * noise(rng, height, width, (1.5, 2), 2)
    pitch = rng.uniform(0.1, 0.5)
    stripes = 0.5 + 0.5 * np.clip(3 * np.sin(pitch * x), -1, 1)
    if rng.uniform() < 0.5:
        stripes = (stripes + 0.5 + 0.5 * np.clip(3 * np.sin(pitch * y), -1, 1)) / 2
    weave = 1 + 0.05 * np.sin(2.1 * x) * np.sin(2.1 * y)
    return blend(base, accent, stripes * np.float32(rng.uniform(0.15, 0.7))) * (weave * (1 + 0.1 * folds))


def distance(rng: Generator, height: int, width: int) -> ndarray:
    """Something far out of focus: blurred shapes over a gradient, and discs of light."""
    base, accent, dark = muted(rng)
    fade = np.linspace(0, 1, height, dtype=np.float32)[:, None].repeat(width, 1)
    image = cv2.merge(blend(accent if rng.uniform() < 0.5 else dark, base, fade))
    for _ in range(rng.integers(8, 25)):
        shade = [float(value) for value in muted(rng)[rng.integers(3)]]
        center = (int(rng.integers(width)), int(rng.integers(height)))
        axes = (int(rng.integers(6, 70)), int(rng.integers(6, 40)))
        cv2.ellipse(image, center, axes, rng.uniform(0, 180), 0, 360, shade, -1)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(4, 14))
    lights = np.zeros_like(image)
    for _ in range(rng.integers(0, 12)):
        center = (int(rng.integers(width)), int(rng.integers(height)))
        shade = rng.uniform(0.1, 0.5, 3)
        cv2.circle(lights, center, int(rng.integers(4, 16)), shade.tolist(), -1, cv2.LINE_AA)
    return np.stack(cv2.split(image + cv2.GaussianBlur(lights, (0, 0), rng.uniform(1, 3))))


def room(rng: Generator, height: int, width: int) -> ndarray:
    """A table in front of a wall, each with a surface of its own."""
    surfaces = (ground, wood, cloth, distance)
    wall, soft = surfaces[rng.integers(4)](rng, height, width), rng.uniform(1, 5)
    wall = np.stack([cv2.GaussianBlur(plane, (0, 0), soft) for plane in wall])
    table = surfaces[rng.integers(3)](rng, height, width)
    edge = rng.uniform(0.2, 0.6) * height + np.linspace(-1, 1, width) * rng.uniform(-0.12, 0.12) * height
    below = np.clip(np.arange(height)[:, None] - edge, 0, 1).astype(np.float32)
    near = np.clip((np.arange(height)[:, None] - edge) / height, 0, 1).astype(np.float32)
    return blend(wall, table * (0.75 + 0.5 * near), below)


def background(rng: Generator, height: int, width: int) -> ndarray:
    """Draw one background, (3, height, width) float32 RGB in [0, 1]."""
    scene = (ground, wood, cloth, distance, room)[rng.integers(5)]
    return np.clip(scene(rng, height, width), 0, 1).astype(np.float32)
