"""Samples become a batch: padding of the images, masks without padding."""

import dataclasses

import numpy as np
import torch

from tests.train.data.datasets import edit, open_coco
from train.data.collate import collate
from train.data.prefetch import batch_tensors


def test_collate_pads_to_multiples_of_32(coco):
    dataset = open_coco(coco)
    wide = dataset[0, 0]
    tall = dataclasses.replace(dataset[0, 1], image=np.ones((70, 20, 3), np.uint8))
    loaded = collate([wide, tall])
    batch = loaded.batch
    assert batch.images.shape == (2, 3, 96, 64)
    assert batch.sizes.tolist() == [[48, 64], [70, 20]]
    assert (batch.images[1, :, :70, :20] == 1).all()
    assert batch.images[1].sum() == 70 * 20 * 3
    assert batch.seeds.tolist() == [wide.seed, tall.seed]
    assert loaded.image_ids == [100, 101]


def test_masks_reach_the_batch(coco):
    edit(coco, lambda content: content["annotations"][0].update(iscrowd=1))  # all of image 100
    dataset = open_coco(coco, masks=True)
    loaded = collate([dataset[0, 0], dataset[0, 1]])
    assert loaded.original_sizes == [(96, 128), (96, 128)]

    empty, full = loaded.batch.targets
    assert empty.masks.shape == (0, 48, 64)
    assert full.masks.shape == (len(full.labels), 48, 64)
    assert full.masks.dtype == torch.uint8
    for (x1, y1, x2, y2), mask in zip(full.boxes.round().int().tolist(), full.masks, strict=True):
        width = x2 - x1
        height = y2 - y1
        assert abs(int(mask.sum()) - width * height) <= width + height
        assert mask[(y1 + y2) // 2, (x1 + x2) // 2]

    masks = loaded.batch.targets.masks
    mask_shapes = [tensor.shape for tensor in batch_tensors(loaded.batch) if any(tensor is mask for mask in masks)]
    assert mask_shapes == [(0, 48, 64), full.masks.shape]
    assert open_coco(coco)[0, 1].masks is None
    assert open_coco(coco, training=False, masks=True)[0, 1].masks is None
