"""Sampling points: a regular grid at zero offset, the operator's own positions otherwise."""

import numpy as np
import pytest
import torch

from detector import FasterRCNN, FasterRCNNConfig
from detector.image import read_image, write_image
from detector.visualize_offsets import _SamplingGrid, _stage_name, draw_sampling_points, main, sampling_points
from detector.weights.checkpoint import save_weights
from triton_dcn import DeformConv2dPack, ModulatedDeformConv2dPack, deform_conv2d

CONFIG = FasterRCNNConfig(
    depth=18,
    num_classes=3,
    dcn="v2",
    dcn_stages=(False, True, False, True),
    norm="gn",
    base_channels=16,
    fpn_channels=32,
    fc_channels=16,
    image_scale=(96, 64),
    rpn_post_nms_top_n=50,
)
IMAGE = np.random.default_rng(0).integers(0, 256, (128, 192, 3), np.uint8)  # shown to the model at half its size


@pytest.fixture
def model():
    return FasterRCNN(CONFIG).eval()


def unique_positions(stage):
    return sorted({tuple(position) for position in stage.positions.tolist()})


@pytest.mark.parametrize(("layers", "reach"), [(1, 1), (2, 2), (3, 2)])
def test_zero_offsets_are_a_regular_grid(model, layers, reach):
    stages = sampling_points(model, IMAGE, (96.0, 64.0), layers)
    assert [stage.name for stage in stages] == ["layer2", "layer4"]
    layer2 = stages[0]  # stride 8 in the resized image, 16 in the original; two layers in the stage
    grid = range(-reach, reach + 1)
    expected = sorted((96.0 + 16 * x, 64.0 + 16 * y) for x in grid for y in grid)
    assert unique_positions(layer2) == expected
    assert len(layer2.weights) == 9**reach
    torch.testing.assert_close(layer2.weights, torch.full((9**reach,), 0.5**reach, dtype=torch.float64))


def test_shifted_offsets_and_positions_outside(model):
    with torch.no_grad():
        bias = model.backbone.layer2[1].conv2.conv_offset.bias
        bias[0:18:2] = 0.5  # dy
        bias[1:18:2] = -0.25  # dx
    layer2 = sampling_points(model, IMAGE, (96.0, 64.0), 1)[0]
    expected = sorted((92.0 + 16 * x, 72.0 + 16 * y) for x in (-1, 0, 1) for y in (-1, 0, 1))
    assert unique_positions(layer2) == expected

    with torch.no_grad():
        bias[0:18:2] = -1000
    assert sampling_points(model, IMAGE, (96.0, 64.0), 1)[0].positions.shape == (0, 2)


@pytest.mark.parametrize("kind", [DeformConv2dPack, ModulatedDeformConv2dPack])
def test_positions_are_those_the_operator_reads(kind):
    module = kind(4, 1, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), deform_groups=2).double()
    one_hot = torch.eye(99, dtype=torch.float64).view(99, 1, 9, 11)  # one image per cell
    one_hot = one_hot.expand(99, 4, 9, 11)
    predicted = torch.randn(1, module.conv_offset.out_channels, 5, 9, dtype=torch.float64)
    offset = predicted[:, :24].expand(99, 24, 5, 9)
    mask = None
    if kind is ModulatedDeformConv2dPack:
        mask = predicted[:, 24:].sigmoid().expand(99, 12, 5, 9)
    weight = torch.ones(1, 4, 3, 2, dtype=torch.float64)
    output = deform_conv2d(one_hot, offset, weight, None, (2, 1), (1, 0), (1, 2), mask)
    read = output[:, 0, 3, 5].view(9, 11)

    grid = _SamplingGrid.from_prediction(module, (9, 11), predicted)
    output_cell = torch.tensor([[5.0, 3.0]], dtype=torch.float64)
    positions, weights = grid.trace_back(output_cell, torch.ones(1, dtype=torch.float64))

    expected = torch.zeros(9 + 2, 11 + 2, dtype=torch.float64)  # what is read of each cell, with a rim
    for (x, y), position_weight in zip(positions.tolist(), weights.tolist(), strict=True):
        left = int(np.floor(x))
        top = int(np.floor(y))
        for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            bilinear_weight = (1 - abs(y - row)) * (1 - abs(x - column))
            expected[row + 1, column + 1] += position_weight * bilinear_weight
    torch.testing.assert_close(read, expected[1:-1, 1:-1] * 2)  # each group has two channels


def test_wrong_arguments_are_named(model):
    with pytest.raises(ValueError, match=r"point: expected x in \[0, 192\) .* got \(192, 5\)"):
        sampling_points(model, IMAGE, (192, 5))
    with pytest.raises(ValueError, match="layers: expected at least 1, got 0"):
        sampling_points(model, IMAGE, (5, 5), 0)
    plain = FasterRCNN(FasterRCNNConfig(depth=18, dcn=None, fpn_channels=32, fc_channels=16)).eval()
    with pytest.raises(ValueError, match="model: expected deformable layers, got none"):
        sampling_points(plain, IMAGE, (5, 5))


def test_picture(model):
    stages = sampling_points(model, IMAGE, (0.0, 127.0))
    picture = draw_sampling_points(IMAGE, (0.0, 127.0), stages)
    assert picture.shape[1] > 2 * 640
    red = (picture[..., 0].astype(int) - picture[..., 1] > 100).sum()
    assert red > 1000  # dots large enough to see
    assert [_stage_name(stage.name) for stage in stages] == ["c3", "c5"]
    assert not model.backbone.layer2[0].conv2.conv_offset._forward_hooks


def test_command_line(model, tmp_path, capsys):
    save_weights(tmp_path / "model.safetensors", model, ["disc", "ring", "star"])
    write_image(tmp_path / "photo.png", IMAGE)
    out = tmp_path / "new" / "offsets.png"
    command = [str(tmp_path / "photo.png")]
    command += ["--weights", str(tmp_path / "model.safetensors")]
    command += ["--device", "cpu"]

    assert main([*command, "--out", str(out)]) == 0
    assert read_image(out).shape[1] > 2 * 640
    assert "the best detection, " in capsys.readouterr().out

    for name in ("photo.png", "model.safetensors"):
        content = (tmp_path / name).read_bytes()
        assert main([*command, "--out", str(tmp_path / name)]) == 1
        assert "error: --out: expected another file than " in capsys.readouterr().err
        assert (tmp_path / name).read_bytes() == content
    (tmp_path / "link.png").symlink_to("photo.png")
    assert main([*command, "--out", str(tmp_path / "link.png")]) == 1
    assert "error: --out: expected another file than IMAGE" in capsys.readouterr().err

    assert main([*command, "--out", str(out), "--point", "500", "5"]) == 1
    assert "error: point: expected x in [0, 192)" in capsys.readouterr().err
