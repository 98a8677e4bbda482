"""Prediction: original pixels, names that do not collide, broken images that do not stop the others."""

import json
import os
import pkgutil
import runpy
import signal
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from detector import FasterRCNN
from detector.image import read_image, resize_keep_ratio, stack_images, write_image
from detector.ops.paste_masks import paste_masks
from detector.ops.rle import encode_mask
from detector.predict import find_images, main, predict_images
from detector.results import full_masks
from detector.structures import Batch
from detector.weights.checkpoint import save_weights
from tests.detector.small_config import small_config

CLASSES = ["disc", "ring", "star"]


@pytest.fixture(scope="module")
def model():
    """A small detector that finds something everywhere."""
    torch.manual_seed(3)
    return FasterRCNN(small_config(dcn=None)).eval()


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_weights(path, model, CLASSES)
    return path


@pytest.fixture
def photos(tmp_path):
    """A folder with images of several sizes; two differ in the suffix alone, two in the folder alone."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    sizes = {"a.png": (50, 80), "a.bmp": (64, 64), "b.jpg": (120, 40), "more/b.jpg": (30, 30)}
    for name, (height, width) in sizes.items():
        write_image(folder / name, random.integers(0, 256, (height, width, 3), np.uint8))
    (folder / "notes.txt").write_text("not an image")
    return folder


def run(weights, out, *images, **options):
    """Run the command on the CPU and return its exit status; `options` are more flags."""
    arguments = [str(image) for image in images]
    flags = {"weights": weights, "out": out, "device": "cpu"} | options
    for name, value in flags.items():
        arguments += [f"--{name}", str(value)]
    return main(arguments)


def read_results(out):
    return json.loads((out / "detections.json").read_text())


def test_boxes_are_in_original_pixels(model):
    image = np.random.default_rng(1).integers(0, 256, (250, 400, 3), np.uint8)
    (detections,) = predict_images(model, [image], score=0.0)
    resized, factors = resize_keep_ratio(image, model.config.image_scale)
    (expected,) = model(Batch(*stack_images([resized])))
    assert len(detections.labels) == 10
    torch.testing.assert_close(detections.boxes * torch.tensor(factors * 2), expected.boxes)
    assert torch.equal(detections.scores, expected.scores)
    assert detections.boxes[:, 2].max() <= 400.001
    assert detections.boxes[:, 3].max() > resized.shape[0]  # not in resized pixels


def test_score_threshold_and_order_of_results(model, photos):
    files = sorted(photos.glob("*.[bjp]*"))
    unfiltered = list(predict_images(model, files, score=0.0))
    assert len(unfiltered) == 3
    threshold = float(torch.cat([detections.scores for detections in unfiltered]).median())
    filtered = list(predict_images(model, files, score=threshold))
    for kept, detections in zip(filtered, unfiltered, strict=True):
        keep = detections.scores >= threshold
        torch.testing.assert_close(kept.boxes, detections.boxes[keep])
        assert torch.equal(kept.labels, detections.labels[keep])


def test_batches_of_equal_images_give_what_single_images_give(model):
    images = list(np.random.default_rng(2).integers(0, 256, (3, 64, 96, 3), np.uint8))
    single = predict_images(model, images, score=0.0)
    batched = predict_images(model, images, score=0.0, batch_size=2)
    for alone, together in zip(single, batched, strict=True):
        assert len(alone) == 10
        torch.testing.assert_close(alone.boxes, together.boxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(alone.scores, together.scores, rtol=1e-4, atol=1e-5)


def test_wrong_arguments_are_named(model):
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        predict_images(model, [], batch_size=0)
    images = [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)]
    with pytest.raises(ValueError, match=r"images\[1\]: expected \(H, W, 3\) uint8 RGB, got \(4, 4\) uint8"):
        list(predict_images(model, images))
    with pytest.raises(ValueError, match="model: expected evaluation mode"):
        predict_images(FasterRCNN(model.config).train(), [])


def test_masks(tmp_path, photos):
    model = FasterRCNN(small_config(dcn=None, mask=True)).eval()
    detections = model.predict(photos / "b.jpg", score=0.0)
    assert detections.masks.shape == (10, 28, 28)
    masks = list(full_masks(detections, 120, 40))
    expected = paste_masks(detections.masks, detections.boxes, 120, 40).numpy()
    np.testing.assert_array_equal(np.stack(masks), expected)

    weights = tmp_path / "model.safetensors"
    out = tmp_path / "out"
    save_weights(weights, model, CLASSES)
    assert run(weights, out, photos / "b.jpg", score=0.0) == 0
    segmentations = [result["segmentation"] for result in read_results(out)]
    assert segmentations == [encode_mask(mask) for mask in expected]
    assert [row["segmentation"] for row in detections.to_coco()] == segmentations


def test_find_images(photos, monkeypatch):
    monkeypatch.chdir(photos)
    names = ["a.bmp", "a.png", "b.jpg"]
    assert find_images(["."]) == ([Path(name) for name in names], [])
    assert find_images(["b.jpg", str(photos)])[0] == [Path("b.jpg"), photos / "a.bmp", photos / "a.png"]
    assert find_images(["**/*.jpg"]) == ([Path("b.jpg"), Path("more/b.jpg")], [])
    (photos / "empty").mkdir()
    (photos / "odd[1].png").write_bytes((photos / "a.png").read_bytes())
    assert find_images(["odd[1].png"]) == ([Path("odd[1].png")], [])
    (photos / "clips").mkdir()
    (photos / "clips" / "a.MP4").touch()
    assert find_images(["empty", "clips", "*.gif"]) == (
        [],
        [
            "no images in folder empty",
            "no images in folder clips; the frames of its videos are not read",
            "no file *.gif",
        ],
    )


def test_pictures_and_results(weights, photos, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert run(weights, out, photos, photos / "more", score=0.0, batch_size=2) == 0
    assert sorted(file.name for file in out.iterdir()) == ["a-2.jpg", "a.jpg", "b-2.jpg", "b.jpg", "detections.json"]

    results = read_results(out)
    assert len(results) == 40
    for result in results:
        assert result["category_name"] == CLASSES[result["category_id"] - 1]
        height, width = read_image(result["file_name"]).shape[:2]
        x, y, w, h = result["bbox"]
        assert x >= 0
        assert y >= 0
        assert x + w <= width + 1e-3
        assert y + h <= height + 1e-3

    files = [photos / "a.bmp", photos / "a.png", photos / "b.jpg", photos / "more" / "b.jpg"]
    numbered_files = {(result["image_id"], result["file_name"]) for result in results}
    assert numbered_files == {(number, str(file)) for number, file in enumerate(files, 1)}
    shapes = [read_image(out / name).shape for name in ["a.jpg", "a-2.jpg", "b.jpg", "b-2.jpg"]]
    assert shapes == [(640, 640, 3), (400, 640, 3), (640, 213, 3), (640, 640, 3)]  # small ones are enlarged
    assert "40 detections in 4 images" in capsys.readouterr().out


def test_inputs_are_never_overwritten(weights, photos):
    before = {file: file.read_bytes() for file in photos.iterdir() if file.is_file()}
    assert run(weights, photos, photos / "b.jpg", photos / "a.png", score=0.0) == 0
    assert {file: file.read_bytes() for file in before} == before
    assert (photos / "b-2.jpg").exists()
    assert (photos / "a.jpg").exists()


def test_links_to_inputs_are_not_overwritten(weights, photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "b.jpg").symlink_to(photos / "b.jpg")
    before = (photos / "b.jpg").read_bytes()
    assert run(weights, out, photos / "b.jpg", score=0.0) == 0
    assert (photos / "b.jpg").read_bytes() == before
    assert (out / "b-2.jpg").exists()


def test_the_same_command_again_replaces_what_it_wrote(weights, photos):
    photo = photos / "a.png"
    neighbor = photos / "a.jpg"
    neighbor.write_bytes(b"not an input")
    before = {file: file.read_bytes() for file in photos.iterdir() if file.is_file()}
    assert run(weights, photos, photo, photo.with_suffix(".bmp"), score=0.0) == 0
    names = {file.name for file in photos.iterdir()}
    assert names - {file.name for file in before} == {"more", "a-2.jpg", "a-3.jpg", "detections.json"}
    picture = (photos / "a-2.jpg").read_bytes()

    assert run(weights, photos, photo, photo.with_suffix(".bmp"), score=0.9999) == 0
    assert {file.name for file in photos.iterdir()} == names
    assert (photos / "a-2.jpg").read_bytes() != picture
    assert {file: file.read_bytes() for file in before} == before


def test_pictures_among_the_images_are_no_images(weights, photos, capsys):
    assert run(weights, photos, photos, score=0.0) == 0
    names = {file.name for file in photos.iterdir()}
    results = read_results(photos)
    assert run(weights, photos, photos, score=0.0) == 0
    assert {file.name for file in photos.iterdir()} == names
    assert read_results(photos) == results
    assert find_images([str(photos / "a*.jpg")]) == ([], [f"no file {photos / 'a*.jpg'}"])
    assert find_images([str(photos / "a.jpg")]) == ([photos / "a.jpg"], [])


def test_a_picture_that_cannot_be_written_stops_nothing(weights, photos, tmp_path, capsys):
    long_name = photos / ("n" * 251 + ".png")  # with a number behind it the name of its picture is too long
    long_name.write_bytes((photos / "a.png").read_bytes())
    out = tmp_path / "out"
    (out / ("n" * 251 + ".jpg")).mkdir(parents=True)
    assert run(weights, out, long_name, photos / "b.jpg", score=0.0) == 1
    assert "nnn-2.jpg: File name too long" in capsys.readouterr().err
    assert len(read_results(out)) == 20
    assert (out / "b.jpg").exists()


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "error: stopped by Ctrl-C after 2 of 3 images\n"),
        (RuntimeError("CUDA error:\n out of luck"), 1, "error: stopped after 2 of 3 images: CUDA error: out of luck\n"),
        (MemoryError(), 1, "error: stopped after 2 of 3 images: MemoryError\n"),
    ],
)
def test_what_was_found_is_written_whatever_happens(
    weights, photos, tmp_path, monkeypatch, capsys, error, status, message
):
    calls = iter([None, None, error])

    def failing(model, images, **options):
        failure = next(calls)
        if failure:
            raise failure
        return predict_images(model, images, **options)

    monkeypatch.setattr("detector.predict.predict_images", failing)
    assert run(weights, tmp_path / "out", photos / "absent.png", photos, score=0.0) == status
    assert len(read_results(tmp_path / "out")) == 20
    captured = capsys.readouterr()
    assert captured.err.endswith(message)
    assert "no file" in captured.err
    assert "20 detections in 2 images" in captured.out


def test_nothing_read_or_found_keeps_earlier_results(weights, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(weights, out, photos, score=0.0) == 0
    earlier = read_results(out)
    (photos / "broken.jpg").write_bytes(b"broken")
    assert run(weights, out, photos / "broken.jpg", score=0.0) == 1
    assert read_results(out) == earlier

    for inputs in [(photos / "b.jpg", photos / "broken.jpg"), (photos / "b.jpg", photos / "absent.jpg")]:
        assert run(weights, out, *inputs, score=1.0) == 1
        assert read_results(out) == earlier
        assert f"{out / 'detections.json'} of an earlier prediction is kept" in capsys.readouterr().err

    assert run(weights, out, photos / "b.jpg", score=1.0) == 0  # nothing is there, and nothing went wrong
    assert read_results(out) == []


@pytest.fixture
def pythons_sigint():
    """Ctrl-C as Python handles it, whatever started the tests."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("moment", ["load", "image_rows", "write_picture", "write_results"])
