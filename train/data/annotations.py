"""The images, categories and annotations of a COCO file as arrays, one per field, and which annotations are used.

The rules are those of MMDetection's CocoDataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.data.coco_json import BOX, INTEGER, NAME, NUMBER, STRING, Entry, read_column


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
        areas: (M,) float64.
        image_indices: (M,) int64, position of the image among `ImageColumns`; 0 where it is not listed.
        image_listed: (M,) bool.
        labels: (M,) int64; 0 where the category is not used.
        category_used: (M,) bool.
        is_crowd: (M,) bool.
        is_ignored: (M,) bool.
    """

    boxes: np.ndarray
    areas: np.ndarray
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
    """How many annotations of a file are used, and how many are dropped; each counts for the first reason that applies.

    Attributes:
        used: boxes that the loss sees.
        crowd: crowds; they are kept out of the loss.
        unlisted_image: dropped, of an image that is not listed.
        ignored: dropped, marked `ignore`.
        empty: dropped, area not above 0 or a side below one pixel.
        outside: dropped, no overlap with the image.
        other_category: dropped, of a category that is not used.
        no_polygon: dropped, without a polygon of three corners where masks are asked for.
    """

    used: int
    crowd: int
    unlisted_image: int
    ignored: int
    empty: int
    outside: int
    other_category: int
    no_polygon: int

    def __str__(self) -> str:
        text = f"{self.used} boxes"
        if self.crowd:
            text += f", {self.crowd} crowds"

        reasons = {
            "without area or thinner than a pixel": self.empty,
            "outside the image": self.outside,
            "marked ignore": self.ignored,
            "of other categories": self.other_category,
            "of images that are not listed": self.unlisted_image,
            "without a valid polygon": self.no_polygon,
        }
        dropped = [f"{count} {reason}" for reason, count in reasons.items() if count]
        if dropped:
            text += f"; dropped: {', '.join(dropped)}"
        return text


def select_categories(categories: list[Entry], classes: Sequence[str] | None) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of the categories to use and their ids in the file (classes,) int64, both by label.

    Args:
        categories: the list of the file.
        classes: names to use, by label; None uses all, in the order of the file.

    Raises:
        ValueError: a field is malformed, a name or an id appears twice, or the file lacks one of `classes`.
    """
    names = [str(name) for name in read_column(categories, "categories", "name", NAME)]
    ids = [int(category_id) for category_id in read_column(categories, "categories", "id", INTEGER)]
    if len(set(names)) != len(names) or len(set(ids)) != len(ids):
        raise ValueError("categories: expected unique names and ids, got one of them twice")

    id_of_name = dict(zip(names, ids, strict=True))
    if classes is None:
        classes = names
    for name in classes:
        if name not in id_of_name:
            raise ValueError(f"categories: expected one with the name {name!r}, got {', '.join(names) or 'none'}")
    return tuple(classes), np.array([id_of_name[name] for name in classes], np.int64)


def read_images(entries: list[Entry]) -> ImageColumns:
    """Return the images of a file.

    Raises:
        ValueError: a field is malformed, or two images have the same id.
    """
    images = ImageColumns(
        ids=np.array(read_column(entries, "images", "id", INTEGER), np.int64),
        widths=np.array(read_column(entries, "images", "width", INTEGER), np.int64),
        heights=np.array(read_column(entries, "images", "height", INTEGER), np.int64),
        file_names=np.array(read_column(entries, "images", "file_name", STRING), np.str_),
    )
    unique_ids, occurrences = np.unique(images.ids, return_counts=True)
    if len(unique_ids) != len(entries):
        raise ValueError(f"images: expected unique ids, got {unique_ids[occurrences > 1][0]} twice")
    return images


def read_annotations(entries: list[Entry], images: ImageColumns, category_ids: np.ndarray) -> AnnotationColumns:
    """Return the annotations of a file.

    Args:
        entries: the list of the file.
        images: the images of the file.
        category_ids: (classes,) int64, id of each category that is used, by label.

    Raises:
        ValueError: a field is malformed.
    """
    boxes = np.array(read_column(entries, "annotations", "bbox", BOX), np.float64).reshape(-1, 4)
    image_ids = np.array(read_column(entries, "annotations", "image_id", INTEGER), np.int64)
    annotation_category_ids = np.array(read_column(entries, "annotations", "category_id", INTEGER), np.int64)
    areas = np.array(read_column(entries, "annotations", "area", NUMBER), np.float64)
    image_indices, image_listed = _find_ids(image_ids, images.ids)
    labels, category_used = _find_ids(annotation_category_ids, category_ids)
    return AnnotationColumns(
        boxes=boxes,
        areas=areas,
        image_indices=image_indices,
        image_listed=image_listed,
        labels=labels,
        category_used=category_used,
        is_crowd=np.array([bool(entry.get("iscrowd", 0)) for entry in entries], bool),
        is_ignored=np.array([bool(entry.get("ignore", 0)) for entry in entries], bool),
    )


def drop_annotations(annotations: AnnotationColumns, images: ImageColumns) -> tuple[np.ndarray, dict[str, int]]:
    """Return which annotations (M,) bool are kept, crowds included, and how many are dropped for which reason.

    The reasons are named as in `AnnotationCounts`.
    """
    widths = annotations.boxes[:, 2]
    heights = annotations.boxes[:, 3]
    reasons = {
        "unlisted_image": ~annotations.image_listed,
        "ignored": annotations.is_ignored,
        "empty": ~((annotations.areas > 0) & (widths >= 1) & (heights >= 1)),
        "outside": ~_overlaps_image(annotations, images),
        "other_category": ~annotations.category_used,
    }
    kept = np.ones(len(annotations.boxes), bool)
    dropped = {}
    for reason, applies in reasons.items():
        dropped[reason] = int((kept & applies).sum())
        kept &= ~applies
    return kept, dropped


def _overlaps_image(annotations: AnnotationColumns, images: ImageColumns) -> np.ndarray:
    """Return which boxes (M,) bool share an area with their image."""
    if len(images.ids) == 0:
        return np.zeros(len(annotations.boxes), bool)
    x, y, width, height = annotations.boxes.T
    image_width = images.widths[annotations.image_indices]
    image_height = images.heights[annotations.image_indices]
    overlap_x = np.minimum(x + width, image_width) - np.maximum(x, 0)
    overlap_y = np.minimum(y + height, image_height) - np.maximum(y, 0)
    common_area = np.maximum(overlap_x, 0) * np.maximum(overlap_y, 0)
    has_common_area: np.ndarray = common_area != 0
    return has_common_area


def _find_ids(values: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the position (M,) int64 of every value in `ids`, 0 where absent, and whether it is there (M,) bool."""
    if len(ids) == 0:
        return np.zeros(len(values), np.int64), np.zeros(len(values), bool)
    order = np.argsort(ids)
    rank = np.searchsorted(ids, values, sorter=order)
    position = order[np.minimum(rank, len(ids) - 1)]
    present = ids[position] == values
    return np.where(present, position, 0), present
