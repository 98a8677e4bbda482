"""Sampling against its definition."""

import pytest
import torch

from detector.model.sampler import BoxSampler, random_keys


def choose_by_definition(candidates, count, rule):
    if len(candidates) <= count:
        return candidates
    if rule == "first":
        return candidates[:count]
    return candidates[torch.arange(count) * len(candidates) // count]


@pytest.mark.parametrize("rule", ["first", "spread"])
@pytest.mark.parametrize("count", [7, 16, 64, 300])
def test_deterministic_rules_are_their_definition(rule, count):
    assigned = torch.randint(-1, 4, (5, 211))
    assigned[1][assigned[1] > 0] = -1
    assigned[2] = 0
    assigned[3] = -1
    samples = BoxSampler(count, 0.5, rule)(assigned, torch.zeros(5, dtype=torch.int64))

    for image, row in enumerate(assigned):
        positives = choose_by_definition((row > 0).nonzero().flatten(), count // 2, rule)
        negatives = choose_by_definition((row == 0).nonzero().flatten(), count - len(positives), rule)
        valid = samples.valid[image]
        assert samples.index[image][valid].tolist() == [*positives.tolist(), *negatives.tolist()]
        assert samples.positive[image][valid].tolist() == [True] * len(positives) + [False] * len(negatives)
        assert samples.target[image][samples.positive[image]].tolist() == (row[positives] - 1).tolist()


def test_random_rule_counts_and_independence():
    """Numbers of positives and negatives as RandomSampler's; a row depends on its own seed alone."""
    positives = torch.full((3, 40), 2)
    negatives = torch.zeros(3, 200, dtype=torch.int64)
    ignored = torch.full((3, 9), -1)
    assigned = torch.cat([positives, negatives, ignored], 1)
    assigned[1, 5:40] = -1
    sampler = BoxSampler(64, 0.25)

    samples = sampler(assigned, torch.tensor([5, 6, 7]))
    assert samples.positive.sum(1).tolist() == [16, 5, 16]
    assert samples.valid.sum(1).tolist() == [64, 64, 64]
    assert (assigned.gather(1, samples.index)[samples.valid] >= 0).all()
    for image in range(3):
        index = samples.index[image]
        assert len(index.unique()) == 64
        alone = sampler(assigned[image : image + 1], torch.tensor([5 + image]))
        assert torch.equal(alone.index[0], index)
    assert not torch.equal(samples.index[0], sampler(assigned, torch.tensor([50, 6, 7])).index[0])


def test_random_rule_ignores_padding_of_targets():
    """The same proposals are drawn behind 2 ground truths and behind 5 with padding."""
    proposals = torch.randint(-1, 3, (3, 200))
    seeds = torch.tensor([5, 6, 7])
    sampler = BoxSampler(64, 0.25)

    two_targets = torch.tensor([[1, 2]]).expand(3, -1)
    five_targets = torch.tensor([[1, 2, -1, -1, -1]]).expand(3, -1)
    few = sampler(torch.cat([two_targets, proposals], 1), seeds, num_targets=2)
    many = sampler(torch.cat([five_targets, proposals], 1), seeds, num_targets=5)
    for image in range(3):
        without_padding = [i if i < 2 else i - 3 for i in many.index[image].tolist()]
        assert few.index[image].tolist() == without_padding


def test_random_rule_is_uniform():
    """Each of 50 candidates is among 10 of them equally often over 4000 seeds: within 5 standard deviations."""
    assigned = torch.zeros(4000, 50, dtype=torch.int64)
    samples = BoxSampler(10, 0.0)(assigned, torch.arange(4000) * 1009 - 3)
    counts = samples.index.flatten().bincount(minlength=50).double()
    assert ((counts - 800).abs() < 5 * (4000 * 0.2 * 0.8) ** 0.5).all()


def test_random_keys_are_splitmix64():
    def reference(seed, i):
        x = (seed + i * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        return (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64

    keys = random_keys(torch.tensor([3, -9]), 20)
    for row, seed in zip(keys.tolist(), (3, -9), strict=True):
        for i, key in enumerate(row, start=1):
            x = reference(seed, i)
            signed = x - 2**64 if x >= 2**63 else x
            assert key == (signed ^ (signed >> 31)) & (2**62 - 1)


def test_no_boxes():
    assigned = torch.zeros(1, 0, dtype=torch.int64)
    samples = BoxSampler(16, 0.5)(assigned, torch.zeros(1, dtype=torch.int64))
    assert not samples.valid.any()


def test_random_keys_are_equal_when_compiled():
    """With the default backend: a product that overflows in its C++ code would end the process."""
    seeds = torch.tensor([0, 3, -9, 2**63 - 1])
    compiled = torch.compile(random_keys, fullgraph=True)
    for count in (1, 37, 1000):
        assert torch.equal(compiled(seeds, count), random_keys(seeds, count))
