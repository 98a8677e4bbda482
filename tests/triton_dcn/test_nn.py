"""Modules against mmcv's numbers, their parameters and their start."""

import pytest
import torch
import torch.nn.functional as F

from tests.triton_dcn.cases import CASES, deterministic, device_of, make_case, relative
from triton_dcn import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack, fuse_batch_norm
from triton_dcn.functional import convolve

PACKS = [f"p{i:02d}" for i in range(20)]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_pack_golden(golden, dtype, limit):
    arrays, params = golden("deform_conv")
    names = [name for name in PACKS if name in params]
    assert names
    for name in names:
        case = params[name]
        expected = {}
        for key, value in arrays.items():
            if key.startswith(f"{name}."):
                expected[key.removeprefix(f"{name}.")] = torch.from_numpy(value)
        values = {key: tensor.to(dtype) for key, tensor in expected.items()}

        pack = ModulatedDeformConv2dPack(
            in_channels=case["C"],
            out_channels=values["weight"].shape[0],
            kernel_size=case["kernel"],
            stride=case["stride"],
            padding=case["padding"],
            dilation=case.get("dilation", 1),
            groups=case["groups"],
            deform_groups=case["deform_groups"],
            bias=case["bias"],
        ).to(dtype)
        pack.load_state_dict({key: values[key] for key in pack.state_dict()}, strict=True)
        predicted = []
        pack.conv_offset.register_forward_hook(lambda module, args, output, maps=predicted: maps.append(output))

        x = values["input"].requires_grad_()
        output = pack(x)
        output.backward(values["grad_out"])
        assert relative(predicted[0], expected["conv_offset_out"]) < limit
        assert relative(output, expected["output"]) < limit
        assert relative(x.grad, expected["grad_input"]) < limit
        for key, parameter in pack.named_parameters():
            assert relative(parameter.grad, expected[f"grad_{key}"]) < limit, key


@pytest.mark.parametrize(
    ("kind", "factor", "bound"),
    [(DeformConv2dPack, 1.0, (6 / 36) ** 0.5), (ModulatedDeformConv2dPack, 0.5, (1 / 36) ** 0.5)],
)
def test_packs_start_as_a_convolution(kind, factor, bound):
    """With the weights that mmcv draws for each version."""
    pack = kind(4, 6, 3, stride=2, padding=1, deform_groups=2)
    x = torch.randn(2, 4, 9, 7)
    expected = factor * F.conv2d(x, pack.weight, stride=2, padding=1)
    torch.testing.assert_close(pack(x), expected)
    assert 0.9 * bound < pack.weight.abs().max() <= bound


@pytest.mark.parametrize("kind", [DeformConv2dPack, ModulatedDeformConv2dPack])
def test_parameter_names_are_mmcvs(kind):
    names = {"weight", "bias", "conv_offset.weight", "conv_offset.bias"}
    assert set(kind(4, 4, 3, bias=True).state_dict()) == names
    assert set(kind(4, 4, 3, bias=False).state_dict()) == names - {"bias"}
    assert ("bias" in kind(4, 4, 3).state_dict()) == (kind is ModulatedDeformConv2dPack)


