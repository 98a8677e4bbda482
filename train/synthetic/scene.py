"""One generated photograph: a background, objects on it with their shadows, and the effects of a camera."""

from __future__ import annotations

import cv2
import numpy as np
from numpy import ndarray
from numpy.random import Generator

from train.synthetic.backgrounds import background
from train.synthetic.canvas import NO_OBJECT, Canvas, SceneObject
from train.synthetic.paint import fractal_noise
from train.synthetic.render import Light, Sprite, random_light, render
from train.synthetic.shapes import CLASSES, DISTRACTOR

SIZE = (240, 320)  # height and width of a photograph; resized to 192 x 256 pixels it needs no padding
EMPTY_SHARE = 0.03  # of the photographs are without objects
CROWD_SHARE = 0.05  # of the photographs have a crowd
TINY_SHARE = 0.05  # of the objects are tiny


def photograph(rng: Generator) -> tuple[ndarray, list[SceneObject]]:
    """Take one photograph of `SIZE` pixels. The order of the random draws decides the picture.

    Returns:
        (H, W, 3) uint8 RGB, and the objects that are seen on it, the last one on top.
    """
    height, width = SIZE
    image = background(rng, height, width)
    canvas = Canvas(image, random_light(rng))

    is_empty = rng.uniform() < EMPTY_SHARE
    has_crowd = rng.uniform() < CROWD_SHARE
    object_count = 0 if is_empty else 1 + rng.poisson(3.0)
    labels = rng.integers(len(CLASSES), size=object_count).tolist()
    labels += [NO_OBJECT] * rng.poisson(1.5)  # distractors
    if has_crowd and not is_empty:
        place_crowd(rng, canvas, label=int(rng.integers(len(CLASSES))))

    for label in rng.permutation(labels):
        place_object(rng, canvas, int(label), random_length(rng))
    return apply_camera(rng, canvas.image), canvas.objects()


def random_length(rng: Generator) -> float:
    """Draw the length of an object in pixels, seldom a tiny one."""
    is_tiny = rng.uniform() < TINY_SHARE
    if is_tiny:
        return rng.uniform(12, 24)
    return float(np.exp(rng.uniform(np.log(48), np.log(160))))


def place_object(rng: Generator, canvas: Canvas, label: int, length: float, attempts: int = 12) -> None:
    """Put an object of a class, or a distractor (label NO_OBJECT), at a random position; give up if none of them fits.

    Args:
        rng: random generator.
        canvas: to draw on.
        label: position in `CLASSES`, or NO_OBJECT.
        length: of the object in pixels.
        attempts: positions to try.
    """
    height, width = canvas.size
    number = NO_OBJECT if label == NO_OBJECT else canvas.add_object(label)
    sprite = make_sprite(rng, label, length, canvas.light)
    for _ in range(attempts):
        x = int(rng.integers(width))
        y = int(rng.integers(height))
        if canvas.place(sprite, x, y, number):
            return


def place_crowd(rng: Generator, canvas: Canvas, label: int) -> None:
    """Put 15 to 40 small objects of a class around one position, as a single object."""
    height, width = canvas.size
    center = rng.uniform(0.2, 0.8, 2) * (width, height)
    spread = rng.uniform(12, 26, 2) * (1.4, 1.0)
    number = canvas.add_object(label, is_crowd=True)
    for _ in range(rng.integers(15, 41)):
        position = np.clip(rng.normal(center, spread), 0, (width - 1, height - 1))
        x, y = position.astype(int).tolist()
        length = rng.uniform(14, 26)
        canvas.place(make_sprite(rng, label, length, canvas.light), x, y, number)


def make_sprite(rng: Generator, label: int, length: float, light: Light) -> Sprite:
    """Paint an object of a class, or a distractor (label NO_OBJECT), `length` pixels long, warp it and light it."""
    object_class = DISTRACTOR if label == NO_OBJECT else list(CLASSES.values())[label]
    size = int(np.clip(1.25 * length, 64, 224))
    painting = object_class.paint(rng, size)
    return render(rng, painting, length, object_class.max_turn, light)


def apply_camera(rng: Generator, image: ndarray) -> ndarray:
    """Apply a camera: uneven light, vignette, white balance, exposure, a soft lens, and the sensor's noise.

    Args:
        rng: random generator.
        image: (3, H, W) float32 in [0, 1].

    Returns:
        (H, W, 3) uint8 RGB.
    """
    _, height, width = image.shape
    x = np.linspace(-1, 1, width, dtype=np.float32)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    falloff = 1 + 0.06 * fractal_noise(rng, height, width, (1, 1), 2)
    falloff = falloff + rng.uniform(-0.2, 0.2) * x
    falloff = falloff + rng.uniform(-0.2, 0.2) * y
    vignette = rng.uniform(0.0, 0.25) * (x**2 + y**2)
    falloff = falloff - vignette

    white_balance = rng.normal(0.0, 0.06, (3, 1, 1))
    exposure = rng.normal(0.0, 0.12)
    gain = np.exp(white_balance + exposure).astype(np.float32)
    channels = np.clip(image * (falloff * gain), 0, 1)
    pixels = cv2.merge(list(channels))
    pixels = cv2.pow(pixels, rng.uniform(0.8, 1.25))
    pixels = cv2.GaussianBlur(pixels, (0, 0), rng.uniform(0.3, 0.8))

    noise = rng.standard_normal(pixels.shape, np.float32) * np.sqrt(pixels + 0.05)
    noise_strength = np.float32(rng.uniform(1.5, 7.0))
    photo: ndarray = np.clip(pixels * 255 + noise * noise_strength + 0.5, 0, 255)
    return photo.astype(np.uint8)
