"""Pictures of detections: boxes and masks in the color of their class, labels that do not cover each other."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Iterator, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from detector.picture import (
    BLACK,
    WHITE,
    Color,
    enlarge,
    font_scale,
    legend,
    line_thickness,
    put_text,
    side_by_side,
    text_extent,
)
from detector.structures import Detections, Target
from detector.text import short_name

MIN_SIDE = 640
"""Images whose long side has fewer pixels are enlarged to so many before boxes and text are drawn."""

GOLDEN_RATIO = 0.618034
LUMA = (0.299, 0.587, 0.114)  # how much red, green and blue add to the brightness (ITU-R BT.601)

Rectangle = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels


def class_color(label: int) -> Color:
    """Return the color (R, G, B) of a class; neighboring labels get hues far apart."""
    hue = (0.02 + label * GOLDEN_RATIO) % 1.0
    value = (1.0, 0.8, 0.6)[label // 12 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
    return round(255 * red), round(255 * green), round(255 * blue)


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
    classes = labels.cpu().tolist()
    score_values = [None] * len(classes) if scores is None else scores.detach().cpu().tolist()
    if not len(boxes) == len(classes) == len(score_values):
        lengths = f"{len(boxes)}, {len(classes)} and {len(score_values)}"
        raise ValueError(f"boxes, labels, scores: expected equal lengths, got {lengths}")
    if classes and not 0 <= min(classes) <= max(classes) < len(class_names):
        raise ValueError(
            f"labels: expected 0 to {len(class_names) - 1} for {len(class_names)} class names, "
            f"got {min(classes)} to {max(classes)}"
        )

    picture = image.copy()
    scale = font_scale(picture)
    rectangles = _pixel_rectangles(boxes)
    best_first = sorted(range(len(classes)), key=lambda i: -(score_values[i] or 0.0))

    for label, mask in zip(classes, masks, strict=False):
        _tint(picture, mask, class_color(label), scale)

    for i in reversed(best_first):  # the best ends on top
        _draw_rectangle(picture, rectangles[i], class_color(classes[i]), scale)

    occupied: list[Rectangle] = []
    for i in best_first:
        text = short_name(class_names[classes[i]])
        if score_values[i] is not None:
            text += f" {score_values[i]:.2f}"
        occupied.append(_draw_label(picture, text, rectangles[i], class_color(classes[i]), scale, occupied))
    return picture


def draw_detections(
    image: np.ndarray,
    detections: Detections,
    class_names: Sequence[str],
    min_side: int = MIN_SIDE,
    masks: Iterable[np.ndarray] = (),
) -> np.ndarray:
    """Draw detections; small images are enlarged before.

    Args:
        image: (H, W, 3) uint8, RGB.
        detections: in pixels of `image`.
        class_names: by label.
        min_side: small images are enlarged until their long side has so many pixels, for the text to be readable.
        masks: (H, W) bool or uint8, one for each detection, or nothing.

    Returns:
        A picture (H', W', 3) uint8, RGB.

    Raises:
        ValueError: a label has no name.
    """
    image, factor = enlarge(image, min_side)
    height, width = image.shape[:2]
    boxes = detections.boxes * factor
    resized = _resize_masks(masks, height, width)
    return draw_boxes(image, boxes, detections.labels, class_names, detections.scores, resized)


def draw_comparison(
    image: np.ndarray,
    detections: Detections,
    target: Target,
    class_names: Sequence[str],
    min_side: int = MIN_SIDE,
    masks: Iterable[np.ndarray] = (),
    true_masks: Iterable[np.ndarray] = (),
    min_score: float | None = None,
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
        min_score: from which `detections` were chosen, for their title.

    Returns:
        A picture (H', W', 3) uint8, RGB.
    """
    left = draw_detections(image, detections, class_names, min_side, masks)
    image, factor = enlarge(image, min_side)
    height, width = image.shape[:2]
    right = draw_boxes(
        image,
        target.boxes * factor,
        target.labels,
        class_names,
        masks=_resize_masks(true_masks, height, width),
    )
    chosen = "" if min_score is None else f", score {min_score:.2f} or more"
    titles = f"detected{chosen} ({len(detections.labels)})", f"ground truth ({len(target.labels)})"
    picture = side_by_side([left, right], titles)

    all_labels = torch.cat([detections.labels.cpu(), target.labels.cpu()])
    entries = [(short_name(class_names[label]), class_color(label)) for label in all_labels.unique().tolist()]
    return np.vstack([picture, legend(entries, picture.shape[1], font_scale(image))])


