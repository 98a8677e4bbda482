"""Stand-ins for torchvision and mmcv, with their interfaces around this package's reference."""

import math
import sys
from types import ModuleType

import torch
from torch import nn

DEFORM_GROUPS = 2


def make_modules(monkeypatch, source, *names):
    """Run `source` as the last of the modules `names`; all of them see what it defines."""
    modules = [ModuleType(name) for name in names]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    *packages, innermost = modules
    exec(source, innermost.__dict__)
    public = {name: value for name, value in vars(innermost).items() if not name.startswith("__")}
    for package in packages:
        vars(package).update(public)
    return innermost


STUB = """
import torch
from torch import nn
from triton_dcn.functional import deform_conv2d as ours

calls = []

class Layer(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
                 deform_groups=1, bias=True):
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.deform_groups = deform_groups
        self.kernel_size, self.stride, self.padding, self.dilation = (
            (x, x) for x in (kernel_size, stride, padding, dilation))
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.randn(out_channels)) if bias else None
"""

TORCHVISION = """
def deform_conv2d(input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), mask=None):
    calls.append("v1" if mask is None else "v2")
    return ours(input, offset, weight, bias, stride, padding, dilation, mask, backend="reference")

class DeformConv2d(Layer):
    def forward(self, input, offset, mask=None):
        return deform_conv2d(input, offset, self.weight, self.bias, stride=self.stride, padding=self.padding,
                             dilation=self.dilation, mask=mask)
"""

MMCV_V2 = """
from triton_dcn.functional import pair
from triton_dcn.geometry import conv_output_size

def read_memory(maps, channels, height, width):
    # what mmcv's kernel finds from the first number of each image on, whatever the shape of the map is
    strides = (height * width, width, 1)
    return torch.stack([image.as_strided((channels, height, width), strides) for image in maps])

def modulated_deform_conv2d(input, offset, mask, weight, bias=None, stride=1, padding=0, dilation=1, groups=1,
                            deform_groups=1):
    calls.append("v2")
    pairs = [pair("", value) for value in (stride, padding, dilation)]
    size = conv_output_size(input.shape[2:], weight.shape[2:], *pairs)
    channels = deform_groups * weight.shape[2] * weight.shape[3]
    offset, mask = read_memory(offset, 2 * channels, *size), read_memory(mask, channels, *size)
    return ours(input, offset, weight, bias, *pairs, mask, backend="reference")

class ModulatedDeformConv2d(Layer):
    def forward(self, x, offset, mask):
        return modulated_deform_conv2d(x, offset, mask, self.weight, self.bias, self.stride, self.padding,
                                       self.dilation, self.groups, self.deform_groups)

class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = nn.Conv2d(self.in_channels, 3 * self.deform_groups * taps, self.kernel_size, self.stride,
                                     self.padding, self.dilation)

    def forward(self, x):
        o1, o2, mask = torch.chunk(self.conv_offset(x), 3, dim=1)
        return super().forward(x, torch.cat((o1, o2), dim=1), torch.sigmoid(mask))
"""

MMCV_V1 = """
def deform_conv2d(input, offset, weight, stride=1, padding=0, dilation=1, groups=1, deform_groups=1, bias=False,
                  im2col_step=32):
    calls.append("v1")
    return ours(input, offset, weight, None, stride, padding, dilation, backend="reference")

class DeformConv2d(Layer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, bias=False)
        del self.bias  # mmcv's class has none

    def forward(self, x, offset):
        return deform_conv2d(x, offset, self.weight, self.stride, self.padding, self.dilation, self.groups,
                             self.deform_groups, False, 32)

class DeformConv2dPack(DeformConv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = nn.Conv2d(self.in_channels, 2 * self.deform_groups * taps, self.kernel_size, self.stride,
                                     self.padding, self.dilation)

    def forward(self, x):
        return super().forward(x, self.conv_offset(x))
"""


