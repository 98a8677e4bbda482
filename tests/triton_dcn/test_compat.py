"""Replacement of torchvision's and mmcv's layers: stubs of their interface, and the real torchvision where it loads."""

import copy
import importlib
import sys
import warnings

import pytest
import torch
from torch import nn

import triton_dcn
from tests.triton_dcn.compat_stubs import (
    DEFORM_GROUPS,
    WithPredictedOffsets,
    assert_same,
    deformable,
    run,
)
from triton_dcn.compat import mmcv as compat_mmcv
from triton_dcn.compat import torchvision as compat_torchvision

IMPORTS = [("torchvision.ops", compat_torchvision), ("mmcv.ops", compat_mmcv)]
GROUPS = 2


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
    assert all(type(model.get_submodule(name)).__module__.startswith("triton_dcn.") for name in names)
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


def test_convert_takes_the_model_itself(torchvision_stub):
    layer = torchvision_stub.DeformConv2d(4, 4, 3)
    assert compat_torchvision.convert(layer) == [""]
    assert isinstance(layer, triton_dcn.DeformConv2d)


def second_order_alignment(ops):
    """A class derived from a layer, as `SecondOrderDeformableAlignment` of BasicVSR++ and as in BasicSR."""

    class SecondOrderDeformableAlignment(ops.DeformConv2d):
        pass

    return SecondOrderDeformableAlignment(4, 4, 3)


@LIBRARIES
def test_convert_names_the_layers_that_it_leaves_alone(stub, compat, make, names, request):
    ops = request.getfixturevalue(stub)
    model = nn.ModuleDict({"known": ops.DeformConv2d(4, 4, 3), "align": second_order_alignment(ops)})
    expected = r"left alone those of derived classes: align \(SecondOrderDeformableAlignment\); use patch\(\)"
    with pytest.warns(UserWarning, match=expected) as caught:
        assert compat.convert(model) == ["known"]
    assert caught[0].filename == __file__
    many = nn.Sequential(*(second_order_alignment(ops) for _ in range(10)))
    with pytest.warns(UserWarning, match=r" 7 \(SecondOrderDeformableAlignment\) and 2 more;"):
        assert compat.convert(many) == []


@LIBRARIES
def test_convert_says_what_works_where_it_finds_nothing(stub, compat, make, names, request):
    ops = request.getfixturevalue(stub)
    expected = r"model: expected layers of \w+\.ops, got Sequential without any; models that call .* need patch\(\)"
    with pytest.warns(UserWarning, match=expected) as caught:
        assert compat.convert(nn.Sequential(nn.Conv2d(4, 4, 3))) == []
    assert caught[0].filename == __file__

    model = make(ops)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compat.revert(model) == []
        assert compat.convert(model) == names
        assert compat.convert(model) == []


def test_revert_refuses_a_layer_fused_with_a_relu(torchvision_stub):
    """The original class would silently ignore the ReLU."""
    layer = torchvision_stub.DeformConv2d(4, 4, 3)
    compat_torchvision.convert(layer)
    fused = triton_dcn.fuse_batch_norm(layer, nn.BatchNorm2d(4).eval(), relu=True)
    with pytest.raises(ValueError, match="expected no ReLU, which DeformConv2d does not have"):
        compat_torchvision.revert(fused)
    assert compat_torchvision.revert(layer) == [""]


def test_revert_refuses_a_parametrization_that_would_be_lost(torchvision_stub):
    layer = torchvision_stub.DeformConv2d(4, 4, 3)
    compat_torchvision.convert(layer)
    nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(ValueError, match="the layer: expected no parametrizations"):
        compat_torchvision.revert(layer)

    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert compat_torchvision.revert(layer) == [""]
    assert isinstance(layer.weight, nn.Parameter)


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
        mask = torch.rand(1, 9, 5, 5, dtype=torch.float64)
        output = mmcv_stub.modulated_deform_conv2d(x, offset.bfloat16(), mask, weight, torch.zeros(4), 1, 1)
        assert output.dtype == torch.bfloat16


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
