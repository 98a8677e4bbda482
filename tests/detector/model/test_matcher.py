"""Assignment of boxes to ground truths against MMDetection's MaxIoUAssigner."""

import pytest
import torch

from detector.model.anchors import AnchorGenerator
from detector.model.matcher import Matcher
from detector.model.padded_targets import pad_targets
from detector.structures import Target

MATCHERS = {
    "rpn": Matcher(0.7, 0.3, low_quality_iou=0.3),
    "rcnn": Matcher(0.5, 0.5),
}


def make_target(boxes):
    return Target(boxes, torch.zeros(len(boxes), dtype=torch.int64))


@pytest.mark.parametrize("head", MATCHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_assign_golden(golden, head, dtype):
    """All cases at once, as one padded batch."""
    arrays, _ = golden("heads")
    cases = [f"assign.{head}{i}" for i in range(6)]
    boxes = [torch.from_numpy(arrays[f"{case}.priors"]).to(dtype) for case in cases]
    targets = [make_target(torch.from_numpy(arrays[f"{case}.gt_bboxes"]).to(dtype)) for case in cases]

    most = max(len(box) for box in boxes)
    padded = torch.full((len(boxes), most, 4), 7.0, dtype=dtype)
    valid = torch.zeros(len(boxes), most, dtype=torch.bool)
    for i, box in enumerate(boxes):
        padded[i, : len(box)] = box
        valid[i, : len(box)] = True

    assigned = MATCHERS[head](pad_targets(targets, dtype), padded, valid)
    for case, row, box in zip(cases, assigned, boxes, strict=True):
        assert row[: len(box)].tolist() == arrays[f"{case}.gt_inds"].tolist(), case
        assert (row[len(box) :] == -1).all(), case


@pytest.mark.parametrize("case", ["assign.ties0", "assign.ties1"])
@pytest.mark.parametrize(("dtype", "suffix"), [(torch.float32, "f32"), (torch.float64, "f64")])
def test_ties_golden(golden, case, dtype, suffix):
    arrays, params = golden("heads")
    generator = AnchorGenerator((4, 8, 16, 32, 64), 8.0, (0.5, 1.0, 2.0)).to(dtype)
    anchors = torch.cat(generator(params[case]["feature_sizes"]))
    target = make_target(torch.from_numpy(arrays[f"{case}.gt_bboxes"]).to(dtype))
    valid = torch.ones(1, len(anchors), dtype=torch.bool)

    assigned = MATCHERS["rpn"](pad_targets([target], dtype), anchors[None], valid)
    assert assigned[0].tolist() == arrays[f"{case}.gt_inds_{suffix}"].tolist()


def test_no_boxes_and_no_targets():
    targets = pad_targets([make_target(torch.zeros(0, 4))], torch.float32)
    assigned = MATCHERS["rpn"](targets, torch.zeros(1, 0, 4), torch.zeros(1, 0, dtype=torch.bool))
    assert assigned.shape == (1, 0)
