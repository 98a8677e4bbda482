"""The picture that a photograph is composed on: places sprites, and records which object every pixel shows."""

from __future__ import annotations

from dataclasses import dataclass
from types import EllipsisType

import cv2
import numpy as np
from numpy import ndarray

from train.synthetic.render import Light, Sprite

MIN_PIXELS = 24  # that every object keeps
MIN_VISIBLE = 0.5  # share of its pixels that other objects leave visible
MIN_INSIDE = 0.65  # share of its pixels that are inside the frame
NO_OBJECT = -1  # owner of a pixel of the background or of a distractor

PlaneIndex = tuple[EllipsisType, slice, slice]  # into the last two dimensions of an array


@dataclass(frozen=True)
class SceneObject:
    """What is seen of an object, or of a crowd of one class, in a photograph.

    Attributes:
        label: position in `CLASSES`.
        mask: (H, W) bool.
        is_crowd: many small objects that have one mask together.
    """

    label: int
    mask: ndarray
    is_crowd: bool


@dataclass
class _CanvasObject:
    """An object of the canvas.

    Attributes:
        label: position in `CLASSES`.
        is_crowd: many small objects that have one mask together.
        full_area: pixels that were drawn for it, also those that are hidden now; 0 until it is placed.
    """

    label: int
    is_crowd: bool
    full_area: int = 0


class Canvas:
    """A picture and the objects on it.

    Args:
        image: (3, H, W) float32 RGB of the background; it is drawn on.
        light: for the shadows.

    Attributes:
        image: (3, H, W) float32 RGB.
        owner: (H, W) int16, number of the object that a pixel shows, or NO_OBJECT.
    """

    def __init__(self, image: ndarray, light: Light) -> None:
        self.image = image
        self.light = light
        height, width = image.shape[1:]
        self.owner = np.full((height, width), NO_OBJECT, np.int16)
        self._objects: list[_CanvasObject] = []

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.owner.shape
        return height, width

    def objects(self) -> list[SceneObject]:
        """Return what is seen of every object that was placed."""
        seen = []
        for number, placed in enumerate(self._objects):
            if placed.full_area > 0:
                seen.append(SceneObject(placed.label, self.owner == number, placed.is_crowd))
        return seen

    def add_object(self, label: int, is_crowd: bool = False) -> int:
        """Return the number of a new object that `place` can give pixels to."""
        self._objects.append(_CanvasObject(label, is_crowd))
        return len(self._objects) - 1

    def place(self, sprite: Sprite, x: int, y: int, number: int) -> bool:
        """Draw a sprite with its center at pixel (x, y), unless it or an object under it would show too little.

        Args:
            sprite: what to draw.
            x: column of the center.
            y: row of the center.
            number: object that the pixels belong to, or NO_OBJECT.

        Returns:
            Whether the sprite was placed.
        """
        height, width = sprite.alpha.shape
        left = x - width // 2
        top = y - height // 2
        in_sprite, in_canvas = overlap(left, top, (height, width), self.size)
        is_opaque = sprite.alpha > 0.5
        drawn = is_opaque[in_sprite]
        pixels = int(np.count_nonzero(drawn))
        if pixels < max(MIN_PIXELS, MIN_INSIDE * np.count_nonzero(is_opaque)):
            return False
        if self._hides_too_much(self.owner[in_canvas][drawn], number):
            return False

        self._draw_shadow(sprite, left, top)
        under = self.image[in_canvas]
        under *= 1 - sprite.alpha[in_sprite]
        under += sprite.color[in_sprite]
        self.owner[in_canvas][drawn] = number
        if number != NO_OBJECT:
            self._objects[number].full_area += pixels
        return True

    def _hides_too_much(self, hidden_owners: ndarray, number: int) -> bool:
        """Tell whether another object than `number` would show too little without these pixels (N,) of `owner`."""
        is_other_object = (hidden_owners != NO_OBJECT) & (hidden_owners != number)
        for hidden_number in np.unique(hidden_owners[is_other_object]):
            visible_before = np.count_nonzero(self.owner == hidden_number)
            visible = visible_before - np.count_nonzero(hidden_owners == hidden_number)
            if visible < max(MIN_PIXELS, MIN_VISIBLE * self._objects[hidden_number].full_area):
                return True
        return False

    def _draw_shadow(self, sprite: Sprite, left: int, top: int) -> None:
        """Darken the picture on the side away from the lamp, for a sprite with its corner at (left, top)."""
        reach = 0.05 * sum(sprite.alpha.shape) / self.light.direction[2]
        blur = 0.25 * reach + 0.5
        border = int(2 * blur) + 1
        shadow = cv2.copyMakeBorder(sprite.alpha, border, border, border, border, cv2.BORDER_CONSTANT)
        shadow = cv2.GaussianBlur(shadow, (0, 0), blur)

        shift_x = int(reach * self.light.direction[0]) + border
        shift_y = int(reach * self.light.direction[1]) + border
        height, width = shadow.shape
        in_shadow, in_canvas = overlap(left - shift_x, top - shift_y, (height, width), self.size)
        darkness = np.float32(0.8 * (1 - self.light.ambient))
        self.image[in_canvas] *= 1 - darkness * shadow[in_shadow]


def overlap(left: int, top: int, small: tuple[int, int], large: tuple[int, int]) -> tuple[PlaneIndex, PlaneIndex]:
    """Return where a small array with its corner at (left, top) of a large one meets it.

    Args:
        left: column in the large array; may be outside.
        top: row in the large array; may be outside.
        small: (height, width) of the small array.
        large: (height, width) of the large array.

    Returns:
        Two indices of the last two dimensions, into the small array and into the large one.
    """
    height, width = small
    large_height, large_width = large
    x0 = min(max(left, 0), large_width)
    y0 = min(max(top, 0), large_height)
    x1 = max(min(left + width, large_width), x0)
    y1 = max(min(top + height, large_height), y0)
    in_small = (..., slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    in_large = (..., slice(y0, y1), slice(x0, x1))
    return in_small, in_large
