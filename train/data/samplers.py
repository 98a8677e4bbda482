"""Decides which images form which batch on which process."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

ImageKey = tuple[int, int]  # (epoch, index of the image): the key of `CocoDetection`


class AspectRatioBatchSampler:
    """Batches of images of one orientation, from a random order of the images that is divided among the processes.

    Iterating gives the batches of the epoch set by `set_epoch`, as lists of (epoch, index).

    Args:
        portrait: (N,) bool, whether an image is higher than wide.
        batch_size: images per batch.
        seed: of the run.
        rank: number of this process.
        world_size: how many processes there are.

    Source:
        MMEngine's DefaultSampler and MMDetection's AspectRatioBatchSampler.
    """

    def __init__(self, portrait: np.ndarray, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1):
        self.portrait = portrait
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._epoch = 0
        self._first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Let the next iteration give the batches of `epoch`, from number `first_batch` on."""
        self._epoch = epoch
        self._first_batch = first_batch

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch on this process; it is the same on all of them."""
        return math.ceil(self._images_per_rank() / self.batch_size)

    def __iter__(self) -> Iterator[list[ImageKey]]:
        for batch in self.epoch_batches(self._epoch)[self._first_batch :]:
            yield [(self._epoch, index) for index in batch]

    def epoch_batches(self, epoch: int) -> list[list[int]]:
        """Return all batches of an epoch on this process, as indices; all processes have the same number of batches."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.portrait), generator=generator).numpy()
        padded = np.resize(order, self._images_per_rank() * self.world_size)
        indices = padded[self.rank :: self.world_size].tolist()

        batches = []
        portrait_bucket: list[int] = []
        landscape_bucket: list[int] = []
        for index in indices:
            bucket = portrait_bucket if self.portrait[index] else landscape_bucket
            bucket.append(index)
            if len(bucket) == self.batch_size:
                batches.append(bucket.copy())
                bucket.clear()

        remaining = portrait_bucket + landscape_bucket
        for start in range(0, len(remaining), self.batch_size):
            batches.append(remaining[start : start + self.batch_size])
        return batches

    def _images_per_rank(self) -> int:
        return math.ceil(len(self.portrait) / self.world_size)


def spread_evenly(total: int, count: int) -> np.ndarray:
    """Return at most `count` of the numbers 0 to total - 1, (n,) int64, the first and the last among them."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))
