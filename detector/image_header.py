"""The size of an image, read from the header of its file: nothing is decoded, and no memory is taken.

Knows every format that OpenCV's wheels decode. A number in a header is what the decoder allocates memory for, so the
header is read as the decoder reads it: the size of JPEG 2000 is taken from its code stream, for example, not from the
box around it, which may say something else. Pillow takes that of the box, does not know all of the formats, and has one
limit for the whole process.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

START_OF_SCAN = 0xDA  # JPEG's marker before the pixels

_JPEG_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of a segment with the size
_JPEG_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD8)}
_JPEG_APP1 = 0xE1
_EXIF_PREFIX = b"Exif\0\0"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TIFF_WIDTH = 256
_TIFF_HEIGHT = 257
_TIFF_ORIENTATION = 274
_TIFF_FORMATS = {3: "H", 4: "I", 16: "Q"}  # type of a tag -> its letter for `struct`
_TIFF_MAX_TAGS = 1000  # more are not looked at: the three that matter are among the first
_WEBP_HAS_EXIF = 0x08
_TEXT_HEADER_BYTES = 1024

_NETPBM = re.compile(rb"P[1-6fF]\s+(\d+)\s+(\d+)\s")
_PAM_WIDTH = re.compile(rb"^WIDTH\s+(\d+)\s", re.MULTILINE)
_PAM_HEIGHT = re.compile(rb"^HEIGHT\s+(\d+)\s", re.MULTILINE)
_RADIANCE = re.compile(rb"^[-+]Y (\d+) [-+]X (\d+)\s", re.MULTILINE)


def stored_size(data: bytes) -> tuple[int, int] | None:
    """Return height and width of the pixels in a file, as they are stored: the orientation is not applied.

    Args:
        data: the file, or its beginning.

    Returns:
        None where the format is unknown, or `data` ends before the size.
    """
    try:
        return _stored_size(data)
    except (struct.error, IndexError):  # the header is cut off
        return None


def seen_size(data: bytes) -> tuple[int, int] | None:
    """Return height and width of an image as it is seen, after the orientation in its EXIF data; None as above.

    Args:
        data: the whole file; of a JPEG its beginning is enough.
    """
    size = stored_size(data)
    if size is None:
        return None
    height, width = size
    if _is_transposed(data):
        return width, height
    return height, width


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (marker, position of its content) for the segments of a JPEG, the last one being the start of scan."""
    position = 2
    while (position := data.find(b"\xff", position)) >= 0:
        marker = data[position + 1] if position + 1 < len(data) else 0
        if marker in _JPEG_WITHOUT_LENGTH:
            position += 2
        elif marker in (0x00, 0xFF):  # no marker, or a fill byte before one
            position += 1
        else:
            yield marker, position + 4
            if marker == START_OF_SCAN:
                return
            length = int.from_bytes(data[position + 2 : position + 4], "big")
            position += 2 + length


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, position of its content, position behind it) for the chunks of a PNG, up to the last one, IEND.

    The content of a chunk may end behind `data`, as its length is what the file says.
    """
    position = len(_PNG_SIGNATURE)
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        content = position + 8
        yield name, content, content + length
        if name == b"IEND":
            return
        position = content + length + 4  # after its check sum


def _stored_size(data: bytes) -> tuple[int, int] | None:
    """Do `stored_size`; a header that is cut off raises struct.error or IndexError."""
    size: tuple[int, int] | None = None
    if data.startswith(b"\xff\xd8"):
        size = _jpeg_size(data)
    elif data.startswith(_PNG_SIGNATURE):
        width, height = struct.unpack_from(">II", data, 16)
        size = height, width
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        size = _webp_size(data)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        width, height = struct.unpack_from("<HH", data, 6)
        size = height, width
    elif data.startswith(b"BM"):
        size = _bmp_size(data)
    elif data.startswith(_TIFF_SIGNATURES):
        tags = _tiff_tags(data)
        if _TIFF_WIDTH in tags and _TIFF_HEIGHT in tags:
            size = tags[_TIFF_HEIGHT], tags[_TIFF_WIDTH]
    elif data[4:8] == b"ftyp":
        size = _avif_size(data)
    elif data.startswith((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")):
        size = _jpeg2000_size(data)
    elif data.startswith(b"\x59\xa6\x6a\x95"):  # Sun raster
        width, height = struct.unpack_from(">II", data, 4)
        size = height, width
    else:
        size = _size_in_text(data[:_TEXT_HEADER_BYTES])
    return size


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    for marker, content in jpeg_segments(data):
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, content + 1)  # after the bits per color
            return height, width
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    chunk = data[12:16]
    if chunk == b"VP8X":
        width_low, width_high, height_low, height_high = struct.unpack_from("<HBHB", data, 24)
        return (height_high << 16 | height_low) + 1, (width_high << 16 | width_low) + 1
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF  # the two highest bits scale the picture on a screen
    return None


def _bmp_size(data: bytes) -> tuple[int, int]:
    (header_length,) = struct.unpack_from("<I", data, 14)
    if header_length == 12:  # OS/2
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    return abs(height), abs(width)  # a negative height means that the first row is the top one


def _avif_size(data: bytes) -> tuple[int, int] | None:
    """Return the largest size that a property of an item tells; an image may consist of smaller ones."""
    largest = None
    position = -1
    while (position := data.find(b"ispe", position + 1)) >= 0:
        width, height = struct.unpack_from(">II", data, position + 8)  # after version and flags
        if largest is None or height * width > largest[0] * largest[1]:
            largest = height, width
    return largest


def _jpeg2000_size(data: bytes) -> tuple[int, int] | None:
    position = data.find(b"\xff\x4f\xff\x51")  # start of the code stream, and its segment with the size
    if position < 0:
        return None
    right, bottom, left, top = struct.unpack_from(">IIII", data, position + 8)
    return bottom - top, right - left


def _size_in_text(data: bytes) -> tuple[int, int] | None:
    """Return the size in the formats whose header is text: Netpbm, its PAM, floats in PFM, and Radiance's HDR."""
    if data.startswith(b"#?"):
        sizes = _RADIANCE.search(data)
        return (int(sizes[1]), int(sizes[2])) if sizes else None
    if data.startswith(b"P7"):
        width = _PAM_WIDTH.search(data)
        height = _PAM_HEIGHT.search(data)
        return (int(height[1]), int(width[1])) if width and height else None
    without_comments = re.sub(rb"#[^\n]*", b"", data)
    sizes = _NETPBM.match(without_comments)
    return (int(sizes[2]), int(sizes[1])) if sizes else None


