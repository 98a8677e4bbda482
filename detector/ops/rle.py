"""Run lengths (RLE) of masks, the form in which COCO stores them: masks and checked annotations in, either form out.

The pixels of a mask are read down its columns. Its "runs" are the lengths of the stretches of equal pixels: the first
run is of zeros and may be empty, the second of ones, and so on. COCO writes the runs as a list of numbers or,
compressed, as a string.

pycocotools.mask has the same code. It is not used here because prediction works without pycocotools, because it does
not give the runs themselves, and because it does not notice a string that ends too early: the rest of its mask is
uninitialized memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from detector.text import shown

GROUP_BITS = 5
"""A number is written in groups of 5 bits, lowest first, one character each."""

CONTINUATION_BIT = 1 << GROUP_BITS
"""Bit of a character: more groups of the number follow."""

SIGN_BIT = 1 << (GROUP_BITS - 1)
"""Bit of the last group of a number: the number is negative."""

ZERO_CODE = ord("0")
"""Code of the character that stands for 0."""

MAX_PIXELS = 1 << 29
"""Pixels of the largest mask that is read. pycocotools counts runs in 32 bits, and so do the evaluators."""

MAX_GROUPS = 7
"""Largest number of groups in one number; enough for a sign and `MAX_PIXELS`."""


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode one mask as COCO's compressed run lengths.

    Args:
        mask: (H, W) bool.

    Returns:
        {"size": [H, W], "counts": str}, the same as pycocotools gives and reads.

    Raises:
        ValueError: `mask` is not a bool array of two dimensions.

    Source:
        The format is that of cocoapi's `rleToString`: from the fourth run on, each is written as its difference from
        the run before it of the same value.
    """
    runs = mask_to_runs(mask).tolist()
    encoded_runs = []
    for index, run in enumerate(runs):
        previous = runs[index - 2] if index > 2 else 0
        encoded_runs.append(_encode_number(run - previous))
    return {"size": list(mask.shape), "counts": "".join(encoded_runs)}


def decode_mask(rle: dict[str, Any]) -> np.ndarray:
    """Decode COCO's run lengths, compressed or not.

    Args:
        rle: {"size": [H, W], "counts": str, bytes or list of lengths}.

    Returns:
        (H, W) bool.

    Raises:
        ValueError: `size` or `counts` is malformed, `size` has more than `MAX_PIXELS`, or `counts` does not fill it.
    """
    height, width = rle_size(rle)
    return runs_to_mask(rle_to_runs(rle), height, width)


def mask_to_runs(mask: np.ndarray) -> np.ndarray:
    """Return the runs (R,) int64 of a mask (H, W) bool; as a list they are COCO's uncompressed `counts`.

    Raises:
        ValueError: `mask` is not a bool array of two dimensions.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(f"mask: expected (H, W) bool, got {mask.shape} {mask.dtype}")

    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    starts_with_one = pixels.size > 0 and pixels[0]
    start = [0, 0] if starts_with_one else [0]  # an empty run of zeros
    borders = np.concatenate([start, changes, [pixels.size]])
    return np.diff(borders).astype(np.int64)


def runs_to_mask(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the mask (height, width) bool of runs (R,) int64.

    Raises:
        ValueError: a run is negative, or they do not fill the mask.
    """
    if not _fill(runs, height * width):
        raise ValueError(f"runs: expected lengths that fill {height} x {width} pixels, got {shown(runs.tolist())}")
    values = np.arange(len(runs)) % 2 == 1
    pixels = np.repeat(values, runs)
    return np.ascontiguousarray(pixels.reshape(width, height).T)


def rle_to_runs(rle: dict[str, Any]) -> np.ndarray:
    """Return the runs (R,) int64 of COCO's run lengths; argument and errors are those of `decode_mask`."""
    height, width = rle_size(rle)
    counts = rle.get("counts")
    runs = None
    if isinstance(counts, (str, bytes)):
        runs = _decode_runs(counts, height * width)
    elif isinstance(counts, (list, tuple)):
        runs = _whole_numbers(counts)
    if runs is None or not _fill(runs, height * width):
        raise ValueError(f"counts: expected lengths that fill {height} x {width} pixels, got {shown(counts)}")
    return runs


