"""Replacement of torchvision's and mmcv's layers: stubs of their interface, and the real torchvision where it loads."""

import copy
import importlib
import math
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

import triton_dcn
from triton_dcn.compat import mmcv as compat_mmcv
from triton_dcn.compat import torchvision as compat_torchvision

IMPORTS = [("torchvision.ops", compat_torchvision), ("mmcv.ops", compat_mmcv)]
GROUPS = 2
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


# the interfaces of the libraries, around this package's reference
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
def modulated_deform_conv2d(input, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups):
    calls.append("v2")
    return ours(input, offset, weight, bias, stride, padding, dilation, mask, backend="reference")

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
def deform_conv2d(input, offset, weight, stride, padding, dilation, groups, deform_groups, bias, im2col_step):
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


@pytest.fixture
def torchvision_stub(monkeypatch):
    return make_modules(
        monkeypatch, STUB + TORCHVISION, "torchvision", "torchvision.ops", "torchvision.ops.deform_conv"
    )


@pytest.fixture
def mmcv_stub(monkeypatch):
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


def torchvision_model(ops):
    return WithPredictedOffsets(ops.DeformConv2d(8, 6, 3, padding=1, groups=GROUPS)).double()


def mmcv_model(ops):
    shape = {"padding": 1, "groups": GROUPS, "deform_groups": DEFORM_GROUPS}
    return nn.Sequential(
        WithPredictedOffsets(ops.ModulatedDeformConv2d(8, 8, 3, **shape)),
        WithPredictedOffsets(ops.DeformConv2d(8, 8, 3, **shape), masks=False),
        ops.ModulatedDeformConv2dPack(8, 8, 3, **shape),
        ops.DeformConv2dPack(8, 8, 3, **shape),
    ).double()


LIBRARIES = pytest.mark.parametrize(
    ("stub", "compat", "make", "names"),
    [
        pytest.param("torchvision_stub", compat_torchvision, torchvision_model, ["layer"], id="torchvision"),
        pytest.param("mmcv_stub", compat_mmcv, mmcv_model, ["0.layer", "1.layer", "2", "3"], id="mmcv"),
    ],
)


@LIBRARIES
def test_patch_replaces_and_restores(stub, compat, make, names, request):
    ops = request.getfixturevalue(stub)
    originals = deformable(ops)
    model = make(ops)
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)
    expected = run(model, x)
    count = len(ops.calls)
    assert count == len(names)

    with compat.patch() as handle:
        assert_same(run(model, x), expected)
        assert len(ops.calls) == count, "the library's own function ran"
    assert deformable(ops) == originals
    handle.undo()
    run(model, x)
    assert len(ops.calls) == 2 * count

    handle = compat.patch()
    run(model, x)
    handle.undo()
    assert len(ops.calls) == 2 * count


@LIBRARIES
def test_patch_is_undone_on_an_error(stub, compat, make, names, request):
    ops = request.getfixturevalue(stub)
    original = ops.deform_conv2d

    def fail_while_patched():
        with compat.patch():
            assert ops.deform_conv2d is not original
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_patched()
    assert ops.deform_conv2d is original


@LIBRARIES
def test_convert_keeps_parameters_names_and_hooks(stub, compat, make, names, request):
    ops = request.getfixturevalue(stub)
    model = make(ops)
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)
    expected = run(model, x)
    count = len(ops.calls)
    parameters = dict(model.named_parameters())
    classes = {name: type(module) for name, module in model.named_modules()}
    hook_calls = []
    model.get_submodule(names[0]).register_forward_hook(lambda *_: hook_calls.append(1))

    assert compat.convert(model) == names
    assert compat.convert(model) == []
    assert all(type(model.get_submodule(name)).__module__ == "triton_dcn.nn" for name in names)
    converted_parameters = dict(model.named_parameters())
    assert list(converted_parameters) == list(parameters)
    assert all(converted_parameters[name] is parameters[name] for name in parameters)
    assert_same(run(model, x), expected)
    assert_same(run(copy.deepcopy(model), x), expected)
    assert len(ops.calls) == count
    assert hook_calls
    repr(model)

    assert compat.revert(model) == names
    assert compat.revert(model) == []
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert not any("triton" in key for module in model.modules() for key in vars(module))
    run(model, x)
    assert len(ops.calls) == 2 * count


class AllRoIPools(nn.Module):
    """The three layers of deformable RoI pooling, one beside the other."""

    def __init__(self, ops):
        super().__init__()
        self.plain = ops.DeformRoIPool(3, 0.5, 2, 0.2)
        self.pack = ops.DeformRoIPoolPack(3, 4, 6, 0.5)
        self.modulated = ops.ModulatedDeformRoIPoolPack(3, 4, 6, 0.5)
        self.offset = nn.Parameter(torch.randn(2, 2, 3, 3))

    def forward(self, x):
        rois = torch.tensor([[0, 1, 2, 13, 9], [1, 3, 1, 9, 12]]).to(x)
        return torch.stack([self.plain(x, rois, self.offset), self.pack(x, rois), self.modulated(x, rois)])


