"""One generated photograph: a background, bent and lit objects on it with their shadows, and a camera's faults."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy import ndarray
from numpy.random import Generator

from train.synthetic.backgrounds import background
from train.synthetic.paint import Painting, noise
from train.synthetic.shapes import KINDS, litter

SIZE = 240, 320  # height and width of a photograph; at 256 pixels wide both sides are multiples of 32: no padding
EMPTY, CROWDED, TINY = 0.03, 0.05, 0.05  # share of photographs without objects, with a crowd; share of tiny objects
MIN_PIXELS, MIN_VISIBLE, MIN_INSIDE = 24, 0.5, 0.65  # what every object keeps: pixels, share unhidden, share in frame
NOTHING = -1  # owner of a pixel of the background or of litter


@dataclass(frozen=True)
class Thing:
    """What is seen of an object, or of a crowd of one kind, in a photograph.

    Attributes:
        label: position in `KINDS`.
        mask: (H, W) bool.
        crowd: many small objects that nobody told apart.
    """

    label: int
    mask: ndarray
    crowd: bool


@dataclass(frozen=True)
class Sprite:
    """A painting bent and lit, on the pixels it takes in the photograph.

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
    azimuth, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.1)
    across = np.cos(height)
    direction = np.array([across * np.cos(azimuth), across * np.sin(azimuth), np.sin(height)], np.float32)
    return Light(direction, rng.uniform(0.35, 0.6))


