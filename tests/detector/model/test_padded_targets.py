"""Ground truth of a batch as tensors of one shape."""

import pytest
import torch

from detector.model.padded_targets import pad_masks, pad_targets
from detector.structures import StackedTargets, Target


def test_boxes_and_labels():
    box = [1.0, 2.0, 3.0, 4.0]
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    padded = pad_targets([nothing, Target(torch.tensor([box, box]), torch.tensor([5, 6]))], torch.float64)
    assert padded.boxes.dtype == torch.float64
    assert padded.boxes.tolist() == [[[0.0] * 4] * 2, [box] * 2]
    assert padded.labels.tolist() == [[0, 0], [5, 6]]
    assert padded.valid.tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("capacity", [1, 5])
def test_stacked_targets_are_padded_as_they_are(capacity):
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    two = Target(torch.rand(2, 4) + torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([5, 6]))
    expected = pad_targets([nothing, two], torch.float64)
    padded = pad_targets(StackedTargets.of([nothing, two], capacity), torch.float64)
    assert padded.labels.shape == (2, max(2, capacity))
    assert not padded.valid[:, 2:].any()
    for name in ("boxes", "labels", "valid"):
        one, other = getattr(padded, name), getattr(expected, name)
        assert one.dtype == other.dtype
        assert torch.equal(one[:, :2], other)


def test_one_image_without_targets_has_one_row():
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    padded = pad_targets([nothing], torch.float32)
    assert padded.boxes.shape == (1, 1, 4)
    assert not padded.valid.any()


def test_masks():
    boxes = torch.tensor([[0.0, 0.0, 3.0, 2.0]])
    labels = torch.zeros(1, dtype=torch.int64)
    small = Target(boxes, labels, torch.ones(1, 2, 3, dtype=torch.uint8))
    large = Target(boxes, labels, torch.ones(1, 4, 4, dtype=torch.bool))
    bitmaps = pad_masks([small, large], 2, (4, 5), torch.float32)
    expected = torch.zeros(2, 2, 4, 5)
    expected[0, 0, :2, :3] = 1
    expected[1, 0, :4, :4] = 1
    assert torch.equal(bitmaps, expected)
