"""A data set in COCO layout: which images, boxes and masks count, as flat arrays; one image at a time as a `Sample`.

The annotations are parsed once. Afterwards everything is a NumPy array without Python objects inside, so the worker
processes that are forked for decoding share one copy: no reference count is written, no page is duplicated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detector.image import read_image
from train.data.segmentation import Shapes, check_shape, is_shape, slices
from train.data.transforms import Sample, Transform

SMALLEST_SIDE = 32  # training images below are dropped


@dataclass(frozen=True)
class BoxCounts:
    """What became of the annotations of a file.

    Attributes:
        used: boxes the loss sees; `crowd`: kept aside; the others are dropped, each for the first reason that holds.
        ignored: marked `ignore`; outside: no overlap with the image; empty: area not above 0, or a side below one
            pixel; foreign: of a category that is not used; orphan: of an image that is not listed; shapeless: without
            a polygon of three corners, where masks are asked for.
    """

    used: int
    crowd: int
    ignored: int
    outside: int
    empty: int
    foreign: int
    orphan: int
    shapeless: int

    def __str__(self) -> str:
        reasons = {
            "without area or thinner than a pixel": self.empty,
            "outside the image": self.outside,
            "marked ignore": self.ignored,
            "of other categories": self.foreign,
            "of images that are not listed": self.orphan,
            "without a valid polygon": self.shapeless,
        }
        dropped = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        crowd = f", {self.crowd} crowds" if self.crowd else ""
        return f"{self.used} boxes{crowd}" + (f"; dropped: {dropped}" if dropped else "")


@dataclass(frozen=True)
class BrokenImage:
    """An image that could not be read, in the place of its `Sample`."""

    image_id: int
    reason: str


class CocoDetection:
    """The images of one split and their boxes.

    Args:
        annotations: JSON file in COCO format.
        images: folder of the image files.
        transform: from decoded image and boxes to what the model is given.
        training: drop images below 32 pixels and images without an annotation of the classes.
        classes: names of the categories to use, by label; None uses all, in the order of the file.
        limit: keep only the first so many images; 0 keeps all.
        masks: read the shapes of the objects too, for samples of the training split and for pictures.

    Attributes:
        classes: names, by label.
        category_ids: (classes,) int64, id in the file by label.
        image_ids, widths, heights: (N,) int64; file_names: (N,) unicode.
        boxes: (M, 4) float32 xyxy, not clipped; labels: (M,) int64; both without crowds.
        starts: (N + 1,) int64; image i owns the boxes starts[i]:starts[i + 1].
        shapes: of the boxes; None without masks.
        counts: what became of every annotation; annotated: whether the file has any.

    Raises:
        OSError: a file or folder is missing.
        ValueError: the file is not what it should be; the message names it and the entry.

    Source:
        MMDetection's CocoDataset (which annotations and images are kept, their order), LoadAnnotations (which masks).
    """

    def __init__(
        self,
        annotations: Path,
        images: Path,
        transform: Transform,
        *,
        training: bool,
        classes: Sequence[str] | None = None,
        limit: int = 0,
        masks: bool = False,
    ):
        self.annotations, self.folder, self.transform = Path(annotations), Path(images), transform
        self.training = training
        if not self.annotations.is_file():
            raise FileNotFoundError(f"annotations not found: {self.annotations}")
        if not self.folder.is_dir():
            raise FileNotFoundError(f"folder of images not found: {self.folder}")
        content = _load_json(self.annotations)
        try:
            self._take_categories(content.get("categories", []), classes)
            self._take_images(content["images"])
            kept = self._take_boxes(content.get("annotations", []), masks)
        except ValueError as error:
            raise ValueError(f"{self.annotations}: {error}") from error
        self.annotated = "annotations" in content
        self._select(np.flatnonzero(kept)[: limit or None])

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: tuple[int, int]) -> Sample | BrokenImage:
        """Read image `index` as it looks in `epoch`; key is (epoch, index)."""
        epoch, index = key
        try:
            image = read_image(self.path(index))
        except (OSError, ValueError) as error:
            return BrokenImage(int(self.image_ids[index]), _one_line(error))
        found, listed = image.shape[:2], (int(self.heights[index]), int(self.widths[index]))
        if self.shapes is not None and found != listed:
            reason = f"{self.path(index)}: {found[0]} x {found[1]} pixels, its masks are for {listed[0]} x {listed[1]}"
            return BrokenImage(int(self.image_ids[index]), reason)
        masks = None if self.shapes is None or not self.training else self.masks(index)
        return self.transform(image, *self.truth(index), int(self.image_ids[index]), epoch, index, masks)

    def path(self, index: int) -> Path:
        """Return the file of image `index`."""
        return self.folder / str(self.file_names[index])

    def truth(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return boxes (n, 4) float32 and labels (n,) int64 of image `index`, in pixels of the file."""
        mine = slice(self.starts[index], self.starts[index + 1])
        return self.boxes[mine], self.labels[mine]

    def masks(self, index: int) -> Iterator[np.ndarray]:
        """Draw the masks of image `index` in the order of its boxes: (H, W) uint8, in pixels of the file."""
        for number in range(self.starts[index], self.starts[index + 1]):
            yield self.shapes.draw(number, int(self.heights[index]), int(self.widths[index]))

    def _take_categories(self, categories: list[dict], classes: Sequence[str] | None) -> None:
        names, numbers = (_column(categories, "categories", *field) for field in (("name", _NAME), ("id", _WHOLE)))
        ids = dict(zip(map(str, names), map(int, numbers), strict=True))
        if len(ids) != len(categories) or len(set(ids.values())) != len(categories):
            raise ValueError("two categories have the same name or the same id")
        missing = [name for name in classes or () if name not in ids]
        if missing:
            raise ValueError(f"category {missing[0]!r} is missing (it has {', '.join(ids) or 'none'})")
        self.classes = tuple(ids if classes is None else classes)
        self.category_ids = np.array([ids[name] for name in self.classes], np.int64)

    def _take_images(self, images: list[dict]) -> None:
        self.image_ids = np.array(_column(images, "images", "id", _WHOLE), np.int64)
        self.widths = np.array(_column(images, "images", "width", _WHOLE), np.int64)
        self.heights = np.array(_column(images, "images", "height", _WHOLE), np.int64)
        self.file_names = np.array(_column(images, "images", "file_name", _TEXT), np.str_)
        ids, times = np.unique(self.image_ids, return_counts=True)
        if len(ids) != len(images):
            raise ValueError(f"two images have the id {ids[times > 1][0]}")

    def _take_boxes(self, annotations: list[dict], masks: bool) -> np.ndarray:
        """Fill boxes, labels, starts and shapes; return which images (N,) bool stay."""
        box = np.array(_column(annotations, "annotations", "bbox", _BOX), np.float64).reshape(-1, 4)
        image_id = np.array(_column(annotations, "annotations", "image_id", _WHOLE), np.int64)
        category = np.array(_column(annotations, "annotations", "category_id", _WHOLE), np.int64)
        area = np.array(_column(annotations, "annotations", "area", _NUMBER), np.float64)
        crowd = np.array([bool(annotation.get("iscrowd", 0)) for annotation in annotations], bool)
        ignored = np.array([bool(annotation.get("ignore", 0)) for annotation in annotations], bool)

        image, listed = _lookup(image_id, self.image_ids)
        label, known = _lookup(category, self.category_ids)
        x, y, w, h = box.T
        if len(self.image_ids):
            overlap_x = np.minimum(x + w, self.widths[image]) - np.maximum(x, 0)
            overlap_y = np.minimum(y + h, self.heights[image]) - np.maximum(y, 0)
            inside = np.maximum(overlap_x, 0) * np.maximum(overlap_y, 0) != 0
        else:
            inside = np.zeros(len(box), bool)
        solid = (area > 0) & (w >= 1) & (h >= 1)

        alive, dropped = np.ones(len(box), bool), []
        for condition in (listed, ~ignored, solid, inside, known):
            dropped.append(int((alive & ~condition).sum()))
            alive &= condition
        orphan, ignore, empty, outside, foreign = dropped
        shapeless = np.zeros(len(box), bool)
        if masks:  # evaluation counts with every annotation, training sees only these
            needed = alive & ~crowd if self.training else listed & known
            shapeless[needed] = ~self._have_shapes(annotations, np.flatnonzero(needed), image)
        used = alive & ~crowd & ~shapeless
        self.counts = BoxCounts(
            int(used.sum()), int((alive & crowd).sum()), ignore, outside, empty, foreign, orphan, int(shapeless.sum())
        )

        order = np.flatnonzero(used)[np.argsort(image[used], kind="stable")]
        self.boxes = np.stack([x, y, x + w, y + h], 1)[order].astype(np.float32)
        self.labels = label[order]
        self.starts = np.searchsorted(image[order], np.arange(len(self.image_ids) + 1))
        self.shapes = Shapes.of(annotations[number]["segmentation"] for number in order) if masks else None
        if not self.training:
            return np.ones(len(self.image_ids), bool)
        mentioned = np.zeros(len(self.image_ids), bool)
        mentioned[image[listed & known]] = True
        return mentioned & (np.minimum(self.widths, self.heights) >= SMALLEST_SIDE)

    def _have_shapes(self, annotations: list[dict], chosen: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Return which of the chosen annotations (n,) have a mask that can be drawn; `image` is where each belongs."""
        have = np.ones(len(chosen), bool)
        for place, number in enumerate(chosen):
            annotation, height, width = annotations[number], self.heights[image[number]], self.widths[image[number]]
            try:
                if annotation.get("segmentation") is None:
                    raise ValueError("missing, and a model with masks (--model.mask) needs it")
                have[place] = is_shape(annotation["segmentation"])
                if have[place]:
                    check_shape(annotation["segmentation"], int(height), int(width))
                elif not self.training:
                    raise ValueError("no valid polygon to compare masks with")
            except ValueError as error:
                raise ValueError(f"{_which('annotations', number, annotation)}: 'segmentation': {error}") from error
        return have

    def _select(self, kept: np.ndarray) -> None:
        """Keep the images with these indices and their boxes."""
        rows, self.starts = slices(self.starts, kept)
        self.boxes, self.labels = self.boxes[rows], self.labels[rows]
        self.shapes = None if self.shapes is None else self.shapes.take(rows)
        self.image_ids, self.file_names = self.image_ids[kept], self.file_names[kept]
        self.widths, self.heights = self.widths[kept], self.heights[kept]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


_Kind = tuple[Callable[[Any], bool], str]  # test of a value, and what passes it
_TEXT: _Kind = (lambda value: isinstance(value, str), "a string")
_NAME: _Kind = (lambda value: isinstance(value, (str, int)), "a name")
_WHOLE: _Kind = (_is_whole, "a whole number")
_NUMBER: _Kind = (_is_number, "a number")
_BOX: _Kind = (_is_box, "4 numbers")


def _column(entries: list[Any], name: str, key: str, kind: _Kind) -> list[Any]:
    """Return one field of all entries of the list `name` of a file.

    Raises:
        ValueError: an entry lacks the field, or it is of another kind; the message names the entry.
    """
    passes, expected = kind
    values = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{name}[{number}] is not an object with fields: {entry!r:.60}")
        value = entry.get(key)
        if not passes(value):
            which = _which(name, number, entry)
            found = f"{key!r} is not {expected}: {value!r:.60}" if key in entry else f"no {key!r}"
            raise ValueError(f"{which}: {found}")
        values.append(value)
    return values


def _which(name: str, number: int, entry: dict) -> str:
    """Name an entry of a list of the file."""
    return f"{name}[{number}]" + (f" (id {entry['id']})" if "id" in entry else "")


def _lookup(values: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the position of every value in `ids` (0 where absent) and whether it is there."""
    if len(ids) == 0:
        return np.zeros(len(values), np.int64), np.zeros(len(values), bool)
    order = np.argsort(ids)
    place = order[np.minimum(np.searchsorted(ids, values, sorter=order), len(ids) - 1)]
    found = ids[place] == values
    return np.where(found, place, 0), found


def _load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise ValueError(f"{path} is not a COCO file: it has no list 'images'")
    for name in ("annotations", "categories"):
        if not isinstance(content.get(name, []), list):
            raise ValueError(f"{path} is not a COCO file: {name!r} is not a list")
    return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