def _pixel_rectangles(boxes: Tensor) -> list[Rectangle]:
    """Round boxes to pixels; what is not a number or too large for OpenCV becomes a number it takes."""
    corners = boxes.detach().cpu().double().numpy()
    corners = np.clip(np.nan_to_num(corners), -1e6, 1e6).round().astype(int)
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in corners.tolist()]


def _resize_masks(masks: Iterable[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
    """Return masks (H, W) as bool of another size, one at a time."""
    for mask in masks:
        resized = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
        yield resized.astype(bool)


def _draw_rectangle(picture: np.ndarray, rectangle: Rectangle, color: Color, scale: float) -> None:
    """Draw a box, a large one with a dark rim, so that it shows on a background of its own color."""
    x1, y1, x2, y2 = rectangle
    thickness = max(2, round(scale * 2.5))
    if min(x2 - x1, y2 - y1) > 10 * thickness:
        cv2.rectangle(picture, (x1, y1), (x2, y2), BLACK, thickness + 2, cv2.LINE_AA)
    cv2.rectangle(picture, (x1, y1), (x2, y2), color, thickness, cv2.LINE_AA)


def _tint(picture: np.ndarray, mask: np.ndarray, color: Color, scale: float) -> None:
    """Mix a color into the pixels of a mask (H, W) and draw its outline."""
    picture[mask] = (0.6 * picture[mask] + 0.4 * np.array(color)).astype(np.uint8)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, outlines, -1, color, line_thickness(scale), cv2.LINE_AA)


def _draw_label(
    picture: np.ndarray,
    text: str,
    box: Rectangle,
    color: Color,
    scale: float,
    occupied: Sequence[Rectangle],
) -> Rectangle:
    """Write a text near its box where it covers the labels in `occupied` least; return the rectangle it fills."""
    text_width, text_height, depth = text_extent(text, scale)
    padding = max(2, round(4 * scale))
    width = text_width + 2 * padding
    height = text_height + depth + padding

    candidates = _label_candidates(box, width, height, picture.shape[1], picture.shape[0])
    x1, y1, x2, y2 = candidates[int(_covered_areas(candidates, occupied).argmin())]

    cv2.rectangle(picture, (x1, y1), (x2 - 1, y2 - 1), color, -1)
    brightness = np.dot(color, LUMA)
    text_color = BLACK if brightness > 140 else WHITE
    put_text(picture, text, x1 + padding, y1 + text_height + padding // 2, scale, text_color)
    return x1, y1, x2, y2


def _label_candidates(
    box: Rectangle, width: int, height: int, picture_width: int, picture_height: int
) -> list[Rectangle]:
    """Return where a label of this size may stand around its box, the best first, all inside the picture."""
    x1, y1, x2, y2 = box
    tops = (y1 - height, y1, y2, y2 - height, (y1 + y2 - height) // 2, y1 - 2 * height, y2 + height)
    lefts = (x1, x2 - width, x2, x1 - width)
    max_left = max(picture_width - width, 0)
    max_top = max(picture_height - height, 0)

    candidates = []
    for top in tops:
        for left in lefts:
            inside_left = min(max(left, 0), max_left)
            inside_top = min(max(top, 0), max_top)
            candidates.append((inside_left, inside_top, inside_left + width, inside_top + height))
    return candidates


def _covered_areas(candidates: Sequence[Rectangle], occupied: Sequence[Rectangle]) -> np.ndarray:
    """Return how many pixels of each candidate (n,) all the other rectangles cover, each for itself."""
    one = np.array(candidates)[:, None]
    other = np.array(occupied, int).reshape(1, -1, 4)
    widths = np.minimum(one[..., 2], other[..., 2]) - np.maximum(one[..., 0], other[..., 0])
    heights = np.minimum(one[..., 3], other[..., 3]) - np.maximum(one[..., 1], other[..., 1])
    areas: np.ndarray = (widths.clip(0) * heights.clip(0)).sum(1)
    return areas
