import numpy as np

from detector.image import read_image
from tests.train.data.test_coco_dataset import open_coco
from train.evaluation.coco_metrics import CocoDetections
from train.evaluation.pictures import draw_pictures


def test_draws_images_spread_over_the_set(coco, tmp_path):
    dataset = open_coco(coco)
    dataset.image_path(4).unlink()
    ids = np.repeat(dataset.image_ids, np.diff(dataset.box_starts))
    found = CocoDetections(ids, dataset.boxes, np.full(len(ids), 0.9, np.float32), dataset.labels)
    drawn = list(draw_pictures(dataset, found, tmp_path / "pictures", 3))
    assert [path.name for path, _ in drawn] == ["000100.png", "000107.png"]  # the middle one is gone
    for path, picture in drawn:
        assert (read_image(path) == picture).all()


def test_weak_detections_are_left_out(coco, tmp_path):
    dataset = open_coco(coco, limit=1)
    boxes = np.array([[5, 5, 60, 60]], np.float32)
    pictures = []
    for score in (0.1, 0.2, 0.8):
        found = CocoDetections(dataset.image_ids, boxes, np.array([score], np.float32), np.array([0]))
        pictures.append(next(draw_pictures(dataset, found, tmp_path, 1))[1])
    assert (pictures[0] == pictures[1]).all()
    assert pictures[0].shape != pictures[2].shape or (pictures[0] != pictures[2]).any()


def test_empty_set_has_no_pictures(coco, tmp_path):
    dataset = open_coco(coco, limit=1)
    dataset._select(np.zeros(0, np.int64))
    assert list(draw_pictures(dataset, CocoDetections.join([]), tmp_path, 3)) == []