def test_ctrl_c_again_and_again_loses_nothing(weights, photos, tmp_path, monkeypatch, capsys, moment, pythons_sigint):
    """Once in the function that is named, and again while the results are written."""
    names = {
        "load": "detector.predict.load",
        "image_rows": "detector.predict.image_rows",
        "write_picture": "detector.predict.ResultsFolder.write_picture",
        "write_results": "detector.predict._write_results",
    }
    calls = []

    def press(name, function):
        def with_ctrl_c(*arguments, **options):
            calls.append(name)
            if name == moment or (moment in calls and name == "write_results"):
                os.kill(os.getpid(), signal.SIGINT)
            return function(*arguments, **options)

        return with_ctrl_c

    for name, path in names.items():
        monkeypatch.setattr(path, press(name, pkgutil.resolve_name(path)))
    out = tmp_path / "out"
    status = run(weights, out, photos, score=0.0)
    captured = capsys.readouterr()
    done = {"load": None, "image_rows": None, "write_picture": 1, "write_results": 3}[moment]
    assert status == (0 if moment == "write_results" else 130)
    if done is None:
        assert not (out / "detections.json").exists()
    else:
        assert len({row["image_id"] for row in read_results(out)}) == done
    position = {"load": "", "image_rows": " after 0 of 3 images", "write_picture": " after 1 of 3 images"}
    if status:
        assert captured.err.endswith(f"error: stopped by Ctrl-C{position[moment]}\n")


