"""Five classes of objects, and distractors, painted flat and upright from a few curves and random colors.

`render` warps and lights the paintings. The classes have usual hues that overlap, as in nature; mugs and distractors
have any. Outline and surface tell the classes apart, color helps. The order of the random draws decides the pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy import ndarray
from numpy.random import Generator

from train.synthetic.paint import (
    Painting,
    bevel,
    blend,
    draw_lines,
    ellipse_points,
    fill_outlines,
    fractal_noise,
    pixel_grid,
    points,
    random_palette,
    surface_pattern,
    symmetric_outline,
    vary_hue,
)

EYE_WHITE = np.array([0.95, 0.93, 0.85], np.float32)
PUPIL = np.array([0.03, 0.03, 0.04], np.float32)


def leaf(rng: Generator, size: int) -> Painting:
    """A blade with serrated or lobed edge, a stalk, and a midrib with side veins."""
    base, accent, dark = random_palette(rng, vary_hue(rng, 0.28))

    t = np.linspace(0, 1, 121)  # along the blade, from stalk to tip
    is_lobed = rng.uniform() < 0.4
    teeth = rng.integers(3, 6) if is_lobed else rng.integers(9, 18)
    tooth_depth = rng.uniform(0.1, 0.3) if is_lobed else 0.06
    skew = rng.uniform(0.6, 1.1)
    bluntness = rng.uniform(0.7, 1.1)
    half_width = np.sin(np.pi * t**skew) ** bluntness * rng.uniform(0.38, 0.6)
    edge = half_width * (1 + tooth_depth * np.sin(2 * np.pi * teeth * t))
    blade = fill_outlines(size, symmetric_outline(-0.65 + 1.6 * t, edge))
    stalk = draw_lines(size, 0.07, np.array([[-0.95, rng.uniform(-0.1, 0.1)], [-0.6, 0.0]]))

    side_veins = _leaf_side_veins(rng, t, half_width)
    veins = draw_lines(size, 0.025, *side_veins)
    midrib = draw_lines(size, 0.05, np.array([[-0.65, 0.0], [0.93, 0.0]]))
    veins = np.maximum(veins, midrib) * blade

    has_dark_veins = rng.uniform() < 0.5
    vein_color = dark if has_dark_veins else base * 0.4 + 0.6
    surface = surface_pattern(rng, size, base, accent)
    stalk_color = dark * 0.5 + base * 0.5
    color = blend(surface, stalk_color, np.clip(stalk - blade, 0, 1))
    color = blend(color, vein_color, veins * np.float32(0.75))

    grooves = cv2.GaussianBlur(veins, (0, 0), 0.012 * size + 0.4)
    relief = 0.35 * bevel(blade, 0.3) - 0.03 * grooves
    return Painting(color, np.maximum(blade, stalk), relief, gloss=rng.uniform(0.0, 0.4))


def _leaf_side_veins(rng: Generator, t: ndarray, half_width: ndarray) -> list[ndarray]:
    """Return the side veins of a leaf of the `half_width` (N,) at `t` (N,), as lines of two points."""
    slant = rng.uniform(0.15, 0.4)
    roots = np.linspace(0.08, 0.85, rng.integers(5, 9))
    tips = np.minimum(roots + slant, 1.0)
    reaches = np.interp(tips, t, half_width) * 0.9
    lines = []
    for root, tip, reach in zip(roots, tips, reaches, strict=True):
        for side in (-1, 1):
            lines.append(np.array([[-0.65 + 1.6 * root, 0.0], [-0.65 + 1.6 * tip, side * reach]]))
    return lines


def fish(rng: Generator, size: int) -> Painting:
    """A body with tail and fins, scales, a gill cover, and an eye."""
    base, accent, dark = random_palette(rng, vary_hue(rng, 0.58))
    x, y = pixel_grid(size)

    girth = rng.uniform(0.26, 0.44)
    tail_fork = rng.uniform(0.0, 0.2)
    t = np.linspace(0, 1, 61)  # along the body, from mouth to tail
    half_width = girth * np.sin(np.pi * t**0.75) ** 0.8 + 0.04 * t
    body = fill_outlines(size, symmetric_outline(-0.9 + 1.45 * t, half_width))
    fins = fill_outlines(size, *_fish_fins(rng, girth, tail_fork))

    scale_frequency = rng.uniform(18, 30)
    rising = np.sin(scale_frequency * (x + 0.5 * y))
    falling = np.sin(scale_frequency * (x - 0.5 * y))
    scales = np.abs(rising * falling)
    skin = surface_pattern(rng, size, base, accent) * (0.75 + 0.35 * scales - 0.25 * y / girth)
    fin_rays = 0.75 + 0.25 * np.sin(40 * y + 12 * x)
    color = blend(accent[:, None, None] * fin_rays, skin, body)

    gill = draw_lines(size, 0.035, ellipse_points(-0.62, 0.0, 0.2, 0.75 * girth, -1.1, 1.1)) * body
    color = blend(color, dark, gill * np.float32(0.8))
    eye_x = -0.66
    eye_y = -0.28 * girth
    color = blend(color, EYE_WHITE, fill_outlines(size, ellipse_points(eye_x, eye_y, 0.085, 0.085)))
    color = blend(color, PUPIL, fill_outlines(size, ellipse_points(eye_x, eye_y, 0.05, 0.05)))

    relief = 0.8 * bevel(body, girth) + 0.05 * fins + 0.01 * scales * body
    return Painting(color, np.maximum(body, fins), relief, gloss=rng.uniform(0.2, 0.9))


def _fish_fins(rng: Generator, girth: float, tail_fork: float) -> tuple[ndarray, ndarray, ndarray]:
    """Return the outlines of the tail fin and of the fins on the back and the belly."""
    spread = rng.uniform(0.3, 0.45)
    tail = np.array([[0.42, 0.0], [0.95, -spread], [0.9 - tail_fork, 0.0], [0.95, spread]])

    lean = rng.uniform(0.0, 0.25)
    back_height = rng.uniform(0.15, 0.3)
    back = np.array([[-0.35, -0.8 * girth], [-0.05 + lean, -girth - back_height], [0.3, -0.7 * girth]])
    belly_height = rng.uniform(0.1, 0.25)
    belly = np.array([[-0.15, 0.85 * girth], [0.1 + lean, girth + belly_height], [0.15, 0.8 * girth]])
    return tail, back, belly


def starfish(rng: Generator, size: int) -> Painting:
    """Five unequal arms with a row of bumps along each."""
    base, accent, dark = random_palette(rng, vary_hue(rng, 0.03))

    angle = np.linspace(0, 2 * np.pi, 240, endpoint=False)
    arm_angles = 2 * np.pi * np.arange(5) / 5 + rng.normal(0, 0.09, 5)
    angle_to_arm = np.abs((angle[:, None] - arm_angles + np.pi) % (2 * np.pi) - np.pi)
    waist = rng.uniform(0.26, 0.4)
    sharpness = rng.uniform(4.5, 8.0)
    arm_lengths = rng.uniform(0.78, 0.97, 5)
    radius_of_arms = waist + (arm_lengths - waist) * np.exp(-sharpness * angle_to_arm**1.5)
    radius = radius_of_arms.max(axis=1)
    star = fill_outlines(size, points(radius * np.cos(angle), radius * np.sin(angle)))

    bumps = np.zeros((size, size), np.float32)
    for arm_angle, arm_length in zip(arm_angles, arm_lengths, strict=True):
        spacing = rng.uniform(0.11, 0.16)
        for distance in np.arange(0.1, 0.9 * arm_length, spacing):
            bump_radius = 0.045 * (1.2 - distance)
            x = distance * np.cos(arm_angle)
            y = distance * np.sin(arm_angle)
            bump = fill_outlines(size, ellipse_points(x, y, bump_radius, bump_radius))
            bumps = np.maximum(bumps, bump)

    surface = surface_pattern(rng, size, base, accent)
    has_dark_bumps = rng.uniform() < 0.4
    bump_color = dark if has_dark_bumps else accent * 0.3 + 0.7
    color = blend(surface, bump_color, bumps * 0.7)

    raised_bumps = cv2.GaussianBlur(bumps, (0, 0), 0.008 * size + 0.4)
    relief = bevel(star, 0.26) + 0.05 * raised_bumps
    return Painting(color, star, relief, gloss=rng.uniform(0.0, 0.3))


def mug(rng: Generator, size: int) -> Painting:
    """A tapered cup with a handle on the right, seen a little from above."""
    base, accent, _ = random_palette(rng)
    x, y = pixel_grid(size)

    center_x = -0.25
    top_radius = rng.uniform(0.45, 0.58)
    bottom_radius = rng.uniform(0.36, 0.5)
    top_y = rng.uniform(-0.7, -0.5)
    bottom_y = rng.uniform(0.55, 0.8)
    tilt = rng.uniform(0.1, 0.2)  # half height of the ellipse that the brim is seen as
    foot = ellipse_points(center_x, bottom_y, bottom_radius, tilt * bottom_radius / top_radius, 0, np.pi)
    wall = np.concatenate([[[center_x + top_radius, top_y]], foot, [[center_x - top_radius, top_y]]])
    brim = ellipse_points(center_x, top_y, top_radius, tilt)
    body = fill_outlines(size, wall, brim)

    handle_reach = rng.uniform(0.28, 0.42)
    handle_x = center_x + (top_radius + bottom_radius) / 2 - 0.04
    handle_y = (top_y + bottom_y) / 2 + 0.03
    loop = ellipse_points(handle_x, handle_y, handle_reach, 0.38, -1.5, 1.5)
    handle = draw_lines(size, rng.uniform(0.1, 0.16), loop) * (1 - body)

    color = surface_pattern(rng, size, base, accent)
    has_band = rng.uniform() < 0.4
    if has_band:
        band_top = rng.uniform(-0.3, 0.1)
        band_bottom = rng.uniform(0.2, 0.5)
        band = ((y > band_top) & (y < band_bottom)).astype(np.float32)
        color = blend(color, accent, cv2.GaussianBlur(band, (0, 0), 0.7))
    color = blend(color, base * np.float32(0.9), handle)

    inside = fill_outlines(size, ellipse_points(center_x, top_y, top_radius * 0.9, tilt * 0.8))
    depth = np.clip((y - top_y) / tilt + 0.4, 0, 1)
    inside_color = blend(base * np.float32(0.35), accent * np.float32(0.25), depth)
    color = blend(color, inside_color, inside)

    cylinder = np.sqrt(np.clip(1 - ((x - center_x) / top_radius) ** 2, 0.02, 1)) * np.float32(top_radius)
    relief: ndarray = np.where(body > 0.5, cylinder * (1 - inside), 0) * 0.8 + 0.6 * bevel(handle, 0.07)
    relief = cv2.GaussianBlur(relief.astype(np.float32), (0, 0), 0.012 * size + 0.4)
    return Painting(color, np.maximum(body, handle), relief, gloss=rng.uniform(0.2, 1.0))


def butterfly(rng: Generator, size: int) -> Painting:
    """Two pairs of mirrored wings with dark rims and eyespots, a body, and antennae."""
    base, accent, dark = random_palette(rng, vary_hue(rng, 0.8))

    upper_radii = rng.uniform(0.4, 0.52), rng.uniform(0.26, 0.36)
    upper_wings = _wing_pair((0.45, -0.32), upper_radii, turn=rng.uniform(-0.9, -0.5))
    lower_radii = rng.uniform(0.3, 0.4), rng.uniform(0.22, 0.32)
    lower_wings = _wing_pair((0.34, 0.36), lower_radii, turn=rng.uniform(0.5, 0.9))
    outlines = [*upper_wings, *lower_wings]
    wings = fill_outlines(size, *outlines)
    body = fill_outlines(size, ellipse_points(0, 0.02, 0.07, 0.5))
    antennae = [np.array([[0, -0.4], [side * 0.12, -0.7], [side * 0.28, -0.88]]) for side in (-1, 1)]
    body_and_antennae = np.maximum(body, draw_lines(size, 0.025, *antennae))

    pattern = surface_pattern(rng, size, base, accent)
    color = (pattern + pattern[..., ::-1]) / 2
    wing_centers = [outline.mean(0) for outline in outlines]
    inner_outlines = [center + (outline - center) * 0.8 for outline, center in zip(outlines, wing_centers, strict=True)]
    rim = wings - fill_outlines(size, *inner_outlines)
    color = blend(color, dark, np.clip(rim, 0, 1) * np.float32(0.9))

    spot_color = accent * 0.3 + np.float32(0.7)
    spot_radii = np.repeat(rng.uniform(0.06, 0.13, 2), 2)
    for center, radius in zip(wing_centers, spot_radii, strict=True):
        x, y = center * [1.15, 1.0]
        color = blend(color, spot_color, fill_outlines(size, ellipse_points(x, y, radius, radius)))
        inner_radius = radius * 0.55
        color = blend(color, dark, fill_outlines(size, ellipse_points(x, y, inner_radius, inner_radius)))

    color = blend(color, dark, body_and_antennae)
    relief = 0.15 * bevel(wings, 0.2) + 0.9 * bevel(body, 0.07)
    return Painting(color, np.maximum(wings, body_and_antennae), relief, gloss=rng.uniform(0.0, 0.4))


def _wing_pair(center: tuple[float, float], radii: tuple[float, float], turn: float) -> tuple[ndarray, ndarray]:
    """Return the outlines of a right wing, an oval with a wavy edge turned by `turn` radians, and of its mirror."""
    waves = 1 + 0.12 * np.sin(np.linspace(0, 6 * np.pi, 48))
    oval = ellipse_points(0, 0, *radii) * waves[:, None]
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    right = oval @ rotation + list(center)
    return right, right * [-1, 1]


def distractor(rng: Generator, size: int) -> Painting:
    """An object of no class: a pebble, a stick, a scrap or a ring, painted as the classes are."""
    base, accent, _ = random_palette(rng)
    style = rng.integers(7)
    if style < 2:
        angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        radius = 0.75 + 0.12 * fractal_noise(rng, 1, 24, (1, 4), 1)[0]
        flatness = rng.uniform(0.5, 1)
        pebble = points(radius * np.cos(angle), radius * np.sin(angle) * flatness)
        mask = fill_outlines(size, pebble)
    elif style < 4:
        thickness = rng.uniform(0.08, 0.2)
        stick = np.array([[-0.85, 0], [0, rng.uniform(-0.2, 0.2)], [0.85, 0]])
        mask = draw_lines(size, thickness, stick)
    elif style < 6:
        corners = rng.integers(3, 6)
        angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
        scrap = 0.9 * points(np.cos(angle), np.sin(angle))
        mask = fill_outlines(size, scrap)
    else:
        thickness = rng.uniform(0.12, 0.3)
        ring = ellipse_points(0, 0, 0.7, 0.7)
        mask = draw_lines(size, thickness, ring)

    height = rng.uniform(0.2, 1.0)
    relief = height * bevel(mask, rng.uniform(0.05, 0.5))
    color = surface_pattern(rng, size, base, accent)
    return Painting(color, mask, relief, gloss=rng.uniform(0.0, 0.8))


@dataclass(frozen=True)
class ObjectClass:
    """One class of the generated data set.

    Attributes:
        paint: draws an object of the class on a square of so many pixels.
        max_turn: largest turn from upright, in degrees.
    """

    paint: Callable[[Generator, int], Painting]
    max_turn: float


# By name; the position is the label.
CLASSES = {
    "leaf": ObjectClass(leaf, 180.0),
    "fish": ObjectClass(fish, 60.0),
    "starfish": ObjectClass(starfish, 180.0),
    "mug": ObjectClass(mug, 40.0),
    "butterfly": ObjectClass(butterfly, 180.0),
}
DISTRACTOR = ObjectClass(distractor, 180.0)
