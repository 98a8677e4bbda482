"""Cascade R-CNN: its stages one after the other, in training and detection, and its behavior at the edges."""

from dataclasses import replace

import pytest
import torch

from detector import Batch, FasterRCNN, Target
from detector.ops import boxes as box_ops
from tests.detector.model.test_faster_rcnn import SMALL, small_batch

CASCADE = replace(SMALL, cascade=True, score_threshold=0.0, max_detections=20)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = FasterRCNN(CASCADE).double()
    for head in model.roi_head.bbox_head:  # boxes that move, classes that differ
        torch.nn.init.normal_(head.fc_reg.weight, std=0.3)
        torch.nn.init.normal_(head.fc_cls.weight, std=0.3)
    return model


def watch(part, name):
    """Return a list that receives arguments and result of each call of a method."""
    method = getattr(part, name)
    calls = []

    def call(*arguments):
        result = method(*arguments)
        calls.append((arguments, result))
        return result

    setattr(part, name, call)
    return calls


def test_detections_are_those_of_the_heads_one_by_one(model):
    """Logits are the mean of three heads; each takes the boxes of the one before; the last one gives the boxes."""
    model.eval()
    proposed = watch(model.rpn_head, "propose")
    suppressed = watch(model.roi_head, "detect")
    batch = small_batch()
    with torch.no_grad():
        model(batch)
        features = model.features(model.normalize(batch))
    _, (proposals, _, valid) = proposed[0]
    logits, deltas, boxes, _, _ = suppressed[0][0]

    stds = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
    for image in range(2):
        regions = proposals[image][valid[image]]
        size = batch.sizes[image : image + 1]
        total = 0
        for stage in range(3):
            rois = torch.cat([torch.full((len(regions), 1), float(image)).double(), regions], 1)
            with torch.no_grad():
                pooled = model.roi_head.bbox_roi_extractor[stage](features, rois)
                stage_logits, stage_deltas = model.roi_head.bbox_head[stage](pooled)
            total = total + stage_logits
            last_regions = regions
            regions = box_ops.clip(box_ops.decode(regions, stage_deltas[:, 0], stds[stage])[None], size)[0]
        torch.testing.assert_close(logits[image][valid[image]], total / 3)
        torch.testing.assert_close(boxes[image][valid[image]], last_regions)
        torch.testing.assert_close(deltas[image][valid[image]], stage_deltas)


def test_stages_learn_from_the_boxes_of_the_one_before(model):
    """Without its ground truths, which the next sampler adds again, and with a stricter IoU each."""
    model.train()
    sampled = watch(model.roi_head, "sample")
    refined = watch(model.roi_head, "refine")
    losses = model(small_batch())
    assert list(losses) == [
        "loss_rpn_cls",
        "loss_rpn_bbox",
        *(f"s{stage}.loss_{kind}" for stage in range(3) for kind in ("cls", "bbox")),
    ]
    assert len(sampled) == 3
    assert len(refined) == 2
    for stage in (1, 2):
        (proposals, valid, *_), _ = sampled[stage]
        _, (_, samples) = sampled[stage - 1]
        assert torch.equal(proposals, refined[stage - 1][1])
        is_ground_truth = samples.index < 2
        assert (is_ground_truth & samples.valid).any()
        assert torch.equal(valid, samples.valid & ~is_ground_truth)
    assert [stage.matcher.positive_iou for stage in model.roi_head.stages] == [0.5, 0.6, 0.7]
    assert [stage.matcher.low_quality_iou for stage in model.roi_head.stages] == [None] * 3


def test_loss_weights(model):
    """A stage counts less and less: its losses are the weight times those of a stage of weight 1."""
    model.train()
    losses = model(small_batch())
    model.roi_head.stages = tuple(replace(stage, loss_weight=1.0) for stage in model.roi_head.stages)
    unweighted = model(small_batch())
    for stage, weight in enumerate((1, 0.5, 0.25)):
        for kind in ("cls", "bbox"):
            name = f"s{stage}.loss_{kind}"
            torch.testing.assert_close(losses[name], weight * unweighted[name])


