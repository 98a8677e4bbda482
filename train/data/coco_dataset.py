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

from detector.image import read_image
from train.data.annotations import (
    AnnotationColumns,
    AnnotationCounts,
    ImageColumns,
    drop_annotations,
    read_annotations,
    read_images,
    select_categories,
)
from train.data.coco_json import Entry, load_coco_json
from train.data.segmentation import Segmentations, find_drawable, take_rows
from train.data.transforms import Sample, Transform

MIN_IMAGE_SIDE = 32  # pixels; smaller images are not trained on


class UnreadableImageError(Exception):
    """An image file cannot be read, or does not have the size that its masks were made for; the message names it."""


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
        counts: how many annotations of the file are used or dropped.
        has_annotations: whether the file has a list of annotations.
        all_annotations: what an evaluation compares with: every annotation of these images and classes, crowds and
            those that training drops too, in the order of the file; None for training.
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
    ):
        self.annotation_file = Path(annotation_file)
        self.image_folder = Path(image_folder)
        self.transform = transform
        self.training = training
        if not self.annotation_file.is_file():
            raise FileNotFoundError(f"annotations: expected a file, got {self.annotation_file}")
        if not self.image_folder.is_dir():
            raise FileNotFoundError(f"images: expected a folder, got {self.image_folder}")

        content = load_coco_json(self.annotation_file)
        entries = content.get("annotations", [])
        try:
            self.classes, self.category_ids = select_categories(content.get("categories", []), classes)
            images = read_images(content["images"])
            annotations = read_annotations(entries, images, self.category_ids)
            self._set_images(images)
            self._set_boxes(entries, annotations, images, masks)
        except ValueError as error:
            raise ValueError(f"{self.annotation_file}: {error}") from error

        self.has_annotations = "annotations" in content
        selected = np.arange(len(images.ids))
        if training:
            selected = _trainable_images(images, annotations)
        self._select_images(selected[: limit or None])

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
            image = read_image(path)
        except (OSError, ValueError) as error:
            one_line = " ".join(str(error).split())
            raise UnreadableImageError(one_line) from error

        height, width = image.shape[:2]
        size_matches = (height, width) == (self.heights[index], self.widths[index])
        if self.segmentations is not None and not size_matches:
            listed = f"{self.heights[index]} x {self.widths[index]}"
            raise UnreadableImageError(f"{path}: expected {listed} pixels as its masks have, got {height} x {width}")
        return image

    def _set_images(self, images: ImageColumns) -> None:
        self.image_ids = images.ids
        self.widths = images.widths
        self.heights = images.heights
        self.file_names = images.file_names

    def _set_boxes(
        self, entries: list[Entry], annotations: AnnotationColumns, images: ImageColumns, masks: bool
    ) -> None:
        """Keep the annotations that are used, sorted by image, and count those that are dropped."""
        kept, dropped = drop_annotations(annotations, images)
        used = kept & ~annotations.is_crowd
        crowds = kept & annotations.is_crowd
        no_polygon = np.zeros(len(entries), bool)
        if masks:
            # Evaluation compares with all annotations of an image, training uses only some of them.
            needs_mask = used
            if not self.training:
                needs_mask = annotations.image_listed & annotations.category_used
            no_polygon = self._find_undrawable(entries, annotations, images, needs_mask)
            used &= ~no_polygon
        self.counts = AnnotationCounts(
            used=int(used.sum()),
            crowd=int(crowds.sum()),
            no_polygon=int(no_polygon.sum()),
            **dropped,
        )

        image_indices = annotations.image_indices
        order = np.flatnonzero(used)[np.argsort(image_indices[used], kind="stable")]
        x, y, width, height = annotations.boxes.T
        self.boxes = np.stack([x, y, x + width, y + height], 1)[order].astype(np.float32)
        self.labels = annotations.labels[order]
        self.box_starts = np.searchsorted(image_indices[order], np.arange(len(images.ids) + 1))
        self.segmentations = None
        if masks:
            self.segmentations = Segmentations.parse(entries[index]["segmentation"] for index in order)

        self.all_annotations = None
        self.all_segmentations = None
        if not self.training:
            compared = np.flatnonzero(annotations.image_listed & annotations.category_used)
            self.all_annotations = annotations.take(compared)
            if masks:
                self.all_segmentations = Segmentations.parse(entries[index]["segmentation"] for index in compared)

    def _find_undrawable(
        self, entries: list[Entry], annotations: AnnotationColumns, images: ImageColumns, needs_mask: np.ndarray
    ) -> np.ndarray:
        """Return which of the annotations that need a mask (M,) bool have none that can be drawn, (M,) bool."""
        indices = np.flatnonzero(needs_mask)
        image_indices = annotations.image_indices[indices]
        sizes = np.stack([images.heights[image_indices], images.widths[image_indices]], 1)
        is_drawable = find_drawable(entries, indices, sizes, required=not self.training)

        undrawable = np.zeros(len(entries), bool)
        undrawable[indices] = ~is_drawable
        return undrawable

    def _select_images(self, indices: np.ndarray) -> None:
        """Keep the images with these indices, which ascend, and their annotations."""
        rows, self.box_starts = take_rows(self.box_starts, indices)
        self.boxes = self.boxes[rows]
        self.labels = self.labels[rows]
        if self.segmentations is not None:
            self.segmentations = self.segmentations.take(rows)
        if self.all_annotations is not None:
            rows = np.flatnonzero(np.isin(self.all_annotations.image_indices, indices))
            annotations = self.all_annotations.take(rows)
            new_image_indices = np.searchsorted(indices, annotations.image_indices)
            self.all_annotations = replace(annotations, image_indices=new_image_indices)
            if self.all_segmentations is not None:
                self.all_segmentations = self.all_segmentations.take(rows)
        self.image_ids = self.image_ids[indices]
        self.file_names = self.file_names[indices]
        self.widths = self.widths[indices]
        self.heights = self.heights[indices]


def _trainable_images(images: ImageColumns, annotations: AnnotationColumns) -> np.ndarray:
    """Return the indices of the images that are large enough and have an annotation of a category that is used."""
    has_annotation = np.zeros(len(images.ids), bool)
    has_annotation[annotations.image_indices[annotations.image_listed & annotations.category_used]] = True
    large_enough = np.minimum(images.widths, images.heights) >= MIN_IMAGE_SIDE
    return np.flatnonzero(has_annotation & large_enough)