def bend(rng: Generator, painting: Painting, length: float, turn: float) -> tuple[ndarray, ndarray, ndarray]:
    """Bend a painting by a random affine map and smooth waves.

    A pixel reads the painting at waves(inverse affine(pixel)): a turn of up to `turn` degrees, shear and unequal
    scales, then a bow and a sine along each axis.

    Args:
        length: side of the painting in pixels of the photograph, before bending.

    Returns:
        float32, cut to what is covered: color times alpha (3, h, w), alpha (h, w), and relief (h, w) in pixels.
    """
    painted = cv2.merge([*(painting.color * painting.alpha), painting.alpha])
    relief = painting.relief
    size = max(round(1.25 * length), 8)
    if size < len(relief):
        painted, relief = (cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA) for part in (painted, relief))
    angle, stretch = np.radians(rng.uniform(-turn, turn)), np.exp(rng.uniform(-0.22, 0.22))
    spin = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    affine = spin @ [[1, rng.uniform(-0.3, 0.3)], [0, 1]] @ np.diag([rng.choice([-stretch, stretch]), 1 / stretch])
    patch = int(1.3 * length * np.abs(affine).sum(axis=1).max()) | 1
    pixels = np.linspace(-patch / length, patch / length, patch // 4 + 2, dtype=np.float32)
    inverse = np.linalg.inv(affine).astype(np.float32)
    x, y = (row[0] * pixels + row[1] * pixels[:, None] for row in inverse)
    bow, amplitude = rng.uniform(-0.3, 0.3), np.float32(rng.uniform(0.0, 0.1, 2))
    frequency, phase = np.float32(rng.uniform(2.0, 4.5, 2)), np.float32(rng.uniform(0, 2 * np.pi, 2))
    wave_x = x + amplitude[0] * np.sin(frequency[0] * y + phase[0])
    wave_y = y + amplitude[1] * np.sin(frequency[1] * x + phase[1]) + bow * (x * x - 0.4)
    columns, rows = (cv2.resize((wave + 1) * (len(relief) / 2) - 0.5, (patch, patch)) for wave in (wave_x, wave_y))
    painted, relief = (cv2.remap(part, columns, rows, cv2.INTER_LINEAR) for part in (painted, relief))
    left, top, width, height = cv2.boundingRect((painted[..., 3] > 0.02).astype(np.uint8))
    *color, alpha, relief = (part[top : top + height, left : left + width] for part in (*cv2.split(painted), relief))
    return np.stack(color), alpha, relief * np.float32(length / 2)


def render(rng: Generator, painting: Painting, length: float, turn: float, light: Light) -> Sprite:
    """Bend a painting, then light it by the slopes of its relief."""
    color, alpha, relief = bend(rng, painting, length, turn)
    slope_x, slope_y = (cv2.Sobel(relief, cv2.CV_32F, dx, 1 - dx, ksize=3, scale=1 / 8) for dx in (1, 0))
    upright = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
    x, y, z = light.direction
    lit = np.clip((z - x * slope_x - y * slope_y) * upright, 0, None)
    middle = light.direction + np.float32([0, 0, 1])  # between the lamp and the camera: where a mirror would face
    x, y, z = middle / np.linalg.norm(middle)
    shine = np.clip((z - x * slope_x - y * slope_y) * upright, 0, None) ** 24
    shade = light.ambient + (1 - light.ambient) * lit / light.direction[2]
    gleam = np.float32(0.5 * painting.gloss) * shine * alpha
    return Sprite(np.clip(color * shade + gleam, 0, 1), alpha)


class Canvas:
    """A photograph in the making: its colors, and which thing owns each pixel.

    Attributes:
        image: (3, H, W) float32 RGB.
        owner: (H, W) int16, number of a thing, or NOTHING.
        labels, crowds: per thing, as in `Thing`.
        whole: per thing, the pixels it would show if nothing lay on it; 0 until it is placed.
    """

    def __init__(self, image: ndarray, light: Light) -> None:
        self.image, self.light = image, light
        self.owner = np.full(image.shape[1:], NOTHING, np.int16)
        self.labels: list[int] = []
        self.crowds: list[bool] = []
        self.whole: list[int] = []

    def things(self) -> list[Thing]:
        """Return what is seen of every thing that was placed."""
        placed = [number for number, pixels in enumerate(self.whole) if pixels]
        return [Thing(self.labels[number], self.owner == number, self.crowds[number]) for number in placed]

    def add(self, label: int, crowd: bool = False) -> int:
        """Open a new thing that `place` can give pixels to, and return its number."""
        self.labels.append(label)
        self.crowds.append(crowd)
        self.whole.append(0)
        return len(self.labels) - 1

    def place(self, sprite: Sprite, x: int, y: int, thing: int) -> bool:
        """Lay a sprite with its center at pixel (x, y), unless it or a thing under it would show too little.

        Args:
            thing: what the pixels belong to, or NOTHING.

        Returns:
            Whether the sprite was laid.
        """
        height, width = sprite.alpha.shape
        left, top = x - width // 2, y - height // 2
        solid = sprite.alpha > 0.5
        inner, outer = overlap(left, top, solid.shape, self.owner.shape)
        inside = solid[inner]
        pixels = np.count_nonzero(inside)
        if pixels < max(MIN_PIXELS, MIN_INSIDE * np.count_nonzero(solid)):
            return False
        hidden = self.owner[outer][inside]
        for other in np.unique(hidden[(hidden != NOTHING) & (hidden != thing)]):
            left_over = np.count_nonzero(self.owner == other) - np.count_nonzero(hidden == other)
            if left_over < max(MIN_PIXELS, MIN_VISIBLE * self.whole[other]):
                return False
        self._shadow(sprite, left, top)
        under = self.image[outer]
        under *= 1 - sprite.alpha[inner]
        under += sprite.color[inner]
        self.owner[outer][inside] = thing
        if thing != NOTHING:
            self.whole[thing] += pixels
        return True

    def _shadow(self, sprite: Sprite, left: int, top: int) -> None:
        """Darken what lies on the far side of the lamp from a sprite with its corner at (left, top)."""
        reach = 0.05 * sum(sprite.alpha.shape) / self.light.direction[2]
        soft = 0.25 * reach + 0.5
        border = int(2 * soft) + 1
        shadow = cv2.copyMakeBorder(sprite.alpha, *[border] * 4, cv2.BORDER_CONSTANT)
        shadow = cv2.GaussianBlur(shadow, (0, 0), soft)
        shift_x, shift_y = (int(reach * part) + border for part in self.light.direction[:2])
        inner, outer = overlap(left - shift_x, top - shift_y, shadow.shape, self.owner.shape)
        self.image[outer] *= 1 - np.float32(0.8 * (1 - self.light.ambient)) * shadow[inner]


def overlap(left: int, top: int, small: tuple[int, int], large: tuple[int, int]) -> tuple[tuple, tuple]:
    """Return where a small array with its corner at (left, top) of a large one meets it.

    Args:
        small, large: (height, width).

    Returns:
        Two indices of the last two dimensions, into the small array and into the large one.
    """
    (height, width), (rows, columns) = small, large
    x0, y0 = min(max(left, 0), columns), min(max(top, 0), rows)
    x1, y1 = max(min(left + width, columns), x0), max(min(top + height, rows), y0)
    return (..., slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)), (..., slice(y0, y1), slice(x0, x1))


