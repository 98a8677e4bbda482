"""Reading and resizing images: MMDetection's pixels bit for bit, and errors that name a file that is no image."""

import io
import os
import socket
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from detector.image import read_image, read_image_size, resize_keep_ratio, resized_size, stack_images, write_image
from tests.detector.image_files import BOMBS, bmp, png
from tests.golden.fill import summary

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("index", range(4))
def test_decoded_pixels_equal_the_reference(golden, index):
    arrays, parameters = golden("preprocess")
    image = read_image(GOLDEN / parameters[f"full.{index}"]["file"])
    np.testing.assert_array_equal(image[..., ::-1], arrays[f"decoded.{index}.bgr"])


@pytest.mark.parametrize("group", ["full", "small"])
@pytest.mark.parametrize("index", range(4))
def test_resized_pixels_equal_the_reference(golden, group, index):
    arrays, parameters = golden("preprocess")
    case = parameters[f"{group}.{index}"]
    decoded = np.ascontiguousarray(arrays[f"decoded.{index}.bgr"][..., ::-1])
    image, factors = resize_keep_ratio(decoded, case["scale"])
    assert list(image.shape[:2]) == case["img_shape"]
    assert factors == tuple(case["scale_factor"])

    flipped = image[:, ::-1] if case["flip"] else image
    ours = summary(flipped[..., ::-1].transpose(2, 0, 1), 1024)
    name = f"{group}.{index}.resized_chw_uint8"
    np.testing.assert_array_equal(ours["samples"], arrays[f"{name}.samples"])
    np.testing.assert_array_equal(ours["stats"], arrays[f"{name}.stats"])


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((1, 5000), (1, 1333)), ((800, 1333), (800, 1333))],
)
def test_resized_size(size, expected):
    assert resized_size(*size, (1333, 800)) == resized_size(*size, (800, 1333)) == expected


def test_image_of_the_right_size_is_not_touched():
    image = np.random.randint(0, 256, (20, 30, 3), np.uint8)
    resized, factors = resize_keep_ratio(image, (30, 20))
    assert resized is image
    assert factors == (1, 1)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
def test_written_pictures_read_back(tmp_path, suffix):
    image = np.full((12, 17, 3), (200, 100, 30), np.uint8)
    write_image(tmp_path / f"höhe{suffix}", image)
    np.testing.assert_allclose(read_image(tmp_path / f"höhe{suffix}").astype(int), image, atol=3)


