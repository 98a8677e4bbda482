"""Checking and moving the types that travel through the detector."""

import pickle
import re
from math import inf, nan

import pytest
import torch

from detector import Batch, Target
from detector.structures import NO_OBJECT, StackedTargets


def make_target(masks=None):
    boxes = torch.tensor([[1.0, 2.0, 5.0, 9.0], [0.0, 0.0, 3.0, 1.0]])
    return Target(boxes, torch.zeros(2, dtype=torch.int64), masks)


@pytest.mark.parametrize(
    ("row", "box"),
    [
        pytest.param(1, [4.0, 2.0, 4.0, 8.0], id="no-width"),
        pytest.param(0, [4.0, 8.0, 6.0, 8.0], id="no-height"),
        pytest.param(1, [6.0, 2.0, 4.0, 8.0], id="negative-width"),
        pytest.param(1, [4.0, 8.0, 6.0, 2.0], id="negative-height"),
        pytest.param(1, [nan, 2.0, 4.0, 8.0], id="nan"),
        pytest.param(1, [4.0, 2.0, inf, 8.0], id="inf"),
        pytest.param(0, [4.0, -inf, 6.0, 8.0], id="minus-inf"),
        pytest.param(1, [4.0, inf, 6.0, inf], id="both-inf"),
    ],
)
def test_boxes_without_area_are_named(row, box):
    boxes = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 3)
    boxes[row] = torch.tensor(box)
    message = f"boxes[{row}]: expected finite x1 y1 x2 y2 with x2 > x1 and y2 > y1, got {box}"
    with pytest.raises(ValueError, match=re.escape(message)):
        Target(boxes, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("boxes", "labels", "message"),
    [
        (torch.ones(4), torch.tensor([0]), r"boxes: expected shape \(N, 4\), got \(4,\)"),
        (torch.ones(1, 5), torch.tensor([0]), r"boxes: expected shape \(N, 4\), got \(1, 5\)"),
        (torch.ones(1, 1, 4), torch.tensor([0]), r"boxes: expected shape \(N, 4\), got \(1, 1, 4\)"),
        (torch.tensor([[1, 2, 3, 4]]), torch.tensor([0]), "boxes: expected a floating dtype, got torch.int64"),
        (torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([0, 1]), r"labels: expected shape \(1,\) .*, got \(2,\)"),
        (torch.tensor([[1.0, 2, 3, 4]]), torch.tensor(0), r"labels: expected shape \(1,\) .*, got \(\)"),
        (torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[0]]), r"labels: expected shape \(1,\) .*, got \(1, 1\)"),
        (torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([0.0]), "labels: expected torch.int64, got torch.float32"),
        (torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([-2]), r"labels\[0\]: expected 0 or more, or -1 .*, got -2"),
        (torch.zeros(0, 4), torch.zeros(0), "labels: expected torch.int64, got torch.float32"),
    ],
)
def test_wrong_targets_are_errors(boxes, labels, message):
    with pytest.raises(ValueError, match=message):
        Target(boxes, labels)


@pytest.mark.parametrize("x2", [10 + 1e-12, 1e300], ids=str)
def test_boxes_are_judged_in_the_precision_of_the_model(x2):
    with pytest.raises(ValueError, match=r"boxes\[0\]: expected finite"):
        Target(torch.tensor([[10.0, 10.0, x2, 20.0]], dtype=torch.float64), torch.tensor([0]))


def test_targets_are_tensors():
    with pytest.raises(TypeError, match="boxes: expected a tensor, got list"):
        Target([[1.0, 2.0, 3.0, 4.0]], torch.tensor([0]))
    with pytest.raises(TypeError, match="labels: expected a tensor, got list"):
        Target(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), [0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_right_targets(dtype):
    """No boxes, thin ones, some beyond the image, and rows that only pad."""
    Target(torch.zeros(0, 4, dtype=dtype), torch.zeros(0, dtype=torch.int64))
    boxes = torch.tensor([[-3.0, 2.0, 4.0, 8.0], [0.0, 0.0, 1e-3, 1e4], [0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    Target(boxes, torch.tensor([0, 80, NO_OBJECT]))
    with pytest.raises(ValueError, match=r"boxes\[2\]: expected finite"):
        Target(torch.where(boxes == 0, nan, boxes)[[0, 0, 2]], torch.tensor([0, 1, NO_OBJECT]))


def test_targets_are_checked_once():
    """Not again where they move, and without a look at numbers that are not on the CPU."""
    nothing = Target(torch.ones(1, 4), torch.tensor([0]), check=False)
    stacked = StackedTargets.of([nothing])
    batch = Batch(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.tensor([[32, 32]]), [nothing])
    for moved in (nothing.to("cpu"), stacked[0], batch.to("cpu").targets[0], pickle.loads(pickle.dumps(nothing))):
        assert torch.equal(moved.boxes, nothing.boxes)
    assert Target(torch.ones(1, 4, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")).boxes.is_meta
    with pytest.raises(ValueError, match=r"boxes: expected shape \(N, 4\), got \(4,\)"):
        Target(torch.ones(4, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta"))


def test_target_moves_with_its_masks():
    target = make_target(masks=torch.zeros(2, 8, 8, dtype=torch.uint8)).to("meta")
    assert target.boxes.is_meta
    assert target.labels.is_meta
    assert target.masks.is_meta
    assert make_target().to("meta").masks is None


def test_batch_moves_with_targets_and_seeds():
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    sizes = torch.tensor([[32, 32]])
    batch = Batch(images, sizes, [make_target()], torch.zeros(1, dtype=torch.int64)).to("meta")
    assert batch.images.is_meta
    assert batch.sizes.is_meta
    assert batch.targets[0].boxes.is_meta
    assert batch.seeds.is_meta

    batch = Batch(images, sizes).to("meta")
    assert batch.targets is None
    assert batch.seeds is None


def images_with_boxes(counts, masks=False):
    targets = []
    for count in counts:
        mask = torch.ones(count, 4, 4 + count, dtype=torch.uint8) if masks else None
        corner = torch.rand(count, 2)
        boxes = torch.cat([corner, corner + 1], 1)
        targets.append(Target(boxes, torch.arange(count), mask))
    return targets


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(
    ("counts", "capacity", "width"), [((2, 0, 3), 1, 3), ((0,), 1, 1), ((0, 0), 5, 5), ((4, 1), 3, 4)], ids=str
)
def test_stacked_targets_are_the_targets(counts, capacity, width, masks):
    targets = images_with_boxes(counts, masks)
    stacked = StackedTargets.of(targets, capacity)
    assert stacked.boxes.shape == (len(counts), width, 4)
    assert (stacked.labels == NO_OBJECT).sum() == len(counts) * width - sum(counts)
    assert len(stacked) == len(targets) == len(stacked[:]) == len(stacked.to("cpu"))
    for stacked_target, target in zip(stacked, targets, strict=True):
        assert torch.equal(stacked_target.boxes, target.boxes)
        assert torch.equal(stacked_target.labels, target.labels)
        assert stacked_target.masks is target.masks
    assert torch.equal(stacked[-1].boxes, targets[-1].boxes)
    with pytest.raises(IndexError):
        stacked[len(counts)]


def test_stacked_targets_move_with_their_masks():
    batch = Batch(
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 2),
        StackedTargets.of(images_with_boxes((2, 1), masks=True)),
    ).to("meta")
    assert isinstance(batch.targets, StackedTargets)
    assert all(tensor.is_meta for tensor in (batch.targets.boxes, batch.targets.labels, *batch.targets.masks))
    assert batch.targets[1].boxes.shape == (1, 4)
