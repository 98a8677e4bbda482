"""FPN: names, features and initial values of MMDetection, sizes that do not halve evenly."""

import numpy as np
import pytest
import torch

from detector.model.fpn import FPN
from tests.golden.fill import summary


def test_state_dict_is_the_mmdetections(golden):
    expected = {
        entry["name"].removeprefix("neck."): tuple(entry["shape"])
        for entry in golden("model")[1]["dg1"]["state_dict"]
        if entry["name"].startswith("neck.")
    }
    model = FPN([256, 512, 1024, 2048])
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected


@pytest.mark.parametrize(("config", "samples", "prefix"), [("dg1", 1024, "train."), ("dg4", 512, "dg4.")])
def test_features_are_the_mmdetections(golden, golden_features, config, samples, prefix):
    arrays, _ = golden("model")
    for level in range(2, 7):
        ours = summary(golden_features(config)[f"P{level}"].numpy(), samples)
        expected = arrays[f"{prefix}P{level}.samples"]
        assert tuple(ours["shape"]) == tuple(arrays[f"{prefix}P{level}.shape"])
        assert np.linalg.norm(ours["samples"] - expected) <= 1e-10 * np.linalg.norm(expected)


def test_top_down_path_by_hand():
    model = FPN([1, 1], out_channels=1, num_outs=3)
    with torch.no_grad():
        for conv in (*model.lateral_convs, *model.fpn_convs):
            conv.conv.weight.zero_()
            center = conv.conv.kernel_size[0] // 2
            conv.conv.weight[:, :, center, center] = 1  # identity
    fine = torch.arange(15.0).view(1, 1, 3, 5)
    coarse = torch.tensor([[100.0, 200.0, 300.0], [400.0, 500.0, 600.0]]).view(1, 1, 2, 3)
    p2, p3, p4 = model([fine, coarse])
    rows = [0, 0, 1]  # nearest, 2 -> 3
    columns = [0, 0, 1, 1, 2]  # nearest, 3 -> 5
    torch.testing.assert_close(p2, fine + coarse[:, :, rows][..., columns])
    torch.testing.assert_close(p3, coarse)
    torch.testing.assert_close(p4, coarse[..., ::2, ::2])


def test_inputs_are_left_alone_and_gradients_reach_them():
    features = [torch.randn(1, 4, size, size, requires_grad=True) for size in (8, 4, 2)]
    before = [feature.detach().clone() for feature in features]
    pyramid = FPN([4, 4, 4], 8)(features)
    sum(level.sum() for level in pyramid).backward()
    for feature, original in zip(features, before, strict=True):
        assert torch.equal(feature, original)
        assert feature.grad.any()


def test_initial_values():
    model = FPN([256, 512])
    for conv in (*model.lateral_convs, *model.fpn_convs):
        assert not conv.conv.bias.any()
    bound = (6 / (512 + 256)) ** 0.5  # Xavier uniform of the 1x1
    assert 0.99 * bound < model.lateral_convs[1].conv.weight.abs().max() <= bound


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"num_outs: expected at least 4, .*got 3"):
        FPN([1, 2, 3, 4], num_outs=3)
    with pytest.raises(ValueError, match="zip"):
        FPN([4, 4])([torch.zeros(1, 4, 4, 4)])
