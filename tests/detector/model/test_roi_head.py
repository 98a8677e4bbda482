"""Samples, losses and detections of the second stage against MMDetection's numbers."""

import pytest
import torch

from detector.model.matcher import Matcher
from detector.model.padded_targets import pad_targets
from detector.model.roi_head import RoIHead, RoIStage
from detector.model.sampler import BoxSampler
from detector.structures import Target
from tests.golden.fill import summary


def make_head(score_threshold=0.05):
    return RoIHead(
        channels=2,
        fc_channels=8,
        num_classes=80,
        strides=(4, 8, 16, 32),
        stages=[RoIStage(Matcher(0.5, 0.5))],
        sampler=BoxSampler(512, 0.25, "first"),
        score_threshold=score_threshold,
        nms_iou=0.5,
        max_detections=100,
    )


@pytest.mark.parametrize(("case", "threshold"), [("test", 0.05), ("thr", 0.2)])
@pytest.mark.parametrize("rescale", [0, 1])
def test_detections_golden(golden, case, threshold, rescale):
    """Suppression in the resized frame keeps the same boxes as in the original one."""
    arrays, params = golden("heads")
    metas = params["rcnn"]["img_metas"]
    rois, logits, deltas = (
        torch.stack([torch.from_numpy(arrays[f"rcnn.img{i}.{name}"]).double() for i in range(2)])
        for name in ("rois", "cls_score", "bbox_pred")
    )
    deltas = deltas.unflatten(2, (80, 4))
    proposals = rois[..., 1:]
    valid = torch.ones(rois.shape[:2], dtype=torch.bool)
    sizes = torch.tensor([meta["img_shape"] for meta in metas])

    boxes, scores, labels, valid = make_head(threshold).detect(logits, deltas, proposals, valid, sizes)
    for image, meta in enumerate(metas):
        name = f"rcnn.{case}_rescale{rescale}.img{image}"
        detected = valid[image]
        assert labels[image][detected].tolist() == arrays[f"{name}.labels"].tolist()

        scale = torch.tensor(meta["scale_factor"], dtype=torch.float64).repeat(2) if rescale else 1
        expected = torch.from_numpy(arrays[f"{name}.bboxes"])
        torch.testing.assert_close(boxes[image][detected] / scale, expected, rtol=1e-12, atol=1e-10)
        expected = torch.from_numpy(arrays[f"{name}.scores"])
        torch.testing.assert_close(scores[image][detected], expected, rtol=1e-12, atol=1e-12)


def golden_targets(arrays):
    targets = []
    for i in range(2):
        boxes = torch.from_numpy(arrays[f"rcnn_loss.img{i}.gt_bboxes"]).double()
        labels = torch.from_numpy(arrays[f"rcnn_loss.img{i}.gt_labels"])
        targets.append(Target(boxes, labels))
    return pad_targets(targets, torch.float64)


def test_samples_and_losses_golden(golden):
    arrays, _ = golden("heads")
    head = make_head()
    targets = golden_targets(arrays)
    proposals = [torch.from_numpy(arrays[f"rcnn_loss.img{i}.proposals"]).double() for i in range(2)]
    valid = torch.stack([torch.arange(700) < len(boxes) for boxes in proposals])
    padded = torch.stack([torch.cat([boxes, torch.zeros(700 - len(boxes), 4)]) for boxes in proposals])

    boxes, samples = head.sample(padded, valid, targets, torch.zeros(2, dtype=torch.int64))
    for i in range(2):
        among_valid = torch.cat([targets.valid[i], valid[i]]).cumsum(0) - 1
        positive = samples.positive[i]
        negative = samples.valid[i] & ~positive
        assert among_valid[samples.index[i][positive]].tolist() == arrays[f"rcnn_loss.img{i}.pos_inds"].tolist()
        assert among_valid[samples.index[i][negative]].tolist() == arrays[f"rcnn_loss.img{i}.neg_inds"].tolist()
        assert samples.target[i][positive].tolist() == arrays[f"rcnn_loss.img{i}.pos_gt"].tolist()

    logits = torch.from_numpy(arrays["rcnn_loss.cls_score"]).double().view(2, 512, 81).requires_grad_()
    class_deltas = torch.from_numpy(arrays["rcnn_loss.bbox_pred_of_label"]).double().requires_grad_()
    column = torch.from_numpy(arrays["rcnn_loss.labels"]).long().clamp(max=79)
    deltas = torch.zeros(1024, 80, 4, dtype=torch.float64)
    deltas = deltas.index_put((torch.arange(1024), column), class_deltas).view(2, 512, 80, 4)

    losses = head.losses(logits, deltas, boxes, samples, targets)
    assert abs(losses["loss_cls"].item() - arrays["rcnn_loss.loss_cls"]) < 1e-12
    assert abs(losses["loss_bbox"].item() - arrays["rcnn_loss.loss_bbox"]) < 1e-12

    sum(losses.values()).backward()
    gradient = summary(logits.grad.view(1024, 81).numpy(), 2048)
    assert abs(gradient["samples"] - arrays["rcnn_loss.grad_cls.samples"]).max() < 1e-14
    assert abs(gradient["stats"] - arrays["rcnn_loss.grad_cls.stats"]).max() < 1e-12
    assert abs(class_deltas.grad.numpy() - arrays["rcnn_loss.grad_bbox_pred_of_label"]).max() < 1e-14


def test_image_without_target_or_proposal():
    """Losses are finite, the box loss is zero, and gradients reach the logits only where a sample is."""
    head = make_head()
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    targets = pad_targets([nothing], torch.float32)
    valid = torch.zeros(1, 6, dtype=torch.bool)
    boxes, samples = head.sample(torch.zeros(1, 6, 4), valid, targets, torch.zeros(1).long())

    logits = torch.randn(1, boxes.shape[1], 81, requires_grad=True)
    deltas = torch.randn(1, boxes.shape[1], 80, 4)
    losses = head.losses(logits, deltas, boxes, samples, targets)
    sum(losses.values()).backward()
    assert losses["loss_cls"].item() == losses["loss_bbox"].item() == 0
    assert logits.grad.abs().sum() == 0
