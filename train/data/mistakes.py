"""Signs that the boxes of an annotation file mean something else than COCO's; each is one sentence for a person."""

from __future__ import annotations

import numpy as np

from train.data.annotations import TOLERANCE, AnnotationColumns, ImageColumns, fits_image

MIN_BOXES = 5  # fewer boxes may look like corners by chance
MIN_SHARE_BEYOND = 0.2  # of boxes that reach beyond their image


def find_mistakes(annotations: AnnotationColumns, images: ImageColumns) -> list[str]:
    """Return what looks wrong about all annotations that could be trained on."""
    annotations = annotations.take(np.flatnonzero(annotations.image_listed & annotations.category_used))
    if not len(annotations.boxes):
        return []

    mistakes = []
    if annotations.is_crowd.all():
        mistakes.append("every annotation has an iscrowd of 1, which means a group of objects, not one of them")
    if (annotations.has_area & (annotations.areas <= 0)).all():
        mistakes.append("every annotation has an area of 0: give the area in pixels, or leave the key out")
    if (np.abs(annotations.boxes) <= 1).all():
        mistakes.append("every bbox lies between 0 and 1: COCO's are in pixels, not in shares of the image")
    elif _look_like_corners(annotations, images):
        mistakes.append("bbox looks like x1, y1, x2, y2: COCO's is x, y, width, height")
    return mistakes


def _look_like_corners(annotations: AnnotationColumns, images: ImageColumns) -> bool:
    """Tell whether boxes fit their images if they are read as corners, and often do not as COCO reads them."""
    x, y, width, height = annotations.boxes.T
    image_widths = images.widths[annotations.image_indices] + TOLERANCE
    image_heights = images.heights[annotations.image_indices] + TOLERANCE
    fit_as_corners = (width > x) & (height > y) & (width <= image_widths) & (height <= image_heights)
    reaches_beyond = ~fits_image(annotations, images)
    is_certain = fit_as_corners.all() and reaches_beyond.mean() >= MIN_SHARE_BEYOND
    return len(annotations.boxes) >= MIN_BOXES and bool(is_certain)
