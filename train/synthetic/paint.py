"""Drawing tools for the generated pictures: colors, noise, outlines, relief and surface patterns.

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

Palette = tuple[ndarray, ndarray, ndarray]  # base, accent and dark color, each (3,) float32 RGB in [0, 1]


@dataclass(frozen=True)
class Painting:
    """An object before it is warped and lit.

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


def vary_hue(rng: Generator, hue: float) -> float:
    """Draw a hue near the usual one of an object class."""
    return (hue + rng.normal(0.0, 0.06)) % 1.0


def random_palette(rng: Generator, hue: float | None = None, max_saturation: float = 0.85) -> Palette:
    """Draw a base, an accent and a dark color.

    Args:
        rng: random generator.
        hue: of the base, in [0, 1); None draws any.
        max_saturation: of all three.
    """
    if hue is None:
        hue = rng.uniform()

    base_saturation = rng.beta(2.5, 1.5)
    base_value = rng.uniform(0.4, 0.95)
    base = _rgb(hue, max_saturation * base_saturation, base_value)

    accent_hue = hue + rng.normal(0.0, 0.15)
    accent_saturation = rng.beta(1.5, 1.5)
    accent_value = rng.uniform(0.25, 1.0)
    accent = _rgb(accent_hue, max_saturation * accent_saturation, accent_value)

    dark_hue = hue + rng.normal(0.0, 0.05)
    dark_saturation = rng.uniform(0.1, 0.6)
    dark_value = rng.uniform(0.05, 0.25)
    dark = _rgb(dark_hue, max_saturation * dark_saturation, dark_value)
    return base, accent, dark


def _rgb(hue: float, saturation: float, value: float) -> ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32)


def fractal_noise(rng: Generator, height: int, width: int, cells: tuple[float, float], octaves: int) -> ndarray:
    """Sum octaves of smooth random fields, each of twice the frequency and half the strength of the one before.

    Args:
        rng: random generator.
        height: of the result.
        width: of the result.
        cells: (rows, columns) of random values of the first octave, fractions allowed; unequal ones stretch the grain.
        octaves: how many fields.

    Returns:
        (height, width) float32 of about zero mean and unit deviation.
    """
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        frequency = 2**octave
        rows = int(cells[0] * frequency) + 2
        columns = int(cells[1] * frequency) + 2
        values = rng.standard_normal((min(rows, height), min(columns, width)), np.float32)
        field = cv2.resize(values, (width, height), interpolation=cv2.INTER_CUBIC)
        total += field * 0.5**octave
    return total / np.float32(total.std() + 1e-6)


def blend(under: ndarray, over: ndarray, amount: ndarray) -> ndarray:
    """Mix two colors, each (3, H, W) or (3,), by `amount` (H, W) in [0, 1]."""
    under = _with_plane_axes(under)
    over = _with_plane_axes(over)
    mixed: ndarray = under + amount.astype(np.float32, copy=False) * (over - under)
    return mixed


def _with_plane_axes(color: ndarray) -> ndarray:
    return color.reshape(3, 1, 1) if color.ndim == 1 else color


def pixel_grid(size: int) -> tuple[ndarray, ndarray]:
    """Return x and y of every pixel of a painting, each (size, size) float32 in [-1, 1]."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
    return x, y


def points(x: ndarray, y: ndarray) -> ndarray:
    """Return (N, 2) points from their coordinates, each (N,)."""
    return np.stack([x, y], axis=1)


def ellipse_points(
    x: float, y: float, radius_x: float, radius_y: float, start: float = 0.0, stop: float = 2 * np.pi
) -> ndarray:
    """Return (48, 2) points of an ellipse around (x, y), or of its arc between two angles in radians."""
    angle = np.linspace(start, stop, 48)
    return points(x + radius_x * np.cos(angle), y + radius_y * np.sin(angle))


def symmetric_outline(x: ndarray, half_width: ndarray) -> ndarray:
    """Return (2 N, 2) points around a shape that lies along the x axis, `half_width` to both sides of it at `x`."""
    one_side = points(x, half_width)
    other_side = points(x, -half_width)
    return np.concatenate([one_side, other_side[::-1]])


def fill_outlines(size: int, *outlines: ndarray) -> ndarray:
    """Return the (size, size) float32 coverage of the union of closed outlines, each (N, 2) points."""
    canvas = np.zeros((size, size), np.uint8)
    for outline in outlines:
        cv2.fillPoly(canvas, [_to_fixed_point(outline, size)], 255, cv2.LINE_AA, SUBPIXEL_BITS)
    return canvas.astype(np.float32) / 255


def draw_lines(size: int, width: float, *lines: ndarray) -> ndarray:
    """Return the (size, size) float32 coverage of lines, each (N, 2) points; `width` in units of half the side."""
    canvas = np.zeros((size, size), np.uint8)
    thickness = max(1, round(width * size / 2))
    for line in lines:
        cv2.polylines(canvas, [_to_fixed_point(line, size)], False, 255, thickness, cv2.LINE_AA, SUBPIXEL_BITS)
    return canvas.astype(np.float32) / 255


def _to_fixed_point(outline: ndarray, size: int) -> ndarray:
    """Turn (N, 2) points in [-1, 1] into cv2's fixed-point pixels."""
    pixels = (np.asarray(outline, np.float64) + 1.0) * (size / 2) - 0.5
    rounded: ndarray = np.rint(pixels * 2**SUBPIXEL_BITS)
    return rounded.astype(np.int32)


def bevel(mask: ndarray, width: float) -> ndarray:
    """Return a relief over `mask`: 0 at its edge, rising over `width` (units of half the side) to a flat `width`."""
    size = mask.shape[0]
    distance = cv2.distanceTransform((mask > 0.5).astype(np.uint8), cv2.DIST_L2, 3)
    depth = distance / (width * size / 2)
    slope = np.sin(np.clip(depth, 0.0, 1.0) * np.float32(np.pi / 2))
    relief: ndarray = slope * np.float32(width)
    return cv2.GaussianBlur(relief, (0, 0), 0.01 * size + 0.5)


def surface_pattern(rng: Generator, size: int, base: ndarray, accent: ndarray) -> ndarray:
    """Paint a (3, size, size) surface, plain, striped, spotted or mottled; any class of object can have any of them."""
    clouds = fractal_noise(rng, size, size, (3, 3), 4)
    style = rng.integers(4)
    if style == 0:
        amount = 0.25 + 0.15 * clouds
    elif style == 1:
        amount = _stripes(rng, size, clouds)
    elif style == 2:
        spots = fractal_noise(rng, size, size, (6, 6), 1)
        amount = np.clip(3 * (spots - rng.uniform(0.4, 1.0)), 0, 1)
    else:
        amount = np.clip(0.5 + 0.6 * clouds, 0, 1)

    strength = np.float32(rng.uniform(0.4, 0.9))
    return blend(base, accent, amount * strength) * (1 + 0.05 * clouds)


def _stripes(rng: Generator, size: int, clouds: ndarray) -> ndarray:
    """Return (size, size) float32 stripes in [0, 1], bent by clouds."""
    x, y = pixel_grid(size)
    angle = rng.uniform(0, np.pi)
    frequency = rng.uniform(5, 16)
    across = x * np.cos(angle) + y * np.sin(angle)
    wave = np.sin(frequency * across + 0.6 * clouds + rng.uniform(0, 6))
    stripes: ndarray = 0.5 + 0.5 * np.clip(4 * wave, -1, 1)
    return stripes
