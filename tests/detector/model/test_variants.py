"""Names, shapes and counts of the parameters of all variants, by the rules of MMDetection's configs."""

import math

import pytest
import torch

from detector import FasterRCNN, FasterRCNNConfig

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}

# name of MMDetection's config -> our options, output channels of conv_offset
VARIANTS = {
    "faster-rcnn_r50_fpn_1x_coco": ({"dcn": None}, 0),
    "faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco": ({"dcn": "v1"}, 18),
    "faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco": ({}, 27),
    "faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco": ({"deform_groups": 4}, 108),
    "faster-rcnn_r101-dconv-c3-c5_fpn_1x_coco": ({"dcn": "v1", "depth": 101}, 18),
    "mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco": ({"mask": True}, 27),
}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def norm(name, channels):
    for kind in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{kind}", (channels,)
    yield f"{name}.num_batches_tracked", ()


def layer(name, *shape):
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def resnet(depth, offsets):
    """ResNet with `dcn=dict(type='DCN' or 'DCNv2')`, `stage_with_dcn=(False, True, True, True)`; frozen_stages=1."""
    yield "conv1.weight", (64, 3, 7, 7)
    yield from norm("bn1", 64)
    in_channels = 64
    for stage, count in enumerate(BLOCKS[depth]):
        planes = 64 << stage
        for block in range(count):
            name = f"layer{stage + 1}.{block}"
            yield f"{name}.conv1.weight", (planes, in_channels, 1, 1)
            yield from norm(f"{name}.bn1", planes)
            yield f"{name}.conv2.weight", (planes, planes, 3, 3)
            if stage and offsets:
                yield from layer(f"{name}.conv2.conv_offset", offsets, planes, 3, 3)
            yield from norm(f"{name}.bn2", planes)
            yield f"{name}.conv3.weight", (planes * 4, planes, 1, 1)
            yield from norm(f"{name}.bn3", planes * 4)
            if block == 0:
                yield f"{name}.downsample.0.weight", (planes * 4, in_channels, 1, 1)
                yield from norm(f"{name}.downsample.1", planes * 4)
            in_channels = planes * 4


def detector(depth, offsets, mask, classes=80):
    """Base config faster-rcnn_r50_fpn or mask-rcnn_r50_fpn."""
    yield from ((f"backbone.{name}", shape) for name, shape in resnet(depth, offsets))
    for i, channels in enumerate((256, 512, 1024, 2048)):
        yield from layer(f"neck.lateral_convs.{i}.conv", 256, channels, 1, 1)
        yield from layer(f"neck.fpn_convs.{i}.conv", 256, 256, 3, 3)
    yield from layer("rpn_head.rpn_conv", 256, 256, 3, 3)
    yield from layer("rpn_head.rpn_cls", 3, 256, 1, 1)
    yield from layer("rpn_head.rpn_reg", 12, 256, 1, 1)
    yield from layer("roi_head.bbox_head.shared_fcs.0", 1024, 256 * 7 * 7)
    yield from layer("roi_head.bbox_head.shared_fcs.1", 1024, 1024)
    yield from layer("roi_head.bbox_head.fc_cls", classes + 1, 1024)
    yield from layer("roi_head.bbox_head.fc_reg", classes * 4, 1024)
    if mask:
        for i in range(4):
            yield from layer(f"roi_head.mask_head.convs.{i}.conv", 256, 256, 3, 3)
        yield from layer("roi_head.mask_head.upsample", 256, 256, 2, 2)
        yield from layer("roi_head.mask_head.conv_logits", classes, 256, 1, 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters(name):
    options, offsets = VARIANTS[name]
    with torch.device("meta"):
        model = FasterRCNN(FasterRCNNConfig(**options))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    expected = dict(detector(options.get("depth", 50), offsets, options.get("mask", False)))
    assert shapes == expected

    count = sum(math.prod(shape) for key, shape in expected.items() if not key.endswith(BUFFERS))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    frozen = ("backbone.conv1.", "backbone.bn1.", "backbone.layer1.")
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad != key.startswith(frozen), key


@pytest.mark.parametrize(("key", "offsets"), [("dg1", 27), ("dg4", 108)])
def test_rules_agree_with_golden_names(golden, key, offsets):
    """The rules above give MMDetection's list of names for the two configs of which the golden data has it."""
    listed = {entry["name"]: tuple(entry["shape"]) for entry in golden("model")[1][key]["state_dict"]}
    assert dict(detector(50, offsets, mask=False)) == listed