@pytest.mark.parametrize("way", ["patch", "convert"])
def test_roi_pooling_of_mmcv(mmcv_stub, way):
    model = AllRoIPools(mmcv_stub).double()
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    expected = run(model, x)
    assert mmcv_stub.calls == ["roi"] * 6
    names = ["plain", "pack", "modulated"]
    parameters = dict(model.named_parameters())
    if way == "patch":
        with compat_mmcv.patch():
            assert_same(run(model, x), expected)
    else:
        assert compat_mmcv.convert(model) == names
        assert type(model.modulated) is triton_dcn.ModulatedDeformRoIPoolPack
        assert_same(run(model, x), expected)
        assert repr(model.pack).startswith("DeformRoIPoolPack(\n  output_size=(3, 3), spatial_scale=0.5")
        assert compat_mmcv.revert(model) == names
        assert type(model.modulated) is mmcv_stub.ModulatedDeformRoIPoolPack
        assert not any("triton" in key for module in model.modules() for key in vars(module))
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert mmcv_stub.calls == ["roi"] * 6
    run(model, x)
    assert len(mmcv_stub.calls) == 12


def test_convert_leaves_subclasses_and_takes_the_model_itself(torchvision_stub):
    class Subclass(torchvision_stub.DeformConv2d):
        pass

    layer = torchvision_stub.DeformConv2d(4, 4, 3)
    assert compat_torchvision.convert(nn.Sequential(Subclass(4, 4, 3))) == []
    assert compat_torchvision.convert(layer) == [""]
    assert isinstance(layer, triton_dcn.DeformConv2d)


def test_revert_refuses_a_layer_fused_with_a_relu(torchvision_stub):
    """The original class would silently ignore the ReLU."""
    layer = torchvision_stub.DeformConv2d(4, 4, 3)
    compat_torchvision.convert(layer)
    fused = triton_dcn.fuse_batch_norm(layer, nn.BatchNorm2d(4).eval(), relu=True)
    with pytest.raises(ValueError, match="expected no ReLU, which DeformConv2d does not have"):
        compat_torchvision.revert(fused)
    assert compat_torchvision.revert(layer) == [""]


def test_revert_refuses_a_bias_that_the_original_would_ignore(mmcv_stub):
    layer = mmcv_stub.DeformConv2d(4, 4, 3)
    compat_mmcv.convert(layer)
    fused = triton_dcn.fuse_batch_norm(layer, nn.BatchNorm2d(4).eval())
    with pytest.raises(ValueError, match="expected no bias, which DeformConv2d does not have"):
        compat_mmcv.revert(fused)
    assert compat_mmcv.revert(layer) == [""]
    assert not hasattr(layer, "bias")


def test_mmcv_functions_check_their_arguments(mmcv_stub):
    x = torch.randn(1, 4, 5, 5)
    offset = torch.randn(1, 18, 5, 5)
    weight = torch.randn(4, 4, 3, 3)
    with compat_mmcv.patch():
        with pytest.raises(ValueError, match="bias: expected False"):
            mmcv_stub.deform_conv2d(x, offset, weight, 1, 1, 1, 1, 1, True)
        with pytest.raises(ValueError, match="deform_groups: expected 1"):
            mmcv_stub.deform_conv2d(x, offset, weight, 1, 1, 1, 1, 2)
        with pytest.raises(ValueError, match="groups: expected 1"):
            mmcv_stub.modulated_deform_conv2d(x, offset, None, weight, None, 1, 1, 1, 2, 1)


def test_mmcv_computes_in_the_dtype_of_the_offset(mmcv_stub):
    x = torch.randn(1, 4, 5, 5)
    offset = torch.randn(1, 18, 5, 5)
    weight = torch.randn(4, 4, 3, 3)
    with compat_mmcv.patch():
        assert mmcv_stub.deform_conv2d(x, offset.bfloat16(), weight, 1, 1).dtype == torch.bfloat16


@pytest.mark.parametrize(("library", "compat"), IMPORTS)
@pytest.mark.parametrize("call", ["patch", "convert", "revert"])
def test_a_missing_library_is_named(library, compat, call, monkeypatch):
    package = library.split(".")[0]
    for name in list(sys.modules):
        if name.split(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)

    arguments = [] if call == "patch" else [nn.Identity()]
    with pytest.raises(ImportError, match=library):
        getattr(compat, call)(*arguments)


@pytest.fixture(scope="module")
def torchvision():
    try:
        library = importlib.import_module("torchvision")
        library.ops.deform_conv2d(torch.zeros(1, 1, 1, 1), torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, 1))
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"no torchvision with operators: {error}")
    return library


def test_with_the_real_torchvision(torchvision):
    model = torchvision_model(torchvision.ops)
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)
    expected = run(model, x)
    with compat_torchvision.patch():
        assert torchvision.ops.deform_conv2d is triton_dcn.deform_conv2d
        assert_same(run(model, x), expected)
    assert compat_torchvision.convert(model) == ["layer"]
    assert_same(run(model, x), expected)
    compat_torchvision.revert(model)
    assert type(model.layer) is torchvision.ops.DeformConv2d
    assert_same(run(model, x), expected)


def test_the_one_rule_that_differs_from_the_real_torchvision(torchvision):
    offset = torch.zeros(1, 18, 4, 4, requires_grad=True)
    x = torch.randn(1, 3, 4, 4)
    weight = torch.randn(2, 3, 3, 3)
    theirs = torchvision.ops.deform_conv2d(x, offset, weight, padding=1)
    ours = triton_dcn.deform_conv2d(x, offset, weight, padding=1)
    torch.testing.assert_close(ours, theirs)

    (their_grad,) = torch.autograd.grad(theirs.sum(), offset)
    (our_grad,) = torch.autograd.grad(ours.sum(), offset)
    differs = ((our_grad - their_grad).abs() > 1e-4).reshape(3, 3, 2, 4, 4)
    assert differs.any()
    assert not differs[1, 1].any(), "the middle tap never lies at -1"
    assert not differs[:, :, :, 1:-1, 1:-1].any(), "nor does a sample of an inner output"
