"""The segmentations of objects as annotation files have them: checked, held as flat arrays, drawn one at a time.

Native code draws and compares them, pycocotools and faster-coco-eval. It trusts what it gets: with run lengths that do
not fill their mask, or coordinates far outside the image, it writes beyond its memory or asks for all there is. So
`read_segmentations` checks everything before.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from detector.ops.rle import MAX_PIXELS, decode_mask, rle_to_runs, runs_to_mask
from detector.text import shown
from train.data.coco_json import NAMED_OFFENDERS, Entry, describe_entry

MIN_POLYGON_LENGTH = 6  # numbers: three corners
FIVE_NUMBERS = 5  # pycocotools takes them for a polygon of two corners, which has no pixel; four are a box to it
NUMBER_TYPES = {int, float}  # of coordinates; bool is none

MARGIN = 10
"""How far coordinates may lie outside of their image, in lengths of its longer side.

COCO's polygons end within a pixel of the image. Those of images that were cut from larger ones go on beyond the cut,
and are drawn right.
"""

MAX_OUTLINE = 1 << 23
"""Pixels of all edges of the polygons of one image, one more for each edge; COCO's images have less than 1 << 15.

Drawing a polygon takes 80 bytes for each of these pixels.
"""

_NO_RUNS = np.zeros(0, np.int64)


def read_segmentations(
    entries: Sequence[Entry],
    indices: np.ndarray,
    image_indices: np.ndarray,
    image_sizes: np.ndarray,
    *,
    training: bool,
) -> tuple[Segmentations, np.ndarray, list[str]]:
    """Read the segmentations of annotations, as MMDetection does in training, as pycocotools does in evaluation.

    They differ in polygons with an odd count of numbers: MMDetection leaves them out, pycocotools draws them without
    the last number.

    Args:
        entries: the annotations of a file.
        indices: (n,) int64, which of them to read.
        image_indices: (n,) int64, the image of each.
        image_sizes: (n, 2) int64, height and width of the image of each.
        training: an annotation may do without a mask; in evaluation every one needs it.

    Returns:
        The segmentations (n of them), which of them have something that can be drawn, (n,) bool, and sentences about
        polygons that are left out or not drawn as they stand in the file.

    Raises:
        ValueError: a segmentation is missing, malformed, does not fit its image, or cannot be drawn though an
            evaluation needs it. The message counts such entries and names the first of them. Or all polygons are in
            shares of the image.

    Source:
        MMDetection's LoadAnnotations, which ignores objects without a polygon of three corners and an even count;
        pycocotools' frPyObjects.
    """
    collector = _Collector(training)
    problems: dict[int, str] = {}
    for position, (index, (height, width)) in enumerate(zip(indices.tolist(), image_sizes.tolist(), strict=True)):
        segmentation = entries[index].get("segmentation")
        try:
            if segmentation is None:
                raise ValueError("expected one, which a model with masks (--model.mask) needs, got none")
            if isinstance(segmentation, dict) and segmentation.get("size", [height, width]) != [height, width]:
                size = shown(segmentation["size"])
                raise ValueError(f"expected the size of its image, {height} x {width}, got {size}")
            if not collector.add(segmentation, height, width) and not training:
                problems[position] = "expected a valid polygon to compare masks with, got none"
        except ValueError as error:
            problems[position] = str(error)
            collector.add([], height, width)

    segmentations = collector.finish()
    coordinates = segmentations.coordinates
    if len(coordinates) and np.abs(coordinates).max() <= 1:
        raise ValueError("annotations: 'segmentation': expected polygons in pixels, got all of them between 0 and 1")
    problems |= _find_problems_of_polygons(segmentations, image_indices, image_sizes)
    if problems:
        named = []
        for position in sorted(problems)[:NAMED_OFFENDERS]:
            index = int(indices[position])
            name = describe_entry("annotations", index, entries[index])
            named.append(f"{name}: 'segmentation': {problems[position]}")
        total = f"; {len(problems)} in all" if len(problems) > len(named) else ""
        raise ValueError("; ".join(named) + total)
    return segmentations, segmentations.are_drawable(), collector.notes()


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

    def __len__(self) -> int:
        return len(self.first_run) - 1

    def are_drawable(self) -> np.ndarray:
        """Return which objects (M,) bool have polygons or run lengths."""
        has_polygons = np.diff(self.first_polygon) > 0
        has_runs = np.diff(self.first_run) > 0
        are_drawable: np.ndarray = has_polygons | has_runs
        return are_drawable

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

        polygon_rles = coco_mask.frPyObjects(self.polygons(number), height, width)
        return decode_mask(coco_mask.merge(polygon_rles)).view(np.uint8)

    def to_coco(self, number: int, height: int, width: int) -> dict[str, Any] | list[list[float]]:
        """Return object `number` of an image of this size as COCO's `segmentation`: run lengths or polygons."""
        first_run, stop_run = self.first_run[number : number + 2]
        if stop_run > first_run:
            return {"size": [height, width], "counts": self.run_lengths[first_run:stop_run].tolist()}
        return [polygon.tolist() for polygon in self.polygons(number)]

    def polygons(self, number: int) -> list[np.ndarray]:
        """Return the polygons of object `number`, each (c,) float64 of x and y in turn."""
        first_polygon, stop_polygon = self.first_polygon[number : number + 2]
        starts = self.polygon_starts[first_polygon : stop_polygon + 1]
        return [self.coordinates[start:stop] for start, stop in pairwise(starts)]