MMCV_ROI_POOL = """
import torch
from torch import nn
from triton_dcn.roi_pool.functional import deform_roi_pool as ours

calls = []

def deform_roi_pool(input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma):
    calls.append("roi")
    return ours(input, rois, offset, output_size=output_size, spatial_scale=spatial_scale,
                sampling_ratio=sampling_ratio, gamma=gamma, backend="reference")

class DeformRoIPool(nn.Module):
    def __init__(self, output_size, spatial_scale=1.0, sampling_ratio=0, gamma=0.1):
        super().__init__()
        self.output_size = (output_size, output_size)
        self.spatial_scale, self.sampling_ratio, self.gamma = spatial_scale, sampling_ratio, gamma

    def forward(self, input, rois, offset=None):
        return deform_roi_pool(input, rois, offset, self.output_size, self.spatial_scale, self.sampling_ratio,
                               self.gamma)

class DeformRoIPoolPack(DeformRoIPool):
    def __init__(self, output_size, output_channels, deform_fc_channels=1024, *args):
        super().__init__(output_size, *args)
        self.output_channels, self.deform_fc_channels = output_channels, deform_fc_channels
        bins = output_size * output_size
        self.offset_fc = nn.Sequential(
            nn.Linear(bins * output_channels, deform_fc_channels), nn.ReLU(inplace=True),
            nn.Linear(deform_fc_channels, deform_fc_channels), nn.ReLU(inplace=True),
            nn.Linear(deform_fc_channels, bins * 2))

    def forward(self, input, rois):
        x = super().forward(input, rois)
        offset = self.offset_fc(x.flatten(1)).view(-1, 2, *self.output_size)
        return super().forward(input, rois, offset)

class ModulatedDeformRoIPoolPack(DeformRoIPoolPack):
    def __init__(self, output_size, output_channels, deform_fc_channels=1024, *args):
        super().__init__(output_size, output_channels, deform_fc_channels, *args)
        bins = output_size * output_size
        self.mask_fc = nn.Sequential(
            nn.Linear(bins * output_channels, deform_fc_channels), nn.ReLU(inplace=True),
            nn.Linear(deform_fc_channels, bins), nn.Sigmoid())

    def forward(self, input, rois):
        x = DeformRoIPool.forward(self, input, rois)
        return super().forward(input, rois) * self.mask_fc(x.flatten(1)).view(-1, 1, *self.output_size)
"""


def make_torchvision(monkeypatch):
    """Return a stand-in for `torchvision.ops`."""
    return make_modules(
        monkeypatch, STUB + TORCHVISION, "torchvision", "torchvision.ops", "torchvision.ops.deform_conv"
    )


def make_mmcv(monkeypatch):
    """Return a stand-in for `mmcv.ops`."""
    v2 = make_modules(monkeypatch, STUB + MMCV_V2, "mmcv.ops.modulated_deform_conv")
    v1 = make_modules(monkeypatch, STUB + MMCV_V1, "mmcv.ops.deform_conv")
    roi_pool = make_modules(monkeypatch, MMCV_ROI_POOL, "mmcv.ops.deform_roi_pool")
    ops = make_modules(monkeypatch, "", "mmcv", "mmcv.ops")
    v2.calls = roi_pool.calls = v1.calls
    for module in (v1, v2, roi_pool):
        vars(ops).update(deformable(module))
    ops.calls = v1.calls
    return ops


def deformable(module):
    """The functions and classes of a module that are about deformable convolution."""
    return {name: value for name, value in vars(module).items() if "deform" in name.lower()}


class WithPredictedOffsets(nn.Module):
    """A layer that is given offsets (and masks), and a convolution that predicts them."""

    def __init__(self, layer, masks=True):
        super().__init__()
        taps = math.prod(layer.kernel_size) * DEFORM_GROUPS
        self.split = [2 * taps, taps] if masks else [2 * taps]
        self.predict = nn.Conv2d(layer.in_channels, sum(self.split), 3, padding=1)
        self.layer = layer

    def forward(self, x):
        offset, *mask = self.predict(x).split(self.split, 1)
        return self.layer(x, offset, *mask)


def run(model, x):
    """Return output and gradients."""
    model.zero_grad()
    output = model(x)
    output.square().sum().backward()
    return [output.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def assert_same(results, expected_results):
    for found, expected in zip(results, expected_results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
