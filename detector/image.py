"""Images: read, convert, write, resize and stack; the only place where pixels are decoded or interpolated.

Boxes depend on the exact pixels, so training and prediction must decode and resize in the same way. Both use OpenCV,
bit for bit as MMDetection does.
"""

from __future__ import annotations

import importlib
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Protocol, TypeAlias

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

_VIDEO_STARTS = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"\x00\x00\x01\xba",  # MPEG program stream
    b"\x00\x00\x01\xb3",  # MPEG video
    b"\x30\x26\xb2\x75",  # Windows Media
    b"FLV\x01",
)
_MP4_IMAGES = (b"avif", b"avis", b"heic", b"heim", b"heis", b"heix", b"hevc", b"hevx", b"mif1", b"mif2", b"msf1")
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide")  # how files of MP4 and QuickTime begin, after four bytes


class PILImage(Protocol):
    """What is used of a `PIL.Image.Image`; this package does not need Pillow."""

    @property
    def mode(self) -> str: ...

    def convert(self, mode: str) -> PILImage: ...


Image: TypeAlias = str | os.PathLike[str] | np.ndarray | Tensor | PILImage
"""An image as users have it, see `to_pixels`."""


def to_pixels(image: Image, name: str = "image") -> np.ndarray:
    """Return an image of any kind as RGB pixels.

    Args:
        image: one of
            a path, read by `read_image`;
            a NumPy array (H, W, 3) uint8 RGB; OpenCV has BGR: `frame[..., ::-1]`;
            a PIL image, turned as its EXIF orientation says and converted to RGB, without its transparency;
            a tensor (3, H, W) uint8 RGB, on any device.
        name: of the image, for messages.

    Returns:
        (H, W, 3) uint8, RGB, contiguous; memory of `image` itself where that is such an array already.

    Raises:
        OSError: a file cannot be opened; the message names it.
        ValueError: a file cannot be decoded, or an image has another shape, dtype or mode than above.
        TypeError: the image is none of these.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(os.fspath(image))
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(f"{name}: expected (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}{_hint(image)}")
        return np.ascontiguousarray(image)
    if isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] != 3 or image.dtype != torch.uint8 or not image.numel():
            raise ValueError(
                f"{name}: expected a tensor (3, H, W) uint8 RGB, got {tuple(image.shape)} {image.dtype}{_hint(image)}"
            )
        return np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())
    if _is_pil_image(image):
        return _pil_pixels(image, name)
    raise TypeError(
        f"{name}: expected a path, a NumPy array, a PIL image or a tensor, got {type(image).__name__}{_hint(image)}"
    )


def _hint(image: object) -> str:
    """Return what to do about something that is no image."""
    if isinstance(image, Iterator):
        return "; list(images) makes a list of an iterator"
    if not isinstance(image, np.ndarray | Tensor):
        return ""
    if image.ndim == 4:
        return "; list(images) makes a list of a stack"
    is_floating = image.is_floating_point() if isinstance(image, Tensor) else np.issubdtype(image.dtype, np.floating)
    return "; give the pixels in 0..255, before any normalization" if is_floating else ""


def _is_pil_image(image: object) -> bool:
    module = sys.modules.get("PIL.Image")  # imported where there is such an image
    return module is not None and isinstance(image, module.Image)


def _pil_pixels(image: PILImage, name: str) -> np.ndarray:
    """Do `to_pixels` for a PIL image."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"{name}: expected a PIL image of 8 bits, got mode {image.mode}; give its path, or an array (H, W, 3) uint8"
        )
    upright: PILImage = importlib.import_module("PIL.ImageOps").exif_transpose(image)
    pixels = np.array(upright.convert("RGB"))
    if not pixels.size:
        raise ValueError(f"{name}: expected at least one pixel, got {pixels.shape}")
    return pixels


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
        ValueError: the file is not an image but a video, say, is cut off or has too many pixels; the message names it.
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


def _open_regular_file(path: str | Path) -> BufferedReader:
    """Open a file for reading, without waiting: a pipe might never have a writer.

    Raises:
        OSError, ValueError: it cannot be opened, is no regular file, a video or larger than any image; the message
            names it.
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
    if _is_video(file):
        file.close()
        raise ValueError(
            f"cannot read image {_name(path)}: expected an image, got a video: read its frames with cv2.VideoCapture"
        )
    if status.st_size > _MAX_BYTES:
        file.close()
        raise ValueError(f"cannot read image {_name(path)}: expected at most {_MAX_BYTES} bytes, got {status.st_size}")
    return file


def _is_video(file: BufferedReader) -> bool:
    """Tell whether a file begins as a video does; its position stays."""
    try:
        start = file.peek(12)[:12]
    except OSError:  # of the disk; reading will tell
        return False
    if start[4:8] in _MP4_BOXES:
        return not (start[4:8] == b"ftyp" and start[8:12] in _MP4_IMAGES)
    return start.startswith(_VIDEO_STARTS) or (start[:4] == b"RIFF" and start[8:12] == b"AVI ")


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
