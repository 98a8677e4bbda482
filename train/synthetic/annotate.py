"""The objects of a generated photograph as COCO annotations."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy import ndarray

from detector.ops.rle import mask_to_runs
from train.synthetic.canvas import SceneObject

OUTLINE_SCALE = 4  # polygons follow the mask to 1 / (2 * OUTLINE_SCALE) pixel


def annotate(scene_object: SceneObject) -> dict[str, Any]:
    """Describe what is seen of an object as COCO does: polygons for an object, run lengths for a crowd.

    Returns:
        category_id (from 1), iscrowd, area in pixels, bbox [x, y, width, height] of the mask, and segmentation.
    """
    mask = scene_object.mask
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    return {
        "category_id": scene_object.label + 1,
        "iscrowd": int(scene_object.is_crowd),
        "area": int(np.count_nonzero(mask)),
        "bbox": [x, y, width, height],
        "segmentation": uncompressed_rle(mask) if scene_object.is_crowd else outlines(mask),
    }


def outlines(mask: ndarray) -> list[list[float]]:
    """Return the outer contours of a (H, W) bool mask as COCO polygons [x1, y1, x2, y2, ...]; holes are filled."""
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    crop = mask[y : y + height, x : x + width].view(np.uint8)
    enlarged = crop.repeat(OUTLINE_SCALE, 0).repeat(OUTLINE_SCALE, 1)
    contours, _ = cv2.findContours(enlarged, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = []
    for contour in contours:
        corners = cv2.approxPolyDP(contour, 0.5 * OUTLINE_SCALE, True)[:, 0]
        polygon = (corners + 0.5) / OUTLINE_SCALE + (x, y)
        polygons.append(np.round(polygon, 2).ravel().tolist())
    return polygons


def uncompressed_rle(mask: ndarray) -> dict[str, list[int]]:
    """Return a (H, W) bool mask as uncompressed COCO RLE: lengths of runs down the columns, the first of zeros."""
    return {"size": list(mask.shape), "counts": mask_to_runs(mask).tolist()}
