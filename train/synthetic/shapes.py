"""Five kinds of objects, and litter, painted flat and upright from a few curves and random colors.

`scene` bends, lights and places the paintings. Kinds have usual hues that overlap, as in nature; mugs and litter have
any. Outline and markings tell the kinds apart, color helps.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.random import Generator

from train.synthetic.paint import Painting, around, blend, ellipse, fill, markings, noise, palette, stroke, swell


def leaf(rng: Generator, size: int) -> Painting:
    """A blade with serrated or lobed edge, a stalk, and a midrib with side veins."""
    base, accent, dark = palette(rng, around(rng, 0.28))
    t = np.linspace(0, 1, 121)
    teeth, depth = (rng.integers(3, 6), rng.uniform(0.1, 0.3)) if rng.uniform() < 0.4 else (rng.integers(9, 18), 0.06)
    profile = np.sin(np.pi * t ** rng.uniform(0.6, 1.1)) ** rng.uniform(0.7, 1.1) * rng.uniform(0.38, 0.6)
    edge = profile * (1 + depth * np.sin(2 * np.pi * teeth * t))
    along = -0.65 + 1.6 * t
    blade = fill(size, np.concatenate([np.stack([along, edge], 1), np.stack([along, -edge], 1)[::-1]]))
    stalk = stroke(size, 0.07, np.array([[-0.95, rng.uniform(-0.1, 0.1)], [-0.6, 0.0]]))
    slant = rng.uniform(0.15, 0.4)
    roots = np.linspace(0.08, 0.85, rng.integers(5, 9))
    tips = np.minimum(roots + slant, 1.0)
    reach = np.interp(tips, t, profile) * 0.9
    veins = stroke(
        size,
        0.025,
        *(
            np.array([[-0.65 + 1.6 * root, 0.0], [-0.65 + 1.6 * tip, side * far]])
            for root, tip, far in zip(roots, tips, reach, strict=True)
            for side in (-1, 1)
        ),
    )
    veins = np.maximum(veins, stroke(size, 0.05, np.array([[-0.65, 0.0], [0.93, 0.0]]))) * blade
    vein_color = dark if rng.uniform() < 0.5 else base * 0.4 + 0.6
    color = blend(markings(rng, size, base, accent), dark * 0.5 + base * 0.5, np.clip(stalk - blade, 0, 1))
    color = blend(color, vein_color, veins * np.float32(0.75))
    relief = 0.35 * swell(blade, 0.3) - 0.03 * cv2.GaussianBlur(veins, (0, 0), 0.012 * size + 0.4)
    return Painting(color, np.maximum(blade, stalk), relief, rng.uniform(0.0, 0.4))


def fish(rng: Generator, size: int) -> Painting:
    """A body with tail and fins, scales, a gill cover, and an eye."""
    base, accent, dark = palette(rng, around(rng, 0.58))
    girth, fork = rng.uniform(0.26, 0.44), rng.uniform(0.0, 0.2)
    t = np.linspace(0, 1, 61)
    half = girth * np.sin(np.pi * t**0.75) ** 0.8 + 0.04 * t
    along = -0.9 + 1.45 * t
    body = fill(size, np.concatenate([np.stack([along, half], 1), np.stack([along, -half], 1)[::-1]]))
    spread = rng.uniform(0.3, 0.45)
    tail = np.array([[0.42, 0.0], [0.95, -spread], [0.9 - fork, 0.0], [0.95, spread]])
    lean = rng.uniform(0.0, 0.25)
    back = np.array([[-0.35, -0.8 * girth], [-0.05 + lean, -girth - rng.uniform(0.15, 0.3)], [0.3, -0.7 * girth]])
    belly = np.array([[-0.15, 0.85 * girth], [0.1 + lean, girth + rng.uniform(0.1, 0.25)], [0.15, 0.8 * girth]])
    fins = fill(size, tail, back, belly)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
    pitch = rng.uniform(18, 30)
    scales = np.abs(np.sin(pitch * (x + 0.5 * y)) * np.sin(pitch * (x - 0.5 * y)))
    skin = markings(rng, size, base, accent) * (0.75 + 0.35 * scales - 0.25 * y / girth)
    rays = 0.75 + 0.25 * np.sin(40 * y + 12 * x)
    color = blend(accent[:, None, None] * rays, skin, body)
    gill = stroke(size, 0.035, ellipse(-0.62, 0.0, 0.2, 0.75 * girth, -1.1, 1.1)) * body
    color = blend(color, dark, gill * np.float32(0.8))
    eye = (-0.66, -0.28 * girth)
    color = blend(color, np.float32([0.95, 0.93, 0.85]), fill(size, ellipse(*eye, 0.085, 0.085)))
    color = blend(color, np.float32([0.03, 0.03, 0.04]), fill(size, ellipse(*eye, 0.05, 0.05)))
    relief = 0.8 * swell(body, girth) + 0.05 * fins + 0.01 * scales * body
    return Painting(color, np.maximum(body, fins), relief, rng.uniform(0.2, 0.9))


def starfish(rng: Generator, size: int) -> Painting:
    """Five unequal arms with a row of bumps along each."""
    base, accent, dark = palette(rng, around(rng, 0.03))
    angle = np.linspace(0, 2 * np.pi, 240, endpoint=False)
    arms = 2 * np.pi * np.arange(5) / 5 + rng.normal(0, 0.09, 5)
    gap = np.abs((angle[:, None] - arms + np.pi) % (2 * np.pi) - np.pi)
    waist, sharpness = rng.uniform(0.26, 0.4), rng.uniform(4.5, 8.0)
    reach = rng.uniform(0.78, 0.97, 5)
    radius = (waist + (reach - waist) * np.exp(-sharpness * gap**1.5)).max(axis=1)
    star = fill(size, np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1))
    bumps = np.zeros((size, size), np.float32)
    for arm, far in zip(arms, reach, strict=True):
        for step in np.arange(0.1, 0.9 * far, rng.uniform(0.11, 0.16)):
            dot = ellipse(step * np.cos(arm), step * np.sin(arm), 0.045 * (1.2 - step), 0.045 * (1.2 - step))
            bumps = np.maximum(bumps, fill(size, dot))
    color = blend(markings(rng, size, base, accent), dark if rng.uniform() < 0.4 else accent * 0.3 + 0.7, bumps * 0.7)
    relief = swell(star, 0.26) + 0.05 * cv2.GaussianBlur(bumps, (0, 0), 0.008 * size + 0.4)
    return Painting(color, star, relief, rng.uniform(0.0, 0.3))


def mug(rng: Generator, size: int) -> Painting:
    """A tapered cup with a handle on the right, seen a little from above."""
    base, accent, _ = palette(rng)
    top, bottom = rng.uniform(0.45, 0.58), rng.uniform(0.36, 0.5)
    brim, ground, tilt = rng.uniform(-0.7, -0.5), rng.uniform(0.55, 0.8), rng.uniform(0.1, 0.2)
    left = -0.25
    foot = ellipse(left, ground, bottom, tilt * bottom / top, 0, np.pi)
    wall = np.concatenate([[[left + top, brim]], foot, [[left - top, brim]]])
    body = fill(size, wall, ellipse(left, brim, top, tilt))
    grip = rng.uniform(0.28, 0.42)
    middle = (brim + ground) / 2 + 0.03
    loop = ellipse(left + (top + bottom) / 2 - 0.04, middle, grip, 0.38, -1.5, 1.5)
    handle = stroke(size, rng.uniform(0.1, 0.16), loop) * (1 - body)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
    color = markings(rng, size, base, accent)
    if rng.uniform() < 0.4:
        band = ((y > rng.uniform(-0.3, 0.1)) & (y < rng.uniform(0.2, 0.5))).astype(np.float32)
        color = blend(color, accent, cv2.GaussianBlur(band, (0, 0), 0.7))
    color = blend(color, base * np.float32(0.9), handle)
    inside = fill(size, ellipse(left, brim, top * 0.9, tilt * 0.8))
    drink = np.clip((y - brim) / tilt + 0.4, 0, 1)
    color = blend(color, blend(base * np.float32(0.35), accent * np.float32(0.25), drink), inside)
    drum = np.sqrt(np.clip(1 - ((x - left) / top) ** 2, 0.02, 1)) * np.float32(top)
    relief = np.where(body > 0.5, drum * (1 - inside), 0) * 0.8 + 0.6 * swell(handle, 0.07)
    relief = cv2.GaussianBlur(relief.astype(np.float32), (0, 0), 0.012 * size + 0.4)
    return Painting(color, np.maximum(body, handle), relief, rng.uniform(0.2, 1.0))


def butterfly(rng: Generator, size: int) -> Painting:
    """Two pairs of mirrored wings with dark rims and eyespots, a body, and feelers."""
    base, accent, dark = palette(rng, around(rng, 0.8))
    wings = []
    for x, y, rx, ry, turn in (
        (0.45, -0.32, rng.uniform(0.4, 0.52), rng.uniform(0.26, 0.36), rng.uniform(-0.9, -0.5)),
        (0.34, 0.36, rng.uniform(0.3, 0.4), rng.uniform(0.22, 0.32), rng.uniform(0.5, 0.9)),
    ):
        oval = ellipse(0, 0, rx, ry) * (1 + 0.12 * np.sin(np.linspace(0, 6 * np.pi, 48)))[:, None]
        spin = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        right = oval @ spin + [x, y]
        wings += [right, right * [-1, 1]]
    wing = fill(size, *wings)
    body = fill(size, ellipse(0, 0.02, 0.07, 0.5))
    feelers = stroke(size, 0.025, *(np.array([[0, -0.4], [s * 0.12, -0.7], [s * 0.28, -0.88]]) for s in (-1, 1)))
    pattern = markings(rng, size, base, accent)
    color = (pattern + pattern[..., ::-1]) / 2
    rim = wing - fill(size, *(outline.mean(0) + (outline - outline.mean(0)) * 0.8 for outline in wings))
    color = blend(color, dark, np.clip(rim, 0, 1) * np.float32(0.9))
    for outline, radius in zip(wings, np.repeat(rng.uniform(0.06, 0.13, 2), 2), strict=True):
        spot = outline.mean(0) * [1.15, 1.0]
        color = blend(color, accent * 0.3 + np.float32(0.7), fill(size, ellipse(*spot, radius, radius)))
        color = blend(color, dark, fill(size, ellipse(*spot, radius * 0.55, radius * 0.55)))
    thin = np.maximum(body, feelers)
    relief = 0.15 * swell(wing, 0.2) + 0.9 * swell(body, 0.07)
    return Painting(blend(color, dark, thin), np.maximum(wing, thin), relief, rng.uniform(0.0, 0.4))


def litter(rng: Generator, size: int) -> Painting:
    """A thing of no kind: a pebble, a stick, a scrap or a ring, painted as the kinds are."""
    base, accent, _ = palette(rng)
    style = rng.integers(7)
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    if style < 2:
        radius = 0.75 + 0.12 * noise(rng, 1, 24, (1, 4), 1)[0]
        mask = fill(size, np.stack([radius * np.cos(angle), radius * np.sin(angle) * rng.uniform(0.5, 1)], 1))
    elif style < 4:
        mask = stroke(size, rng.uniform(0.08, 0.2), np.array([[-0.85, 0], [0, rng.uniform(-0.2, 0.2)], [0.85, 0]]))
    elif style < 6:
        corners = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 6)))
        mask = fill(size, 0.9 * np.stack([np.cos(corners), np.sin(corners)], 1))
    else:
        mask = stroke(size, rng.uniform(0.12, 0.3), ellipse(0, 0, 0.7, 0.7))
    relief = rng.uniform(0.2, 1.0) * swell(mask, rng.uniform(0.05, 0.5))
    return Painting(markings(rng, size, base, accent), mask, relief, rng.uniform(0.0, 0.8))


# Kind -> (painter, largest turn from upright in degrees). Label = position.
KINDS: dict[str, tuple[Callable[[Generator, int], Painting], float]] = {
    "leaf": (leaf, 180.0),
    "fish": (fish, 60.0),
    "starfish": (starfish, 180.0),
    "mug": (mug, 40.0),
    "butterfly": (butterfly, 180.0),
}
