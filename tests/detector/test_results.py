"""Results: boxes in the pixels of the file, masks of its size, rows as COCO's tools read them."""

import numpy as np
import pytest
import torch

from detector import Detections
from detector.ops.rle import encode_mask
from detector.results import coco_rows, encode_masks, full_masks, undo_resize


def some_detections(count, dtype=torch.float32, with_masks=False):
    generator = torch.Generator().manual_seed(count)
    corners = 40 * torch.rand(count, 2, generator=generator)
    extents = 5 + 20 * torch.rand(count, 2, generator=generator)
    boxes = torch.cat([corners, corners + extents], dim=1).to(dtype)
    scores = torch.rand(count, generator=generator).sort(descending=True).values.to(dtype)
    labels = torch.randint(0, 3, (count,), generator=generator)
    masks = torch.rand(count, 28, 28, generator=generator).to(dtype) if with_masks else None
    return Detections(boxes, scores, labels, masks)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        pytest.param(torch.float64, torch.float64, id="float64"),
        pytest.param(torch.float32, torch.float32, id="float32"),
        pytest.param(torch.bfloat16, torch.float32, id="bfloat16"),
    ],
)
def test_boxes_are_divided_by_the_factors_of_the_resize(dtype, expected):
    detections = some_detections(6, dtype, with_masks=True)
    undone = undo_resize(detections, (2.0, 0.75))

    torch.testing.assert_close(undone.boxes[:, 0::2], detections.boxes[:, 0::2].to(expected) / 2.0, rtol=0, atol=0)
    torch.testing.assert_close(undone.boxes[:, 1::2], detections.boxes[:, 1::2].to(expected) / 0.75, rtol=0, atol=0)
    assert torch.equal(undone.scores, detections.scores.to(expected))
    assert torch.equal(undone.masks, detections.masks.to(expected))
    assert torch.equal(undone.labels, detections.labels)


def test_boxes_without_masks():
    detections = some_detections(3)
    assert undo_resize(detections, (2.0, 2.0)).masks is None
    assert list(full_masks(detections, 60, 80)) == []
    assert encode_masks(detections, 60, 80) is None


def test_no_detections():
    undone = undo_resize(some_detections(0, with_masks=True), (0.5, 0.5))
    assert undone.boxes.shape == (0, 4)
    assert encode_masks(undone, 60, 80) == []
    none = np.zeros(0, np.int64)
    assert coco_rows(none, none, undone.boxes.numpy(), undone.scores.numpy(), []) == []


def test_masks_have_the_size_of_the_image():
    detections = some_detections(4, with_masks=True)
    masks = list(full_masks(detections, 60, 80))
    assert len(masks) == 4
    for mask, (x1, y1, x2, y2) in zip(masks, detections.boxes.tolist(), strict=True):
        assert mask.shape == (60, 80)
        assert mask.dtype == np.bool_
        assert mask.any()
        outside = mask.copy()
        outside[max(int(y1) - 1, 0) : int(y2) + 2, max(int(x1) - 1, 0) : int(x2) + 2] = False
        assert not outside.any()
    assert encode_masks(detections, 60, 80) == [encode_mask(mask) for mask in masks]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_have_corner_and_extent(dtype):
    boxes = np.array([[1.1, 2.2, 4.4, 8.8], [0.0, 0.0, 10.0, 5.0]], dtype)
    scores = np.array([0.9, 0.3], np.float32)
    masks = [{"size": [1, 1], "counts": "01"}, {"size": [1, 1], "counts": "1"}]
    rows = coco_rows(np.array([7, 9]), np.array([18, 1]), boxes, scores, masks)

    width, height = boxes[0, 2:] - boxes[0, :2]  # in the dtype of the boxes
    first = {
        "image_id": 7,
        "category_id": 18,
        "bbox": [float(boxes[0, 0]), float(boxes[0, 1]), float(width), float(height)],
        "score": float(scores[0]),
        "segmentation": masks[0],
    }
    assert rows[0] == first
    assert list(rows[0]) == list(first)
    assert rows[1]["bbox"] == [0.0, 0.0, 10.0, 5.0]
    assert "segmentation" not in coco_rows(np.array([7, 9]), np.array([18, 1]), boxes, scores)[0]


def test_every_row_needs_a_mask():
    boxes = np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match="zip"):
        coco_rows(np.array([1, 1]), np.array([1, 1]), boxes, boxes[:, 0], [{"size": [1, 1], "counts": "1"}])
