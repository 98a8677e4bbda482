"""Batches of an epoch: MMDetection's, the same number on every process, and none lost between processes."""

import math

import numpy as np
import pytest

from tests.train.data.datasets import open_golden
from train.data.samplers import AspectRatioBatchSampler


def test_batches_equal_mmdetection(golden, tmp_path):
    dataset = open_golden(tmp_path, True)
    portrait = dataset.heights > dataset.widths
    for case in golden("dataset")[1]["batches"]:
        sampler = AspectRatioBatchSampler(portrait, 2, case["seed"], case["rank"], case["world"])
        assert sampler.epoch_batches(case["epoch"]) == case["batches"]
        assert len(sampler) == case["length"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("images", [1, 5, 37])
def test_every_process_has_as_many_batches(images, world_size):
    portrait = np.random.default_rng(images).random(images) < 0.3
    samplers = [AspectRatioBatchSampler(portrait, 3, 1, rank, world_size) for rank in range(world_size)]
    batches_of_ranks = [sampler.epoch_batches(2) for sampler in samplers]
    assert {len(batches) for batches in batches_of_ranks} == {len(samplers[0])}

    seen = []
    for batches in batches_of_ranks:
        for batch in batches:
            seen += batch
    assert set(seen) == set(range(images))
    assert len(seen) == math.ceil(images / world_size) * world_size


def test_processes_share_the_batches_of_one():
    portrait = np.zeros(24, bool)
    whole = AspectRatioBatchSampler(portrait, 6, 5).epoch_batches(1)
    thirds = [AspectRatioBatchSampler(portrait, 2, 5, rank, 3).epoch_batches(1) for rank in range(3)]
    for number, batch in enumerate(whole):
        union = [index for batches in thirds for index in batches[number]]
        assert sorted(batch) == sorted(union)


def test_iteration_starts_anywhere():
    sampler = AspectRatioBatchSampler(np.zeros(10, bool), 2, 0)
    sampler.set_epoch(3, 2)
    expected = [[(3, index) for index in batch] for batch in sampler.epoch_batches(3)[2:]]
    assert list(sampler) == expected