def test_results_that_cannot_be_written_hide_no_message(weights, photos, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError("cannot write detections.json: No space left on device")

    monkeypatch.setattr("detector.predict.ResultsFolder.write_results", fail)
    assert run(weights, tmp_path / "out", photos / "absent.png", photos / "b.jpg") == 1
    assert capsys.readouterr().err == (
        f"error: no file {photos / 'absent.png'}\nerror: cannot write detections.json: No space left on device\n"
    )


def test_results_of_somebody_else_are_kept(weights, photos, capsys):
    (photos / "detections.json").write_text('{"images": []}')
    assert run(weights, photos, photos / "b.jpg") == 1
    assert capsys.readouterr().err == (
        f"error: --out: {photos / 'detections.json'} was not written by a prediction and is kept; take another folder\n"
    )
    assert (photos / "detections.json").read_text() == '{"images": []}'


def test_broken_images_are_named_and_the_others_done(weights, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes((photos / "b.jpg").read_bytes()[:500])
    out = tmp_path / "out"
    assert run(weights, out, photos, photos / "absent.jpg", score=0.0, batch_size=4) == 1
    assert {file.name for file in out.iterdir()} == {"a.jpg", "a-2.jpg", "b.jpg", "detections.json"}

    captured = capsys.readouterr()
    assert f"no file {photos / 'absent.jpg'}" in captured.err
    assert f"cannot read image {photos / 'broken.jpg'}" in captured.err
    assert "30 detections in 3 images" in captured.out

    numbers = {result["file_name"]: result["image_id"] for result in read_results(out)}
    assert numbers == {str(photos / "a.bmp"): 1, str(photos / "a.png"): 2, str(photos / "b.jpg"): 3}


def test_videos_are_named(weights, photos, tmp_path, capsys):
    video = photos / "clip.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 64))
    for _ in range(2):
        writer.write(np.zeros((64, 64, 3), np.uint8))
    writer.release()
    assert run(weights, tmp_path / "out", video, photos / "b.jpg") == 1
    assert capsys.readouterr().err.endswith(
        f"error: cannot read image {video}: expected an image, got a video: read its frames with cv2.VideoCapture\n"
    )
    assert run(weights, tmp_path / "out", photos, score=0.0) == 0  # in a folder it is no image


def test_nothing_to_do_is_an_error(weights, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(weights, out, tmp_path / "absent.jpg") == 1
    assert f"error: no file {tmp_path / 'absent.jpg'}" in capsys.readouterr().err
    assert run(weights, out, tmp_path / "absent.jpg", batch_size=0) == 1
    assert "error: --batch-size: expected at least 1, got 0" in capsys.readouterr().err
    for score in ("1.5", "-0.1", "nan"):
        assert run(weights, out, Path(__file__), score=score) == 1
        assert f"error: --score: expected 0 to 1, got {score}" in capsys.readouterr().err
    assert run(tmp_path / "lost.pt", out, Path(__file__)) == 1
    assert "lost.pt" in capsys.readouterr().err
    assert not out.exists()


def test_module_is_a_command(weights, photos, tmp_path, monkeypatch):
    arguments = [photos / "b.jpg", "--weights", weights, "--out", tmp_path, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    monkeypatch.delitem(sys.modules, "detector.predict")
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("detector.predict", run_name="__main__", alter_sys=True)
    assert exit_.value.code == 0
    assert (tmp_path / "b.jpg").exists()
    assert (tmp_path / "detections.json").exists()
