"""Folding batch norms: the same detections from fewer operations."""

import pytest
import torch
from torch import nn

from detector import Batch, FasterRCNN, FasterRCNNConfig, fuse_batch_norms

SIZES = {"num_classes": 3, "base_channels": 16, "fpn_channels": 16, "fc_channels": 32}


def make_model(**options):
    """A small detector in float64 whose norms do something."""
    torch.manual_seed(0)
    model = FasterRCNN(FasterRCNNConfig(**SIZES, **options)).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.copy_(torch.rand_like(tensor) + 0.5)
        if hasattr(module, "conv_offset"):
            nn.init.normal_(module.conv_offset.weight, std=0.01)
    nn.init.normal_(model.roi_head.bbox_head.fc_cls.weight, std=0.1)
    return model


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("dcn", [None, "v1", "v2"])
@torch.no_grad()
def test_same_features_and_detections(depth, dcn):
    model = make_model(depth=depth, dcn=dcn)
    names = set(model.state_dict())
    fused = fuse_batch_norms(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert set(model.state_dict()) == names

    batch = Batch(
        images=torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8),
        sizes=torch.tensor([[64, 96], [50, 90]]),
    )
    images = model.normalize(batch)
    for feature, expected in zip(fused.features(images), model.features(images), strict=True):
        torch.testing.assert_close(feature, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    for detected, expected in zip(fused(batch), model(batch), strict=True):
        assert len(expected.boxes)
        torch.testing.assert_close(detected.boxes, expected.boxes, rtol=1e-7, atol=1e-6)
        assert torch.equal(detected.labels, expected.labels)


def test_the_deformable_layers_of_bottlenecks_rectify():
    fused = fuse_batch_norms(make_model(depth=50))
    assert [block.conv2.relu for block in fused.backbone.layer2] == [True] * 4
    fused = fuse_batch_norms(make_model(depth=18))
    assert [block.conv2.relu for block in fused.backbone.layer2] == [False] * 2


@pytest.mark.parametrize(
    ("make", "words"),
    [(lambda: make_model(depth=18).train(), "eval"), (lambda: make_model(depth=18, norm="gn"), "group norms")],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        fuse_batch_norms(make())
