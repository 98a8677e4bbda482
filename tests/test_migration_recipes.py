"""The code of docs/migration.md runs as it stands there, on stand-ins for the libraries that it names."""

import sys

import pytest
import torch
from torch import nn

from detector import FasterRCNN, FasterRCNNConfig
from tests.doc_blocks import ROOT, blocks
from tests.triton_dcn.compat_stubs import (
    WithPredictedOffsets,
    assert_same,
    make_mmcv,
    make_modules,
    make_torchvision,
    run,
)
from triton_dcn import DeformConv2dPack, ModulatedDeformConv2dPack

PAGE = ROOT / "docs" / "migration.md"
RECIPES: dict[str, list[str]] = {}  # the pieces of code of the page by the section that they are in
for block in blocks(PAGE):
    RECIPES.setdefault(block.heading, []).append(block.text)


def execute(code, names):
    """Run a piece of code, which uses `names` and adds to them."""
    exec(compile(code, str(PAGE), "exec"), names)


def test_every_section_with_code_is_run_here():
    assert set(RECIPES) == {
        "torchvision",
        "mmcv",
        "MMDetection",
        "Detectron2 and DB",
        "CenterNet, FairMOT, YOLACT++",
        "A convolution of my network becomes deformable",
    }


def test_torchvision(monkeypatch, capsys):
    ops = make_torchvision(monkeypatch)
    model = WithPredictedOffsets(ops.DeformConv2d(4, 4, 3, padding=1)).double()
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    expected = run(model, x)
    calls = len(ops.calls)

    imports, patch, in_place = RECIPES["torchvision"]
    names = {"model": model}
    execute(imports, names)
    execute(patch, names)
    assert "torchvision.ops.deform_conv2d" in capsys.readouterr().out
    assert_same(run(model, x), expected)
    assert len(ops.calls) == calls
    names["handle"].undo()
    run(model, x)
    assert len(ops.calls) == calls + 1

    convert, revert = in_place.splitlines()
    execute(convert, names)
    assert_same(run(model, x), expected)
    execute(revert, names)
    assert type(model.layer) is ops.DeformConv2d


def test_mmcv(monkeypatch):
    ops = make_mmcv(monkeypatch)
    model = nn.Sequential(ops.ModulatedDeformConv2dPack(4, 4, 3, padding=1), ops.DeformConv2dPack(4, 4, 3)).double()
    x = torch.randn(1, 4, 6, 7, dtype=torch.float64)
    expected = run(model, x)
    calls = len(ops.calls)

    (code,) = RECIPES["mmcv"]
    imports, _, patch, convert = code.splitlines()
    names = {"model": model}
    execute(imports, names)
    execute(patch, names)
    assert_same(run(model, x), expected)
    execute(convert, names)
    assert [type(layer) for layer in model] == [ModulatedDeformConv2dPack, DeformConv2dPack]
    assert_same(run(model, x), expected)
    assert len(ops.calls) == calls


def test_mmdetection(tmp_path, monkeypatch):
    (code,) = RECIPES["MMDetection"]
    (file_name,) = [word for word in code.split('"') if word.endswith(".pth")]
    config = FasterRCNNConfig(depth=18, num_classes=2, norm="gn", base_channels=16, fpn_channels=32, fc_channels=16)
    weights = FasterRCNN(config).state_dict()
    torch.save({"model": weights, "config": {"model": vars(config)}, "classes": ["disc", "ring"]}, tmp_path / file_name)
    monkeypatch.chdir(tmp_path)
    names = {}
    execute(code, names)
    assert names["names"] == ["disc", "ring"]
    assert names["model"].config == config


# the interface of Detectron2's layers, which a GPU is needed for
DETECTRON2 = """
from torch import nn
from torch.nn.modules.utils import _pair

def deform_conv(*arguments):
    raise NotImplementedError("Deformable Conv is not supported on CPUs!")

def modulated_deform_conv(*arguments):
    raise NotImplementedError("Deformable Conv is not supported on CPUs!")

class ModulatedDeformConv(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
                 deformable_groups=1):
        super().__init__()
        self.in_channels, self.kernel_size = in_channels, _pair(kernel_size)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups, self.deformable_groups = groups, deformable_groups
        self.weight = nn.Parameter(nn.Conv2d(in_channels, out_channels, kernel_size, groups=groups).weight.detach())

    def forward(self, x, offset, mask):
        return modulated_deform_conv(x, offset, mask, self.weight, None, self.stride, self.padding, self.dilation,
                                     self.groups, self.deformable_groups)

class DeformConv(ModulatedDeformConv):
    def forward(self, x, offset):
        return deform_conv(x, offset, self.weight, _pair(self.stride), _pair(self.padding), _pair(self.dilation),
                           self.groups, self.deformable_groups)
"""