def test_unknown_picture_format_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot write image .*a\.xyz.*'\.xyz'"):
        write_image(tmp_path / "a.xyz", np.zeros((4, 4, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_orientation_gray_alpha_and_depth(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = read_image(tmp_path / "turned.jpg")
    assert turned.shape == (16, 8, 3)
    assert turned[:6].min() > 200
    assert turned[10:].max() < 50

    Image.fromarray(pixels[..., 0]).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(read_image(tmp_path / "gray.png"), pixels)
    Image.fromarray(np.dstack([pixels, pixels[..., :1] // 2])).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png"), pixels)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png"), pixels)


@pytest.mark.parametrize("name", ["land.jpg", "port.png"])
@pytest.mark.parametrize("keep", [0, 1, 3, 0.1, 0.5, 0.95])
def test_cut_off_image_is_named(tmp_path, name, keep):
    data = (GOLDEN / "images" / name).read_bytes()
    path = tmp_path / name
    length = int(keep * len(data)) if isinstance(keep, float) else keep  # a share, or bytes
    path.write_bytes(data[:length])
    with pytest.raises(ValueError, match="cannot read image") as error:
        read_image(path)
    assert str(path) in str(error.value)


def test_jpeg_cut_off_after_its_thumbnail_is_named(tmp_path):
    thumbnail = io.BytesIO()
    Image.new("RGB", (8, 8)).save(thumbnail, "jpeg")

    picture = io.BytesIO()
    pixels = np.random.randint(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(picture, "jpeg", comment=thumbnail.getvalue())

    path = tmp_path / "thumbnail.jpg"
    path.write_bytes(picture.getvalue())
    assert read_image(path).shape == (64, 64, 3)
    path.write_bytes(picture.getvalue()[:-500])
    with pytest.raises(ValueError, match="cut off"):
        read_image(path)


def test_text_file_missing_file_and_folder_are_named(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"cannot read image .*text\.jpg"):
        read_image(tmp_path / "text.jpg")
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg"):
        read_image(tmp_path / "absent.jpg")
    with pytest.raises(OSError, match=tmp_path.name):
        read_image(tmp_path)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ValueError, match=r"empty\.jpg: its 0 bytes"):
        read_image(tmp_path / "empty.jpg")


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_only_regular_files_are_read(tmp_path, kind):
    """A pipe without a writer would be waited for without end."""
    path = tmp_path / "a.jpg"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    for read in (read_image, read_image_size):
        with pytest.raises(OSError, match=r"a\.jpg"):
            read(path)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("x" * 20_000 + ".jpg", id="long"),
        pytest.param("a\0b.jpg", id="NUL"),
        pytest.param("a\ud800.jpg", id="surrogate"),
        pytest.param("", id="empty"),
        pytest.param("../no.jpg", id="dots"),
        pytest.param("/no/a.jpg", id="absolute"),
    ],
)
def test_odd_file_names_are_told_in_a_line(tmp_path, name):
    with pytest.raises((OSError, ValueError)) as error:
        read_image(tmp_path / name)
    message = str(error.value)
    assert len(message) < 500
    assert name[-6:] in message or ascii(name)[-7:-1] in message
    assert "\n" not in message


def test_sparse_file_is_not_read(tmp_path):
    path = tmp_path / "a.jpg"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match=r"a\.jpg: expected at most \d+ bytes, got 1099511627776"):
        read_image(path)


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_not_decoded(tmp_path, name, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(BOMBS[name])
    monkeypatch.setattr(cv2, "imdecode", None)
    with pytest.raises(ValueError, match=r"a\.png: expected at most 178956970 pixels .*, got 30000 x 20000"):
        read_image(path)


@pytest.mark.parametrize("chunk", [b"IHDR", b"IDAT", b"IEND"])
@pytest.mark.parametrize("length", [500, 2**28, 2**32 - 1])
def test_png_whose_chunk_is_longer_than_the_file_is_not_decoded(tmp_path, chunk, length, monkeypatch):
    """OpenCV takes the memory for the chunk before it looks at the file."""
    path = tmp_path / "a.png"
    data = png(8, 8)
    position = data.index(chunk)
    path.write_bytes(data[: position - 4] + length.to_bytes(4, "big") + data[position:])
    monkeypatch.delattr(cv2, "imdecode")
    with pytest.raises(ValueError, match=r"a\.png: the file is cut off after \d+ bytes"):
        read_image(path)


def test_limit_of_pixels_can_be_moved(tmp_path):
    write_image(tmp_path / "a.png", np.zeros((20, 30, 3), np.uint8))
    assert read_image(tmp_path / "a.png", max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(ValueError, match=r"at most 599 pixels .*--data\.max-pixels.*, got 30 x 20"):
        read_image(tmp_path / "a.png", max_pixels=599)


@pytest.mark.parametrize(
    "data", [png(40000, 40000), bmp(40000, 40000), b"P6\n40000 40000\n255\n"], ids=["png", "bmp", "ppm"]
)
def test_limit_of_opencv_is_one_line(tmp_path, data):
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"cannot read image .*a\.png: .*CV_IO_MAX_IMAGE_PIXELS") as error:
        read_image(path, max_pixels=1 << 62)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "start",
    [
        b"\x00\x00\x00\x18ftypmp42",
        b"\x00\x00\x00\x14ftypqt  ",
        b"\x00\x00\x00\x08wide",
        b"\x1a\x45\xdf\xa3",
        b"RIFF\x00\x00\x00\x00AVI ",
        b"\x00\x00\x01\xba",
        b"\x00\x00\x01\xb3",
        b"\x30\x26\xb2\x75",
        b"FLV\x01",
    ],
)
def test_videos_are_named(tmp_path, start):
    path = tmp_path / "clip"
    path.write_bytes(start + bytes(100))
    with pytest.raises(ValueError, match="expected an image, got a video: read its frames with cv2.VideoCapture"):
        read_image(path)


@pytest.mark.parametrize("start", [b"\x00\x00\x00\x18ftypheic", b"\x00\x00\x00\x18ftypavif", b"RIFF\0\0\0\0WEBPVP8 "])
def test_images_that_begin_as_videos_do_are_no_videos(tmp_path, start):
    path = tmp_path / "image"
    path.write_bytes(start + bytes(100))
    with pytest.raises(ValueError, match="cannot read image") as caught:
        read_image(path)
    assert "video" not in str(caught.value)


def test_stacked_images_are_padded_with_zeros():
    sizes = [(20, 70), (33, 32), (1, 45), (50, 1)]
    images = [np.random.randint(1, 256, (*size, 3), np.uint8) for size in sizes]
    stacked, stacked_sizes = stack_images(images)
    assert stacked.dtype == torch.uint8
    assert stacked.shape == (4, 3, 64, 96)
    assert stacked_sizes.tolist() == [list(size) for size in sizes]
    for padded, image in zip(stacked, images, strict=True):
        height, width = image.shape[:2]
        np.testing.assert_array_equal(padded[:, :height, :width].permute(1, 2, 0), image)
        assert not padded[:, height:].any()
        assert not padded[:, :, width:].any()
