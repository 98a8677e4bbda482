"""Which box belongs to which ground truth, and which boxes a loss looks at; whole batches, fixed shapes.

Letters: B images, G padded ground truths, N boxes, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detector.ops.boxes import iou
from detector.structures import Target

NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class PaddedTargets:
    """Ground truth of a batch as three tensors.

    Attributes:
        boxes: (B, G, 4); G is the largest count of the batch and at least 1.
        labels: (B, G) int64.
        valid: (B, G) bool, false on padding.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor

    @staticmethod
    def of(targets: Sequence[Target], dtype: torch.dtype) -> PaddedTargets:
        """Pad the targets of a batch; reads shapes only."""
        count = max(1, *(len(target.labels) for target in targets))
        device = targets[0].boxes.device
        boxes = torch.zeros(len(targets), count, 4, dtype=dtype, device=device)
        labels = torch.zeros(len(targets), count, dtype=torch.int64, device=device)
        valid = torch.zeros(len(targets), count, dtype=torch.bool, device=device)
        for image, target in enumerate(targets):
            found = len(target.labels)
            boxes[image, :found], labels[image, :found], valid[image, :found] = target.boxes, target.labels, True
        return PaddedTargets(boxes, labels, valid)


@dataclass(frozen=True)
class Matcher:
    """Thresholds of the IoU assigner.

    Attributes:
        positive, negative: a box is positive from an IoU of `positive` on and negative below `negative`.
        low_quality: each ground truth also takes the boxes that reach its own best IoU, if that is at least this;
            None turns it off. A later ground truth overwrites an earlier one.
    """

    positive: float
    negative: float
    low_quality: float | None = None

    def __call__(self, targets: PaddedTargets, boxes: Tensor, valid: Tensor) -> Tensor:
        """Assign boxes to ground truths.

        Args:
            boxes: (B, N, 4).
            valid: (B, N) bool; the other boxes are ignored.

        Returns:
            (B, N) int64: -1 ignored, 0 background, g + 1 for ground truth g.

        Source:
            MMDetection's MaxIoUAssigner; ties of a box take the first ground truth.
        """
        overlap = iou(targets.boxes, boxes)  # (B, G, N)
        overlap = torch.where(targets.valid[:, :, None] & valid[:, None, :], overlap, -1)
        best, index = overlap.max(1)
        assigned = torch.where(best >= self.positive, index + 1, torch.where(best < self.negative, 0, -1))
        if self.low_quality is not None and boxes.shape[1]:
            best_of_target = overlap.amax(2)  # (B, G)
            taken = (overlap == best_of_target[:, :, None]) & (best_of_target >= self.low_quality)[:, :, None]
            number = torch.arange(1, overlap.shape[1] + 1, dtype=torch.int32, device=boxes.device)[None, :, None]
            last = torch.where(taken, number, 0).amax(1)
            assigned = torch.where(last > 0, last, assigned)
        return torch.where(valid, assigned, -1)


@dataclass(frozen=True)
class SamplingResult:
    """Boxes that a loss looks at: positives by rising index, then negatives, then padding.

    Attributes:
        index: (B, S) int64 into the boxes; 0 on padding.
        target: (B, S) int64, the ground truth of a positive; 0 elsewhere.
        positive, valid: (B, S) bool.
    """

    index: Tensor
    target: Tensor
    positive: Tensor
    valid: Tensor

    def first(self, count: int) -> SamplingResult:
        """Return the first `count` samples of each image."""
        return SamplingResult(*(column[:, :count] for column in vars(self).values()))


@dataclass(frozen=True)
class Sampler:
    """Choose a fixed number of boxes per image.

    Attributes:
        count: S, samples per image.
        positive_fraction: of `count`, at most; negatives fill up the rest.
        rule: "random"; "first", the lowest indices; "spread", at even distances in the list of candidates. The last two
            exist to compare runs with numbers of other programs.
    """

    count: int
    positive_fraction: float
    rule: str = "random"

    @property
    def most_positives(self) -> int:
        """Positives per image, at most; they stand in the first columns of the samples."""
        return int(self.count * self.positive_fraction)

    def __call__(self, assigned: Tensor, seeds: Tensor, ahead: int = 0) -> SamplingResult:
        """Sample.

        Args:
            assigned: (B, N) int64 of `Matcher`.
            seeds: (B,) int64, used by the random rule: equal seeds choose equally.
            ahead: this many boxes stand in front whose number depends on the batch (padded ground truths); they are
                counted last, so that the draw of the others does not depend on it.

        Source:
            MMDetection's RandomSampler: the same distribution, drawn as the smallest of random keys.
        """
        number = assigned.shape[1]
        positive, negative = assigned > 0, assigned == 0
        keys = random_keys(seeds, number).roll(ahead, 1) if self.rule == "random" else None
        most = self.most_positives
        limit = positive.sum(1).clamp(max=most)
        chosen = self._choose(positive, limit, min(most, number), keys)
        others = self._choose(negative, self.count - limit, min(self.count, number), keys)
        order = torch.cat([chosen, torch.where(others < NEVER, others + number, NEVER)], 1)
        order = order.sort(1).values[:, : self.count]
        valid = order < NEVER
        index = torch.where(valid, order % max(number, 1), 0)
        is_positive = valid & (order < number)
        target = torch.where(is_positive, assigned.gather(1, index) - 1, 0)
        return SamplingResult(index, target, is_positive, valid)

    def _choose(self, candidates: Tensor, limit: Tensor, most: int, keys: Tensor | None) -> Tensor:
        """Return (B, most) indices of chosen candidates, the first `limit` (B,) of them real, NEVER elsewhere."""
        index = torch.arange(candidates.shape[1], device=candidates.device).expand_as(candidates)
        if self.rule == "spread":
            total, limit = candidates.sum(1, keepdim=True), limit[:, None]
            rank = candidates.cumsum(1) - 1
            step = (rank * limit + total - 1) // total.clamp(min=1)  # only this one may land on `rank`
            hit = (step < limit) & (step * total // limit.clamp(min=1) == rank)
            candidates, limit = candidates & (hit | (total <= limit)), limit[:, 0]
        priority = torch.where(candidates, index if keys is None else keys, NEVER)
        smallest, where = priority.topk(most, 1, largest=False, sorted=True)
        real = (torch.arange(most, device=where.device) < limit[:, None]) & (smallest < NEVER)
        return torch.where(real, where, NEVER)


def random_keys(seeds: Tensor, count: int) -> Tensor:
    """Return (B, count) int64 keys in [0, 2^62), a pure function of the seeds on every device.

    Source:
        Steele et al., Fast splittable pseudorandom number generators (SplitMix64), OOPSLA 2014.
    """

    def mix(x: Tensor, shift: int, factor: int) -> Tensor:
        return (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # a logical shift; products wrap

    x = seeds[:, None] + torch.arange(1, count + 1, device=seeds.device) * -0x61C8864680B583EB
    x = mix(mix(x, 30, -0x40A7B892E31B1A47), 27, -0x6B2FB644ECCEEE15)
    return (x ^ (x >> 31)) & ((1 << 62) - 1)