@pytest.mark.parametrize("package", ["detectron2.layers", "assets.ops.dcn.functions"])
def test_detectron2_and_db(package, monkeypatch):
    module = make_modules(monkeypatch, DETECTRON2, f"{package}.deform_conv")
    parents = package.split(".")
    parent = make_modules(monkeypatch, "", *(".".join(parents[: index + 1]) for index in range(len(parents))))
    parent.deform_conv = module
    layers = [
        WithPredictedOffsets(module.ModulatedDeformConv(4, 4, 3, padding=1, groups=2, deformable_groups=2)),
        WithPredictedOffsets(module.DeformConv(4, 4, 3, padding=1, deformable_groups=2), masks=False),
    ]
    x = torch.randn(1, 4, 5, 6)

    (code,) = RECIPES["Detectron2 and DB"]
    names = {}
    execute(code.replace("detectron2.layers", package), names)
    assert len(names["handle"]) == 2
    for layer in layers:
        assert all(gradient.abs().max() > 0 for gradient in run(layer, x))
    names["handle"].undo()
    for layer in layers:
        with pytest.raises(NotImplementedError):
            layer(x)


def test_the_dcnv2_extension(monkeypatch):
    change_import, replace_module = RECIPES["CenterNet, FairMOT, YOLACT++"]
    names = {}
    execute(change_import, names)

    make_modules(monkeypatch, "", "models", "models.networks", "models.networks.DCNv2")
    for extension in ("dcn_v2", "models.networks.DCNv2.dcn_v2"):
        monkeypatch.setitem(sys.modules, extension, None)  # cannot be imported
    execute(replace_module, names)
    for statement in ("from dcn_v2 import DCN", "from models.networks.DCNv2.dcn_v2 import DCN"):
        model_code = {}
        execute(statement, model_code)
        assert model_code["DCN"] is names["DCN"]

    layer = names["DCN"](4, 6, kernel_size=3, stride=1, padding=1, dilation=1, deformable_groups=1)
    assert [*layer.state_dict()] == ["weight", "bias", "conv_offset_mask.weight", "conv_offset_mask.bias"]
    mmcvs = ModulatedDeformConv2dPack(4, 6, 3, padding=1)
    layer.load_state_dict(mmcvs.state_dict())
    x = torch.randn(1, 4, 5, 6)
    assert torch.equal(layer(x), mmcvs(x))


class Network(nn.Module):
    """Stages with the names of torchvision's ResNet."""

    def __init__(self):
        super().__init__()
        for index in range(1, 5):
            stage = nn.Sequential(
                nn.Conv2d(4, 4, 3, stride=1 + index % 2, padding=1, groups=2, bias=index > 2),
                nn.BatchNorm2d(4),
                nn.Conv2d(4, 4, 1),
            )
            stage[1].running_var.uniform_(0.5, 1.5)
            self.add_module(f"layer{index}", stage)

    def forward(self, x):
        for stage in self.children():
            x = stage(x)
        return x


def test_a_convolution_becomes_deformable():
    replace, load, optimize = RECIPES["A convolution of my network becomes deformable"]
    model = Network().double().eval()
    plain_weights = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 4, 16, 20, dtype=torch.float64)
    expected = model(x)

    names = {"model": model, "weights_of_the_plain_network": plain_weights}
    execute(replace, names)
    deformable = [name for name, layer in model.named_modules() if isinstance(layer, ModulatedDeformConv2dPack)]
    assert deformable == ["layer2.0", "layer3.0", "layer4.0"]
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-14)
    for gradient in run(model, x):
        assert gradient.abs().max() > 0

    execute(load, names)
    assert len(names["missing"]) == 6
    for name in deformable:
        model.get_submodule(name).weight.data *= 2
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-14)

    execute(optimize, names)
    rates = {id(value): group["lr"] for group in names["optimizer"].param_groups for value in group["params"]}
    assert len(rates) == len([*model.parameters()])
    for name, value in model.named_parameters():
        assert rates[id(value)] == pytest.approx(0.001 if "conv_offset" in name else 0.01)
