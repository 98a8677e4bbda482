"""`model.predict`: images of every kind, one or many, and what comes back."""

import copy
import io
import json
import pickle
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import detector
from detector import Detections, FasterRCNN, ImageDetections
from detector.draw import class_color
from detector.image import read_image, to_pixels, write_image
from detector.inference import for_inference
from detector.predict import predict_images
from detector.weights.checkpoint import save_weights
from tests.detector.small_config import small_config

CLASSES = ("disc", "ring", "star")
PIXELS = np.random.default_rng(0).integers(0, 256, (50, 80, 3), np.uint8)
FAR_TOO_LONG = 10_000


@pytest.fixture(scope="module")
def model():
    """A small detector that finds ten objects everywhere."""
    torch.manual_seed(3)
    config = small_config(dcn=None, norm="bn", fpn_channels=16)
    model = FasterRCNN(config).eval()
    model.class_names = CLASSES
    return model


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    write_image(path, PIXELS)
    return path


def some_detections(count, image=PIXELS, **options):
    """Return detections whose boxes are side by side in the image."""
    left = 10.0 * torch.arange(count)
    boxes = torch.stack([left, torch.full_like(left, 20), left + 8, torch.full_like(left, 40)], 1)
    return ImageDetections(
        boxes=boxes,
        scores=torch.linspace(0.9, 0.5, count),
        labels=torch.arange(count) % 3,
        image=image,
        size=(50, 80),
        class_names=CLASSES,
        **options,
    )


def assert_same(found, expected):
    assert len(expected) == 10
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.labels, expected.labels)


def test_every_kind_of_image_gives_the_same(model, photo):
    expected = model.predict(PIXELS, score=0)
    assert expected.size == (50, 80)
    kinds = {
        "path": photo,
        "str": str(photo),
        "opencv": cv2.imread(str(photo))[..., ::-1],
        "read-only": np.frombuffer(PIXELS.tobytes(), np.uint8).reshape(PIXELS.shape),
        "pil": Image.open(photo),
        "tensor": torch.from_numpy(PIXELS).permute(2, 0, 1),
    }
    for image in kinds.values():
        found = model.predict(image, score=0)
        assert_same(found, expected)
        assert found.image is image
    for images in (list(kinds.values()), tuple(kinds.values())):
        results = model.predict(images, score=0)
        assert isinstance(results, list)
        assert len(results) == len(kinds)
        for found in results:
            assert_same(found, expected)
    for found in predict_images(model, iter(kinds.values()), score=0):
        assert_same(found, expected)
    assert model.predict([]) == []


def test_boxes_are_in_pixels_of_the_image(model):
    large = cv2.resize(PIXELS, (1600, 1000))
    expected = model.predict(PIXELS, score=0)
    found = model.predict(large, score=0)
    assert found.size == (1000, 1600)
    assert found.boxes.max() > 500
    assert expected.boxes.max() <= 80.001


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes_of_pil_become_rgb(mode):
    image = Image.fromarray(PIXELS).convert(mode)
    np.testing.assert_array_equal(to_pixels(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_pil_images_are_read_as_their_files(tmp_path, mode, orientation):
    path = tmp_path / "photo.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).convert(mode).save(path, exif=exif)
    np.testing.assert_array_equal(to_pixels(Image.open(path)), read_image(path))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("absent.jpg", FileNotFoundError, "No such file or directory: 'absent.jpg'"),
        (np.zeros((4, 4), np.uint8), ValueError, "images: expected (H, W, 3) uint8 RGB, got (4, 4) uint8"),
        (np.zeros((4, 4, 4), np.uint8), ValueError, "images: expected (H, W, 3) uint8 RGB, got (4, 4, 4) uint8"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "images: expected (H, W, 3) uint8 RGB, got (0, 4, 3) uint8"),
        (np.zeros((3, 4, 4), np.uint8), ValueError, "images: expected (H, W, 3) uint8 RGB, got (3, 4, 4) uint8"),
        (np.zeros((2, 4, 4, 3), np.uint8), ValueError, "uint8; list(images) makes a list of a stack"),
        (np.zeros((4, 4, 3)), ValueError, "(4, 4, 3) float64; give the pixels in 0..255, before any normalization"),
        (
            torch.zeros(3, 4, 4),
            ValueError,
            "images: expected a tensor (3, H, W) uint8 RGB, got (3, 4, 4) torch.float32; give the pixels in 0..255",
        ),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), ValueError, "got (4, 4, 3) torch.uint8"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ValueError, "torch.uint8; list(images) makes a list of a stack"),
        (Image.new("I;16", (4, 4)), ValueError, "images: expected a PIL image of 8 bits, got mode I;16; give its path"),
        (Image.new("F", (4, 4)), ValueError, "images: expected a PIL image of 8 bits, got mode F; give its path"),
        (b"a.jpg", TypeError, "images: expected a path, a NumPy array, a PIL image or a tensor, got bytes"),
        (None, TypeError, "got NoneType"),
        (iter(["a.jpg"]), TypeError, "got list_iterator; list(images) makes a list of an iterator"),
        ([PIXELS, [PIXELS]], TypeError, "images[1]: expected a path, a NumPy array, a PIL image or a tensor, got list"),
        ([PIXELS, PIXELS[0]], ValueError, "images[1]: expected (H, W, 3) uint8 RGB, got (80, 3) uint8"),
    ],
)
def test_what_is_no_image_is_named(model, image, error, message):
    with pytest.raises(error, match=re.escape(message)):
        model.predict(image)


