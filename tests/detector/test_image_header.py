"""Sizes from headers: those of the decoded image, in every format and orientation; None for what is no header."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from detector.image_header import seen_size, stored_size
from tests.conftest import GOLDEN
from tests.detector.image_files import BOMBS

OPTIONS = {
    "JPEG": {},
    "JPEG, progressive": {"progressive": True},
    "JPEG, CMYK": {"mode": "CMYK"},
    "MPO": {},
    "PNG": {},
    "PNG, palette": {"mode": "P"},
    "PNG, 16 bit": {"mode": "I;16"},
    "WEBP": {},
    "WEBP, lossless": {"lossless": True},
    "WEBP, alpha": {"mode": "RGBA"},
    "TIFF": {},
    "TIFF, compressed": {"compression": "tiff_lzw"},
    "TIFF, big": {"big_tiff": True},
    "GIF": {},
    "BMP": {},
    "JPEG2000": {},
    "PPM": {},
    "PPM, gray": {"mode": "L"},
    "AVIF": {},
}


def encode(name: str, size: tuple[int, int], **more: object) -> bytes:
    """Return a file of `size` (height, width)."""
    options = OPTIONS[name] | more
    mode = options.pop("mode", "RGB")
    file = io.BytesIO()
    height, width = size
    Image.new(mode, (width, height)).save(file, name.split(",")[0], **options)
    return file.getvalue()


def decoded_size(data: bytes) -> tuple[int, ...]:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).shape[:2]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", [(8, 16), (300, 7), (1, 1)])
def test_size_is_that_of_the_decoded_image(name, size):
    data = encode(name, size)
    assert stored_size(data) == seen_size(data) == decoded_size(data) == size


@pytest.mark.parametrize("name", ["JPEG", "MPO", "PNG", "WEBP", "WEBP, lossless", "TIFF", "TIFF, big", "JPEG2000"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_where_opencv_applies_it(name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(name, (8, 16), exif=exif)
    assert stored_size(data) == (8, 16)
    assert seen_size(data) == decoded_size(data)


@pytest.mark.parametrize("name", ["GIF", "WEBP"])
def test_animation_has_the_size_of_its_first_picture(name):
    data = encode(name, (8, 16), save_all=True, append_images=[Image.new("RGB", (16, 8), "red")])
    assert seen_size(data) == decoded_size(data) == (8, 16)


@pytest.mark.parametrize("name", ["land.jpg", "port.png"])
def test_beginning_of_a_file_is_enough(name):
    data = (GOLDEN / "images" / name).read_bytes()
    assert stored_size(data[:1000]) == decoded_size(data)


def test_size_that_differs_from_the_box_around_a_code_stream():
    """The decoder allocates what the code stream says."""
    data = encode("JPEG2000", (8, 16))
    position = data.index(b"ihdr") + 4
    lying = data[:position] + bytes([0, 0, 0, 1, 0, 0, 0, 1]) + data[position + 8 :]
    assert stored_size(lying) == (8, 16)


@pytest.mark.parametrize("name", BOMBS)
def test_no_beginning_of_a_header_is_an_error(name):
    data = BOMBS[name]
    for length in range(min(len(data), 300)):
        # The AVIF has a small part before the whole.
        assert seen_size(data[:length]) in (None, (64, 64), (20000, 30000))


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff", b"text", b"RIFF....WEBP", b"II*\0\xff\xff\xff\xff", bytes(64)]
)
def test_no_header(data):
    assert stored_size(data) is None
    assert seen_size(data) is None


def test_random_bytes_are_no_error():
    random = np.random.default_rng(0)
    for name in BOMBS:
        for _ in range(50):
            damaged = bytearray(BOMBS[name])
            for position in random.integers(4, len(damaged), 5):
                damaged[position] = random.integers(256)
            seen_size(bytes(damaged))
