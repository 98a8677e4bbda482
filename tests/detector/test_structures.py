"""Moving the types that travel through the detector."""

import pytest
import torch

from detector import Batch, Target
from detector.structures import NO_OBJECT, StackedTargets


def make_target(masks=None):
    return Target(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), masks)


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
        targets.append(Target(torch.rand(count, 4), torch.arange(count), mask))
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
