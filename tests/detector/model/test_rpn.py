"""Proposals, samples and losses of the first stage against MMDetection's numbers."""

import pytest
import torch

from detector.model.anchors import AnchorGenerator
from detector.model.matching import Matcher, PaddedTargets, Sampler
from detector.model.rpn import RPN
from detector.structures import Target
from tests.golden.fill import summary

SIZES = torch.tensor([[97, 141], [84, 148]])
PAD_SIZES = torch.tensor([[128, 160], [96, 160]])


def head(candidates=(2000, 1000), proposals=1000, min_size=0.0):
    return RPN(
        4,
        AnchorGenerator((4, 8, 16, 32, 64), 8.0, (0.5, 1.0, 2.0)),
        Matcher(0.7, 0.3, 0.3),
        Sampler(256, 0.5, "spread"),
        0.7,
        candidates,
        proposals,
        min_size,
    ).double()


@pytest.fixture
def predictions(golden):
    arrays, params = golden("heads")
    maps = {}
    for kind in ("cls", "reg"):
        maps[kind] = [torch.from_numpy(arrays[f"rpn.{kind}{i}"]).double().requires_grad_() for i in range(5)]
    logits = [x.permute(0, 2, 3, 1).flatten(1) for x in maps["cls"]]
    deltas = [x.permute(0, 2, 3, 1).reshape(2, -1, 4) for x in maps["reg"]]
    return arrays, params["rpn"]["feature_sizes"], maps, logits, deltas


@pytest.mark.parametrize(
    ("case", "training", "options"),
    [
        ("train", True, {}),
        ("test", False, {}),
        ("small", False, {"candidates": (150, 150), "proposals": 60, "min_size": 6.0}),
    ],
)
def test_proposals_golden(predictions, case, training, options):
    arrays, shapes, _, logits, deltas = predictions
    rpn = head(**options).train(training)
    boxes, scores, valid = rpn.propose(logits, deltas, rpn.anchors(shapes), SIZES)
    for image in range(2):
        expected = torch.from_numpy(arrays[f"rpn.{case}.img{image}.bboxes"])
        assert valid[image].sum() == len(expected)
        torch.testing.assert_close(boxes[image][valid[image]], expected, rtol=1e-12, atol=1e-11)
        expected = torch.from_numpy(arrays[f"rpn.{case}.img{image}.scores"])
        torch.testing.assert_close(scores[image][valid[image]], expected, rtol=1e-12, atol=1e-12)


def test_samples_and_losses_golden(predictions):
    arrays, shapes, maps, logits, deltas = predictions
    rpn = head()
    anchors = torch.cat(rpn.anchors(shapes))
    valid = rpn.anchors.valid(shapes, PAD_SIZES)
    targets = [torch.from_numpy(arrays[f"rpn.img{image}.gt_bboxes"]).double() for image in range(2)]
    targets = PaddedTargets.of(
        [Target(box, torch.zeros(len(box), dtype=torch.int64)) for box in targets], torch.float64
    )
    samples = rpn.sample(anchors, valid, targets, torch.zeros(2, dtype=torch.int64))
    for image in range(2):
        among_valid = valid[image].cumsum(0) - 1
        positive = samples.positive[image]
        negative = samples.valid[image] & ~positive
        assert among_valid[samples.index[image][positive]].tolist() == arrays[f"rpn.img{image}.pos_inds"].tolist()
        assert among_valid[samples.index[image][negative]].tolist() == arrays[f"rpn.img{image}.neg_inds"].tolist()
        assert samples.target[image][positive].tolist() == arrays[f"rpn.img{image}.pos_gt"].tolist()
    losses = rpn.losses(torch.cat(logits, 1), torch.cat(deltas, 1), anchors, samples, targets)
    assert abs(losses["loss_rpn_cls"].item() - arrays["rpn.loss.cls"].sum()) < 1e-12
    assert abs(losses["loss_rpn_bbox"].item() - arrays["rpn.loss.bbox"].sum()) < 1e-12
    sum(losses.values()).backward()
    for kind in ("cls", "reg"):
        for level, leaf in enumerate(maps[kind]):
            found = summary(leaf.grad.numpy(), 1024)
            name = f"rpn.loss.grad_{kind}{level}"
            assert abs(found["samples"] - arrays[f"{name}.samples"]).max() < 1e-13, name
            assert abs(found["stats"] - arrays[f"{name}.stats"]).max() < 1e-11, name
