"""From a flat painting to a sprite: warped by a random map, then lit by one lamp."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy import ndarray
from numpy.random import Generator

from train.synthetic.paint import Painting


@dataclass(frozen=True)
class Sprite:
    """A painting warped and lit, on the pixels it takes in the photograph.

    Attributes:
        color: (3, h, w) float32, multiplied by `alpha`.
        alpha: (h, w) float32 in [0, 1].
    """

    color: ndarray
    alpha: ndarray


@dataclass(frozen=True)
class Light:
    """One lamp far away.

    Attributes:
        direction: (3,) unit vector towards the lamp, x right, y down, z towards the camera.
        ambient: light that comes from everywhere, in [0, 1].
    """

    direction: ndarray
    ambient: float


def random_light(rng: Generator) -> Light:
    """Draw a lamp above the horizon."""
    azimuth = rng.uniform(0, 2 * np.pi)
    elevation = rng.uniform(0.5, 1.1)
    across = np.cos(elevation)
    direction = np.array([across * np.cos(azimuth), across * np.sin(azimuth), np.sin(elevation)], np.float32)
    return Light(direction, ambient=rng.uniform(0.35, 0.6))


def render(rng: Generator, painting: Painting, length: float, max_turn: float, light: Light) -> Sprite:
    """Warp a painting, then light it by the slopes of its relief; the arguments are those of `warp`."""
    color, alpha, relief = warp(rng, painting, length, max_turn)
    slope_x = cv2.Sobel(relief, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8)
    slope_y = cv2.Sobel(relief, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8)

    diffuse = _facing(light.direction, slope_x, slope_y)
    shade = light.ambient + (1 - light.ambient) * diffuse / light.direction[2]

    # A mirror that faces halfway between the lamp and the camera shows the lamp.
    halfway = light.direction + np.array([0, 0, 1], np.float32)
    highlight = _facing(halfway / np.linalg.norm(halfway), slope_x, slope_y) ** 24
    gleam = np.float32(0.5 * painting.gloss) * highlight * alpha
    return Sprite(np.clip(color * shade + gleam, 0, 1), alpha)


def _facing(direction: ndarray, slope_x: ndarray, slope_y: ndarray) -> ndarray:
    """Return the cosine of the angle between a surface of these slopes and a direction (3,), 0 where it is negative."""
    x, y, z = direction
    normal_z = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
    cosine: ndarray = np.clip((z - x * slope_x - y * slope_y) * normal_z, 0, None)
    return cosine


def warp(rng: Generator, painting: Painting, length: float, max_turn: float) -> tuple[ndarray, ndarray, ndarray]:
    """Warp a painting by a random affine map and smooth waves.

    A pixel reads the painting at waves(inverse affine(pixel)): a turn, shear and unequal scales, then a bow and a sine
    along each axis.

    Args:
        rng: random generator.
        painting: what to warp.
        length: side of the painting in pixels of the photograph, before warping.
        max_turn: largest turn in degrees.

    Returns:
        float32, cut to what is covered: color times alpha (3, h, w), alpha (h, w), and relief (h, w) in pixels.
    """
    # Color and alpha are resampled together, as one image of four channels.
    rgba = cv2.merge([*(painting.color * painting.alpha), painting.alpha])
    relief = painting.relief
    size = max(round(1.25 * length), 8)
    if size < len(relief):
        rgba = cv2.resize(rgba, (size, size), interpolation=cv2.INTER_AREA)
        relief = cv2.resize(relief, (size, size), interpolation=cv2.INTER_AREA)

    affine = _random_affine(rng, max_turn)
    patch_size = int(1.3 * length * np.abs(affine).sum(axis=1).max()) | 1
    source_x, source_y = _source_positions(rng, affine, patch_size, length)
    half = len(relief) / 2
    columns = cv2.resize((source_x + 1) * half - 0.5, (patch_size, patch_size))
    rows = cv2.resize((source_y + 1) * half - 0.5, (patch_size, patch_size))
    rgba = cv2.remap(rgba, columns, rows, cv2.INTER_LINEAR)
    relief = cv2.remap(relief, columns, rows, cv2.INTER_LINEAR)

    covered = (rgba[..., 3] > 0.02).astype(np.uint8)
    left, top, width, height = cv2.boundingRect(covered)
    box = (slice(top, top + height), slice(left, left + width))
    red, green, blue, alpha = cv2.split(rgba)
    color = np.stack([red[box], green[box], blue[box]])
    return color, alpha[box], relief[box] * np.float32(length / 2)


def _random_affine(rng: Generator, max_turn: float) -> ndarray:
    """Draw a (2, 2) map: a turn of up to `max_turn` degrees, a shear, unequal scales, mirrored or not."""
    angle = np.radians(rng.uniform(-max_turn, max_turn))
    stretch = np.exp(rng.uniform(-0.22, 0.22))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = np.array([[1, rng.uniform(-0.3, 0.3)], [0, 1]])
    scale = np.diag([rng.choice([-stretch, stretch]), 1 / stretch])
    affine: ndarray = rotation @ shear @ scale
    return affine


def _source_positions(rng: Generator, affine: ndarray, patch_size: int, length: float) -> tuple[ndarray, ndarray]:
    """Return x and y in [-1, 1] at which the pixels of a patch read the painting, both on a grid four times coarser."""
    reach = patch_size / length
    axis = np.linspace(-reach, reach, patch_size // 4 + 2, dtype=np.float32)
    inverse = np.linalg.inv(affine).astype(np.float32)
    x = inverse[0, 0] * axis + inverse[0, 1] * axis[:, None]
    y = inverse[1, 0] * axis + inverse[1, 1] * axis[:, None]

    bow = rng.uniform(-0.3, 0.3)
    amplitude = rng.uniform(0.0, 0.1, 2).astype(np.float32)
    frequency = rng.uniform(2.0, 4.5, 2).astype(np.float32)
    phase = rng.uniform(0, 2 * np.pi, 2).astype(np.float32)
    wave_x = x + amplitude[0] * np.sin(frequency[0] * y + phase[0])
    wave_y = y + amplitude[1] * np.sin(frequency[1] * x + phase[1]) + bow * (x * x - 0.4)
    return wave_x, wave_y
