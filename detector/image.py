"""Images: read, write, resize and stack; the only place where pixels are decoded or interpolated.

Boxes depend on the exact pixels, so training and prediction must decode and resize in the same way. Both use OpenCV,
bit for bit as MMDetection does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from detector.structures import padded_side


def read_image(path: str | Path) -> np.ndarray:
    """Decode an image file to RGB.

    Gray images become three equal channels, transparency is dropped, 16 bits become 8, and the orientation that a
    camera wrote into the file (EXIF) is applied.

    Args:
        path: a file of any format OpenCV reads.

    Returns:
        (H, W, 3) uint8, RGB, contiguous.

    Raises:
        OSError: the file cannot be opened; the message names it.
        ValueError: the file is not an image or is cut off; the message names it.
    """
    data = Path(path).read_bytes()
    if _is_cut_off(data):
        raise ValueError(f"cannot read image {path}: the file is cut off after {len(data)} bytes")

    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    except cv2.error as error:
        raise ValueError(f"cannot read image {path}: {error}") from error
    if image is None:
        raise ValueError(f"cannot read image {path}: its {len(data)} bytes are not in an image format OpenCV knows")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write an RGB picture; the suffix of `path` chooses the format.

    Args:
        path: file to write; its folder must exist.
        image: (H, W, 3) uint8, RGB.

    Raises:
        OSError: the file cannot be written.
        ValueError: OpenCV has no encoder for the suffix.
    """
    path = Path(path)
    try:
        done, data = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    except cv2.error as error:
        raise ValueError(f"cannot write image {path}: no encoder for suffix {path.suffix!r}") from error
    if not done:
        raise ValueError(f"cannot write image {path}: OpenCV could not encode {image.shape} {image.dtype}")
    path.write_bytes(data.tobytes())


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
    """Tell whether a JPEG or PNG lacks its end marker: decoders fill the missing part with gray and do not complain."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data.rfind(b"IEND") < 0  # the search begins at the end, where the marker is
    if data.startswith(b"\xff\xd8\xff"):
        return data.rfind(b"\xff\xd9", _end_of_jpeg_header(data)) < 0
    return False


def _end_of_jpeg_header(data: bytes) -> int:
    """Return where the segments before the pixels end: a thumbnail inside one has end markers of its own."""
    position = 2
    while data[position : position + 1] == b"\xff":
        marker = data[position + 1 : position + 2]
        if marker == b"\xda":  # start of scan: the pixels follow
            break
        if marker == b"\xff":  # a fill byte
            position += 1
        else:
            length = int.from_bytes(data[position + 2 : position + 4], "big")
            position += 2 + length
    return position
