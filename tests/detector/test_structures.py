"""Moving the types that travel through the detector."""

import torch

from detector import Batch, Target


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