@pytest.mark.parametrize("image", ["a.jpg", Path("a.jpg"), PIXELS, Image.new("RGB", (4, 4)), torch.zeros(3, 4, 4)])
def test_one_image_is_no_iterable_of_images(model, image):
    with pytest.raises(TypeError, match="images: expected an iterable of images, got one image; model.predict takes"):
        predict_images(model, image)


@pytest.mark.parametrize("score", [1.5, -0.1, float("nan")])
def test_scores_are_probabilities(model, score):
    for predict in (model.predict, lambda images, **options: predict_images(model, images, **options)):
        with pytest.raises(ValueError, match=f"score: expected 0 to 1, got {score}"):
            predict([], score=score)


def test_other_wrong_arguments_are_named(model):
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        model.predict(PIXELS, batch_size=0)
    with pytest.raises(ValueError, match="model: expected evaluation mode, got training mode"):
        copy.deepcopy(model).train().predict(PIXELS)
    other = copy.deepcopy(model)
    other.class_names = ["disc"]
    with pytest.raises(ValueError, match="class_names: expected 3, one per class, got 1"):
        other.predict(PIXELS)


def test_a_stream_is_read_when_its_batch_begins(model):
    read = []

    def frames():
        while True:
            read.append(len(read))
            yield PIXELS

    results = predict_images(model, frames(), score=0, batch_size=2)
    assert read == []
    assert len(next(results)) == len(next(results)) == 10
    assert len(read) == 2


def test_frames_of_a_video(model, tmp_path):
    """The loop of docs/detector.md."""
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (80, 50))
    for _ in range(3):
        writer.write(PIXELS[..., ::-1])
    writer.release()

    counts = []
    video = cv2.VideoCapture(str(tmp_path / "clip.avi"))
    while True:
        is_read, frame = video.read()
        if not is_read:
            break
        found = model.predict(frame[..., ::-1], score=0)
        counts.append(len(found))
    assert counts == [10, 10, 10]


def test_names_come_from_the_file_and_travel_with_the_model(model, tmp_path):
    save_weights(tmp_path / "model.safetensors", model, ["a", "b", "c"])
    loaded, names = detector.load(tmp_path / "model.safetensors", "cpu")
    for same in (loaded, copy.deepcopy(loaded), for_inference(loaded), pickle.loads(pickle.dumps(loaded))):
        assert same.class_names == ("a", "b", "c")
        assert same.predict(PIXELS, score=0).class_names == ("a", "b", "c")
    assert names == ["a", "b", "c"]
    assert not any("class_names" in name for name in loaded.state_dict())

    nameless = FasterRCNN(model.config).eval()
    assert set(nameless.predict(PIXELS, score=0).names) <= {"class 0", "class 1", "class 2"}


