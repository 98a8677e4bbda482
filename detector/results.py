"""From what the model returns to results in pixels of the image: boxes, masks of full size, rows for COCO, pictures.

The model sees resized images and knows nothing of the original size. Prediction and evaluation both come here to undo
the resize.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detector.draw import MIN_SIDE, draw_detections
from detector.image import Image, encode_image, to_pixels, write_image
from detector.ops.paste_masks import paste_masks
from detector.ops.rle import encode_mask
from detector.structures import Detections
from detector.text import short_list, short_name

CocoRow = dict[str, Any]
"""One detection in COCO's results format: image_id, category_id, bbox, score and, with masks, segmentation."""


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class ImageDetections(Detections):
    """The objects detected in one image, in its pixels: what `FasterRCNN.predict` returns for it.

    Tensors are on the CPU. In a notebook it is shown as a picture.

    Attributes:
        boxes: (N, 4), x1 y1 x2 y2 in pixels of `image`.
        image: the image, or its path, as it was given; nothing is copied.
        size: height and width of `image`.
        class_names: by label.
    """

    image: Image
    size: tuple[int, int]
    class_names: Sequence[str]

    @property
    def names(self) -> list[str]:
        """The name of each object's class."""
        return [self.class_names[label] for label in self.labels.tolist()]

    def to_coco(self, image_id: int = 1, category_ids: Sequence[int] | None = None) -> list[CocoRow]:
        """Return the objects in COCO's results format, ready for JSON; with masks also `segmentation`.

        Args:
            image_id: of the image in the annotation file.
            category_ids: of the annotation file, by label; None counts the classes from 1.
        """
        labels = self.labels.numpy()
        ids = np.arange(1, len(self.class_names) + 1) if category_ids is None else np.asarray(category_ids)
        if len(ids) != len(self.class_names):
            raise ValueError(f"category_ids: expected {len(self.class_names)}, one per class, got {len(ids)}")
        return coco_rows(
            image_ids=np.full(len(labels), image_id),
            category_ids=ids[labels],
            boxes=self.boxes.double().numpy(),
            scores=self.scores.numpy(),
            masks=encode_masks(self, *self.size),
        )

    def draw(self, min_side: int = MIN_SIDE) -> np.ndarray:
        """Draw boxes, masks, names and scores into a copy of the image.

        Args:
            min_side: a small image is enlarged until its long side has so many pixels, for the text to be readable; 0
                never enlarges.

        Returns:
            A picture (H', W', 3) uint8, RGB.

        Raises:
            OSError, ValueError: the image was given as a path, and cannot be read any more.
        """
        pixels = to_pixels(self.image)
        return draw_detections(pixels, self, self.class_names, min_side, full_masks(self, *self.size))

    def save(self, path: str | os.PathLike[str], min_side: int = MIN_SIDE) -> None:
        """Write the picture of `draw`; a file of that name is replaced, but not the image itself.

        Args:
            path: file to write; its folder must exist. Its suffix chooses the format.
            min_side: as in `draw`.

        Raises:
            OSError: the picture cannot be written.
            ValueError: there is no such format, or `path` is the image; otherwise as `draw`.
        """
        path = Path(path)
        source = self.image if isinstance(self.image, str | os.PathLike) else getattr(self.image, "filename", None)
        if source and path.exists() and os.path.exists(source) and path.samefile(source):
            raise ValueError(f"path: expected another file than the image, got {path}")
        write_image(path, self.draw(min_side))

    def _repr_jpeg_(self) -> bytes:
        """Return the picture for IPython."""
        return encode_image("picture.jpg", self.draw())

    def __repr__(self) -> str:
        height, width = self.size
        objects = [
            f"{short_name(name)} {score:.2f}" for name, score in zip(self.names, self.scores.tolist(), strict=True)
        ]
        text = f"{len(self)} in {width} x {height} pixels"
        if objects:
            text += f": {short_list(objects)}"
        return f"<{type(self).__name__} {text}>"


def split_detections(tensors: Sequence[Tensor]) -> list[Detections]:
    """Return the detections of each image, without padding; waits for the device once.

    Args:
        tensors: of `FasterRCNN.detect`.
    """
    boxes, scores, labels, valid, *masks = tensors
    detections = []
    for index, count in enumerate(valid.sum(1).tolist()):
        detections.append(
            Detections(
                boxes=boxes[index, :count],
                scores=scores[index, :count],
                labels=labels[index, :count],
                masks=masks[0][index, :count] if masks else None,
            )
        )
    return detections


def undo_resize(detections: Detections, factors: tuple[float, float]) -> Detections:
    """Move detections to the CPU and their boxes to the pixels of the image before its resize.

    Args:
        detections: of one image, as the model returns them.
        factors: by which the resize multiplied x and y, see `detector.image.resize_keep_ratio`.

    Returns:
        Detections on the CPU; 16-bit floats become float32, other dtypes stay.
    """
    factor_x, factor_y = factors
    boxes = _to_cpu(detections.boxes)
    boxes = boxes / boxes.new_tensor([factor_x, factor_y, factor_x, factor_y])

    masks = None
    if detections.masks is not None:
        masks = _to_cpu(detections.masks)

    return Detections(boxes, _to_cpu(detections.scores), detections.labels.cpu(), masks)


def full_masks(detections: Detections, height: int, width: int) -> Iterator[np.ndarray]:
    """Draw the masks of an image's detections at the size of that image, one after the other.

    Args:
        detections: boxes in the pixels of the image; without masks, nothing is yielded.
        height, width: of the image.

    Yields:
        (height, width) bool, in the order of the detections.
    """
    if detections.masks is None:
        return

    for index in range(len(detections.masks)):
        mask = detections.masks[index : index + 1]
        box = detections.boxes[index : index + 1]
        yield paste_masks(mask, box, height, width)[0].numpy()


def encode_masks(detections: Detections, height: int, width: int) -> list[dict[str, Any]] | None:
    """Return `full_masks` as COCO's compressed run lengths, or None if the detections have no masks."""
    if detections.masks is None:
        return None
    return [encode_mask(mask) for mask in full_masks(detections, height, width)]


def coco_rows(
    image_ids: np.ndarray,
    category_ids: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    masks: Iterable[dict[str, Any]] | None = None,
) -> list[CocoRow]:
    """Return detections as rows of COCO's results format.

    Args:
        image_ids: (N,) integers.
        category_ids: (N,) integers, those of the annotation file, not labels from 0.
        boxes: (N, 4) float, x1 y1 x2 y2 in pixels of the image files; width and height are computed in this dtype.
        scores: (N,) float.
        masks: N run lengths, see `encode_masks`; None leaves `segmentation` out.

    Returns:
        N dictionaries, ready for JSON: image_id, category_id, bbox (x, y, width, height), score and, with masks,
        segmentation.
    """
    top_left = boxes[:, :2]
    sizes = boxes[:, 2:] - top_left
    bboxes = np.concatenate([top_left, sizes], axis=1)

    fields = zip(
        image_ids.tolist(),
        category_ids.tolist(),
        bboxes.tolist(),
        scores.tolist(),
        strict=True,
    )
    rows: list[CocoRow] = []
    for image_id, category_id, bbox, score in fields:
        rows.append({"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score})

    if masks is not None:
        for row, mask in zip(rows, masks, strict=True):
            row["segmentation"] = mask
    return rows


def _to_cpu(values: Tensor) -> Tensor:
    """Return a floating-point tensor on the CPU, in float32 at least."""
    return values.to("cpu", torch.promote_types(values.dtype, torch.float32))
