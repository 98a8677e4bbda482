"""The shapes of objects as annotation files have them: checked, held as flat arrays, drawn one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from detector.ops.rle import decode_mask, rle_to_runs, runs_to_mask

SMALLEST_POLYGON = 6  # numbers: three corners


def valid_polygons(polygons: list) -> list[list[float]]:
    """Return the polygons [x1, y1, x2, y2, ...] that have pairs of coordinates and three corners."""
    return [polygon for polygon in polygons if len(polygon) % 2 == 0 and len(polygon) >= SMALLEST_POLYGON]


def is_shape(value: Any) -> bool:
    """Tell whether a `segmentation` can be drawn: it has a valid polygon, or runs and a size.

    Raises:
        ValueError: it is neither a list of polygons nor an object.

    Source:
        MMDetection's LoadAnnotations, which ignores an instance whose segmentation can not.
    """
    if isinstance(value, dict):
        return isinstance(value.get("counts"), (list, str)) and isinstance(value.get("size"), list)
    if not isinstance(value, list) or not all(isinstance(polygon, list) for polygon in value):
        raise ValueError(f"expected polygons or run lengths, found {value!r:.60}")
    return bool(valid_polygons(value))


@dataclass(frozen=True)
class Shapes:
    """The shapes of M objects, each polygons or run lengths, without Python objects inside.

    Attributes:
        coordinates: (P,) float64, x and y in turn, in pixels.
        polygons: (K + 1,) int64; polygon k has coordinates[polygons[k]:polygons[k + 1]].
        runs: (R,) int64, lengths of runs down the columns.
        first_polygon, first_run: (M + 1,) int64; object m has the polygons, or the runs, from its number to the next.
    """

    coordinates: np.ndarray
    polygons: np.ndarray
    runs: np.ndarray
    first_polygon: np.ndarray
    first_run: np.ndarray

    @classmethod
    def of(cls, values: Iterable[Any]) -> Shapes:
        """Take `segmentation` values that `check_shape` accepts."""
        coordinates, runs = [np.zeros(0)], [np.zeros(0, np.int64)]
        polygon_lengths, polygon_counts, run_counts = [], [], []
        for value in values:
            drawn = [] if isinstance(value, dict) else valid_polygons(value)
            coordinates += [np.array(polygon, np.float64) for polygon in drawn]
            polygon_lengths += [len(polygon) for polygon in drawn]
            polygon_counts.append(len(drawn))
            runs.append(rle_to_runs(value) if isinstance(value, dict) else runs[0])
            run_counts.append(len(runs[-1]))
        starts = (_starts(lengths) for lengths in (polygon_lengths, polygon_counts, run_counts))
        polygons, first_polygon, first_run = starts
        return cls(np.concatenate(coordinates), polygons, np.concatenate(runs), first_polygon, first_run)

    def __len__(self) -> int:
        return len(self.first_run) - 1

    def take(self, rows: np.ndarray) -> Shapes:
        """Return the shapes with these numbers."""
        of_objects, first_polygon = slices(self.first_polygon, rows)
        of_polygons, polygons = slices(self.polygons, of_objects)
        of_runs, first_run = slices(self.first_run, rows)
        return Shapes(self.coordinates[of_polygons], polygons, self.runs[of_runs], first_polygon, first_run)

    def draw(self, number: int, height: int, width: int) -> np.ndarray:
        """Return the mask (height, width) uint8 of an object, in the pixels of its image."""
        first, last = self.first_run[number : number + 2]
        if last > first:
            mask = runs_to_mask(self.runs[first:last], height, width)
        else:
            ends = self.polygons[self.first_polygon[number] : self.first_polygon[number + 1] + 1]
            parts = [self.coordinates[a:b] for a, b in pairwise(ends)]
            mask = decode_mask(coco_mask.merge(coco_mask.frPyObjects(parts, height, width)))
        return mask.view(np.uint8)


def check_shape(value: Any, height: int, width: int) -> None:
    """Raise ValueError where a `segmentation` that `is_shape` does not fit its image, or is not made of numbers."""
    if isinstance(value, dict):
        if value["size"] != [height, width]:
            raise ValueError(f"expected the size of its image, {height} x {width}, found {value['size']}")
        rle_to_runs(value)
        return
    for polygon in valid_polygons(value):
        numbers = np.array(polygon)
        if numbers.dtype.kind not in "if" or numbers.ndim != 1 or not np.isfinite(numbers).all():
            raise ValueError(f"expected polygons of numbers, found {polygon!r:.60}")


def slices(starts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the members of some rows are, one row after the other, and where the rows then start.

    Args:
        starts: (N + 1,) int64; row i has the members starts[i]:starts[i + 1].
        rows: (R,) int64.

    Returns:
        (members,) int64 and (R + 1,) int64.
    """
    lengths = starts[rows + 1] - starts[rows]
    new = _starts(lengths)
    return np.repeat(starts[rows] - new[:-1], lengths) + np.arange(new[-1]), new


def _starts(lengths: Iterable[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
