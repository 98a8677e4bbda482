"""ResNet: names, features and trainable parameters of MMDetection, and what each option changes."""

import numpy as np
import pytest
import torch
from torch import nn

from detector.model.resnet import ResNet
from tests.golden.fill import summary
from triton_dcn import DeformConv2dPack, ModulatedDeformConv2dPack


def deformable_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, DeformConv2dPack)]


@pytest.mark.parametrize("config", ["dg1", "dg4"])
def test_state_dict_is_the_mmdetections(golden, config):
    parameters = golden("model")[1][config]
    with torch.device("meta"):
        model = ResNet(50, dcn="v2", deform_groups=int(config[2:]))
    expected = {
        entry["name"].removeprefix("backbone."): tuple(entry["shape"])
        for entry in parameters["state_dict"]
        if entry["name"].startswith("backbone.")
    }
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected


def test_trainable_parameters_are_the_mmdetections(golden):
    names = golden("model")[1]["dg1"]["trainable"]
    expected = {name.removeprefix("backbone.") for name in names if name.startswith("backbone.")}
    with torch.device("meta"):
        model = ResNet(50, dcn="v2")
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected


@pytest.mark.parametrize(("config", "samples", "prefix"), [("dg1", 1024, "train."), ("dg4", 512, "dg4.")])
def test_features_are_the_mmdetections(golden, golden_features, config, samples, prefix):
    arrays, _ = golden("model")
    for level in range(2, 6):
        ours = summary(golden_features(config)[f"C{level}"].numpy(), samples)
        expected = arrays[f"{prefix}C{level}.samples"]
        assert tuple(ours["shape"]) == tuple(arrays[f"{prefix}C{level}.shape"])
        assert np.linalg.norm(ours["samples"] - expected) <= 1e-10 * np.linalg.norm(expected)


def test_golden_input_is_the_mmdetections(golden, golden_images):
    expected = golden("model")[0]["batch.input.samples"]
    np.testing.assert_array_equal(summary(golden_images.numpy(), 2048)["samples"], expected)


@pytest.mark.parametrize(
    ("depth", "dcn", "stages", "count"),
    [
        pytest.param(18, None, (False, True, True, True), 0, id="r18-plain"),
        pytest.param(18, "v2", (False, True, True, True), 6, id="r18-v2"),
        pytest.param(18, "v1", (True, False, False, True), 4, id="r18-v1-some-stages"),
        pytest.param(50, "v1", (False, True, True, True), 13, id="r50-v1"),
        pytest.param(101, "v1", (False, True, True, True), 30, id="r101-v1"),
    ],
)
def test_deformable_layers_are_conv2_of_the_stages_asked_for(depth, dcn, stages, count):
    with torch.device("meta"):
        model = ResNet(depth, dcn=dcn, dcn_stages=stages)
    layers = deformable_layers(model)
    assert len(layers) == count
    assert all(name.endswith("conv2") and stages[int(name[len("layer")]) - 1] for name in layers)
    kind = ModulatedDeformConv2dPack if dcn == "v2" else DeformConv2dPack
    assert all(type(model.get_submodule(name)) is kind for name in layers)


@pytest.mark.parametrize("depth", [18, 50, 101])
@pytest.mark.parametrize("dcn", [None, "v1", "v2"])
def test_shapes_at_odd_sizes(depth, dcn):
    model = ResNet(depth, dcn=dcn, deform_groups=2, base_channels=16).eval()
    with torch.no_grad():
        features = model(torch.randn(1, 3, 67, 93))
    expansion = 1 if depth == 18 else 4
    assert [tuple(feature.shape) for feature in features] == [
        (1, 16 * expansion, 17, 24),
        (1, 32 * expansion, 9, 12),
        (1, 64 * expansion, 5, 6),
        (1, 128 * expansion, 3, 3),
    ]
    assert model.out_channels == [feature.shape[1] for feature in features]


def test_blocks_start_as_identity_and_offsets_at_zero():
    model = ResNet(50, dcn="v2", frozen_stages=-1).eval()
    block = model.layer2[1]
    x = torch.rand(1, 512, 6, 5)
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)
    assert not block.conv2.conv_offset.weight.any()
    assert not block.conv2.conv_offset.bias.any()
    bound = 1 / (9 * 128) ** 0.5
    assert 0.9 * bound < block.conv2.weight.abs().max() <= bound
    std = (2 / 512) ** 0.5  # Kaiming, fan out
    assert block.conv3.weight.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(("frozen_stages", "frozen"), [(-1, 0), (0, 1), (1, 2), (2, 3), (4, 5)])
def test_frozen_stages(frozen_stages, frozen):
    model = ResNet(18, frozen_stages=frozen_stages, norm_eval=False).train()
    parts = ["conv1", "layer1", "layer2", "layer3", "layer4"]
    for index, part in enumerate(parts):
        module = model.get_submodule(part)
        is_frozen = index < frozen
        assert all(parameter.requires_grad != is_frozen for parameter in module.parameters()), part
        assert all(submodule.training != is_frozen for submodule in module.modules()), part
    assert model.bn1.training == (frozen == 0)
    assert not any(m.training for m in model.eval().modules())


@pytest.mark.parametrize("norm_eval", [True, False])
def test_norm_eval_keeps_running_statistics(norm_eval):
    model = ResNet(18, norm_eval=norm_eval).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(torch.randn(2, 3, 64, 64))
    changed = set()
    for name, value in model.named_buffers():
        if not torch.equal(value, before[name]):
            changed.add(name.split(".")[0])
    assert changed == (set() if norm_eval else {"layer2", "layer3", "layer4"})
    assert model.layer3[0].bn1.weight.requires_grad


def test_group_norm_has_no_running_statistics_and_trains():
    model = ResNet(18, dcn="v2", norm="gn", frozen_stages=-1).train()
    assert not list(model.buffers())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for module in model.modules():  # no branch at zero, so that all layers have a gradient
        if isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
    features = model(torch.randn(2, 3, 64, 64))
    sum(feature.square().mean() for feature in features).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


def test_channels_last_stays_channels_last():
    model = ResNet(18, norm="gn").to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in model(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 34}, r"depth: expected one of \(18, 50, 101\), got 34"),
        ({"dcn": "v3"}, "dcn: .*got 'v3'"),
        ({"norm": "ln"}, "norm: .*got 'ln'"),
        ({"frozen_stages": 5}, "frozen_stages: .*got 5"),
        ({"dcn_stages": (True, True)}, "dcn_stages: expected four flags"),
        ({"dcn": "v2", "deform_groups": 3}, "deform_groups"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResNet(**arguments)