def test_deform_conv2d_module():
    layer = DeformConv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), groups=2)
    x = torch.randn(1, 4, 9, 7)
    output = layer(x, torch.zeros(1, 2 * 15, 5, 7), torch.ones(1, 15, 5, 7))
    torch.testing.assert_close(output, F.conv2d(x, layer.weight, layer.bias, (2, 1), (1, 2), groups=2))
    assert "kernel_size=(3, 5)" in repr(layer)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DeformConv2d(5, 6, 3, groups=2), "in_channels: expected a positive multiple of groups = 2, got 5"),
        (lambda: DeformConv2d(4, 5, 3, groups=2), "out_channels: .* got 5"),
        (lambda: DeformConv2dPack(4, 6, 3, deform_groups=3), "multiple of deform_groups = 3, got 4"),
        (lambda: ModulatedDeformConv2dPack(4, 6, (3, 3, 3)), "kernel_size"),
        (lambda: DeformConv2d(4, 0, 3), "out_channels: expected a positive multiple .* got 0"),
        (lambda: DeformConv2d(4, 4, 3, groups=0), "groups = 0"),
        (lambda: DeformConv2dPack(4, 4, 3, deform_groups=0), "deform_groups = 0"),
        (lambda: DeformConv2dPack(4, 4, 0), "kernel_size: expected at least 1"),
        (lambda: DeformConv2dPack(4, 4, 3, padding=-1), "padding: expected at least 0"),
        (lambda: DeformConv2d(4, 2, 3)(torch.zeros(1, 8, 3, 3), torch.zeros(1, 18, 1, 1)), "input: .* 4 channels"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_sigmoid_of_the_mask_inside_the_operator(backend):
    """A predicted map gives what its offsets and the sigmoid of its last third give, gradients included."""
    case = make_case(CASES["groups"], torch.float32, device_of(backend))
    x, offset, mask, weight = case.tensors
    settings = case.bias, case.geom.stride, case.geom.padding, case.geom.dilation
    predicted = torch.cat([offset, 4 * mask - 2], 1).detach()
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = predicted.clone(memory_format=layout).requires_grad_()
        output = convolve(x, leaf, weight, *settings, None, mask_logits=True, backend=backend)
        (grad,) = torch.autograd.grad(output, leaf, case.grad_output)

        offset_part, logits = leaf.split([offset.shape[1], mask.shape[1]], 1)
        expected = convolve(x, offset_part, weight, *settings, logits.sigmoid(), backend=backend)
        (expected_grad,) = torch.autograd.grad(expected, leaf, case.grad_output)
        assert relative(output, expected) < 1e-6
        assert relative(grad, expected_grad) < 1e-6


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("name", ["plain", "groups"])
def test_relu_inside_the_operator(name, backend):
    """The output and every gradient are those of a ReLU behind the operator; NaN is not swallowed."""
    case = make_case(CASES[name], torch.float32, device_of(backend))
    leaves = [tensor.detach().requires_grad_() for tensor in case.tensors]
    x, offset, mask, weight = leaves
    settings = case.bias, case.geom.stride, case.geom.padding, case.geom.dilation, mask
    output = convolve(x, offset, weight, *settings, relu=True, backend=backend)
    expected = convolve(x, offset, weight, *settings, backend=backend).relu()
    assert 0.1 < (output == 0).float().mean() < 0.9
    assert torch.equal(output, expected)

    with deterministic():
        grads = torch.autograd.grad(output, leaves, case.grad_output)
        expected_grads = torch.autograd.grad(expected, leaves, case.grad_output)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert torch.equal(grad, expected_grad)

    nan_weight = torch.full_like(weight, torch.nan)
    assert convolve(x, offset, nan_weight, *settings, relu=True, backend=backend).isnan().all()


def norm_of(channels, **arguments):
    """A BatchNorm2d in evaluation mode that does something."""
    norm = torch.nn.BatchNorm2d(channels, **arguments).double().eval()
    for name, value in norm.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + (0.5 if name == "running_var" else -0.5))
    return norm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack])
def test_fused_batch_norm(kind, bias):
    layer = kind(4, 6, 3, stride=2, padding=1, groups=2, bias=bias).double()
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 4, 9, 7).double()
    inputs = [x]
    if kind is DeformConv2d:
        inputs += [torch.randn(2, 18, 5, 4).double(), torch.rand(2, 9, 5, 4).double()]
    else:
        torch.nn.init.normal_(layer.conv_offset.weight)
    for affine in (True, False):
        norm = norm_of(6, affine=affine)
        weight_before = layer.weight.clone()
        fused = fuse_batch_norm(layer, norm)
        torch.testing.assert_close(fused(*inputs), norm(layer(*inputs)))
        assert type(fused) is kind
        assert fused.bias.dtype == fused.weight.dtype == torch.float64
        assert torch.equal(layer.weight, weight_before)
        assert (layer.bias is not None) == bias
    half = fuse_batch_norm(kind(4, 6, 3).bfloat16(), norm)
    assert half.weight.dtype == half.bias.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("layer", "norm", "error", "words"),
    [
        (torch.nn.Conv2d(4, 6, 3), norm_of(6), TypeError, "layer: expected.*got Conv2d"),
        (DeformConv2d(4, 6, 3), torch.nn.GroupNorm(2, 6), TypeError, "norm: expected.*got GroupNorm"),
        (DeformConv2d(4, 6, 3), norm_of(6).train(), ValueError, "evaluation mode"),
        (DeformConv2d(4, 6, 3), norm_of(6, track_running_stats=False), ValueError, "statistics"),
        (DeformConv2d(4, 6, 3), norm_of(5), ValueError, "expected 6 channels .*, got 5"),
        (fuse_batch_norm(DeformConv2d(4, 6, 3), norm_of(6), relu=True), norm_of(6), ValueError, "without relu"),
    ],
)
def test_errors_of_fusing(layer, norm, error, words):
    with pytest.raises(error, match=words):
        fuse_batch_norm(layer, norm)
