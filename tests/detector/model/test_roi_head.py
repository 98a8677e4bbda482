"""Samples, losses and detections of the second stage against MMDetection's numbers."""

import pytest
import torch

from detector.model.matching import Matcher, PaddedTargets, Sampler
from detector.model.roi_head import RoIHead
from detector.structures import Target
from tests.golden.fill import summary


def head(score_threshold=0.05):
    matcher, sampler = Matcher(0.5, 0.5), Sampler(512, 0.25, "first")
    return RoIHead(2, 7, 8, 80, (4, 8, 16, 32), matcher, sampler, score_threshold, 0.5, 100)


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
    sizes = torch.tensor([meta["img_shape"] for meta in metas])
    valid = torch.ones(rois.shape[:2], dtype=torch.bool)
    boxes, scores, labels, valid = head(threshold).detect(
        logits, deltas.unflatten(2, (80, 4)), rois[..., 1:], valid, sizes
    )
    for image, meta in enumerate(metas):
        real = valid[image]
        name = f"rcnn.{case}_rescale{rescale}.img{image}"
        assert labels[image][real].tolist() == arrays[f"{name}.labels"].tolist()
        scale = torch.tensor(meta["scale_factor"], dtype=torch.float64).repeat(2) if rescale else 1
        torch.testing.assert_close(
            boxes[image][real] / scale, torch.from_numpy(arrays[f"{name}.bboxes"]), rtol=1e-12, atol=1e-10
        )
        torch.testing.assert_close(
            scores[image][real], torch.from_numpy(arrays[f"{name}.scores"]), rtol=1e-12, atol=1e-12
        )


def test_samples_and_losses_golden(golden):
    arrays, _ = golden("heads")
    roi_head = head()
    proposals = [torch.from_numpy(arrays[f"rcnn_loss.img{i}.proposals"]).double() for i in range(2)]
    targets = PaddedTargets.of(
        [
            Target(
                torch.from_numpy(arrays[f"rcnn_loss.img{i}.gt_bboxes"]).double(),
                torch.from_numpy(arrays[f"rcnn_loss.img{i}.gt_labels"]),
            )
            for i in range(2)
        ],
        torch.float64,
    )
    valid = torch.stack([torch.arange(700) < len(boxes) for boxes in proposals])
    padded = torch.stack([torch.cat([boxes, torch.zeros(700 - len(boxes), 4)]) for boxes in proposals])
    boxes, samples = roi_head.sample(padded, valid, targets, torch.zeros(2, dtype=torch.int64))
    for i in range(2):
        among_real = torch.cat([targets.valid[i], valid[i]]).cumsum(0) - 1
        positive, negative = samples.positive[i], samples.valid[i] & ~samples.positive[i]
        assert among_real[samples.index[i][positive]].tolist() == arrays[f"rcnn_loss.img{i}.pos_inds"].tolist()
        assert among_real[samples.index[i][negative]].tolist() == arrays[f"rcnn_loss.img{i}.neg_inds"].tolist()
        assert samples.target[i][positive].tolist() == arrays[f"rcnn_loss.img{i}.pos_gt"].tolist()
    logits = torch.from_numpy(arrays["rcnn_loss.cls_score"]).double().view(2, 512, 81).requires_grad_()
    own = torch.from_numpy(arrays["rcnn_loss.bbox_pred_of_label"]).double().requires_grad_()
    column = torch.from_numpy(arrays["rcnn_loss.labels"]).long().clamp(max=79)
    deltas = torch.zeros(1024, 80, 4, dtype=torch.float64)
    deltas = deltas.index_put((torch.arange(1024), column), own).view(2, 512, 80, 4)
    losses = roi_head.losses(logits, deltas, boxes, samples, targets)
    assert abs(losses["loss_cls"].item() - arrays["rcnn_loss.loss_cls"]) < 1e-12
    assert abs(losses["loss_bbox"].item() - arrays["rcnn_loss.loss_bbox"]) < 1e-12
    sum(losses.values()).backward()
    found = summary(logits.grad.view(1024, 81).numpy(), 2048)
    assert abs(found["samples"] - arrays["rcnn_loss.grad_cls.samples"]).max() < 1e-14
    assert abs(found["stats"] - arrays["rcnn_loss.grad_cls.stats"]).max() < 1e-12
    assert abs(own.grad.numpy() - arrays["rcnn_loss.grad_bbox_pred_of_label"]).max() < 1e-14


def test_image_without_target_or_proposal():
    """Losses are finite, the box loss is zero, and gradients reach the logits only where a sample is."""
    roi_head = head()
    targets = PaddedTargets.of([Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))], torch.float32)
    boxes, samples = roi_head.sample(
        torch.zeros(1, 6, 4), torch.zeros(1, 6, dtype=torch.bool), targets, torch.zeros(1).long()
    )
    logits = torch.randn(1, boxes.shape[1], 81, requires_grad=True)
    losses = roi_head.losses(logits, torch.randn(1, boxes.shape[1], 80, 4), boxes, samples, targets)
    sum(losses.values()).backward()
    assert losses["loss_cls"].item() == losses["loss_bbox"].item() == 0
    assert logits.grad.abs().sum() == 0
