"""Pictures of detections: boxes in the color of their class, labels that keep out of each other's way."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Iterator, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from detector.structures import Detections, Target

FONT = cv2.FONT_HERSHEY_SIMPLEX
WHITE, BLACK, GRAY = (255, 255, 255), (0, 0, 0), (235, 235, 235)
GOLDEN_RATIO = 0.618034


def class_color(label: int) -> tuple[int, int, int]:
    """Return the color (R, G, B) of a class; neighboring labels get hues far apart."""
    hue = (0.02 + label * GOLDEN_RATIO) % 1.0
    value = (1.0, 0.8, 0.6)[label // 12 % 3]
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.85, value))


def draw_boxes(
    image: np.ndarray,
    boxes: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    scores: Tensor | None = None,
    masks: Iterable[np.ndarray] = (),
) -> np.ndarray:
    """Draw boxes and, on each, the name of its class and its score; masks are tinted in the colors of their classes.

    Labels are placed best score first, each on the first spot around its box that is free.

    Args:
        image: (H, W, 3) uint8, RGB; left as it is.
        boxes: (N, 4), x1 y1 x2 y2 in pixels of `image`.
        labels: (N,), classes from 0.
        class_names: by label.
        scores: (N,) or None.
        masks: (H, W) bool, one for each box, or nothing.

    Returns:
        A new picture of the size of `image`.

    Raises:
        ValueError: a label has no name, or the lengths disagree.
    """
    boxes, labels = boxes.detach().cpu().double().numpy(), labels.cpu().tolist()
    scores = [None] * len(labels) if scores is None else scores.detach().cpu().tolist()
    if not len(boxes) == len(labels) == len(scores):
        raise ValueError(f"boxes, labels, scores: {len(boxes)}, {len(labels)} and {len(scores)} entries")
    if labels and not 0 <= min(labels) <= max(labels) < len(class_names):
        raise ValueError(f"labels: found {min(labels)} to {max(labels)} with {len(class_names)} class names")
    picture = image.copy()
    size = _font_size(picture)
    order = sorted(range(len(labels)), key=lambda i: -(scores[i] or 0.0))
    corners = np.clip(np.nan_to_num(boxes), -1e6, 1e6).round().astype(int)
    for label, mask in zip(labels, masks, strict=False):
        _tint(picture, mask, class_color(label), size)
    for i in reversed(order):  # the best on top
        _rectangle(picture, corners[i], class_color(labels[i]), size)
    taken: list[tuple[int, int, int, int]] = []
    for i in order:
        text = class_names[labels[i]] if scores[i] is None else f"{class_names[labels[i]]} {scores[i]:.2f}"
        taken.append(_label(picture, text, corners[i], class_color(labels[i]), size, taken))
    return picture


def draw_comparison(
    image: np.ndarray,
    detections: Detections,
    target: Target,
    class_names: Sequence[str],
    min_side: int = 640,
    masks: Iterable[np.ndarray] = (),
    true_masks: Iterable[np.ndarray] = (),
) -> np.ndarray:
    """Draw detections beside the ground truth, with a title over either half and a legend of the classes below.

    Args:
        image: (H, W, 3) uint8, RGB.
        detections: what to draw on the left, in pixels of `image`.
        target: what to draw on the right, in pixels of `image`.
        class_names: by label.
        min_side: small images are enlarged until their long side has so many pixels, for the text to be readable.
        masks: (H, W) bool or uint8, one for each detection, or nothing.
        true_masks: the same for `target`.

    Returns:
        A picture (H', W', 3) uint8, RGB.
    """
    image, factor = enlarge(image, min_side)
    masks, true_masks = (_enlarge_masks(given, image.shape[:2]) for given in (masks, true_masks))
    left = draw_boxes(image, detections.boxes * factor, detections.labels, class_names, detections.scores, masks)
    right = draw_boxes(image, target.boxes * factor, target.labels, class_names, masks=true_masks)
    titles = f"detected ({len(detections.labels)})", f"ground truth ({len(target.labels)})"
    picture = side_by_side([left, right], titles)
    present = sorted(set(torch.cat([detections.labels.cpu(), target.labels.cpu()]).tolist()))
    entries = [(class_names[label], class_color(label)) for label in present]
    return np.vstack([picture, _legend(entries, picture.shape[1], _font_size(image))])


def enlarge(image: np.ndarray, min_side: int) -> tuple[np.ndarray, float]:
    """Return the image, enlarged if its long side has less than `min_side` pixels, and the factor."""
    factor = max(1.0, min_side / max(image.shape[:2]))
    if factor > 1:
        image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    return image, factor


def _enlarge_masks(masks: Iterable[np.ndarray], size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Return masks (H, W) as bool of another size (height, width), one at a time."""
    for mask in masks:
        yield cv2.resize(mask.astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST).astype(bool)


