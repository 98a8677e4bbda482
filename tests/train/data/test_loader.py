"""Loaders: workers change nothing and survive signals, unreadable images are replaced or named."""

import multiprocessing
import os
import resource
import signal
import time

import numpy as np
import pytest
import torch

import train.data.loader
from tests.train.data.datasets import open_coco
from train.data.loader import evaluation_loader, training_loader
from train.data.prefetch import batch_tensors
from train.data.samplers import AspectRatioBatchSampler
from train.errors import explain


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
        assert len(pairs) == 5 + (len(made.image_ids) if masks else 0)  # boxes and labels of all images are one each
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


LOADERS = {
    "training": lambda dataset, **options: training_loader(
        dataset, AspectRatioBatchSampler(np.zeros(len(dataset), bool), 1), 1, False, **options
    ),
    "evaluation": lambda dataset, **options: evaluation_loader(dataset, 1, False, **options),
}


def fail(loader) -> tuple[str, float]:
    """Load until an error ends it; return its line for the user, and the seconds that it took."""
    start = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        list(loader)
    seconds = time.monotonic() - start
    message = explain(error.value)
    assert message is not None
    assert "\n" not in message
    return message, seconds


@pytest.fixture
def end_workers():
    """Kill the processes that a test leaves hanging; they ignore other signals."""
    yield
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, handler)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV])
def test_killed_worker_ends_the_loading(coco, monkeypatch, kind, number):
    dataset = open_coco(coco)

    def read(path, max_pixels):
        signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
        os.kill(os.getpid(), number)

    monkeypatch.setattr("train.data.coco_dataset.read_image", read)
    message, seconds = fail(LOADERS[kind](dataset))
    assert message.startswith("lost a process that loads images: DataLoader worker")
    assert seconds < 30  # on a machine that is busy otherwise


@pytest.mark.parametrize("kind", LOADERS)
def test_worker_that_hangs_ends_the_loading(coco, monkeypatch, end_workers, kind):
    monkeypatch.setattr("train.data.coco_dataset.read_image", lambda path, max_pixels: time.sleep(1000))
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    message, seconds = fail(LOADERS[kind](open_coco(coco), timeout=0.5))
    assert message.startswith("no images within --timeout: DataLoader timed out after 0.5 seconds")
    assert seconds < 30  # on a machine that is busy otherwise


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("kind", LOADERS)
def test_full_shared_memory_ends_the_loading(coco, monkeypatch, end_workers, kind, masks):
    """A file of /dev/shm cannot grow, as where it is full; without the check the batch would get lost silently."""
    start_worker = train.data.loader._start_worker

    def start_with_little_memory(number):
        start_worker(number)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    monkeypatch.setattr("train.data.loader._start_worker", start_with_little_memory)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    message, seconds = fail(LOADERS[kind](open_coco(coco, masks=masks)))
    assert message.startswith("lost a process that loads images: RuntimeError: ")
    assert "shared memory" in message
    assert seconds < 30  # on a machine that is busy otherwise


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_is_no_file_is_skipped_at_once(coco, kind, workers):
    dataset = open_coco(coco)
    path = dataset.image_path(3)
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    (loaded,) = make_training_loader(dataset, 8, workers)
    assert list(loaded.unreadable) == [103]
    assert path.name in loaded.unreadable[103]


def test_lost_boxes_arrive_from_workers(coco):
    dataset = open_coco(coco)
    dataset.boxes[dataset.box_starts[3]] = [128, 5, 140, 9]
    for workers in (0, 1):
        (loaded,) = make_training_loader(dataset, 8, workers)
        assert loaded.lost_boxes == {103: [[128.0, 5.0, 140.0, 9.0]]}
