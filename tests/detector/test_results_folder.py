"""The folder of results: only files of earlier predictions are replaced, and only by results of the same image."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from detector.image import read_image, write_image
from detector.results_folder import ResultsFolder

PICTURE = np.full((8, 8, 3), 128, np.uint8)
ROW = {
    "image_id": 1,
    "file_name": 'a "b".png',
    "category_id": 1,
    "category_name": "cat",
    "bbox": [0.0, 1.0, 2.0, 3.0],
    "score": 0.5,
}


@pytest.fixture
def image(tmp_path):
    """An image file outside the folder of results."""
    path = tmp_path / "images" / "a.png"
    path.parent.mkdir()
    write_image(path, PICTURE)
    return path


def write_again(out, *images):
    """Write pictures as one prediction does; return the names in the folder and their bytes."""
    out.mkdir(exist_ok=True)
    folder = ResultsFolder(out, images)
    folder.check()
    for image in images:
        folder.write_picture(image, PICTURE)
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_pictures_are_found_again(tmp_path, image):
    out = tmp_path / "out"
    others = [tmp_path / "A.png", tmp_path / "images" / "a.bmp"]
    for other in others:
        write_image(other, PICTURE)
    first = write_again(out, image, *others)
    assert sorted(first) == ["A-2.jpg", "a-3.jpg", "a.jpg"]
    assert write_again(out, image, *others) == first
    assert write_again(out, image) == first
    assert sorted(write_again(out, others[0])) == ["A-2.jpg", "A.jpg", "a-3.jpg", "a.jpg"]  # its first name was free
    assert read_image(out / "a.jpg").shape == PICTURE.shape


def changed(path, image):
    path.write_bytes(path.read_bytes() + b"a note of mine")


def drawn_over(path, image):
    write_image(path, read_image(path))


def of_somebody_else(path, image):
    path.write_bytes(image.read_bytes())


def empty(path, image):
    path.write_bytes(b"")


def link(path, image):
    path.unlink()
    path.symlink_to(image)


def dead_link(path, image):
    path.unlink()
    path.symlink_to(image.parent / "absent.png")


def folder(path, image):
    path.unlink()
    path.mkdir()


def pipe(path, image):
    path.unlink()
    os.mkfifo(path)


def hard_link(path, image):
    path.unlink()
    path.hardlink_to(image)


@pytest.mark.parametrize(
    "replace", [changed, drawn_over, of_somebody_else, empty, link, dead_link, folder, pipe, hard_link]
)
def test_other_files_keep_their_names(tmp_path, image, replace):
    out = tmp_path / "out"
    write_again(out, image)
    replace(out / "a.jpg", image)
    status = (out / "a.jpg").lstat()
    image_bytes = image.read_bytes()
    assert "a-2.jpg" in write_again(out, image)
    assert (out / "a.jpg").lstat() == status
    assert image.read_bytes() == image_bytes
    assert not (image.parent / "absent.png").exists()
    assert set(os.listdir(out)) == {"a.jpg", "a-2.jpg"}


def test_pictures_that_are_images_are_kept(tmp_path, image):
    out = tmp_path / "out"
    write_again(out, image)
    picture = (out / "a.jpg").read_bytes()
    assert sorted(write_again(out, image, out / "a.jpg")) == ["a-2.jpg", "a-3.jpg", "a.jpg"]
    assert (out / "a.jpg").read_bytes() == picture


@pytest.mark.parametrize("rows", [[], [ROW], [ROW | {"segmentation": {"size": [1, 1], "counts": "1"}}] * 3])
def test_results_of_predictions_are_replaced(tmp_path, rows):
    folder = ResultsFolder(tmp_path, [])
    folder.check()
    folder.write_results(rows)
    folder.check()
    folder.write_results([ROW])
    assert json.loads(folder.results.read_text()) == [ROW]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "notes",
        "{}",
        "[1]",
        '{"images": [], "annotations": [], "categories": []}',
        '[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]',
        '[{"image_id": 1, "file_name": "a", "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]',
    ],
)
def test_other_files_of_that_name_are_kept(tmp_path, text):
    (tmp_path / "detections.json").write_text(text)
    with pytest.raises(ValueError, match=r"--out: .*detections\.json was not written by a prediction and is kept"):
        ResultsFolder(tmp_path, []).check()


def test_links_and_folders_of_that_name_are_kept(tmp_path):
    for number, make in enumerate([lambda path: path.symlink_to("absent"), Path.mkdir, os.mkfifo]):
        out = tmp_path / str(number)
        out.mkdir()
        make(out / "detections.json")
        with pytest.raises(ValueError, match="was not written by a prediction and is kept"):
            ResultsFolder(out, []).check()
