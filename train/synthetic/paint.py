"""Brushes for the generated pictures: colors, noise, outlines, cushions and surface markings.

Coordinates are x to the right and y down, both in [-1, 1]; a painting is drawn on a square of `size` x `size` pixels.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import cv2
import numpy as np
from numpy import ndarray
from numpy.random import Generator

SUBPIXEL_BITS = 4  # cv2 drawing takes fixed-point coordinates with this many fractional bits


@dataclass(frozen=True)
class Painting:
    """An object before it is bent and lit.

    Attributes:
        color: (3, S, S) float32 RGB in [0, 1], without any light.
        alpha: (S, S) float32 in [0, 1], how much of a pixel the object covers.
        relief: (S, S) float32, height above the ground, in units of half the painting's side.
        gloss: strength of the highlights, 0 for a matt surface.
    """

    color: ndarray
    alpha: ndarray
    relief: ndarray
    gloss: float


def around(rng: Generator, hue: float) -> float:
    """Draw a hue near the usual one of a kind."""
    return (hue + rng.normal(0.0, 0.06)) % 1.0


def palette(rng: Generator, hue: float | None = None, vivid: float = 0.85) -> tuple[ndarray, ndarray, ndarray]:
    """Draw a base, an accent and a dark color, float32 RGB in [0, 1].

    Args:
        hue: of the base, in [0, 1); None draws any.
        vivid: greatest saturation.
    """
    hue = rng.uniform() if hue is None else hue
    draws = (
        (hue, rng.beta(2.5, 1.5), rng.uniform(0.4, 0.95)),
        (hue + rng.normal(0.0, 0.15), rng.beta(1.5, 1.5), rng.uniform(0.25, 1.0)),
        (hue + rng.normal(0.0, 0.05), rng.uniform(0.1, 0.6), rng.uniform(0.05, 0.25)),
    )
    return tuple(np.float32(colorsys.hsv_to_rgb(turn % 1.0, vivid * rich, value)) for turn, rich, value in draws)


def noise(rng: Generator, height: int, width: int, cells: tuple[float, float], octaves: int) -> ndarray:
    """Sum octaves of smooth random fields, each of twice the frequency and half the strength of the one before.

    Args:
        cells: (rows, columns) of random values of the first octave, fractions allowed; unequal ones stretch the grain.

    Returns:
        (height, width) float32 of about zero mean and unit deviation.
    """
    field = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        rows, columns = (int(count * 2**octave) + 2 for count in cells)
        grid = rng.standard_normal((min(rows, height), min(columns, width)), np.float32)
        field += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) * 0.5**octave
    return field / np.float32(field.std() + 1e-6)


def blend(under: ndarray, over: ndarray, amount: ndarray) -> ndarray:
    """Mix two colors, each (3, H, W) or (3,), by `amount` (H, W) in [0, 1]."""
    under, over = (color.reshape(3, 1, 1) if color.ndim == 1 else color for color in (under, over))
    return under + amount.astype(np.float32, copy=False) * (over - under)


def _fixed(points: ndarray, size: int) -> ndarray:
    """Turn (N, 2) points in [-1, 1] into cv2's fixed-point pixels."""
    pixels = (np.asarray(points, np.float64) + 1.0) * (size / 2) - 0.5
    return np.rint(pixels * 2**SUBPIXEL_BITS).astype(np.int32)


def fill(size: int, *outlines: ndarray) -> ndarray:
    """Return the (size, size) float32 coverage of the union of closed outlines, each (N, 2) points."""
    canvas = np.zeros((size, size), np.uint8)
    for outline in outlines:
        cv2.fillPoly(canvas, [_fixed(outline, size)], 255, cv2.LINE_AA, SUBPIXEL_BITS)
    return canvas.astype(np.float32) / 255


def stroke(size: int, width: float, *lines: ndarray) -> ndarray:
    """Return the (size, size) float32 coverage of lines, each (N, 2) points; `width` in units of half the side."""
    canvas = np.zeros((size, size), np.uint8)
    thickness = max(1, round(width * size / 2))
    for line in lines:
        cv2.polylines(canvas, [_fixed(line, size)], False, 255, thickness, cv2.LINE_AA, SUBPIXEL_BITS)
    return canvas.astype(np.float32) / 255


def ellipse(x: float, y: float, rx: float, ry: float, start: float = 0.0, stop: float = 2 * np.pi) -> ndarray:
    """Return (48, 2) points of an ellipse, or of its arc between two angles in radians."""
    angle = np.linspace(start, stop, 48)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def swell(mask: ndarray, width: float) -> ndarray:
    """Return a cushion over `mask`: 0 at its edge, rising over `width` (units of half the side) to a flat `width`."""
    size = mask.shape[0]
    depth = cv2.distanceTransform((mask > 0.5).astype(np.uint8), cv2.DIST_L2, 3) / (width * size / 2)
    cushion = np.sin(np.clip(depth, 0.0, 1.0) * np.float32(np.pi / 2)) * np.float32(width)
    return cv2.GaussianBlur(cushion, (0, 0), 0.01 * size + 0.5)


def markings(rng: Generator, size: int, base: ndarray, accent: ndarray) -> ndarray:
    """Paint a (3, size, size) surface, plain, striped, spotted or mottled; any kind of object can wear any."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
    cloud = noise(rng, size, size, (3, 3), 4)
    style = rng.integers(4)
    if style == 0:
        amount = 0.25 + 0.15 * cloud
    elif style == 1:
        angle, frequency = rng.uniform(0, np.pi), rng.uniform(5, 16)
        wave = np.sin(frequency * (x * np.cos(angle) + y * np.sin(angle)) + 0.6 * cloud + rng.uniform(0, 6))
        amount = 0.5 + 0.5 * np.clip(4 * wave, -1, 1)
    elif style == 2:
        amount = np.clip(3 * (noise(rng, size, size, (6, 6), 1) - rng.uniform(0.4, 1.0)), 0, 1)
    else:
        amount = np.clip(0.5 + 0.6 * cloud, 0, 1)
    return blend(base, accent, amount * np.float32(rng.uniform(0.4, 0.9))) * (1 + 0.05 * cloud)
