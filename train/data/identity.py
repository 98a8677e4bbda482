"""Tells whether two training sets are the same images in the same order, so that a position in an epoch means the same.

Ids, file names and orientations count: they decide which images form which batch. Boxes and labels do not: whoever
corrects them goes on with the same run, and the images that were seen stay the same.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from detector.text import plural
from train.data.coco_dataset import CocoDetection

_TYPES = {"images": int, "order": str, "members": str}


def identify_images(dataset: CocoDetection) -> dict[str, Any]:
    """Return what identifies the images of a data set: their number, a digest in their order, and one without it."""
    count = len(dataset)
    return {
        "images": count,
        "order": _digest(dataset, np.arange(count)),
        "members": _digest(dataset, np.argsort(dataset.image_ids, kind="stable")),
    }


def is_identity(value: object) -> bool:
    """Tell whether a value is what `identify_images` returns."""
    return isinstance(value, dict) and {key: type(item) for key, item in value.items()} == _TYPES


def describe_change(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return how one set of images differs from another, "" if they are the same in the same order."""
    if before["images"] != now["images"]:
        return f"{plural(before['images'], 'image')} before, {now['images']} now"
    if before["members"] != now["members"]:
        return f"{plural(now['images'], 'image')} as before, but others"
    if before["order"] != now["order"]:
        return f"the same {now['images']} images in another order"
    return ""


def _digest(dataset: CocoDetection, order: np.ndarray) -> str:
    """Return a digest of the images with these indices, in this order."""
    is_portrait = dataset.heights > dataset.widths
    names = json.dumps(dataset.file_names[order].tolist())
    digest = hashlib.sha256(dataset.image_ids[order].astype("<i8").tobytes())
    digest.update(is_portrait[order].tobytes())
    digest.update(names.encode("ascii"))
    return digest.hexdigest()[:16]
