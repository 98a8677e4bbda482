"""Masks as COCO stores them: lengths of runs down the columns, packed into a string."""

from __future__ import annotations

import numpy as np

_MOST_GROUPS = 10  # of 5 bits in one number: no image has runs longer than 2 ** 49


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


def decode_mask(rle: dict) -> np.ndarray:
    """Decode COCO's run lengths, compressed or not.

    Args:
        rle: {"size": [H, W], "counts": str, bytes or list of lengths}.

    Returns:
        (H, W) bool.

    Raises:
        ValueError: `counts` is malformed or does not fill `size`.
    """
    return fill_runs(runs_of(rle), *rle["size"])


def runs_of(rle: dict) -> np.ndarray:
    """Return the lengths of the runs (R,) int64, the first of zeros, as `decode_mask` takes and checks them."""
    size, counts = rle["size"], rle["counts"]
    packed = isinstance(counts, (str, bytes))
    runs = _unpack(counts) if packed else np.array(counts or [0])
    if runs.ndim != 1 or runs.dtype.kind != "i" or runs.min() < 0 or runs.sum() != size[0] * size[1]:
        raise ValueError(f"counts: expected lengths that fill {size[0]} x {size[1]} pixels, found {counts!r:.60}")
    return runs.astype(np.int64)


def fill_runs(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the mask (height, width) bool of runs (R,) down its columns that fill it."""
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.ascontiguousarray(pixels.reshape(width, height).T)


def _unpack(text: str | bytes) -> np.ndarray:
    """Read what `_pack` wrote, all of it at once; [-1] if it is malformed."""
    data = text.encode("utf-8") if isinstance(text, str) else text
    groups = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((groups & 0x20) == 0)
    if not len(ends) or ends[-1] != len(groups) - 1 or groups.min() < 0 or groups.max() > 0x3F:
        return np.array([-1])
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MOST_GROUPS:
        return np.array([-1])
    place = np.arange(len(groups)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((groups & 0x1F) << 5 * place, starts)
    runs -= np.where(groups[ends] & 0x10, 1 << 5 * lengths, 0)
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs


def _pack(number: int) -> str:
    """Write one signed number."""
    text, more = "", True
    while more:
        group = number & 0x1F
        number >>= 5
        more = number != (-1 if group & 0x10 else 0)
        text += chr(group + 48 + (0x20 if more else 0))
    return text
