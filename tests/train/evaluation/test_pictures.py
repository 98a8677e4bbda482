import numpy as np

from detector.image import read_image
from detector.results import coco_rows
from tests.train.data.datasets import edit, open_coco
from train.evaluation.pictures import draw_pictures


def test_draws_images_spread_over_the_set(coco, tmp_path):
    dataset = open_coco(coco)
    dataset.image_path(4).unlink()
    image_ids = np.repeat(dataset.image_ids, np.diff(dataset.box_starts))
    scores = np.full(len(image_ids), 0.9, np.float32)
    rows = coco_rows(image_ids, dataset.category_ids[dataset.labels], dataset.boxes, scores)
    drawn = list(draw_pictures(dataset, rows, tmp_path / "pictures", 3))
    assert [path.name for path, _ in drawn] == ["000100.png", "000107.png"]  # the middle one is gone
    for path, picture in drawn:
        assert (read_image(path) == picture).all()


def test_weak_detections_are_left_out(coco, tmp_path):
    dataset = open_coco(coco, limit=1)
    boxes = np.array([[5, 5, 60, 60]], np.float32)
    pictures = []
    for score in (0.1, 0.2, 0.8):
        rows = coco_rows(dataset.image_ids, dataset.category_ids[:1], boxes, np.array([score], np.float32))
        pictures.append(next(draw_pictures(dataset, rows, tmp_path, 1))[1])
    assert (pictures[0] == pictures[1]).all()
    assert pictures[0].shape != pictures[2].shape or (pictures[0] != pictures[2]).any()


def test_empty_set_has_no_pictures(coco, tmp_path):
    def clear(content):
        content["images"].clear()

    edit(coco, clear)
    dataset = open_coco(coco)
    assert list(draw_pictures(dataset, [], tmp_path, 3)) == []