def _is_transposed(data: bytes) -> bool:
    """Tell whether the orientation in the EXIF data exchanges height and width."""
    try:
        orientation = _tiff_tags(_exif(data)).get(_TIFF_ORIENTATION, 1)
    except (struct.error, IndexError):
        return False
    return 5 <= orientation <= 8


def _exif(data: bytes) -> bytes:
    """Return the EXIF data of a file in one of the formats whose orientation OpenCV applies; empty without any."""
    if data.startswith(_TIFF_SIGNATURES):
        return data
    if data.startswith(b"\xff\xd8"):
        return _jpeg_exif(data)
    if data.startswith(_PNG_SIGNATURE):
        return _png_exif(data)
    if data[12:16] == b"VP8X" and data[20] & _WEBP_HAS_EXIF:
        return _webp_exif(data)
    return b""


def _jpeg_exif(data: bytes) -> bytes:
    for marker, content in jpeg_segments(data):
        if marker == _JPEG_APP1 and data.startswith(_EXIF_PREFIX, content):
            length = int.from_bytes(data[content - 2 : content], "big")
            return data[content + len(_EXIF_PREFIX) : content - 2 + length]
    return b""


def _png_exif(data: bytes) -> bytes:
    for name, content, end in png_chunks(data):
        if name == b"eXIf":
            return data[content:end]
    return b""


def _webp_exif(data: bytes) -> bytes:
    position = 12
    while position + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, position)
        content = position + 8
        if name == b"EXIF":
            return data[content : content + length].removeprefix(_EXIF_PREFIX)
        position = content + length + length % 2
    return b""


def _tiff_tags(data: bytes) -> dict[int, int]:
    """Return the tags with one whole number in the first directory of a TIFF or of EXIF data, which has its form."""
    if not data.startswith(_TIFF_SIGNATURES):
        return {}
    order = "<" if data.startswith(b"II") else ">"
    is_big = b"+" in data[:4]  # BigTIFF: offsets of 8 bytes
    offset_format, count_format, tag_format = ("Q", "Q", "HHQ8s") if is_big else ("I", "H", "HHI4s")
    (position,) = struct.unpack_from(order + offset_format, data, 8 if is_big else 4)
    (count,) = struct.unpack_from(order + count_format, data, position)
    position += struct.calcsize(order + count_format)

    tags = {}
    for index in range(min(count, _TIFF_MAX_TAGS)):
        size = struct.calcsize(order + tag_format)
        tag, kind, values, value = struct.unpack_from(order + tag_format, data, position + index * size)
        if values == 1 and kind in _TIFF_FORMATS:
            (tags[tag],) = struct.unpack_from(order + _TIFF_FORMATS[kind], value)
    return tags
