"""The interface of the DCNv2 extension."""

import copy
import importlib
import pickle
import sys

import pytest
import torch
from torch import nn

import triton_dcn
from tests.triton_dcn.compat_stubs import make_modules
from triton_dcn.compat import dcnv2

# the extension's layer around this package's reference; its CPU kernel reads maps from the start of each image
EXTENSION = """
import math
import torch
from torch import nn
from torch.nn.modules.utils import _pair
from triton_dcn.functional import deform_conv2d

def read(maps, like):
    size = (maps.shape[1], *like.shape[2:])
    return torch.stack([image.contiguous().view(-1)[:math.prod(size)].view(size) for image in maps])

class DCN(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, stride, padding, dilation=1, deformable_groups=1):
        super().__init__()
        self.kernel_size, self.stride, self.padding, self.dilation = map(
            _pair, (kernel_size, stride, padding, dilation))
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels))
        stdv = 1 / math.sqrt(in_channels * taps)
        self.weight.data.uniform_(-stdv, stdv)
        self.bias.data.zero_()
        self.conv_offset_mask = nn.Conv2d(in_channels, 3 * deformable_groups * taps, kernel_size=self.kernel_size,
                                          stride=self.stride, padding=self.padding)
        self.conv_offset_mask.weight.data.zero_()
        self.conv_offset_mask.bias.data.zero_()

    def forward(self, input):
        like = nn.functional.conv2d(input, self.weight, None, self.stride, self.padding, self.dilation)
        o1, o2, mask = torch.chunk(self.conv_offset_mask(input), 3, dim=1)
        offset, mask = read(torch.cat((o1, o2), dim=1), like), read(torch.sigmoid(mask), like)
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask,
                             backend="reference")
"""

CASES = [
    (4, 6, 3, 1, 1),
    (4, 6, 3, 2, 1, 1, 2),
    (4, 6, (3, 1), (1, 2), (1, 0), 1, 4),
    (4, 6, 3, 1, 2, 2, 1),  # `conv_offset_mask` has no dilation
    (4, 6, 3, 1, 0, (1, 2), 2),
]


@pytest.fixture
def extension(monkeypatch):
    return make_modules(monkeypatch, EXTENSION, "reference_dcn_v2")


