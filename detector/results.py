"""From detections of the model to results in pixels of the image file: boxes, masks of full size, rows for COCO.

The model sees resized images and knows nothing of the original size. Prediction and evaluation both come here to undo
the resize.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from detector.ops.paste_masks import paste_masks
from detector.ops.rle import encode_mask
from detector.structures import Detections

CocoRow = dict[str, Any]
"""One detection in COCO's results format: image_id, category_id, bbox, score and, with masks, segmentation."""


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


def _to_cpu(values: torch.Tensor) -> torch.Tensor:
    """Return a floating-point tensor on the CPU, in float32 at least."""
    return values.to("cpu", torch.promote_types(values.dtype, torch.float32))
