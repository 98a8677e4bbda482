import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from tests.train.data.test_coco_dataset import edit, open_coco, open_golden
from train.data.collate import collate
from train.data.loader import evaluation_loader, training_loader
from train.data.prefetch import batch_tensors
from train.data.samplers import AspectRatioBatchSampler


def test_batches_equal_mmdetection(golden, tmp_path):
    dataset = open_golden(golden, tmp_path, True)
    upright = dataset.heights > dataset.widths
    for case in golden("dataset")[1]["batches"]:
        batches = AspectRatioBatchSampler(upright, 2, case["seed"], case["rank"], case["world"])
        assert batches.epoch_batches(case["epoch"]) == case["batches"]
        assert len(batches) == case["length"]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("images", [1, 5, 37])
def test_every_process_has_as_many_batches(images, world):
    upright = np.random.default_rng(images).random(images) < 0.3
    ranks = [AspectRatioBatchSampler(upright, 3, 1, rank, world) for rank in range(world)]
    batches = [rank.epoch_batches(2) for rank in ranks]
    assert {len(mine) for mine in batches} == {len(ranks[0])}
    seen = [index for mine in batches for batch in mine for index in batch]
    assert set(seen) == set(range(images))
    assert len(seen) == -(-images // world) * world


def test_processes_share_the_batches_of_one():
    upright = np.zeros(24, bool)
    whole = AspectRatioBatchSampler(upright, 6, 5).epoch_batches(1)
    thirds = [AspectRatioBatchSampler(upright, 2, 5, rank, 3).epoch_batches(1) for rank in range(3)]
    for number, batch in enumerate(whole):
        assert sorted(batch) == sorted(index for mine in thirds for index in mine[number])


def test_iteration_starts_anywhere():
    batches = AspectRatioBatchSampler(np.zeros(10, bool), 2, 0)
    batches.set_epoch(3, 2)
    expected = [[(3, index) for index in batch] for batch in batches.epoch_batches(3)[2:]]
    assert list(batches) == expected


def test_collate_pads_to_multiples_of_32(coco):
    dataset = open_coco(coco)
    samples = [dataset[0, 0], dataset[0, 1]]
    tall = type(samples[1])(np.ones((70, 20, 3), np.uint8), *list(vars(samples[1]).values())[1:])
    loaded = collate([samples[0], tall])
    assert loaded.batch.images.shape == (2, 3, 96, 64)
    assert loaded.batch.sizes.tolist() == [[48, 64], [70, 20]]
    assert (loaded.batch.images[1, :, :70, :20] == 1).all()
    assert loaded.batch.images[1].sum() == 70 * 20 * 3
    assert loaded.batch.seeds.tolist() == [samples[0].seed, samples[1].seed]
    assert loaded.image_ids == [100, 101]


def content(loader):
    return [(loaded.image_ids, loaded.batch.images, loaded.batch.seeds) for loaded in loader]


def test_workers_change_nothing(coco):
    dataset = open_coco(coco)
    passes = []
    for workers in (0, 2):
        batches = AspectRatioBatchSampler(np.zeros(len(dataset), bool), 2, 1)
        batches.set_epoch(1)
        passes.append(content(training_loader(dataset, batches, workers, False)))
    for (ids, images, seeds), (other_ids, other_images, other_seeds) in zip(*passes, strict=True):
        assert ids == other_ids
        assert torch.equal(images, other_images)
        assert torch.equal(seeds, other_seeds)


@pytest.mark.parametrize("masks", [False, True])
def test_batches_arrive_from_workers_as_they_were_made(coco, masks):
    dataset = open_coco(coco, masks=masks)
    dataset.image_path(3).write_bytes(b"no image")
    batches = AspectRatioBatchSampler(np.zeros(len(dataset), bool), 3)
    for made, arrived in zip(*(training_loader(dataset, batches, workers, False) for workers in (0, 1)), strict=True):
        assert vars(made).keys() == vars(arrived).keys()
        for name in ("image_ids", "scale_factors", "original_sizes", "unreadable"):
            assert getattr(made, name) == getattr(arrived, name)
        pairs = list(zip(batch_tensors(made.batch), batch_tensors(arrived.batch), strict=True))
        assert len(pairs) == 3 + len(made.image_ids) * (3 if masks else 2)
        for one, other in pairs:
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    assert [loaded.batch is None for loaded in evaluation_loader(dataset, 1, False)] == [i == 3 for i in range(8)]


def test_workers_survive_a_signal_to_the_whole_group(coco):
    dataset = open_coco(coco)
    batches = iter(training_loader(dataset, AspectRatioBatchSampler(np.zeros(len(dataset), bool), 1), 2, False))
    seen = [next(batches), next(batches)]  # one of each worker
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, number)
    assert len(multiprocessing.active_children()) == 2
    assert len([*seen, *batches]) == len(dataset)


def test_unreadable_image_is_replaced_by_the_next(coco):
    dataset = open_coco(coco)
    dataset.image_path(3).write_bytes(b"no image")
    batches = AspectRatioBatchSampler(np.zeros(len(dataset), bool), 8)
    (loaded,) = training_loader(dataset, batches, 0, False)
    assert list(loaded.unreadable) == [103]
    assert sorted(loaded.image_ids) == [100, 101, 102, 104, 104, 105, 106, 107]


def test_evaluation_sees_every_image_once(coco):
    dataset = open_coco(coco)
    seen = [
        loaded.image_ids
        for rank in range(3)
        for loaded in evaluation_loader(dataset, 0, False, rank=rank, world_size=3)
    ]
    assert sorted(seen) == [[image_id] for image_id in dataset.image_ids]
    dataset.image_path(0).unlink()
    first = next(iter(evaluation_loader(dataset, 0, False)))
    assert first.batch is None
    assert list(first.unreadable) == [100]


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
        assert abs(int(mask.sum()) - (x2 - x1) * (y2 - y1)) <= x2 - x1 + y2 - y1
        assert mask[(y1 + y2) // 2, (x1 + x2) // 2]
    assert [tensor.shape for tensor in batch_tensors(loaded.batch) if tensor.dim() == 3] == [
        (0, 48, 64),
        full.masks.shape,
    ]
    assert open_coco(coco)[0, 1].masks is None
    assert open_coco(coco, training=False, masks=True)[0, 1].masks is None
