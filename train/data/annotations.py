"""The images, categories and annotations of a COCO file as arrays, one per field, and which annotations are used.

The rules are those of MMDetection's CocoDataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detector.text import short_list
from train.data.coco_json import (
    BOX,
    FILE_NAME,
    FLAG,
    ID,
    IMAGE_SIDE,
    NAME,
    NUMBER,
    Entry,
    check_unique,
    read_column,
)

MIN_IMAGE_SIDE = 32  # pixels; smaller images are not trained on
TOLERANCE = 1.0  # pixels that rounding may add to a box


@dataclass(frozen=True)
class ImageColumns:
    """The images of a file, in its order.

    Attributes:
        ids: (N,) int64, unique.
        widths: (N,) int64.
        heights: (N,) int64.
        file_names: (N,) unicode.
    """

    ids: np.ndarray
    widths: np.ndarray
    heights: np.ndarray
    file_names: np.ndarray


@dataclass(frozen=True)
class AnnotationColumns:
    """The annotations of a file, in its order.

    Attributes:
        boxes: (M, 4) float64, x, y, width, height.
        areas: (M,) float64; that of the box where the file has none.
        has_area: (M,) bool.
        image_indices: (M,) int64, position of the image among `ImageColumns`; 0 where it is not listed.
        image_listed: (M,) bool.
        labels: (M,) int64; 0 where the category is not used.
        category_used: (M,) bool.
        is_crowd: (M,) bool.
        is_ignored: (M,) bool.
    """

    boxes: np.ndarray
    areas: np.ndarray
    has_area: np.ndarray
    image_indices: np.ndarray
    image_listed: np.ndarray
    labels: np.ndarray
    category_used: np.ndarray
    is_crowd: np.ndarray
    is_ignored: np.ndarray

    def take(self, rows: np.ndarray) -> AnnotationColumns:
        """Return the annotations with these row numbers (R,) int64, in this order."""
        return AnnotationColumns(**{name: column[rows] for name, column in vars(self).items()})


@dataclass(frozen=True)
class AnnotationCounts:
    """How many annotations of a file are used, and how many are not; each counts for the first reason that applies.

    Attributes:
        used: boxes that the loss sees.
        unlisted_image: of an image that is not listed.
        other_category: of a category that is not used.
        unused_image: of an image that is not used, but for those beyond --data.limit, whose annotations count nowhere.
        ignored: marked `ignore`.
        negative_side: with a width or height below 0.
        no_area: with an `area` that is not above 0.
        thin: with a side below one pixel.
        outside: with nothing left when the box is clipped to its image.
        crowd: crowds; they are kept out of the loss.
        no_polygon: without a valid polygon, of three corners and an even count of numbers, where masks are asked for.
    """

    used: int
    unlisted_image: int
    other_category: int
    unused_image: int
    ignored: int
    negative_side: int
    no_area: int
    thin: int
    outside: int
    crowd: int
    no_polygon: int

    @property
    def total(self) -> int:
        """Annotations of the file, without those of images beyond --data.limit."""
        return sum(vars(self).values())

    def __str__(self) -> str:
        reasons = {
            "crowd" if self.crowd == 1 else "crowds": self.crowd,
            "thinner than a pixel": self.thin,
            "with a negative side": self.negative_side,
            "whose area is 0 or less": self.no_area,
            "outside their image": self.outside,
            "marked ignore": self.ignored,
            "without a valid polygon": self.no_polygon,
            "of other categories": self.other_category,
            "of images that are left out": self.unused_image,
            "of images that are not listed": self.unlisted_image,
        }
        return ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)


@dataclass(frozen=True)
class ImageCounts:
    """How many images of a file are used, and how many are not; each counts for the first reason that applies.

    Attributes:
        used: images of the split.
        no_annotation: without any annotation.
        other_category: with annotations of categories that are not used, and no others.
        small: with a side below 32 pixels.
        beyond_limit: after as many as --data.limit says.
    """

    used: int
    no_annotation: int
    other_category: int
    small: int
    beyond_limit: int

    @property
    def total(self) -> int:
        """Images of the file."""
        return sum(vars(self).values())

    def __str__(self) -> str:
        reasons = {
            "without annotations": self.no_annotation,
            "with other categories only": self.other_category,
            f"with a side below {MIN_IMAGE_SIDE} pixels": self.small,
            "beyond --data.limit": self.beyond_limit,
        }
        return ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)


def select_categories(categories: list[Entry], classes: Sequence[str] | None) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of the categories to use and their ids in the file (classes,) int64, both by label.

    Args:
        categories: the list of the file.
        classes: names to use, by label; None uses all, in the order of the file.

    Raises:
        ValueError: a field is malformed, a name or an id appears twice, or the file lacks one of `classes`.
    """
    ids = read_column(categories, "categories", "id", ID).tolist()
    names = read_column(categories, "categories", "name", NAME).tolist()
    check_unique(categories, "categories", "id", ids)
    check_unique(categories, "categories", "name", names)

    id_of_name = dict(zip(names, ids, strict=True))
    if classes is None:
        classes = names
    missing = [name for name in classes if name not in id_of_name]
    if missing:
        total = f" ({len(missing)} names are missing)" if len(missing) > 1 else ""
        raise ValueError(
            f"categories: expected one with the name {missing[0]!r}, got {short_list(names) or 'none'}{total}"
        )
    return tuple(classes), np.array([id_of_name[name] for name in classes], np.int64)


