"""The segmentations of objects as annotation files have them: checked, held as flat arrays, drawn one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from detector.ops.rle import decode_mask, rle_to_runs, runs_to_mask
from train.data.coco_json import Entry, describe_entry

MIN_POLYGON_LENGTH = 6  # numbers: three corners
_NO_RUNS = np.zeros(0, np.int64)


def valid_polygons(polygons: list[list[float]]) -> list[list[float]]:
    """Return the polygons [x1, y1, x2, y2, ...] that have pairs of coordinates and three corners."""
    return [polygon for polygon in polygons if len(polygon) % 2 == 0 and len(polygon) >= MIN_POLYGON_LENGTH]


def is_drawable(segmentation: Any) -> bool:
    """Tell whether a `segmentation` can be drawn: it has a valid polygon, or run lengths and a size.

    Raises:
        ValueError: it is neither a list of polygons nor an object.

    Source:
        MMDetection's LoadAnnotations, which ignores objects without one.
    """
    if isinstance(segmentation, dict):
        has_counts = isinstance(segmentation.get("counts"), (list, str))
        return has_counts and isinstance(segmentation.get("size"), list)
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        raise ValueError(f"expected polygons or run lengths, got {segmentation!r:.60}")
    return bool(valid_polygons(segmentation))


def check_segmentation(segmentation: Any, height: int, width: int) -> None:
    """Check the numbers of a `segmentation` that can be drawn, and that it fits its image.

    Raises:
        ValueError: run lengths of another size, or polygons with something else than finite numbers.
    """
    if isinstance(segmentation, dict):
        size = segmentation["size"]
        if size != [height, width]:
            raise ValueError(f"expected the size of its image, {height} x {width}, got {size}")
        rle_to_runs(segmentation)
        return

    for polygon in valid_polygons(segmentation):
        numbers = np.array(polygon)
        if numbers.dtype.kind not in "if" or numbers.ndim != 1 or not np.isfinite(numbers).all():
            raise ValueError(f"expected polygons of numbers, got {polygon!r:.60}")


def find_drawable(
    entries: Sequence[Entry], indices: np.ndarray, image_sizes: np.ndarray, *, required: bool
) -> np.ndarray:
    """Return which annotations have a mask that can be drawn.

    Args:
        entries: the annotations of a file.
        indices: (n,) int64, which of them to look at.
        image_sizes: (n, 2) int64, height and width of the image of each.
        required: whether every one needs a mask, as in evaluation.

    Returns:
        (n,) bool.

    Raises:
        ValueError: a segmentation is missing, malformed, or not drawable though required; the message names the entry.
    """
    drawable = np.ones(len(indices), bool)
    for position, index in enumerate(indices):
        entry = entries[index]
        segmentation = entry.get("segmentation")
        height, width = image_sizes[position].tolist()
        try:
            if segmentation is None:
                raise ValueError("expected one, which a model with masks (--model.mask) needs, got none")

            drawable[position] = is_drawable(segmentation)
            if drawable[position]:
                check_segmentation(segmentation, height, width)
            elif required:
                raise ValueError("expected a valid polygon to compare masks with, got none")
        except ValueError as error:
            name = describe_entry("annotations", index, entry)
            raise ValueError(f"{name}: 'segmentation': {error}") from error
    return drawable


@dataclass(frozen=True)
class Segmentations:
    """The segmentations of M objects, each polygons or run lengths, without Python objects inside.

    Attributes:
        coordinates: (P,) float64, x and y in turn, in pixels.
        polygon_starts: (K + 1,) int64; polygon k has coordinates[polygon_starts[k]:polygon_starts[k + 1]].
        run_lengths: (R,) int64, lengths of runs down the columns.
        first_polygon: (M + 1,) int64; object m has the polygons first_polygon[m] to first_polygon[m + 1] - 1.
        first_run: (M + 1,) int64; object m has the runs run_lengths[first_run[m]:first_run[m + 1]].
    """

    coordinates: np.ndarray
    polygon_starts: np.ndarray
    run_lengths: np.ndarray
    first_polygon: np.ndarray
    first_run: np.ndarray

    @classmethod
    def parse(cls, segmentations: Iterable[Any]) -> Segmentations:
        """Take `segmentation` values that `check_segmentation` accepts."""
        coordinates = [np.zeros(0)]
        polygon_lengths = []
        polygon_counts = []
        run_lengths = [_NO_RUNS]
        run_counts = []
        for segmentation in segmentations:
            polygons = []
            runs = _NO_RUNS
            if isinstance(segmentation, dict):
                runs = rle_to_runs(segmentation)
            else:
                polygons = valid_polygons(segmentation)

            coordinates += [np.array(polygon, np.float64) for polygon in polygons]
            polygon_lengths += [len(polygon) for polygon in polygons]
            polygon_counts.append(len(polygons))
            run_lengths.append(runs)
            run_counts.append(len(runs))
        return cls(
            coordinates=np.concatenate(coordinates),
            polygon_starts=_starts(polygon_lengths),
            run_lengths=np.concatenate(run_lengths),
            first_polygon=_starts(polygon_counts),
            first_run=_starts(run_counts),
        )

    def __len__(self) -> int:
        return len(self.first_run) - 1

    def take(self, objects: np.ndarray) -> Segmentations:
        """Return the segmentations of the objects with these numbers."""
        polygons, first_polygon = take_rows(self.first_polygon, objects)
        coordinates, polygon_starts = take_rows(self.polygon_starts, polygons)
        runs, first_run = take_rows(self.first_run, objects)
        return Segmentations(
            self.coordinates[coordinates], polygon_starts, self.run_lengths[runs], first_polygon, first_run
        )

    def draw(self, number: int, height: int, width: int) -> np.ndarray:
        """Return the mask (height, width) uint8 of object `number`, in the pixels of its image."""
        first_run, stop_run = self.first_run[number : number + 2]
        if stop_run > first_run:
            runs = self.run_lengths[first_run:stop_run]
            return runs_to_mask(runs, height, width).view(np.uint8)

        polygon_rles = coco_mask.frPyObjects(self._polygons(number), height, width)
        return decode_mask(coco_mask.merge(polygon_rles)).view(np.uint8)

    def to_coco(self, number: int, height: int, width: int) -> dict[str, Any] | list[list[float]]:
        """Return object `number` of an image of this size as COCO's `segmentation`: run lengths or polygons."""
        first_run, stop_run = self.first_run[number : number + 2]
        if stop_run > first_run:
            return {"size": [height, width], "counts": self.run_lengths[first_run:stop_run].tolist()}
        return [polygon.tolist() for polygon in self._polygons(number)]

    def _polygons(self, number: int) -> list[np.ndarray]:
        first_polygon, stop_polygon = self.first_polygon[number : number + 2]
        starts = self.polygon_starts[first_polygon : stop_polygon + 1]
        return [self.coordinates[start:stop] for start, stop in pairwise(starts)]


def take_rows(starts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Select rows of a ragged array: return the indices of their members, and where each row starts among these.

    Args:
        starts: (N + 1,) int64; row i has the members starts[i]:starts[i + 1].
        rows: (R,) int64.

    Returns:
        Indices of the members int64, and the new starts (R + 1,) int64.
    """
    lengths = starts[rows + 1] - starts[rows]
    new_starts = _starts(lengths)
    shift = starts[rows] - new_starts[:-1]
    return np.repeat(shift, lengths) + np.arange(new_starts[-1]), new_starts


def _starts(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths))]).astype(np.int64)
