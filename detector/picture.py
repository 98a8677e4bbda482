"""Parts of every picture: colors, text, titles, legends, enlarged pictures and pictures side by side."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

Color = tuple[int, int, int]  # red, green, blue in 0..255

WHITE: Color = (255, 255, 255)
BLACK: Color = (0, 0, 0)
GRAY: Color = (235, 235, 235)
FONT = cv2.FONT_HERSHEY_SIMPLEX
HAS_ALL_LETTERS = int(cv2.__version__.split(".")[0]) >= 5  # the fonts of OpenCV 4 have those of ASCII only


def font_scale(image: np.ndarray) -> float:
    """Return the size of text, in OpenCV's unit, that suits a picture, its short side too."""
    height, width = image.shape[:2]
    return float(np.clip(min(max(height, width) / 1100, min(height, width) / 500), 0.35, 1.5))


def line_thickness(scale: float) -> int:
    """Return the pixels of a text's strokes."""
    return max(1, round(scale * 1.6))


def text_extent(text: str, scale: float) -> tuple[int, int, int]:
    """Return the width of a text, and the height above and the depth below the baseline of any text, in pixels."""
    (width, _), _ = cv2.getTextSize(_drawable(text), FONT, scale, line_thickness(scale))
    (_, height), depth = cv2.getTextSize("Hg", FONT, scale, line_thickness(scale))
    return width, height, depth


def put_text(picture: np.ndarray, text: str, x: int, baseline: int, scale: float, color: Color = BLACK) -> None:
    """Write a text into a picture, from column `x` on."""
    cv2.putText(picture, _drawable(text), (x, baseline), FONT, scale, color, line_thickness(scale), cv2.LINE_AA)


def _drawable(text: str) -> str:
    """Return a text with a question mark for each letter that OpenCV cannot draw."""
    return text if HAS_ALL_LETTERS else text.encode("ascii", "replace").decode("ascii")


def enlarge(image: np.ndarray, min_side: int) -> tuple[np.ndarray, float]:
    """Return the image, enlarged if its long side has fewer than `min_side` pixels, and the factor."""
    factor = max(1.0, min_side / max(image.shape[:2]))
    if factor > 1:
        image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    return image, factor


def pad(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a picture (H, W, 3) uint8 in the top left corner of a white one of another size."""
    padded = np.full((height, width, 3), WHITE, np.uint8)
    padded[: picture.shape[0], : picture.shape[1]] = picture
    return padded


def side_by_side(pictures: Sequence[np.ndarray], titles: Sequence[str]) -> np.ndarray:
    """Join pictures, (H, W, 3) uint8 RGB of one size, into a row, each below its title."""
    columns = []
    for picture, title in zip(pictures, titles, strict=True):
        width = picture.shape[1]
        column = np.vstack([_title_bar(title, width, font_scale(picture)), picture])
        gap = np.full((len(column), max(4, width // 100), 3), WHITE, np.uint8)
        columns += [column, gap]
    return np.hstack(columns[:-1])


def _title_bar(title: str, width: int, scale: float) -> np.ndarray:
    _, height, depth = text_extent(title, scale)
    bar = np.full((2 * (height + depth), width, 3), WHITE, np.uint8)
    put_text(bar, title, height // 2, height + depth, scale)
    return bar


def legend(entries: Sequence[tuple[str, Color]], width: int, scale: float) -> np.ndarray:
    """Draw a strip of color swatches with names, in as many rows as they need.

    Args:
        entries: names and their colors.
        width: of the strip in pixels.
        scale: size of the text, see `font_scale`.

    Returns:
        (H, width, 3) uint8, RGB.
    """
    _, height, depth = text_extent("", scale)
    row_height = round(1.6 * (height + depth))
    margin = row_height // 2

    corners = []  # x and y of each swatch's row
    x = margin
    y = 0
    for name, _ in entries:
        entry_width = 2 * row_height + text_extent(name, scale)[0]
        if x > margin and x + entry_width > width:
            x = margin
            y += row_height
        corners.append((x, y))
        x += entry_width

    strip = np.full((y + row_height + depth, width, 3), GRAY, np.uint8)
    for (name, color), (x, y) in zip(entries, corners, strict=True):
        top = y + (row_height - height) // 2 + depth // 2
        baseline = y + (row_height + height) // 2 + depth // 2
        cv2.rectangle(strip, (x, top), (x + row_height - depth, baseline), color, -1)
        put_text(strip, name, x + row_height, baseline, scale)
    return strip
