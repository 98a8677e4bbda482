"""Reading and resizing images: MMDetection's pixels bit for bit, and errors that name a file that is no image."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detector.image import read_image, resize_keep_ratio, resized_size, stack_images, write_image
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