def test_objects_are_picked():
    masks = torch.rand(4, 28, 28)
    found = some_detections(4, masks=masks)
    assert found.names == ["disc", "ring", "star", "disc"]
    for index, rows in [
        (0, [0]),
        (-1, [3]),
        (np.int64(2), [2]),
        (slice(1, 3), [1, 2]),
        (found.labels == 0, [0, 3]),
        (found.scores.numpy() > 0.6, [0, 1, 2]),
        ([name == "ring" for name in found.names], [1]),
        ([3, 0], [3, 0]),
        (torch.tensor([], dtype=torch.int64), []),
        ([], []),
    ]:
        picked = found[index]
        assert type(picked) is ImageDetections
        assert len(picked) == len(rows)
        assert picked.image is found.image
        for name in ("boxes", "scores", "labels", "masks"):
            assert torch.equal(getattr(picked, name), getattr(found, name)[rows])
    assert [one.names for one in found] == [["disc"], ["ring"], ["star"], ["disc"]]
    for index in (4, -5):
        with pytest.raises(IndexError):
            found[index]
    plain = Detections(found.boxes, found.scores, found.labels)[1:]
    assert type(plain) is Detections
    assert plain.masks is None
    assert not some_detections(0)


def test_rows_are_cocos():
    found = some_detections(2)
    rows = found.to_coco(image_id=7, category_ids=[10, 20, 30])
    assert json.loads(json.dumps(rows)) == [
        {"image_id": 7, "category_id": 10, "bbox": [0.0, 20.0, 8.0, 20.0], "score": pytest.approx(0.9)},
        {"image_id": 7, "category_id": 20, "bbox": [10.0, 20.0, 8.0, 20.0], "score": 0.5},
    ]
    assert [row["category_id"] for row in found.to_coco()] == [1, 2]
    assert [row["image_id"] for row in found.to_coco()] == [1, 1]
    assert some_detections(0).to_coco() == []
    with pytest.raises(ValueError, match="category_ids: expected 3, one per class, got 2"):
        found.to_coco(category_ids=[1, 2])


def test_small_images_are_enlarged_before_drawing():
    gray = np.full((50, 80, 3), 77, np.uint8)
    masks = torch.ones(1, 28, 28)
    for found in (some_detections(1, image=gray), some_detections(1, image=gray, masks=masks)):
        picture = found.draw()
        assert picture.shape == (400, 640, 3)  # 8 times as large
        assert tuple(picture[240, 64]) == class_color(0)
        tinted = (0.6 * 77 + 0.4 * np.array(class_color(0))).astype(np.uint8)
        expected = (77, 77, 77) if found.masks is None else tinted
        np.testing.assert_array_equal(picture[240, 32], expected)
        assert found.draw(min_side=0).shape == (50, 80, 3)
    assert (gray == 77).all()


def test_pictures_are_saved_and_shown(photo, tmp_path):
    found = some_detections(3, image=photo)
    found.save(tmp_path / "found.png")
    np.testing.assert_array_equal(read_image(tmp_path / "found.png"), found.draw())
    shown = np.asarray(Image.open(io.BytesIO(found._repr_jpeg_())))
    assert shown.shape == (400, 640, 3)

    before = photo.read_bytes()
    (tmp_path / "link.png").symlink_to(photo)
    opened = some_detections(3, image=Image.open(photo))
    for result, path in ((found, photo), (found, str(photo)), (found, tmp_path / "link.png"), (opened, photo)):
        with pytest.raises(ValueError, match="path: expected another file than the image, got "):
            result.save(path)
    assert photo.read_bytes() == before
    with pytest.raises(ValueError, match="no encoder for suffix '.txt'"):
        found.save(tmp_path / "found.txt")


def test_a_result_is_short_in_print():
    assert repr(some_detections(2)) == "<ImageDetections 2 in 80 x 50 pixels: disc 0.90, ring 0.50>"
    assert repr(some_detections(0)) == "<ImageDetections 0 in 80 x 50 pixels>"
    many = some_detections(100)
    assert repr(many).endswith(" and 90 more>")
    odd = ImageDetections(
        boxes=many.boxes[:1],
        scores=many.scores[:1],
        labels=many.labels[:1],
        image=PIXELS,
        size=(50, 80),
        class_names=["\x1b[2J" * FAR_TOO_LONG],
    )
    assert repr(odd).isprintable()
    assert len(repr(odd)) < 200


def test_results_travel(model, photo):
    found = model.predict(photo, score=0)
    for same in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert_same(same, found)
        assert same.names == found.names
        np.testing.assert_array_equal(same.draw(), found.draw())