def side_by_side(pictures: Sequence[np.ndarray], titles: Sequence[str]) -> np.ndarray:
    """Join pictures, (H, W, 3) uint8 RGB of one size, into a row, each below its title."""
    columns = []
    for picture, title in zip(pictures, titles, strict=True):
        columns.append(np.vstack([_heading(title, picture.shape[1], _font_size(picture)), picture]))
        columns.append(np.full((len(columns[0]), max(4, picture.shape[1] // 100), 3), WHITE, np.uint8))
    return np.hstack(columns[:-1])


def _font_size(image: np.ndarray) -> float:
    return float(np.clip(max(image.shape[:2]) / 1100, 0.35, 1.5))


def _text_extent(text: str, size: float) -> tuple[int, int, int]:
    """Return width of a text, and height above and depth below the base line of any text, in pixels."""
    (width, _), _ = cv2.getTextSize(text, FONT, size, _thickness(size))
    (_, height), depth = cv2.getTextSize("Hg", FONT, size, _thickness(size))
    return width, height, depth


def _thickness(size: float) -> int:
    return max(1, round(size * 1.6))


def _rectangle(picture: np.ndarray, corners: np.ndarray, color: tuple[int, int, int], size: float) -> None:
    """Draw a box, a large one with a dark rim, so that it shows on a background of its own color."""
    x1, y1, x2, y2 = corners.tolist()
    width = max(2, round(size * 2.5))
    if min(x2 - x1, y2 - y1) > 10 * width:
        cv2.rectangle(picture, (x1, y1), (x2, y2), BLACK, width + 2, cv2.LINE_AA)
    cv2.rectangle(picture, (x1, y1), (x2, y2), color, width, cv2.LINE_AA)


def _tint(picture: np.ndarray, mask: np.ndarray, color: tuple[int, int, int], size: float) -> None:
    """Mix a color into the pixels of a mask (H, W) and draw its outline."""
    picture[mask] = (0.6 * picture[mask] + 0.4 * np.array(color)).astype(np.uint8)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, outlines, -1, color, _thickness(size), cv2.LINE_AA)


def _label(
    picture: np.ndarray,
    text: str,
    corners: np.ndarray,
    color: tuple[int, int, int],
    size: float,
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int, int, int]:
    """Write a text near its box where least of it covers the texts in `taken`; return the rectangle it fills."""
    width, height, depth = _text_extent(text, size)
    pad = max(2, round(4 * size))
    width, total = width + 2 * pad, height + depth + pad
    x1, y1, x2, y2 = corners.tolist()
    rows = (y1 - total, y1, y2, y2 - total, (y1 + y2 - total) // 2, y1 - 2 * total, y2 + total)
    spots = [(x, y) for y in rows for x in (x1, x2 - width, x2, x1 - width)]
    room_x, room_y = max(picture.shape[1] - width, 0), max(picture.shape[0] - total, 0)
    spots = [(min(max(x, 0), room_x), min(max(y, 0), room_y)) for x, y in spots]
    covered = [sum(_overlap((x, y, x + width, y + total), other) for other in taken) for x, y in spots]
    x, y = spots[covered.index(min(covered))]
    cv2.rectangle(picture, (x, y), (x + width - 1, y + total - 1), color, -1)
    ink = BLACK if np.dot(color, (0.299, 0.587, 0.114)) > 140 else WHITE
    cv2.putText(picture, text, (x + pad, y + height + pad // 2), FONT, size, ink, _thickness(size), cv2.LINE_AA)
    return x, y, x + width, y + total


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    """Return the common area of two rectangles (x1, y1, x2, y2)."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def _heading(text: str, width: int, size: float) -> np.ndarray:
    _, height, depth = _text_extent(text, size)
    bar = np.full((2 * (height + depth), width, 3), WHITE, np.uint8)
    cv2.putText(bar, text, (height // 2, height + depth), FONT, size, BLACK, _thickness(size), cv2.LINE_AA)
    return bar


def _legend(entries: Sequence[tuple[str, tuple[int, int, int]]], width: int, size: float) -> np.ndarray:
    """Draw a strip of color swatches with names, in as many rows as they need."""
    _, height, depth = _text_extent("", size)
    row = round(1.6 * (height + depth))
    spots, x, y = [], row // 2, 0
    for name, _ in entries:
        extent = 2 * row + _text_extent(name, size)[0]
        if x > row // 2 and x + extent > width:
            x, y = row // 2, y + row
        spots.append((x, y))
        x += extent
    strip = np.full((y + row + depth, width, 3), GRAY, np.uint8)
    for (name, color), (x, y) in zip(entries, spots, strict=True):
        top, base = y + (row - height) // 2 + depth // 2, y + (row + height) // 2 + depth // 2
        cv2.rectangle(strip, (x, top), (x + row - depth, base), color, -1)
        cv2.putText(strip, name, (x + row, base), FONT, size, BLACK, _thickness(size), cv2.LINE_AA)
    return strip
