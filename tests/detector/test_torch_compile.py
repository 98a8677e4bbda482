"""The detector under torch.compile with its default backend: the code that Inductor writes equals eager PyTorch.

What chooses (labels of anchors, samples, boxes that are kept) has to be equal bit for bit; sums may be added up in
another order. On a CPU the C++ code of a step takes minutes to compile, so these tests are slow; random keys and layers
have fast ones beside their other tests.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detector import Batch, FasterRCNN, FasterRCNNConfig, Target
from detector.model.anchors import AnchorGenerator
from detector.model.matcher import Matcher
from detector.model.padded_targets import pad_targets
from detector.model.sampler import BoxSampler
from detector.model.selection import top_scores
from detector.ops import boxes as box_ops
from detector.ops.nms import batched_nms
from detector.ops.roi_align import roi_levels
from triton_dcn import ModulatedDeformConv2dPack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SMALLEST = FasterRCNNConfig(
    depth=18,
    num_classes=3,
    base_channels=16,
    norm="gn",
    frozen_stages=-1,
    fpn_channels=8,
    fc_channels=8,
    rpn_batch_size=32,
    rpn_pre_nms_top_n=(60, 40),
    rpn_post_nms_top_n=40,
    roi_batch_size=16,
    score_threshold=0.0,
)


def integer_boxes(batch, count, extent=24, dtype=torch.float32):
    """Boxes on a coarse grid: many have equal overlaps, some are empty."""
    low = torch.randint(extent, (batch, count, 2))
    sides = torch.randint(extent // 2, (batch, count, 2))
    return torch.cat([low, low + sides], 2).to(dtype)


def assigned_rows(batch, count):
    """Assignments with ignored boxes, and images without positives, without negatives, with neither."""
    assigned = torch.randint(-1, 4, (batch, count))
    assigned[0] = assigned[0].clamp(max=0)
    if batch > 3:
        assigned[1] = assigned[1].abs().clamp(min=1)
        assigned[2] = -1
    return assigned


def choose(images, boxes, labels, matched, matched_valid, assigned, seeds, scores, sizes):
    """Run everything between two predictions and a loss that decides by comparisons, sorting and integers."""
    # also boxes without area
    targets = [Target(box, label, check=False) for box, label in zip(boxes, labels, strict=True)]
    targets = pad_targets(targets, matched.dtype)
    rpn = Matcher(0.7, 0.3, 0.3)(targets, matched, matched_valid)
    roi = Matcher(0.5, 0.5)(targets, matched, matched_valid)
    samples = []
    for rule in ("random", "first", "spread"):
        samples += vars(BoxSampler(16, 0.25, rule)(assigned, seeds, 2)).values()
    kept = batched_nms(matched, scores, matched_valid, 0.5)
    shapes = [(images.shape[2] // stride, images.shape[3] // stride) for stride in (4, 8)]
    flags = AnchorGenerator((4, 8), 2.0, (0.5, 1.0)).valid_flags(shapes, sizes)
    clipped = box_ops.clip(matched, sizes)
    levels = roi_levels(clipped * 40)
    return [rpn, roi, *samples, kept, flags, clipped, levels, *top_scores(scores, kept, 20)]


def choose_call(batch, count, dtype=torch.float32):
    side = 32 * (1 + batch)
    boxes = [integer_boxes(1, number % 4, dtype=dtype)[0] for number in range(batch)]
    labels = [torch.randint(3, (len(box),)) for box in boxes]
    matched = integer_boxes(batch, count, dtype=dtype)
    return (
        torch.zeros(batch, 3, side, side),
        boxes,
        labels,
        matched,
        torch.rand(batch, count) < 0.9,
        assigned_rows(batch, count),
        torch.randint(-(2**62), 2**62, (batch,)),
        torch.rand(batch, count).mul(5).floor().div(5).to(dtype),  # with ties
        torch.randint(1, side, (batch, 2)),
    )


def test_choices_are_equal():
    torch._dynamo.reset()
    arguments = choose_call(4, 50)
    found = torch.compile(choose, fullgraph=True)(*arguments)
    for tensor, expected in zip(found, choose(*arguments), strict=True):
        assert torch.equal(tensor, expected)


class Pyramid(nn.Module):
    """Averages in the place of a feature pyramid, which has no code of its own to compile."""

    def forward(self, x):
        return [F.avg_pool2d(x, stride) for stride in (4, 8, 16, 32, 64)]


def make_model():
    """A detector in float64 with one deformable layer as its backbone."""
    torch.manual_seed(0)
    model = FasterRCNN(SMALLEST)
    model.backbone = ModulatedDeformConv2dPack(3, SMALLEST.fpn_channels, 3, padding=1)
    nn.init.normal_(model.backbone.conv_offset.weight, std=0.1)
    model.neck = Pyramid()
    return model.double()


def make_batch(dtype=torch.float64):
    """Two images of 64 x 64 with two objects and one."""
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    boxes = torch.tensor([[3.0, 5.0, 40.0, 31.0], [20.0, 18.0, 55.0, 60.0], [10.0, 12.0, 29.0, 50.0]], dtype=dtype)
    labels = torch.tensor([0, 2, 1])
    targets = [Target(boxes[:2], labels[:2]), Target(boxes[2:], labels[2:])]
    return Batch(images, torch.tensor([[64, 61], [58, 61]]), targets, torch.tensor([7, 1007]))


def losses_and_gradients(model, network, batch):
    model.zero_grad()
    losses = network(batch)
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def test_training_step():
    """Other samples would change the losses in their first digits."""
    torch._dynamo.reset()
    model = make_model()
    batch = make_batch()
    expected = losses_and_gradients(model, model, batch)
    found = losses_and_gradients(model, torch.compile(model, fullgraph=True), batch)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_detections():
    torch._dynamo.reset()
    model = make_model().eval()
    batch = replace(make_batch(), targets=None)
    expected = model.detect(batch)
    found = torch.compile(model.detect, fullgraph=True)(batch)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
