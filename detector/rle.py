"""Masks as COCO stores them: lengths of runs down the columns, packed into a string."""

from __future__ import annotations

import numpy as np


def encode_mask(mask: np.ndarray) -> dict:
    """Encode one mask as COCO's compressed run lengths.

    Args:
        mask: (H, W) bool.

    Returns:
        {"size": [H, W], "counts": str}, the same as pycocotools gives and reads.

    Raises:
        ValueError: `mask` is not a bool array of two dimensions.

    Source:
        The format is that of cocoapi's `rleToString`: each run is written as its difference from the run of the same
        value before, in groups of 5 bits with a bit that says whether more follow, as characters from "0" on.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(f"mask: expected (H, W) bool, found {mask.shape} {mask.dtype}")
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    starts = [0] if pixels.size and pixels[0] else []  # the first run is of zeros, maybe none
    runs = np.diff(np.concatenate([[0], starts, changes, [pixels.size]]).astype(np.int64)).tolist()
    before = [0, 0, 0, *runs[1:]]  # the first three are written as they are
    return {
        "size": list(mask.shape),
        "counts": "".join(_pack(run - previous) for run, previous in zip(runs, before, strict=False)),
    }


def _pack(number: int) -> str:
    """Write one signed number."""
    text, more = "", True
    while more:
        group = number & 0x1F
        number >>= 5
        more = number != (-1 if group & 0x10 else 0)
        text += chr(group + 48 + (0x20 if more else 0))
    return text