class _Collector:
    """Puts segmentations into flat arrays, one after the other, and counts the polygons that are not drawn as they are.

    Args:
        training: read them as MMDetection does in training, else as pycocotools does in evaluation.
    """

    def __init__(self, training: bool) -> None:
        self._training = training
        self._odd_count = 0
        self._short_count = 0
        self._coordinates = array("d")
        self._polygon_lengths: list[int] = []
        self._polygon_counts: list[int] = []
        self._run_lengths = [_NO_RUNS]
        self._run_counts: list[int] = []

    def add(self, segmentation: Any, height: int, width: int) -> bool:
        """Add one segmentation of an image of this size; return whether it can be drawn.

        Polygons without three corners are left out, and so are run lengths that lack `size` or `counts`. An object of
        polygons of five numbers is, in evaluation, one without pixels.

        Raises:
            ValueError: it is malformed, and not added.
        """
        runs = _NO_RUNS
        polygon_count = 0
        if isinstance(segmentation, dict):
            if segmentation.get("size") is not None and segmentation.get("counts") is not None:
                runs = rle_to_runs(segmentation)
        elif isinstance(segmentation, list) and set(map(type, segmentation)) <= {list}:
            polygon_count = self._add_polygons(segmentation)
            if polygon_count == 0 and not self._training and FIVE_NUMBERS in map(len, segmentation):
                runs = rle_to_runs({"size": [height, width], "counts": [height * width]})
        else:
            raise ValueError(f"expected polygons or run lengths, got {shown(segmentation)}")
        if len(runs):
            self._run_lengths.append(runs)
        self._polygon_counts.append(polygon_count)
        self._run_counts.append(len(runs))
        return polygon_count > 0 or len(runs) > 0

    def notes(self) -> list[str]:
        """Return a sentence about every kind of polygon that is left out or not drawn as it stands in the file."""
        notes = []
        if self._odd_count and self._training:
            notes.append(f"polygons with an odd count of numbers, left out: {self._odd_count}")
        elif self._odd_count:
            notes.append(f"polygons with an odd count of numbers, drawn without the last one: {self._odd_count}")
        if self._short_count:
            notes.append(f"polygons with less than three corners, left out: {self._short_count}")
        return notes

    def finish(self) -> Segmentations:
        """Return all that were added."""
        return Segmentations(
            coordinates=np.frombuffer(self._coordinates, np.float64),
            polygon_starts=_starts(self._polygon_lengths),
            run_lengths=np.concatenate(self._run_lengths),
            first_polygon=_starts(self._polygon_counts),
            first_run=_starts(self._run_counts),
        )

    def _add_polygons(self, polygons: list[list[Any]]) -> int:
        """Add those that are drawn and have three corners or more; return how many these are."""
        lengths = list(map(len, polygons))
        is_list_of_points = lengths[2:] and set(lengths) == {2}
        types: set[type] = set().union(*(map(type, polygon) for polygon in polygons))
        if is_list_of_points or list in types:
            found = shown(polygons)
            raise ValueError(f"expected polygons [x1, y1, x2, y2, ...] without a list for every point, got {found}")
        if not types <= NUMBER_TYPES:
            raise ValueError(f"expected polygons of numbers, got {shown(polygons)}")

        long_enough = [polygon for polygon in polygons if len(polygon) >= MIN_POLYGON_LENGTH]
        valid = [polygon for polygon in long_enough if len(polygon) % 2 == 0]
        self._short_count += len(polygons) - len(long_enough)
        self._odd_count += len(long_enough) - len(valid)
        if not self._training:
            valid = [polygon[: len(polygon) // 2 * 2] for polygon in long_enough]
        try:
            coordinates = array("d", chain.from_iterable(valid))
        except OverflowError:
            raise ValueError(f"expected polygons of numbers in 64 bits, got {shown(polygons)}") from None
        self._coordinates.extend(coordinates)
        self._polygon_lengths += map(len, valid)
        return len(valid)


def _find_problems_of_polygons(
    segmentations: Segmentations, image_indices: np.ndarray, image_sizes: np.ndarray
) -> dict[int, str]:
    """Return number -> what is wrong with its polygons, of the objects whose polygons cannot be drawn in their image.

    The arguments are those of `read_segmentations`. Only the first texts are written, the others are empty.
    """
    polygon_counts = np.diff(segmentations.first_polygon)
    if not polygon_counts.any():
        return {}
    object_of_polygon = np.repeat(np.arange(len(segmentations)), polygon_counts)
    heights, widths = image_sizes[object_of_polygon].T
    margins = MARGIN * np.maximum(heights, widths)

    x, y = segmentations.coordinates.reshape(-1, 2).T
    starts = segmentations.polygon_starts[:-1] // 2
    is_inside = np.ones(len(starts), bool)
    for values, sides in ((x, widths), (y, heights)):
        # NaN is neither below nor above anything
        is_inside &= np.minimum.reduceat(values, starts) >= -margins
        is_inside &= np.maximum.reduceat(values, starts) <= sides + margins
    is_inside &= heights * widths <= MAX_PIXELS

    problems: dict[int, str] = {}
    for number in np.unique(object_of_polygon[~is_inside]).tolist():
        problems[number] = ""
        if len(problems) <= NAMED_OFFENDERS:
            height, width = image_sizes[number].tolist()
            problems[number] = _describe_coordinates(segmentations, number, height, width)
    return problems or _find_long_outlines(segmentations, image_indices, x, y)


def _describe_coordinates(segmentations: Segmentations, number: int, height: int, width: int) -> str:
    """Return what is wrong with the coordinates of an object in an image of this size."""
    if height * width > MAX_PIXELS:
        return f"expected an image of at most {MAX_PIXELS} pixels, got {height} x {width}"
    x, y = np.concatenate(segmentations.polygons(number)).reshape(-1, 2).T
    margin = MARGIN * max(height, width)
    is_inside = (x >= -margin) & (x <= width + margin) & (y >= -margin) & (y <= height + margin)
    first = int(np.flatnonzero(~is_inside)[0])
    point = f"({x[first]:g}, {y[first]:g})"
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return f"expected polygons of numbers, got the corner {point}"
    return f"expected corners at most {margin} pixels outside of its image of {height} x {width}, got {point}"


def _find_long_outlines(
    segmentations: Segmentations, image_indices: np.ndarray, x: np.ndarray, y: np.ndarray
) -> dict[int, str]:
    """Return number -> what is wrong, of the longest outline of each image whose outlines are too long together.

    Args:
        segmentations: of the objects.
        image_indices: (n,) int64, the image of each object.
        x, y: (P / 2,) float64, all corners.
    """
    stops = segmentations.polygon_starts[1:] // 2
    starts = segmentations.polygon_starts[:-1] // 2
    edges = np.maximum(np.abs(np.diff(x, append=0)), np.abs(np.diff(y, append=0)))
    edges[stops - 1] = np.maximum(np.abs(x[stops - 1] - x[starts]), np.abs(y[stops - 1] - y[starts]))
    outline_of_polygon = np.add.reduceat(edges, starts) + (stops - starts)

    object_of_polygon = np.repeat(np.arange(len(segmentations)), np.diff(segmentations.first_polygon))
    outlines = np.bincount(object_of_polygon, outline_of_polygon, minlength=len(segmentations))
    outlines_of_images = np.bincount(image_indices, outlines)

    by_image = np.lexsort((outlines, image_indices))  # the longest one of an image comes last
    is_last = np.diff(image_indices[by_image], append=-1) != 0
    problems: dict[int, str] = {}
    for number in by_image[is_last].tolist():
        total = outlines_of_images[image_indices[number]]
        if total > MAX_OUTLINE:
            problems[number] = (
                f"expected polygons of at most {MAX_OUTLINE} pixels of outline in one image, got {total:.0f}, "
                f"{outlines[number]:.0f} of them here"
            )
    return problems


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