def scatter(rng: Generator, canvas: Canvas, label: int, length: float, tries: int = 12) -> None:
    """Put one object of a kind, or litter (label NOTHING), at a random place; give up if none of the tries fits."""
    height, width = canvas.owner.shape
    thing = NOTHING if label == NOTHING else canvas.add(label)
    sprite = sprite_of(rng, label, length, canvas.light)
    for _ in range(tries):
        if canvas.place(sprite, int(rng.integers(width)), int(rng.integers(height)), thing):
            return


def crowd(rng: Generator, canvas: Canvas, label: int) -> None:
    """Heap 15 to 40 small objects of a kind around one place, as a single thing."""
    height, width = canvas.owner.shape
    center = rng.uniform(0.2, 0.8, 2) * (width, height)
    spread = rng.uniform(12, 26, 2) * (1.4, 1.0)
    thing = canvas.add(label, crowd=True)
    for _ in range(rng.integers(15, 41)):
        x, y = np.clip(rng.normal(center, spread), 0, (width - 1, height - 1)).astype(int)
        canvas.place(sprite_of(rng, label, rng.uniform(14, 26), canvas.light), int(x), int(y), thing)


def sprite_of(rng: Generator, label: int, length: float, light: Light) -> Sprite:
    """Paint one object of a kind, or litter (label NOTHING), `length` pixels long, bend it and light it."""
    painter, turn = (litter, 180.0) if label == NOTHING else list(KINDS.values())[label]
    size = int(np.clip(1.25 * length, 64, 224))
    return render(rng, painter(rng, size), length, turn, light)


def develop(rng: Generator, image: ndarray) -> ndarray:
    """Apply a camera: uneven light, vignette, white balance, exposure, a soft lens, and the sensor's noise.

    Args:
        image: (3, H, W) float32 in [0, 1].

    Returns:
        (H, W, 3) uint8 RGB.
    """
    _, height, width = image.shape
    x, y = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    falloff = 1 + 0.06 * noise(rng, height, width, (1, 1), 2) + rng.uniform(-0.2, 0.2) * x + rng.uniform(-0.2, 0.2) * y
    falloff -= rng.uniform(0.0, 0.25) * (x**2 + y**2)
    balance = np.exp(rng.normal(0.0, 0.06, (3, 1, 1)) + rng.normal(0.0, 0.12)).astype(np.float32)
    image = cv2.merge(np.clip(image * (falloff * balance), 0, 1))
    image = cv2.GaussianBlur(cv2.pow(image, rng.uniform(0.8, 1.25)), (0, 0), rng.uniform(0.3, 0.8))
    grain = rng.standard_normal(image.shape, np.float32) * np.sqrt(image + 0.05)
    return np.clip(image * 255 + grain * np.float32(rng.uniform(1.5, 7.0)) + 0.5, 0, 255).astype(np.uint8)


def photograph(rng: Generator) -> tuple[ndarray, list[Thing]]:
    """Take one photograph of `SIZE` pixels.

    Returns:
        (H, W, 3) uint8 RGB, and what is to be found on it, the last one uppermost.
    """
    height, width = SIZE
    canvas = Canvas(background(rng, height, width), random_light(rng))
    empty, crowded = rng.uniform() < EMPTY, rng.uniform() < CROWDED
    objects = 0 if empty else 1 + rng.poisson(3.0)
    labels = rng.integers(len(KINDS), size=objects).tolist() + [NOTHING] * rng.poisson(1.5)
    if crowded and not empty:
        crowd(rng, canvas, int(rng.integers(len(KINDS))))
    for label in rng.permutation(labels):
        tiny = rng.uniform() < TINY
        scatter(rng, canvas, int(label), rng.uniform(12, 24) if tiny else np.exp(rng.uniform(np.log(48), np.log(160))))
    return develop(rng, canvas.image), canvas.things()
