"""Chooses the boxes that a loss is computed on, for a whole batch and with fixed shapes.

Letters: B images, N boxes, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NOT_SAMPLED = 1 << 62  # larger than every index and every random key; a sum with an index does not overflow

SamplingRule = Literal["random", "first", "spread"]


@dataclass(frozen=True)
class SamplingResult:
    """The boxes that a loss is computed on: positives, then negatives, each by ascending index, then padding.

    Attributes:
        index: (B, S) int64 into the boxes; 0 on padding.
        target: (B, S) int64, the ground truth of a positive; 0 elsewhere.
        positive: (B, S) bool.
        valid: (B, S) bool, false on padding.
    """

    index: Tensor
    target: Tensor
    positive: Tensor
    valid: Tensor

    def first(self, count: int) -> SamplingResult:
        """Return the first `count` samples of each image."""
        return SamplingResult(
            index=self.index[:, :count],
            target=self.target[:, :count],
            positive=self.positive[:, :count],
            valid=self.valid[:, :count],
        )


@dataclass(frozen=True)
class BoxSampler:
    """Chooses a fixed number of positive and negative boxes per image.

    Attributes:
        num_samples: S, samples per image.
        positive_fraction: largest share of positives; negatives fill up the rest.
        rule: "random"; "first", the lowest indices; "spread", at even distances in the list of candidates. The last two
            are for comparisons with numbers of other programs.

    Source:
        MMDetection's RandomSampler: the same distribution, drawn as the smallest of random keys.
    """

    num_samples: int
    positive_fraction: float
    rule: SamplingRule = "random"

    @property
    def max_positives(self) -> int:
        """Largest number of positives per image; they are in the first columns of the samples."""
        return int(self.num_samples * self.positive_fraction)

    def __call__(self, assigned: Tensor, seeds: Tensor, num_targets: int = 0) -> SamplingResult:
        """Choose the samples of every image.

        Args:
            assigned: (B, N) int64 of `Matcher`.
            seeds: (B,) int64, used by the random rule: equal seeds give the same choice.
            num_targets: the first boxes of each image are this many padded ground truths. Their number depends on the
                other images of the batch. They get the last random keys, so that the draw of the boxes behind them
                does not depend on it.
        """
        num_boxes = assigned.shape[1]
        is_positive = assigned > 0
        is_negative = assigned == 0
        keys = None
        if self.rule == "random":
            keys = random_keys(seeds, num_boxes)
            if num_targets:
                keys = keys.roll(num_targets, 1)

        num_positives = is_positive.sum(1).clamp(max=self.max_positives)
        positives = self._choose(is_positive, num_positives, min(self.max_positives, num_boxes), keys)
        num_negatives = self.num_samples - num_positives
        negatives = self._choose(is_negative, num_negatives, min(self.num_samples, num_boxes), keys)

        # One sort brings the samples into order: with `num_boxes` added, the negatives come after the positives.
        samples = torch.cat([positives, negatives + num_boxes], 1).sort(1).values[:, : self.num_samples]

        valid = samples < NOT_SAMPLED
        positive = valid & (samples < num_boxes)
        index = torch.where(valid, samples % max(num_boxes, 1), 0)
        target = torch.where(positive, assigned.gather(1, index) - 1, 0)
        return SamplingResult(index, target, positive, valid)

    def _choose(self, candidates: Tensor, limit: Tensor, capacity: int, keys: Tensor | None) -> Tensor:
        """Choose boxes of one kind.

        Args:
            candidates: (B, N) bool.
            limit: (B,) int64, largest number to choose.
            capacity: width of the result, enough for the largest number that is chosen in an image.
            keys: (B, N) int64, the smallest are chosen; None chooses the lowest indices.

        Returns:
            (B, capacity) int64, indices of the chosen boxes, then `NOT_SAMPLED`.
        """
        if self.rule == "spread":
            candidates = _spread(candidates, limit)
        if keys is None:
            keys = torch.arange(candidates.shape[1], device=candidates.device).expand_as(candidates)

        smallest, index = torch.where(candidates, keys, NOT_SAMPLED).topk(capacity, 1, largest=False, sorted=True)
        position = torch.arange(capacity, device=index.device)
        is_chosen = (position < limit[:, None]) & (smallest < NOT_SAMPLED)
        return torch.where(is_chosen, index, NOT_SAMPLED)


def random_keys(seeds: Tensor, count: int) -> Tensor:
    """Return (B, count) int64 keys in [0, 2^62), which depend only on the seeds (B,), and are the same on every device.

    An operator, which torch.compile calls and does not translate. The products are meant to overflow. In C++, which
    torch.compile would write on a CPU, an overflow of signed integers is undefined: from `number * constant` GCC
    concludes that the loop over `number` ends early, drops the test for its end, and the loop writes past its result.

    Source:
        Steele et al., Fast splittable pseudorandom number generators (SplitMix64), OOPSLA 2014.
    """
    keys: Tensor = random_keys_op(seeds, count)
    return keys


@torch.library.custom_op("detector::random_keys", mutates_args=())
def random_keys_op(seeds: Tensor, count: int) -> Tensor:
    """Compute `random_keys`."""
    number = torch.arange(1, count + 1, device=seeds.device)
    keys = seeds[:, None] + number * -0x61C8864680B583EB
    keys = _xor_shift(keys, 30) * -0x40A7B892E31B1A47
    keys = _xor_shift(keys, 27) * -0x6B2FB644ECCEEE15
    keys = keys ^ (keys >> 31)
    return keys & ((1 << 62) - 1)


@random_keys_op.register_fake
def _random_keys_fake(seeds: Tensor, count: int) -> Tensor:
    return seeds.new_empty(seeds.shape[0], count)


def _xor_shift(keys: Tensor, shift: int) -> Tensor:
    """Return keys ^ (keys >> shift) with zeros shifted in; torch's own shift of int64 repeats the sign bit."""
    shifted = (keys >> shift) & ((1 << (64 - shift)) - 1)
    return keys ^ shifted


def _spread(candidates: Tensor, limit: Tensor) -> Tensor:
    """Leave at most `limit` candidates of each image, at even distances.

    Of `total` candidates, numbered from 0, those numbered i * total // limit are left, i = 0, 1, ..., limit - 1.

    Args:
        candidates: (B, N) bool.
        limit: (B,) int64.

    Returns:
        (B, N) bool.
    """
    limit = limit[:, None]
    total = candidates.sum(1, keepdim=True)
    number = candidates.cumsum(1) - 1  # of each candidate among those of its image

    # Only the smallest i with i * total >= number * limit can give i * total // limit = number.
    i = (number * limit + total - 1) // total.clamp(min=1)
    is_even = (i < limit) & (i * total // limit.clamp(min=1) == number)
    return candidates & (is_even | (total <= limit))