def read_images(entries: list[Entry]) -> ImageColumns:
    """Return the images of a file.

    Raises:
        ValueError: a field is malformed, or two images have the same id.
    """
    images = ImageColumns(
        ids=read_column(entries, "images", "id", ID),
        widths=read_column(entries, "images", "width", IMAGE_SIDE),
        heights=read_column(entries, "images", "height", IMAGE_SIDE),
        file_names=read_column(entries, "images", "file_name", FILE_NAME),
    )
    check_unique(entries, "images", "id", images.ids.tolist())
    return images


def read_annotations(entries: list[Entry], images: ImageColumns, category_ids: np.ndarray) -> AnnotationColumns:
    """Return the annotations of a file.

    The ids of annotations are only used in messages: they may be missing, or equal.

    Args:
        entries: the list of the file.
        images: the images of the file.
        category_ids: (classes,) int64, id of each category that is used, by label.

    Raises:
        ValueError: a field is malformed.
    """
    boxes = read_column(entries, "annotations", "bbox", BOX)
    image_indices, image_listed = _find_ids(read_column(entries, "annotations", "image_id", ID), images.ids)
    labels, category_used = _find_ids(read_column(entries, "annotations", "category_id", ID), category_ids)
    has_area = np.array(["area" in entry for entry in entries], np.bool_)
    areas = read_column(entries, "annotations", "area", NUMBER, default=0)
    return AnnotationColumns(
        boxes=boxes,
        areas=np.where(has_area, areas, boxes[:, 2] * boxes[:, 3]),
        has_area=has_area,
        image_indices=image_indices,
        image_listed=image_listed,
        labels=labels,
        category_used=category_used,
        is_crowd=read_column(entries, "annotations", "iscrowd", FLAG, default=0),
        is_ignored=read_column(entries, "annotations", "ignore", FLAG, default=0),
    )


def choose_images(
    images: ImageColumns, annotations: AnnotationColumns, *, training: bool, limit: int
) -> tuple[np.ndarray, np.ndarray, ImageCounts]:
    """Return the indices (n,) int64 of the images that are used, which (N,) bool the limit leaves out, and counts.

    Args:
        images: of the file.
        annotations: of the file.
        training: leave out images that are small or have no annotation of a category that is used. What the other
            fields of the annotation say does not matter.
        limit: use the first so many; 0 uses all.
    """
    count = len(images.ids)
    has_annotation = np.zeros(count, bool)
    has_annotation[annotations.image_indices[annotations.image_listed]] = True
    has_used_category = np.zeros(count, bool)
    has_used_category[annotations.image_indices[annotations.image_listed & annotations.category_used]] = True
    reasons = {
        "no_annotation": ~has_annotation,
        "other_category": ~has_used_category,
        "small": np.minimum(images.widths, images.heights) < MIN_IMAGE_SIDE,
    }
    if not training:
        reasons = {reason: np.zeros(count, bool) for reason in reasons}
    is_used, left_out = _apply_reasons(reasons, np.ones(count, bool))

    indices = np.flatnonzero(is_used)
    chosen = indices[: limit or None]
    is_beyond_limit = np.zeros(count, bool)
    is_beyond_limit[indices[len(chosen) :]] = True
    return chosen, is_beyond_limit, ImageCounts(used=len(chosen), beyond_limit=int(is_beyond_limit.sum()), **left_out)


