"""Backgrounds of the generated photographs: ground, wood, cloth, a blurred distance, and a table before a wall.

Every function draws one, (3, height, width) float32 RGB. The order of the random draws decides the pictures.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy import ndarray
from numpy.random import Generator

from train.synthetic.paint import Palette, blend, fractal_noise, random_palette


def background(rng: Generator, height: int, width: int) -> ndarray:
    """Draw any of the backgrounds, its values clipped to [0, 1]."""
    scenes = (ground, wood, cloth, blurred_distance, table_and_wall)
    scene = scenes[rng.integers(5)]
    image: ndarray = np.clip(scene(rng, height, width), 0, 1)
    return image.astype(np.float32)


def muted_palette(rng: Generator) -> Palette:
    """Draw a palette as rooms and landscapes have it: mostly earth or sky, of low saturation."""
    earthy = rng.uniform() < 0.6
    hue = rng.normal(0.09, 0.06) if earthy else rng.normal(0.5, 0.12)
    return random_palette(rng, hue, max_saturation=0.5)


def ground(rng: Generator, height: int, width: int) -> ndarray:
    """Sand, soil or moss: rough mottled color with pebbles of light and shade."""
    base, accent, dark = muted_palette(rng)
    roughness = fractal_noise(rng, height, width, (3, 4), 6)
    patches = fractal_noise(rng, height, width, (2, 3), 3)
    image = blend(base, accent, np.clip(0.4 + 0.3 * patches, 0, 1))
    image = blend(image, dark, np.clip(0.25 * roughness, 0, 0.7))

    grain = fractal_noise(rng, height, width, (height / 3, width / 3), 2)
    grain_strength = rng.uniform(0.03, 0.14)
    return image * (1 + grain_strength * grain + 0.06 * roughness)


def wood(rng: Generator, height: int, width: int) -> ndarray:
    """Planks: stretched grain, rings, dark gaps."""
    base, accent, _ = muted_palette(rng)
    grain = fractal_noise(rng, height, width, (24, 2), 3)
    ring_frequency = rng.uniform(4, 12)
    rings = np.sin(ring_frequency * fractal_noise(rng, height, width, (4, 0.5), 2))
    image = blend(base, accent, np.clip(0.4 + 0.15 * grain + 0.2 * rings, 0, 1))

    planks = rng.integers(2, 7)
    plank_position = (np.arange(height) + rng.uniform(0, height)) * planks / height
    gap_distance = ((plank_position % 1) - 0.5) * height / planks / 1.2
    gap = np.exp(-(gap_distance**2))
    tones = rng.standard_normal(2 * planks + 1)
    tone = 1 + 0.12 * tones[plank_position.astype(int)]
    image *= (tone * (1 - 0.6 * gap)).astype(np.float32)[:, None]
    return image


def cloth(rng: Generator, height: int, width: int) -> ndarray:
    """A woven, striped or checked cloth with soft folds."""
    base, accent, _ = muted_palette(rng)
    folds = fractal_noise(rng, height, width, (1.5, 2), 3)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x = x + 3 * folds
    y = y + 3 * fractal_noise(rng, height, width, (1.5, 2), 2)

    frequency = rng.uniform(0.1, 0.5)
    stripes = 0.5 + 0.5 * np.clip(3 * np.sin(frequency * x), -1, 1)
    is_checked = rng.uniform() < 0.5
    if is_checked:
        stripes = (stripes + 0.5 + 0.5 * np.clip(3 * np.sin(frequency * y), -1, 1)) / 2

    contrast = np.float32(rng.uniform(0.15, 0.7))
    weave = 1 + 0.05 * np.sin(2.1 * x) * np.sin(2.1 * y)
    shading = weave * (1 + 0.1 * folds)
    image: ndarray = blend(base, accent, stripes * contrast) * shading
    return image


def blurred_distance(rng: Generator, height: int, width: int) -> ndarray:
    """Something far out of focus: blurred shapes over a gradient, and discs of light."""
    base, accent, dark = muted_palette(rng)
    top_color = accent if rng.uniform() < 0.5 else dark
    fade = np.linspace(0, 1, height, dtype=np.float32)[:, None].repeat(width, 1)
    image = cv2.merge(list(blend(top_color, base, fade)))

    for _ in range(rng.integers(8, 25)):
        palette = muted_palette(rng)
        color = palette[rng.integers(3)].tolist()
        center = _random_pixel(rng, height, width)
        axes = (int(rng.integers(6, 70)), int(rng.integers(6, 40)))
        cv2.ellipse(image, center, axes, rng.uniform(0, 180), 0, 360, color, -1)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(4, 14))

    lights = np.zeros_like(image)
    for _ in range(rng.integers(0, 12)):
        center = _random_pixel(rng, height, width)
        brightness = rng.uniform(0.1, 0.5, 3).tolist()
        radius = int(rng.integers(4, 16))
        cv2.circle(lights, center, radius, brightness, -1, cv2.LINE_AA)
    lights = cv2.GaussianBlur(lights, (0, 0), rng.uniform(1, 3))
    return np.stack(cv2.split(image + lights))


def _random_pixel(rng: Generator, height: int, width: int) -> tuple[int, int]:
    """Draw (x, y) inside the picture."""
    x = int(rng.integers(width))
    y = int(rng.integers(height))
    return x, y


def table_and_wall(rng: Generator, height: int, width: int) -> ndarray:
    """A table in front of a wall, each with a surface of its own."""
    walls = (ground, wood, cloth, blurred_distance)
    sharp_wall = walls[rng.integers(4)](rng, height, width)
    blur = rng.uniform(1, 5)
    wall = np.stack([cv2.GaussianBlur(plane, (0, 0), blur) for plane in sharp_wall])

    tables = (ground, wood, cloth)
    table = tables[rng.integers(3)](rng, height, width)

    edge_height = rng.uniform(0.2, 0.6) * height
    tilt = np.linspace(-1, 1, width) * rng.uniform(-0.12, 0.12) * height
    below_edge = np.arange(height)[:, None] - (edge_height + tilt)
    is_table = np.clip(below_edge, 0, 1).astype(np.float32)
    nearness = np.clip(below_edge / height, 0, 1).astype(np.float32)
    return blend(wall, table * (0.75 + 0.5 * nearness), is_table)