def test_batch_is_its_images_one_by_one(model):
    model.train()
    batch = small_batch(2)
    together = model(batch)
    alone = []
    for i in range(2):
        image = slice(i, i + 1)
        alone.append(model(Batch(batch.images[image], batch.sizes[image], batch.targets[image], batch.seeds[image])))
    for name in ("s0.loss_cls", "s0.loss_bbox"):  # later stages have different numbers of regions
        torch.testing.assert_close(together[name], (alone[0][name] + alone[1][name]) / 2)

    model.eval()
    with torch.no_grad():
        detections = model(batch)
        for i in range(2):
            (one,) = model(Batch(batch.images[i : i + 1], batch.sizes[i : i + 1]))
            torch.testing.assert_close(one.boxes, detections[i].boxes)
            torch.testing.assert_close(one.scores, detections[i].scores)
            assert torch.equal(one.labels, detections[i].labels)


def test_boxes_without_width_give_no_nan(model):
    """A head can move all boxes out of the image, where clipping leaves nothing of them."""
    torch.nn.init.constant_(model.roi_head.bbox_head[0].fc_reg.bias, 100.0)
    losses = model.train()(small_batch())
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    for detections in model(small_batch()):
        assert detections.boxes.isfinite().all()


def test_images_without_objects(model):
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    batch = small_batch()
    losses = model.train()(Batch(batch.images, batch.sizes, [nothing] * 2, batch.seeds))
    sum(losses.values()).backward()
    assert all(losses[f"s{stage}.loss_bbox"] == 0 for stage in range(3))
    assert all(losses[f"s{stage}.loss_cls"] > 0 for stage in range(3))
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_masks_are_the_mean_of_the_heads():
    torch.manual_seed(0)
    model = FasterRCNN(replace(CASCADE, mask=True)).eval()
    batch = small_batch()
    with torch.no_grad():
        boxes, _, labels, valid, masks = model.detect(batch)
        features = model.features(model.normalize(batch))
        stages = [model.roi_head.mask_logits(features, boxes, labels, valid, stage).sigmoid() for stage in range(3)]
    assert valid.any()
    torch.testing.assert_close(masks[valid], (sum(stages) / 3)[valid])
    assert len({tuple(parameter.shape) for parameter in model.roi_head.mask_head[0].parameters()}) > 1


def test_rpn_learns_from_anchors_inside_the_image():
    model = FasterRCNN(CASCADE)
    shapes = [(24, 32), (12, 16)]
    anchors = torch.tensor(
        [[0.0, 0.0, 10.0, 10.0], [-1.0, 0.0, 10.0, 10.0], [0.0, 0.0, 100.0, 89.0], [0, 0, 100.0, 90]]
    )
    generator = model.rpn_head.anchor_generator
    generator_flags = torch.ones(2, 4, dtype=torch.bool)
    generator.valid_flags = lambda level_shapes, pad_sizes: generator_flags
    flags = model.rpn_head.valid_anchors(shapes, anchors, torch.tensor([[90, 128], [90, 100]]))
    assert flags.tolist() == [[True, False, True, False], [True, False, False, False]]
    model.rpn_head.inside_only = False
    assert model.rpn_head.valid_anchors(shapes, anchors, torch.tensor([[90, 128], [90, 100]])).all()


@pytest.mark.parametrize(("iou", "fits"), [(0.8, True), (0.81, False)])
def test_largest_iou(iou, fits):
    if fits:
        assert replace(CASCADE, roi_positive_iou=iou).roi_positive_iou == iou
    else:
        with pytest.raises(ValueError, match=r"'roi_positive_iou': expected 0 to 0\.8 with cascade True, got 0\.81"):
            replace(CASCADE, roi_positive_iou=iou)
