import json

import numpy as np
import torch
from torch import nn

from detector import Batch, Detections
from tests.train.data.datasets import open_coco
from train.data.collate import LoadedBatch
from train.evaluation.evaluate import _sort_by_image, _to_rows, detect

CATEGORY_IDS = np.array([7, 3])


class OneBox(nn.Module):
    """A stand-in for the detector: the same box in every image."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def detect(self, batch):
        boxes = torch.tensor([[[2.0, 2.0, 6.0, 8.0], [0.0, 0.0, 0.0, 0.0]]])
        return boxes, torch.tensor([[0.9, -1]]), torch.tensor([[0, 0]]), torch.tensor([[True, False]])


def load(image_id):
    batch = Batch(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.tensor([[32, 32]]))
    return LoadedBatch(batch, [image_id], [(2.0, 2.0)], [(50, 50)], {})


def test_detect_returns_to_the_pixels_of_the_file():
    unreadable_batch = LoadedBatch(None, [], [], [], {9: "cut off"})
    calls = []
    batches = [load(0), load(1), load(2), unreadable_batch]
    rows, unreadable = detect(OneBox(), batches, CATEGORY_IDS, check_stop=lambda: calls.append(1))
    assert [row["image_id"] for row in rows] == [0, 1, 2]
    assert [row["bbox"] for row in rows] == [[1, 1, 2, 3]] * 3
    assert unreadable == {9: "cut off"}
    assert len(calls) == 4


def test_each_batch_is_waited_for_once_when_the_next_one_has_begun(monkeypatch):
    calls = []

    class Recorded(OneBox):
        def detect(self, batch):
            calls.append("detect")
            return super().detect(batch)

    def start_copy(tensors):
        calls.append("copy")
        return lambda: calls.append("wait") or tensors

    monkeypatch.setattr("detector.inference.start_copy", start_copy)
    detect(Recorded(), [load(0), load(1), load(2)], CATEGORY_IDS)
    assert calls == ["detect", "copy", "detect", "copy", "wait", "detect", "copy", "wait", "wait"]


def test_rows_are_in_coco_format():
    detections = Detections(torch.tensor([[1.0, 8.0, 6.0, 20.0]]), torch.tensor([0.5]), torch.tensor([1]))
    rows = _to_rows(detections, 42, (32, 8), CATEGORY_IDS)
    assert rows == [{"image_id": 42, "category_id": 3, "bbox": [1.0, 8.0, 5.0, 12.0], "score": 0.5}]
    assert json.loads(json.dumps(rows)) == rows


def test_rows_come_in_the_order_of_the_data_set(coco):
    dataset = open_coco(coco, "val2017")
    first, _, third = dataset.image_ids.tolist()
    rows = [{"image_id": first, "score": 0.9}, {"image_id": first, "score": 0.8}, {"image_id": third, "score": 0.95}]
    assert _sort_by_image([rows[2:], [], rows[:2]], dataset) == rows
    assert _sort_by_image([[], []], dataset) == []
