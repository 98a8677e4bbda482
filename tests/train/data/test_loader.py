"""Loaders: workers change nothing and survive signals, unreadable images are replaced or named."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from tests.train.data.datasets import open_coco
from train.data.loader import evaluation_loader, training_loader
from train.data.prefetch import batch_tensors
from train.data.samplers import AspectRatioBatchSampler


def make_training_loader(dataset, batch_size, workers, epoch=0, seed=0):
    sampler = AspectRatioBatchSampler(np.zeros(len(dataset), bool), batch_size, seed)
    sampler.set_epoch(epoch)
    return training_loader(dataset, sampler, workers, pin_memory=False)


def test_workers_change_nothing(coco):
    dataset = open_coco(coco)
    alone = make_training_loader(dataset, 2, workers=0, epoch=1, seed=1)
    with_workers = make_training_loader(dataset, 2, workers=2, epoch=1, seed=1)
    for expected, loaded in zip(alone, with_workers, strict=True):
        assert loaded.image_ids == expected.image_ids
        assert torch.equal(loaded.batch.images, expected.batch.images)
        assert torch.equal(loaded.batch.seeds, expected.batch.seeds)


@pytest.mark.parametrize("masks", [False, True])
def test_batches_arrive_from_workers_as_they_were_made(coco, masks):
    dataset = open_coco(coco, masks=masks)
    dataset.image_path(3).write_bytes(b"no image")
    alone = make_training_loader(dataset, 3, workers=0)
    with_worker = make_training_loader(dataset, 3, workers=1)
    for made, arrived in zip(alone, with_worker, strict=True):
        assert vars(made).keys() == vars(arrived).keys()
        for name in ("image_ids", "scale_factors", "original_sizes", "unreadable"):
            assert getattr(made, name) == getattr(arrived, name)

        pairs = list(zip(batch_tensors(made.batch), batch_tensors(arrived.batch), strict=True))
        assert len(pairs) == 3 + len(made.image_ids) * (3 if masks else 2)
        for expected, tensor in pairs:
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor, expected)

    is_empty = [loaded.batch is None for loaded in evaluation_loader(dataset, 1, False)]
    assert is_empty == [index == 3 for index in range(8)]


def test_workers_survive_a_signal_to_the_whole_group(coco):
    dataset = open_coco(coco)
    batches = iter(make_training_loader(dataset, 1, workers=2))
    seen = [next(batches), next(batches)]  # one of each worker
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, number)
    assert len(multiprocessing.active_children()) == 2
    seen += batches
    assert len(seen) == len(dataset)


def test_unreadable_image_is_replaced_by_the_next(coco):
    dataset = open_coco(coco)
    dataset.image_path(3).write_bytes(b"no image")
    (loaded,) = make_training_loader(dataset, 8, workers=0)
    assert list(loaded.unreadable) == [103]
    assert sorted(loaded.image_ids) == [100, 101, 102, 104, 104, 105, 106, 107]


def test_evaluation_sees_every_image_once(coco):
    dataset = open_coco(coco)
    seen = []
    for rank in range(3):
        for loaded in evaluation_loader(dataset, 0, False, rank=rank, world_size=3):
            seen.append(loaded.image_ids)
    assert sorted(seen) == [[image_id] for image_id in dataset.image_ids]

    dataset.image_path(0).unlink()
    first = next(iter(evaluation_loader(dataset, 0, False)))
    assert first.batch is None
    assert list(first.unreadable) == [100]
