"""Images: read, write, resize and stack; the only place where pixels are decoded or interpolated.

Boxes depend on the exact pixels, so training and prediction must decode and resize in the same way. Both use OpenCV,
bit for bit as MMDetection does.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import torch
from torch import Tensor

from detector.files import open_without_waiting, replacing
from detector.image_header import jpeg_segments, png_chunks, seen_size, stored_size
from detector.structures import padded_side
from detector.text import shorten

MAX_PIXELS = 178_956_970
"""Images with more are not decoded; Pillow draws the line there, too. Decoding takes 6 bytes for each pixel."""

_MAX_BYTES = 16 * MAX_PIXELS  # of a file: four floats for each pixel
_HEADER_BYTES = 65536  # where the size of most JPEGs is
_NAME_LENGTH = 300  # letters of a path in a message


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file to RGB.

    Gray images become three equal channels, transparency is dropped, 16 bits become 8, and the orientation that a
    camera wrote into the file (EXIF) is applied.

    Args:
        path: a file of any format OpenCV reads.
        max_pixels: an image whose header tells more is not decoded: a file of a few KB can say that it has any number.

    Returns:
        (H, W, 3) uint8, RGB, contiguous.

    Raises:
        OSError: the file cannot be opened, or is no regular file; the message names it.
        ValueError: the file is not an image, is cut off or has too many pixels; the message names it.
    """
    data = _read_file(path)
    size = stored_size(data)
    if size is not None and size[0] * size[1] > max_pixels:
        height, width = size
        raise ValueError(
            f"cannot read image {_name(path)}: expected at most {max_pixels} pixels (max_pixels, in training "
            f"--data.max-pixels), got {width} x {height}"
        )
    if _is_cut_off(data):
        raise ValueError(f"cannot read image {_name(path)}: the file is cut off after {len(data)} bytes")

    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    except (cv2.error, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot read image {_name(path)}: {reason}") from error
    if image is None:
        raise ValueError(
            f"cannot read image {_name(path)}: its {len(data)} bytes are not in an image format OpenCV knows"
        )
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_image_size(path: str | Path) -> tuple[int, int] | None:
    """Return height and width that `read_image` gives, from the header of the file alone.

    Returns:
        None where the header does not tell it.

    Raises:
        OSError, ValueError: the file cannot be opened, or is no regular file; the message names it.
    """
    with _open_regular_file(path) as file:
        data = file.read(_HEADER_BYTES)
        is_jpeg = data.startswith(b"\xff\xd8")
        if stored_size(data) is None or not is_jpeg:
            data += file.read()  # the orientation may come last
    return seen_size(data)


def _read_file(path: str | Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError, ValueError: it cannot be read; the message names it.
    """
    with _open_regular_file(path) as file:
        try:
            return file.read()
        except OSError as error:  # of the disk; it does not have the name
            raise OSError(error.errno, error.strerror, _name(path)) from error


def _open_regular_file(path: str | Path) -> BinaryIO:
    """Open a file for reading, without waiting: a pipe might never have a writer.

    Raises:
        OSError, ValueError: it cannot be opened, is no regular file or larger than any image; the message names it.
    """
    try:
        file = open(path, "rb", opener=open_without_waiting)  # noqa: SIM115  # the caller closes it
    except OSError as error:
        raise OSError(error.errno, error.strerror, _name(path)) from error
    except ValueError as error:  # a name with a NUL, or with letters that no file name can have
        raise ValueError(f"cannot read image {_name(path)}: {error}") from error

    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        file.close()
        raise OSError(f"cannot read image {_name(path)}: expected a regular file, got a pipe or a device")
    if status.st_size > _MAX_BYTES:
        file.close()
        raise ValueError(f"cannot read image {_name(path)}: expected at most {_MAX_BYTES} bytes, got {status.st_size}")
    return file


def _name(path: str | Path) -> str:
    """Return a path for a message; the middle of a very long one is left out."""
    return shorten(str(path), _NAME_LENGTH)


def encode_image(path: str | Path, image: np.ndarray) -> bytes:
    """Return the bytes of an image file.

    Args:
        path: of the file; its suffix chooses the format.
        image: (H, W, 3) uint8, RGB.

    Raises:
        ValueError: OpenCV has no encoder for the suffix, or the image is too large for the format.
    """
    suffix = Path(path).suffix
    try:
        done, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    except cv2.error as error:
        raise ValueError(f"cannot write image {path}: no encoder for suffix {suffix!r}") from error
    if not done:
        raise ValueError(f"cannot write image {path}: OpenCV could not encode {image.shape} {image.dtype}")
    return data.tobytes()


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write an RGB picture as `detector.files.replacing` does: whole, and not through a link.

    Args:
        path: file to write; its folder must exist. Its suffix chooses the format.
        image: (H, W, 3) uint8, RGB.

    Raises:
        OSError: the file cannot be written.
        ValueError: as `encode_image`.
    """
    data = encode_image(path, image)
    with replacing(path, size=len(data)) as partial:
        partial.write_bytes(data)


def resized_size(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) after the largest resize that fits into `scale` and keeps the ratio.

    Args:
        height, width: pixels of the image.
        scale: upper bounds for the long and the short side, in any order.

    Source:
        mmcv `imrescale` (rounding rule); a side never becomes 0 here.
    """
    factor_for_long_side = max(scale) / max(height, width)
    factor_for_short_side = min(scale) / min(height, width)
    factor = min(factor_for_long_side, factor_for_short_side)
    new_height = int(height * factor + 0.5)
    new_width = int(width * factor + 0.5)
    return max(new_height, 1), max(new_width, 1)


def resize_keep_ratio(image: np.ndarray, scale: tuple[int, int]) -> tuple[np.ndarray, tuple[float, float]]:
    """Resize (bilinear) to the largest size that fits into `scale` and keeps the ratio.

    Args:
        image: (H, W, 3) uint8.
        scale: upper bounds for the long and the short side, in any order.

    Returns:
        The image (H', W', 3) uint8 and the factors (W' / W, H' / H) by which boxes grow in x and y. The two differ
        slightly because sides are rounded to whole pixels.
    """
    height, width = image.shape[:2]
    new_height, new_width = resized_size(height, width, scale)
    if (new_height, new_width) != (height, width):
        image = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    return image, (new_width / width, new_height / height)


def stack_images(images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Put images side by side into one tensor, padded on the right and bottom with zeros.

    Args:
        images: at least one (H, W, 3) uint8; sizes may differ.

    Returns:
        (B, 3, Hp, Wp) uint8, sides the largest ones rounded up to a multiple of 32, and (B, 2) int64, the heights and
        widths before padding.
    """
    sizes = torch.tensor([image.shape[:2] for image in images])
    max_height, max_width = sizes.amax(0).tolist()
    stacked = torch.empty(len(images), 3, padded_side(max_height), padded_side(max_width), dtype=torch.uint8)
    for padded, image in zip(stacked.numpy(), images, strict=True):
        height, width = image.shape[:2]
        padded[:, height:] = 0
        padded[:, :height, width:] = 0
        cv2.split(image, list(padded[:, :height, :width]))  # faster than a strided copy
    return stacked, sizes


def _is_cut_off(data: bytes) -> bool:
    """Tell whether a JPEG or PNG ends before its end marker.

    Decoders fill the missing part of a JPEG with gray and do not complain; OpenCV takes the memory that a chunk of a
    PNG asks for, up to 4 GiB, before it sees that the file is shorter.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return not any(name == b"IEND" and end <= len(data) for name, _, end in png_chunks(data))
    if data.startswith(b"\xff\xd8\xff"):
        return data.rfind(b"\xff\xd9", _end_of_jpeg_header(data)) < 0
    return False


def _end_of_jpeg_header(data: bytes) -> int:
    """Return where the segments before the pixels end: a thumbnail inside one has end markers of its own."""
    position = 2
    for _, content in jpeg_segments(data):
        position = content
    return position
