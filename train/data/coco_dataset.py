"""A data set in COCO layout: its images, boxes and masks as flat arrays, and one image at a time as a `Sample`.

The annotation file is parsed once. Afterwards everything is a NumPy array without Python objects inside. Worker
processes that are forked for decoding share these arrays: reading them writes no reference counts, so no memory page is
copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from detector.image import MAX_PIXELS, read_image
from train.data.annotations import (
    AnnotationColumns,
    AnnotationCounts,
    ImageColumns,
    choose_annotations,
    choose_images,
    count_by_class,
    find_compared,
    is_within_limit,
    read_annotations,
    read_images,
    select_categories,
    to_corners,
)
from train.data.coco_json import Entry, collector_paused, load_coco_json
from train.data.image_sizes import correct_sizes
from train.data.mistakes import find_mistakes
from train.data.segmentation import Segmentations, read_segmentations
from train.data.transforms import Sample, Transform


class UnreadableImageError(Exception):
    """An image file cannot be read, or does not have the size that is listed; the message names it."""


class CocoDetection:
    """The images of one split and their boxes.

    Args:
        annotation_file: JSON file in COCO format.
        image_folder: folder of the image files.
        transform: turns the decoded image and its annotations into a `Sample`.
        training: drop images below 32 pixels and images without an annotation of the classes.
        classes: names of the categories to use, by label; None uses all, in the order of the file.
        limit: keep only the first so many images; 0 keeps all.
        masks: read the segmentations of the objects too. Training samples then have masks, and pictures can show them.
        max_pixels: images with more are not decoded.

    Attributes:
        classes: names, by label.
        category_ids: (classes,) int64, id in the file by label.
        image_ids: (N,) int64.
        widths: (N,) int64.
        heights: (N,) int64.
        file_names: (N,) unicode.
        boxes: (M, 4) float32 xyxy, not clipped; without crowds.
        labels: (M,) int64 of `boxes`.
        box_starts: (N + 1,) int64; image i has the boxes box_starts[i]:box_starts[i + 1].
        segmentations: of `boxes`; None without masks.
        counts: how many annotations of the images within `limit` are used, and how many are not for which reason.
        image_counts: the same of the images of the file.
        annotations_per_class: (classes,) int64, annotations of the file by label, used or not.
        boxes_without_area: annotations of the images within `limit` whose area is that of their box, as they have none.
        mistakes: sentences about what looks wrong in the file as a whole, and about polygons that are left out.
        other_sizes: what is wrong if many image files have another size than the file lists; empty otherwise.
        has_annotations: whether the file has a list of annotations.
        all_annotations: what an evaluation compares with: every annotation of these images and classes, crowds and
            those that training drops too, in the order of the file, without boxes of a negative side; None for
            training.
        all_segmentations: of `all_annotations`; None without masks and for training.

    Raises:
        OSError: a file or folder is missing.
        ValueError: the file is malformed; the message names it and the entry.

    Source:
        MMDetection's CocoDataset (which annotations and images are kept, their order), LoadAnnotations (which masks).
    """

    def __init__(
        self,
        annotation_file: Path,
        image_folder: Path,
        transform: Transform,
        *,
        training: bool,
        classes: Sequence[str] | None = None,
        limit: int = 0,
        masks: bool = False,
        max_pixels: int = MAX_PIXELS,
    ):
        self.annotation_file = Path(annotation_file)
        self.image_folder = Path(image_folder)
        self.transform = transform
        self.training = training
        self.max_pixels = max_pixels
        if not self.annotation_file.is_file():
            raise FileNotFoundError(f"annotations: expected a file, got {self.annotation_file}")
        if not self.image_folder.is_dir():
            raise FileNotFoundError(f"images: expected a folder, got {self.image_folder}")

        with collector_paused():
            self._read(classes, limit, masks)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Read image `index` as it looks in `epoch`; key is (epoch, index).

        Raises:
            UnreadableImageError: the image cannot be used.
        """
        epoch, index = key
        image = self._read_image(index)
        boxes, labels = self.ground_truth(index)
        masks = self.masks(index) if self.training and self.segmentations is not None else None
        return self.transform(image, boxes, labels, int(self.image_ids[index]), epoch, index, masks)

    def image_path(self, index: int) -> Path:
        """Return the file of image `index`."""
        return self.image_folder / str(self.file_names[index])

    def ground_truth(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return boxes (n, 4) float32 xyxy and labels (n,) int64 of image `index`, in pixels of the file."""
        rows = slice(self.box_starts[index], self.box_starts[index + 1])
        return self.boxes[rows], self.labels[rows]

    def masks(self, index: int) -> Iterator[np.ndarray]:
        """Draw the masks of image `index` in the order of its boxes: (H, W) uint8, in pixels of the file.

        Yields nothing where the data set was opened without masks.
        """
        if self.segmentations is None:
            return
        height = int(self.heights[index])
        width = int(self.widths[index])
        for row in range(self.box_starts[index], self.box_starts[index + 1]):
            yield self.segmentations.draw(row, height, width)

    def _read_image(self, index: int) -> np.ndarray:
        path = self.image_path(index)
        try:
            image = read_image(path, self.max_pixels)
        except (OSError, ValueError) as error:
            one_line = " ".join(str(error).split())
            raise UnreadableImageError(one_line) from error

        height, width = image.shape[:2]
        listed_height = int(self.heights[index])
        listed_width = int(self.widths[index])
        size_is_listed = (height, width) == (listed_height, listed_width)
        # Boxes are meant as the image is seen, whichever way round the size is listed. Masks are drawn at that size.
        is_exchanged = (height, width) == (listed_width, listed_height) and self.segmentations is None
        if not size_is_listed and not is_exchanged:
            raise UnreadableImageError(
                f"{path}: expected {listed_width} x {listed_height} pixels, as listed, got {width} x {height}"
            )
        return image

    def _read(self, classes: Sequence[str] | None, limit: int, masks: bool) -> None:
        """Read the annotation file; none of its Python objects is kept."""
        content = load_coco_json(self.annotation_file)
        self.has_annotations = "annotations" in content
        entries = content.get("annotations", [])
        try:
            self.classes, self.category_ids = select_categories(content.get("categories", []), classes)
            images = read_images(content["images"])
            annotations = read_annotations(entries, images, self.category_ids)
            indices, is_beyond_limit, self.image_counts = choose_images(
                images, annotations, training=self.training, limit=limit
            )
            is_counted = is_within_limit(annotations, is_beyond_limit)
            images, note, self.other_sizes = correct_sizes(images, annotations, indices, self.image_folder)
            self._set_images(images, indices)
            mask_notes = self._set_boxes(entries, annotations, images, indices, is_counted, masks)
            self.annotations_per_class = count_by_class(annotations, len(self.classes))
            self.boxes_without_area = int((is_counted & ~annotations.has_area).sum())
            self.mistakes = find_mistakes(annotations, images) + mask_notes
            if note:
                self.mistakes.append(note)
        except ValueError as error:
            raise ValueError(f"{self.annotation_file}: {error}") from error

    def _set_images(self, images: ImageColumns, indices: np.ndarray) -> None:
        self.image_ids = images.ids[indices]
        self.widths = images.widths[indices]
        self.heights = images.heights[indices]
        self.file_names = images.file_names[indices]

    def _set_boxes(
        self,
        entries: list[Entry],
        annotations: AnnotationColumns,
        images: ImageColumns,
        image_indices: np.ndarray,
        is_counted: np.ndarray,
        masks: bool,
    ) -> list[str]:
        """Keep the annotations that are used, sorted by image, and count the others.

        Returns sentences about polygons that are not drawn as they stand in the file.
        """
        used, dropped = choose_annotations(annotations, images, image_indices, is_counted)
        # Evaluation compares with all annotations of an image, training uses only some of them.
        compared = np.zeros(len(entries), bool) if self.training else find_compared(annotations, images, image_indices)
        no_polygon = np.zeros(len(entries), bool)
        masked = np.zeros(0, np.int64)
        segmentations = None
        notes: list[str] = []
        if masks:
            masked = np.flatnonzero(used | compared)
            segmentations, are_drawable, notes = self._read_segmentations(entries, annotations, images, masked)
            no_polygon[masked] = ~are_drawable
            used &= ~no_polygon
        self.counts = AnnotationCounts(used=int(used.sum()), no_polygon=int(no_polygon.sum()), **dropped)

        of_image = annotations.image_indices
        order = np.flatnonzero(used)[np.argsort(of_image[used], kind="stable")]
        self.boxes = to_corners(annotations.boxes[order])
        self.labels = annotations.labels[order]
        self.box_starts = np.searchsorted(of_image[order], np.append(image_indices, len(images.ids)))
        self.segmentations = None
        if segmentations is not None:
            self.segmentations = segmentations.take(np.searchsorted(masked, order))

        self.all_annotations = None
        self.all_segmentations = None
        if not self.training:
            rows = np.flatnonzero(compared)
            columns = annotations.take(rows)
            self.all_annotations = replace(columns, image_indices=np.searchsorted(image_indices, columns.image_indices))
            if segmentations is not None:
                self.all_segmentations = segmentations.take(np.searchsorted(masked, rows))
        return notes

    def _read_segmentations(
        self, entries: list[Entry], annotations: AnnotationColumns, images: ImageColumns, indices: np.ndarray
    ) -> tuple[Segmentations, np.ndarray, list[str]]:
        """Return what `read_segmentations` does for the annotations with these indices."""
        image_indices = annotations.image_indices[indices]
        sizes = np.stack([images.heights[image_indices], images.widths[image_indices]], 1)
        return read_segmentations(entries, indices, image_indices, sizes, training=self.training)
