import numpy as np
import pytest

from detector.image import read_image
from detector.results import coco_rows
from tests.train.data.datasets import edit, open_coco
from train.evaluation.pictures import draw_pictures, unique_stems


def test_draws_images_spread_over_the_set(coco, tmp_path):
    dataset = open_coco(coco)
    dataset.image_path(4).unlink()
    image_ids = np.repeat(dataset.image_ids, np.diff(dataset.box_starts))
    scores = np.full(len(image_ids), 0.9, np.float32)
    rows = coco_rows(image_ids, dataset.category_ids[dataset.labels], dataset.boxes, scores)
    drawn = list(draw_pictures(dataset, rows, tmp_path / "pictures", 3, 0.3))
    assert [path.name for path, _ in drawn] == ["000100.png", "000107.png"]  # the middle one is gone
    for path, picture in drawn:
        assert (read_image(path) == picture).all()


def test_weak_detections_are_left_out(coco, tmp_path):
    dataset = open_coco(coco, limit=1)
    boxes = np.array([[5, 5, 60, 60]], np.float32)
    pictures = []
    for score in (0.1, 0.2, 0.8):
        rows = coco_rows(dataset.image_ids, dataset.category_ids[:1], boxes, np.array([score], np.float32))
        pictures.append(next(draw_pictures(dataset, rows, tmp_path, 1, 0.3))[1])
    assert (pictures[0] == pictures[1]).all()
    assert pictures[0].shape != pictures[2].shape or (pictures[0] != pictures[2]).any()


def test_empty_set_has_no_pictures(coco, tmp_path):
    def clear(content):
        content["images"].clear()

    edit(coco, clear)
    dataset = open_coco(coco)
    assert list(draw_pictures(dataset, [], tmp_path, 3, 0.3)) == []


@pytest.mark.parametrize(
    ("stems", "names"),
    [
        (["a", "b"], ["a", "b"]),
        (["0001", "0001", "0002", "0001"], ["0001", "0001-2", "0002", "0001-3"]),
        (["a", "A", "ä", "Ä"], ["a", "A-2", "ä", "Ä-2"]),
        (["a", "a", "a-2"], ["a", "a-3", "a-2"]),
        (["a-2", "a", "a", "A-2"], ["a-2", "a", "a-3", "A-2-2"]),
    ],
)
def test_pictures_have_names_of_their_own(stems, names):
    assert unique_stems(stems) == names


def test_other_pictures_of_the_folder_are_kept(coco, tmp_path):
    dataset = open_coco(coco, limit=1)
    path = dataset.image_path(0)
    dataset.file_names = np.array(["Training-Images.jpg"])
    dataset.image_path(0).write_bytes(path.read_bytes())
    ((picture_path, _),) = draw_pictures(dataset, [], tmp_path, 1, 0.3)
    assert picture_path.name == "Training-Images-2.png"


def test_pictures_of_equal_names_are_all_kept(coco, tmp_path):
    dataset = open_coco(coco, limit=3)
    paths = [dataset.image_path(index) for index in range(3)]
    dataset.file_names = np.array(["cam0/0001.jpg", "cam1/0001.png", "0001.JPG"])
    for index, path in enumerate(paths):
        dataset.image_path(index).parent.mkdir(exist_ok=True)
        dataset.image_path(index).write_bytes(path.read_bytes())
    for _ in range(2):
        drawn = list(draw_pictures(dataset, [], tmp_path, 3, 0.3))
        assert [path.name for path, _ in drawn] == ["0001.png", "0001-2.png", "0001-3.png"]
        for path, picture in drawn:
            assert (read_image(path) == picture).all()


@pytest.mark.parametrize("name", ["n" * 255, "ä" * 127, "n" * 251 + ".jpg"])
def test_pictures_of_long_names_are_written(coco, tmp_path, name):
    dataset = open_coco(coco, limit=1)
    path = dataset.image_path(0)
    dataset.file_names = np.array([name])
    dataset.image_path(0).write_bytes(path.read_bytes())
    ((picture_path, _),) = draw_pictures(dataset, [], tmp_path / "pictures", 1, 0.3)
    assert picture_path.exists()