def randomize(layer):
    """Let the offsets leave zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layer.double()


def run(layer, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    output = layer(x)
    output.square().sum().backward()
    return {"output": output.detach(), "input": x.grad, **{n: p.grad.clone() for n, p in layer.named_parameters()}}


@pytest.mark.parametrize("arguments", CASES)
def test_values_gradients_and_checkpoints_are_those_of_the_extension(extension, arguments):
    theirs = randomize(extension.DCN(*arguments))
    ours = dcnv2.DCN(*arguments).double()
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    expected = run(theirs, x)
    torch.testing.assert_close(run(ours, x), expected, rtol=1e-9, atol=1e-9)

    back = extension.DCN(*arguments).double()
    back.load_state_dict(ours.state_dict())
    torch.testing.assert_close(back(x), expected["output"])


@pytest.mark.parametrize("arguments", CASES[:3])
def test_initial_values_are_those_of_the_extension(extension, arguments):
    torch.manual_seed(0)
    theirs = extension.DCN(*arguments)
    torch.manual_seed(0)
    ours = dcnv2.DCN(*arguments)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


def test_checkpoints_of_the_layers_that_are_called_conv_offset():
    pack = randomize(triton_dcn.ModulatedDeformConv2dPack(4, 6, 3, padding=1, deform_groups=2))
    layer = dcnv2.DCN(4, 6, 3, 1, 1, 1, 2).double()
    state = nn.ModuleDict({"dcn": pack}).state_dict()
    nn.ModuleDict({"dcn": layer}).load_state_dict(state)
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), pack(x))
    assert "dcn.conv_offset.weight" in state, "the caller's dictionary was changed"

    # the other way, as the documentation says
    state = {name.replace("conv_offset_mask.", "conv_offset."): value for name, value in layer.state_dict().items()}
    again = triton_dcn.ModulatedDeformConv2dPack(4, 6, 3, padding=1, deform_groups=2).double()
    again.load_state_dict(state)
    torch.testing.assert_close(again(x), pack(x))

    with pytest.raises(RuntimeError, match="Missing key.*conv_offset_mask.weight"):
        layer.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    with pytest.raises(RuntimeError, match="Unexpected key.*conv_offset.weight"):
        layer.load_state_dict({**layer.state_dict(), "conv_offset.weight": pack.conv_offset.weight})


def test_given_offsets_and_masks():
    layer = randomize(dcnv2.DCNv2(4, 6, 3, 2, 1, 1, 2))
    x = torch.randn(2, 4, 8, 10, dtype=torch.float64)
    offset, mask = torch.randn(2, 36, 4, 5, dtype=torch.float64), torch.rand(2, 18, 4, 5, dtype=torch.float64)
    expected = triton_dcn.deform_conv2d(x, offset, layer.weight, layer.bias, 2, 1, 1, mask, backend="reference")
    torch.testing.assert_close(layer(x, offset, mask), expected)
    found = dcnv2.dcn_v2_conv(x, offset, mask, layer.weight, layer.bias, 2, 1, 1, 2)
    torch.testing.assert_close(found, expected)
    assert layer.deformable_groups == 2

    with pytest.raises(ValueError, match="offset: expected 36 channels for 9 taps and deform_groups = 2, got 18"):
        layer(x, offset[:, :18], mask)
    with pytest.raises(ValueError, match="deform_groups: expected 2 by the shapes, got 1"):
        dcnv2.dcn_v2_conv(x, offset, mask, layer.weight, layer.bias, 2, 1, 1, 1)
    with pytest.raises(ValueError, match="in_channels: expected a multiple of deform_groups = 3"):
        dcnv2.DCN(4, 6, 3, 1, 1, 1, 3)


CENTERNET = """
from torch import nn
from dcn_v2 import DCN

class DeformConv(nn.Module):
    def __init__(self, chi, cho):
        super().__init__()
        self.actf = nn.Sequential(nn.BatchNorm2d(cho, momentum=0.1), nn.ReLU(inplace=True))
        self.conv = DCN(chi, cho, kernel_size=(3, 3), stride=1, padding=1, dilation=1, deformable_groups=1)

    def forward(self, x):
        return self.actf(self.conv(x))
"""


def test_in_place_of_the_compiled_module(monkeypatch, tmp_path):
    """FairMOT and YOLACT++ say `from dcn_v2 import DCN`."""
    monkeypatch.setitem(sys.modules, "dcn_v2", dcnv2)
    (tmp_path / "pose_dla_dcn.py").write_text(CENTERNET)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = importlib.import_module("pose_dla_dcn").DeformConv(4, 6).eval()
    monkeypatch.delitem(sys.modules, "pose_dla_dcn")
    assert "conv.conv_offset_mask.weight" in dict(model.named_parameters())
    assert model(torch.randn(1, 4, 6, 7)).shape == (1, 6, 6, 7)


def test_the_layer_is_copied_pickled_fused_and_compiled():
    layer = randomize(dcnv2.DCN(4, 6, 3, 1, 1)).float()
    x = torch.randn(2, 4, 6, 7)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x), expected)
    assert "deform_groups=1" in repr(layer)

    norm = nn.BatchNorm2d(6).eval()
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    fused = triton_dcn.fuse_batch_norm(layer, norm, relu=True)
    assert type(fused) is dcnv2.DCN
    torch.testing.assert_close(fused(x), norm(expected).relu())

    for run_layer in (
        torch.compile(layer, backend="eager", fullgraph=True),
        torch.fx.symbolic_trace(layer),
        torch.export.export(layer, (x,), strict=False).module(),
    ):
        torch.testing.assert_close(run_layer(x), expected)
