"""Assignment against MMDetection's MaxIoUAssigner, sampling against its definition."""

import pytest
import torch

from detector.model.anchors import AnchorGenerator
from detector.model.matching import Matcher, PaddedTargets, Sampler, random_keys
from detector.structures import Target

RPN = Matcher(0.7, 0.3, low_quality=0.3)
RCNN = Matcher(0.5, 0.5)


def target(boxes):
    return Target(boxes, torch.zeros(len(boxes), dtype=torch.int64))


@pytest.mark.parametrize("head", ["rpn", "rcnn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_assign_golden(golden, head, dtype):
    """All cases at once, as one padded batch."""
    arrays, _ = golden("heads")
    cases = [f"assign.{head}{i}" for i in range(6)]
    boxes = [torch.from_numpy(arrays[f"{case}.priors"]).to(dtype) for case in cases]
    targets = [target(torch.from_numpy(arrays[f"{case}.gt_bboxes"]).to(dtype)) for case in cases]
    most = max(len(box) for box in boxes)
    padded = torch.stack([torch.cat([box, torch.full((most - len(box), 4), 7.0, dtype=dtype)]) for box in boxes])
    valid = torch.stack([torch.arange(most) < len(box) for box in boxes])
    assigned = (RPN if head == "rpn" else RCNN)(PaddedTargets.of(targets, dtype), padded, valid)
    for case, row, box in zip(cases, assigned, boxes, strict=True):
        assert row[: len(box)].tolist() == arrays[f"{case}.gt_inds"].tolist(), case
        assert (row[len(box) :] == -1).all(), case


@pytest.mark.parametrize("case", ["assign.ties0", "assign.ties1"])
@pytest.mark.parametrize(("dtype", "suffix"), [(torch.float32, "f32"), (torch.float64, "f64")])
def test_ties_golden(golden, case, dtype, suffix):
    arrays, params = golden("heads")
    grid = AnchorGenerator((4, 8, 16, 32, 64), 8.0, (0.5, 1.0, 2.0)).to(dtype)
    anchors = torch.cat(grid(params[case]["feature_sizes"]))
    targets = PaddedTargets.of([target(torch.from_numpy(arrays[f"{case}.gt_bboxes"]).to(dtype))], dtype)
    assigned = RPN(targets, anchors[None], torch.ones(1, len(anchors), dtype=torch.bool))
    assert assigned[0].tolist() == arrays[f"{case}.gt_inds_{suffix}"].tolist()


def gallery_choice(gallery, count, rule):
    if len(gallery) <= count:
        return gallery
    if rule == "first":
        return gallery[:count]
    return gallery[torch.arange(count) * len(gallery) // count]


@pytest.mark.parametrize("rule", ["first", "spread"])
@pytest.mark.parametrize("count", [7, 16, 64, 300])
def test_deterministic_rules_are_their_definition(rule, count):
    assigned = torch.randint(-1, 4, (5, 211))
    assigned[1][assigned[1] > 0] = -1
    assigned[2] = 0
    assigned[3] = -1
    samples = Sampler(count, 0.5, rule)(assigned, torch.zeros(5, dtype=torch.int64))
    for image, row in enumerate(assigned):
        positives = gallery_choice((row > 0).nonzero().flatten(), count // 2, rule)
        negatives = gallery_choice((row == 0).nonzero().flatten(), count - len(positives), rule)
        valid = samples.valid[image]
        assert samples.index[image][valid].tolist() == [*positives.tolist(), *negatives.tolist()]
        assert samples.positive[image][valid].tolist() == [True] * len(positives) + [False] * len(negatives)
        assert samples.target[image][samples.positive[image]].tolist() == (row[positives] - 1).tolist()


def test_random_rule_counts_and_independence():
    """Numbers of positives and negatives as RandomSampler's; a row depends on its own seed alone."""
    assigned = torch.cat([torch.full((3, 40), 2), torch.zeros(3, 200, dtype=torch.int64), torch.full((3, 9), -1)], 1)
    assigned[1, 5:40] = -1
    sampler = Sampler(64, 0.25)
    samples = sampler(assigned, torch.tensor([5, 6, 7]))
    assert samples.positive.sum(1).tolist() == [16, 5, 16]
    assert samples.valid.sum(1).tolist() == [64, 64, 64]
    assert (assigned.gather(1, samples.index)[samples.valid] >= 0).all()
    for image in range(3):
        chosen = samples.index[image]
        assert len(chosen.unique()) == 64
        alone = sampler(assigned[image : image + 1], torch.tensor([5 + image]))
        assert torch.equal(alone.index[0], chosen)
    assert not torch.equal(samples.index[0], sampler(assigned, torch.tensor([50, 6, 7])).index[0])


def test_random_rule_ignores_padding_ahead():
    """The same proposals are drawn behind 2 ground truths and behind 5 with padding."""
    proposals = torch.randint(-1, 3, (3, 200))
    seeds, sampler = torch.tensor([5, 6, 7]), Sampler(64, 0.25)
    few = sampler(torch.cat([torch.tensor([[1, 2]]).expand(3, -1), proposals], 1), seeds, ahead=2)
    many = sampler(torch.cat([torch.tensor([[1, 2, -1, -1, -1]]).expand(3, -1), proposals], 1), seeds, ahead=5)
    for image in range(3):
        assert few.index[image].tolist() == [i if i < 2 else i - 3 for i in many.index[image].tolist()]


def test_random_rule_is_uniform():
    """Each of 50 candidates is among 10 of them equally often over 4000 seeds: within 5 standard deviations."""
    samples = Sampler(10, 0.0)(torch.zeros(4000, 50, dtype=torch.int64), torch.arange(4000) * 1009 - 3)
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


def test_no_boxes_and_no_targets():
    targets = PaddedTargets.of([target(torch.zeros(0, 4))], torch.float32)
    assigned = RPN(targets, torch.zeros(1, 0, 4), torch.zeros(1, 0, dtype=torch.bool))
    samples = Sampler(16, 0.5)(assigned, torch.zeros(1, dtype=torch.int64))
    assert assigned.shape == (1, 0)
    assert not samples.valid.any()