def fill_all(texts: Sequence[str | bytes], pixels: np.ndarray) -> bool:
    """Tell whether the runs of every compressed string fill a mask of so many pixels (N,) int64.

    Does what `rle_to_runs` does, for thousands of strings, in about half of its time.
    """
    encoded = [_to_ascii(text) for text in texts]
    parts = [data for data in encoded if data]
    decoded = _decode_numbers(b"".join(parts))
    if len(parts) < len(texts) or decoded is None:
        return False
    numbers, last = decoded
    last_of_text = np.cumsum(list(map(len, parts))) - 1
    last_number = np.searchsorted(last, last_of_text)
    if (last[last_number] != last_of_text).any():
        return False  # a number goes on in the next text

    starts = np.concatenate([[0], last_number[:-1] + 1])
    text = np.repeat(np.arange(len(texts)), np.diff(starts, append=len(numbers)))
    rank = np.arange(len(numbers)) - starts[text]
    for chosen in (rank % 2 == 1, (rank % 2 == 0) & (rank > 0)):
        differences = numbers[chosen]
        sums = np.cumsum(differences)
        begins = np.diff(text[chosen], prepend=-1) != 0
        before = (sums - differences)[begins]
        numbers[chosen] = sums - before[np.cumsum(begins) - 1]
    are_lengths = numbers.min() >= 0 and numbers.max() <= MAX_PIXELS
    return bool(are_lengths and (np.add.reduceat(numbers, starts) == pixels).all())


def rle_size(rle: dict[str, Any]) -> tuple[int, int]:
    """Return height and width of COCO's run lengths; argument and errors are those of `decode_mask`."""
    size = rle.get("size") if isinstance(rle, dict) else None
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(_is_whole(type(side)) for side in size):
        height, width = map(int, size)
        if min(height, width) >= 0 and height * width <= MAX_PIXELS:
            return height, width
    raise ValueError(f"size: expected whole numbers [height, width] of at most {MAX_PIXELS} pixels, got {shown(size)}")


def _fill(runs: np.ndarray, pixels: int) -> bool:
    """Tell whether runs (R,) are lengths that add up to this number of pixels.

    Each is compared first: so their sum cannot wrap to the right number.
    """
    if not len(runs):
        return pixels == 0
    return bool(runs.min() >= 0 and runs.max() <= pixels and runs.sum() == pixels)


def _is_whole(kind: type) -> bool:
    return issubclass(kind, (int, np.integer)) and kind is not bool


def _whole_numbers(counts: Sequence[Any]) -> np.ndarray | None:
    """Return whole numbers (R,) as int64, None if they are something else."""
    if not all(map(_is_whole, set(map(type, counts)))):
        return None
    try:
        return np.array(counts, np.int64)
    except OverflowError:
        return None


def _encode_number(number: int) -> str:
    """Return the characters of one signed number."""
    text = ""
    is_complete = False
    while not is_complete:
        group = number & (CONTINUATION_BIT - 1)
        number >>= GROUP_BITS
        sign_extension = -1 if group & SIGN_BIT else 0  # what a reader adds to the left of the last group
        is_complete = number == sign_extension
        if not is_complete:
            group |= CONTINUATION_BIT
        text += chr(ZERO_CODE + group)
    return text


def _decode_runs(text: str | bytes, pixels: int) -> np.ndarray | None:
    """Return the runs (R,) int64 in a compressed string for a mask of so many pixels, None if it is malformed."""
    data = _to_ascii(text)
    if data is None or len(data) > MAX_GROUPS * (pixels + 1):
        return None  # more runs than pixels
    decoded = _decode_numbers(data)
    if decoded is None:
        return None
    runs, _ = decoded
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def _to_ascii(text: str | bytes) -> bytes | None:
    if isinstance(text, bytes):
        return text
    return text.encode("ascii") if text.isascii() else None


def _decode_numbers(data: bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the numbers in a string, and the place of the last character of each, both (R,) int64.

    None if a number is malformed or larger than `MAX_PIXELS`: sums of others do not wrap.
    """
    characters = np.frombuffer(data, np.uint8).astype(np.int64) - ZERO_CODE
    last = np.flatnonzero((characters & CONTINUATION_BIT) == 0)
    if not len(last) or last[-1] != len(characters) - 1:
        return None
    if characters.min() < 0 or characters.max() >= 2 * CONTINUATION_BIT:
        return None
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > MAX_GROUPS:
        return None

    index_in_number = np.arange(len(characters)) - np.repeat(first, lengths)
    groups = characters & (CONTINUATION_BIT - 1)
    numbers = np.add.reduceat(groups << GROUP_BITS * index_in_number, first)
    numbers -= np.where(characters[last] & SIGN_BIT, 1 << GROUP_BITS * lengths, 0)  # two's complement
    if np.abs(numbers).max() > MAX_PIXELS:
        return None
    return numbers, last