def choose_annotations(
    annotations: AnnotationColumns, images: ImageColumns, image_indices: np.ndarray, is_counted: np.ndarray
) -> tuple[np.ndarray, dict[str, int]]:
    """Return which annotations (M,) bool the loss sees, and how many of the others are not seen for which reason.

    The reasons are named as in `AnnotationCounts`.

    Args:
        annotations: of the file.
        images: of the file.
        image_indices: (n,) int64, the images that are used.
        is_counted: (M,) bool, which annotations the counts speak of: those that --data.limit leaves.
    """
    widths = annotations.boxes[:, 2]
    heights = annotations.boxes[:, 3]
    reasons = {
        "unlisted_image": ~annotations.image_listed,
        "other_category": ~annotations.category_used,
        "unused_image": ~_is_of_used_image(annotations, images, image_indices),
        "ignored": annotations.is_ignored,
        "negative_side": _has_negative_side(annotations),
        "no_area": annotations.has_area & (annotations.areas <= 0),
        "thin": (widths < 1) | (heights < 1),
        "outside": ~is_inside_image(annotations, images),
        "crowd": annotations.is_crowd,
    }
    return _apply_reasons(reasons, is_counted)


def find_compared(annotations: AnnotationColumns, images: ImageColumns, image_indices: np.ndarray) -> np.ndarray:
    """Return which annotations (M,) bool an evaluation compares with; arguments as of `choose_annotations`."""
    of_used_image = _is_of_used_image(annotations, images, image_indices)
    is_compared: np.ndarray = of_used_image & annotations.category_used & ~_has_negative_side(annotations)
    return is_compared


def is_within_limit(annotations: AnnotationColumns, is_beyond_limit: np.ndarray) -> np.ndarray:
    """Return which annotations (M,) bool are not of the images (N,) bool that the limit leaves out."""
    # one more, because the annotations of a file without images have the index 0, too
    is_beyond = np.append(is_beyond_limit, False)[annotations.image_indices]
    is_within: np.ndarray = ~(annotations.image_listed & is_beyond)
    return is_within


def count_by_class(annotations: AnnotationColumns, count: int) -> np.ndarray:
    """Return how many annotations of listed images each of `count` classes has, (count,) int64."""
    labels = annotations.labels[annotations.image_listed & annotations.category_used]
    return np.bincount(labels, minlength=count)


def to_corners(boxes: np.ndarray) -> np.ndarray:
    """Return boxes (M, 4) float64 of x, y, width, height as x1, y1, x2, y2 in float32, as training uses them."""
    x, y, width, height = boxes.T
    corners: np.ndarray = np.stack([x, y, x + width, y + height], 1)
    return corners.astype(np.float32)


def _apply_reasons(reasons: dict[str, np.ndarray], kept: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Return what no reason drops of `kept` (N,) bool, and how much each one drops that none before it has dropped."""
    kept = kept.copy()
    dropped = {}
    for reason, applies in reasons.items():
        dropped[reason] = int((kept & applies).sum())
        kept &= ~applies
    return kept, dropped


def _is_of_used_image(annotations: AnnotationColumns, images: ImageColumns, image_indices: np.ndarray) -> np.ndarray:
    is_used = np.zeros(len(images.ids) + 1, bool)  # one more, so that a file without images has the index 0, too
    is_used[image_indices] = True
    is_of_used: np.ndarray = annotations.image_listed & is_used[annotations.image_indices]
    return is_of_used


def _has_negative_side(annotations: AnnotationColumns) -> np.ndarray:
    has_negative_side: np.ndarray = np.minimum(annotations.boxes[:, 2], annotations.boxes[:, 3]) < 0
    return has_negative_side


def fits_image(annotations: AnnotationColumns, images: ImageColumns) -> np.ndarray:
    """Return which boxes (M,) bool do not reach beyond the right and bottom border of their image."""
    x, y, width, height = annotations.boxes.T
    fits_in_x = x + width <= images.widths[annotations.image_indices] + TOLERANCE
    fits_in_y = y + height <= images.heights[annotations.image_indices] + TOLERANCE
    fits: np.ndarray = fits_in_x & fits_in_y
    return fits


def is_inside_image(annotations: AnnotationColumns, images: ImageColumns) -> np.ndarray:
    """Return of which boxes (M,) bool something is left when they are clipped to their image, in float32."""
    if len(images.ids) == 0:
        return np.zeros(len(annotations.boxes), bool)
    widths = images.widths[annotations.image_indices]
    heights = images.heights[annotations.image_indices]
    sizes = np.stack([widths, heights, widths, heights], 1).astype(np.float32)
    x1, y1, x2, y2 = np.clip(to_corners(annotations.boxes), 0, sizes).T
    is_inside: np.ndarray = (x2 > x1) & (y2 > y1)
    return is_inside


def _find_ids(values: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the position (M,) int64 of every value in `ids`, 0 where absent, and whether it is there (M,) bool."""
    if len(ids) == 0:
        return np.zeros(len(values), np.int64), np.zeros(len(values), bool)
    order = np.argsort(ids)
    rank = np.searchsorted(ids, values, sorter=order)
    position = order[np.minimum(rank, len(ids) - 1)]
    present = ids[position] == values
    return np.where(present, position, 0), present
