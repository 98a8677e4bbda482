"""Proposals, samples and losses of the first stage against MMDetection's numbers."""

import pytest
import torch

from detector.model.anchors import AnchorGenerator
from detector.model.matcher import Matcher
from detector.model.padded_targets import pad_targets
from detector.model.rpn import RPN
from detector.model.sampler import BoxSampler
from detector.structures import Target
from tests.golden.fill import summary

SIZES = torch.tensor([[97, 141], [84, 148]])
PAD_SIZES = torch.tensor([[128, 160], [96, 160]])


def make_head(pre_nms_top_n=(2000, 1000), post_nms_top_n=(1000, 1000), min_size=0.0):
    head = RPN(
        channels=4,
        anchor_generator=AnchorGenerator((4, 8, 16, 32, 64), 8.0, (0.5, 1.0, 2.0)),
        matcher=Matcher(0.7, 0.3, 0.3),
        sampler=BoxSampler(256, 0.5, "spread"),
        nms_iou=0.7,
        pre_nms_top_n=pre_nms_top_n,
        post_nms_top_n=post_nms_top_n,
        min_size=min_size,
    )
    return head.double()


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
        ("small", False, {"pre_nms_top_n": (150, 150), "post_nms_top_n": (60, 60), "min_size": 6.0}),
    ],
)
def test_proposals_golden(predictions, case, training, options):
    arrays, shapes, _, logits, deltas = predictions
    rpn = make_head(**options).train(training)
    boxes, scores, valid = rpn.propose(logits, deltas, rpn.anchor_generator(shapes), SIZES)
    for image in range(2):
        expected = torch.from_numpy(arrays[f"rpn.{case}.img{image}.bboxes"])
        assert valid[image].sum() == len(expected)
        torch.testing.assert_close(boxes[image][valid[image]], expected, rtol=1e-12, atol=1e-11)
        expected = torch.from_numpy(arrays[f"rpn.{case}.img{image}.scores"])
        torch.testing.assert_close(scores[image][valid[image]], expected, rtol=1e-12, atol=1e-12)


def golden_targets(arrays):
    targets = []
    for image in range(2):
        boxes = torch.from_numpy(arrays[f"rpn.img{image}.gt_bboxes"]).double()
        targets.append(Target(boxes, torch.zeros(len(boxes), dtype=torch.int64)))
    return pad_targets(targets, torch.float64)


def test_samples_and_losses_golden(predictions):
    arrays, shapes, maps, logits, deltas = predictions
    rpn = make_head()
    anchors = torch.cat(rpn.anchor_generator(shapes))
    valid = rpn.anchor_generator.valid_flags(shapes, PAD_SIZES)
    targets = golden_targets(arrays)

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
            name = f"rpn.loss.grad_{kind}{level}"
            gradient = summary(leaf.grad.numpy(), 1024)
            assert abs(gradient["samples"] - arrays[f"{name}.samples"]).max() < 1e-13, name
            assert abs(gradient["stats"] - arrays[f"{name}.stats"]).max() < 1e-11, name
