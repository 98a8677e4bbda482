"""Offsets and masks of a map larger than the output, which mmcv's version 2 reads from the start of each image.

The stand-in for mmcv reads memory as its kernel does (`read_memory` in `compat_stubs`); that agrees with the CPU kernel
of mmcv 2 to 4e-16 in values and gradients, in float64.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import triton_dcn
from tests.triton_dcn.compat_stubs import assert_same, run
from triton_dcn.compat import mmcv as compat_mmcv


class DyHead(nn.Module):
    """mmdet's DyHead and GLIP: the offsets of a level go to layers on the levels below and above."""

    def __init__(self, ops, channels=4, deform_groups=1):
        super().__init__()
        options = {"padding": 1, "deform_groups": deform_groups, "bias": False}
        self.high = ops.ModulatedDeformConv2d(channels, channels, 3, **options)
        self.middle = ops.ModulatedDeformConv2d(channels, channels, 3, **options)
        self.low = ops.ModulatedDeformConv2d(channels, channels, 3, stride=2, **options)
        self.offset_channels = 18 * deform_groups
        self.predict = nn.Conv2d(channels, 27 * deform_groups, 3, padding=1)

    def forward(self, levels):
        outputs = []
        for i, level in enumerate(levels):
            predicted = self.predict(level)
            offset, mask = predicted[:, : self.offset_channels], predicted[:, self.offset_channels :].sigmoid()
            output = self.middle(level, offset, mask)
            if i > 0:
                output = output + self.low(levels[i - 1], offset, mask)
            if i < len(levels) - 1:
                high = self.high(levels[i + 1].contiguous(), offset, mask)
                output = output + functional.interpolate(high, size=output.shape[2:], mode="bilinear")
            outputs.append(output)
        return torch.cat([output.flatten() for output in outputs])


class StridedBlock(nn.Module):
    """A block of DB's ResNet: the offsets are predicted without the stride that the deformable layer has."""

    def __init__(self, ops, deform_groups):
        super().__init__()
        self.conv2_offset = nn.Conv2d(4, 27 * deform_groups, 3, padding=1)
        self.conv2 = ops.ModulatedDeformConv2d(4, 6, 3, stride=2, padding=1, deform_groups=deform_groups)
        self.taps = 9 * deform_groups

    def forward(self, x):
        predicted = self.conv2_offset(x)
        return self.conv2(x, predicted[:, : 2 * self.taps], predicted[:, -self.taps :].sigmoid())


def levels():
    return [torch.randn(2, 4, *size, dtype=torch.float64) for size in ((11, 14), (6, 7), (3, 4))]


@pytest.mark.parametrize("way", ["patch", "convert"])
@pytest.mark.parametrize("deform_groups", [1, 2])
@pytest.mark.parametrize("make_model", [DyHead, StridedBlock])
def test_values_and_gradients_are_those_of_mmcv(mmcv_stub, make_model, deform_groups, way):
    model = make_model(mmcv_stub, deform_groups=deform_groups).double()
    x = levels() if make_model is DyHead else levels()[0]
    expected = run(model, x)
    count = len(mmcv_stub.calls)
    if way == "patch":
        with compat_mmcv.patch():
            assert_same(run(model, x), expected)
    else:
        names = ["high", "middle", "low"] if make_model is DyHead else ["conv2"]
        assert compat_mmcv.convert(model) == names
        assert_same(run(model, x), expected)
        assert compat_mmcv.revert(model) == names
    assert len(mmcv_stub.calls) == count
    assert_same(run(model, x), expected)
    assert len(mmcv_stub.calls) == 2 * count


def test_a_map_of_another_shape_counts_by_its_numbers(mmcv_stub):
    """Only how many numbers an image has matters; a view that skips some of its memory is read by its indices."""
    layer = compat_mmcv.ModulatedDeformConv2d(4, 4, 3, padding=1).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    offset, mask = torch.randn(2, 18, 3, 11, dtype=torch.float64), torch.rand(2, 9, 31, 1, dtype=torch.float64)
    expected = triton_dcn.deform_conv2d(
        x,
        offset.flatten(1)[:, : 18 * 30].reshape(2, 18, 5, 6),
        layer.weight,
        layer.bias,
        padding=1,
        mask=mask.flatten(1)[:, : 9 * 30].reshape(2, 9, 5, 6),
    )
    torch.testing.assert_close(layer(x, offset, mask), expected)
    last = offset.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x, last, mask.expand(2, 9, 31, 1)), expected)

    cut = torch.randn(2, 18, 8, 8, dtype=torch.float64)[:, :, :5, :6]
    torch.testing.assert_close(layer(x, cut, mask), layer(x, cut.clone(), mask))
    as_many = mask[:, :, :30]
    torch.testing.assert_close(layer(x, cut, as_many), layer(x, cut, as_many.view(2, 9, 5, 6)))


def test_settings_that_differ_between_the_axes():
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    offset = torch.randn(2, 18, 9, 8, dtype=torch.float64)
    mask = torch.rand(2, 9, 9, 8, dtype=torch.float64)
    settings = (2, 1), (1, 0), (1, 2)  # an output of 5x4
    output = compat_mmcv.deform_conv2d_v2(x, offset, mask, weight, None, *settings)

    first_offsets = offset.flatten(1)[:, : 18 * 20].view(2, 18, 5, 4)
    first_masks = mask.flatten(1)[:, : 9 * 20].view(2, 9, 5, 4)
    expected = triton_dcn.deform_conv2d(x, first_offsets, weight, None, *settings, mask=first_masks)
    torch.testing.assert_close(output, expected)


def test_maps_that_are_too_small_are_refused(mmcv_stub):
    x = torch.randn(1, 4, 5, 6)
    weight = torch.randn(4, 4, 3, 3)
    offset, mask = torch.randn(1, 18, 5, 6), torch.randn(1, 9, 5, 6)
    layer = compat_mmcv.ModulatedDeformConv2d(4, 4, 3, padding=1)
    expected = "expected at least 30 numbers for each channel and image, as many as the output of 5x6 has, got a map of"
    with compat_mmcv.patch():

        def function(*maps):
            return mmcv_stub.modulated_deform_conv2d(x, *maps, weight, None, 1, 1, 1, 1, 1)

        for call in (function, lambda *maps: layer(x, *maps)):
            with pytest.raises(ValueError, match=f"offset: {expected} 4x7"):
                call(torch.randn(1, 18, 4, 7), mask)
            with pytest.raises(ValueError, match=f"mask: {expected} 29x1"):
                call(offset, torch.randn(1, 9, 29, 1))
            with pytest.raises(ValueError, match=r"mask: expected 9 channels .*deform_groups = 1, got 18"):
                call(offset, torch.randn(1, 18, 5, 6))
            with pytest.raises(ValueError, match="offset: expected 4 dimensions"):
                call(offset[0], mask)
            with pytest.raises(ValueError, match=r"offset: expected shape \(1, 18, 5, 6\), got \(2, 18, 5, 6\)"):
                call(torch.randn(2, 18, 9, 9), mask)
        with pytest.raises(ValueError, match="stride: expected at least 1"):
            mmcv_stub.modulated_deform_conv2d(x, offset, mask, weight, None, 0, 1)
        with pytest.raises(ValueError, match="output: expected at least 1x1"):
            mmcv_stub.modulated_deform_conv2d(x[:, :, :1, :1], offset, mask, weight, None, 1, 0)
    with pytest.raises(ValueError, match=r"offset: expected 18 channels .*deform_groups = 1, got 36"):
        layer(x, torch.randn(1, 36, 5, 6), mask)


def test_version_1_is_strict_as_in_mmcv(mmcv_stub):
    x, offset = torch.randn(1, 4, 5, 6), torch.randn(1, 18, 10, 12)
    layer = mmcv_stub.DeformConv2d(4, 4, 3, padding=1)
    with compat_mmcv.patch(), pytest.raises(ValueError, match="offset: expected shape"):
        layer(x, offset)
    compat_mmcv.convert(layer)
    with pytest.raises(ValueError, match="offset: expected shape"):
        layer(x, offset)


def test_an_empty_batch(mmcv_stub):
    layer = compat_mmcv.ModulatedDeformConv2d(4, 6, 3, padding=1)
    assert layer(torch.ones(0, 4, 5, 6), torch.ones(0, 18, 9, 9), torch.ones(0, 9, 9, 9)).shape == (0, 6, 5, 6)


def test_the_converted_layer_fuses_and_traces(mmcv_stub):
    model = StridedBlock(mmcv_stub, deform_groups=2)
    compat_mmcv.convert(model)
    assert repr(model.conv2).endswith("bias=True, deform_groups=2)")
    x = torch.randn(2, 4, 6, 8)
    expected = model(x)

    fused = triton_dcn.fuse_batch_norm(model.conv2, nn.BatchNorm2d(6).eval())
    assert type(fused) is compat_mmcv.ModulatedDeformConv2d
    compat_mmcv.revert(fused)
    assert type(fused) is mmcv_stub.ModulatedDeformConv2d

    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, x)
    for run_model in (
        traced,
        torch.fx.symbolic_trace(model),
        torch.compile(model, backend="eager", fullgraph=True),
        torch.export.export(model, (x,), strict=False).module(),
    ):
        torch.testing.assert_close(run_model(x), expected)
    other = torch.randn(3, 4, 9, 7)
    torch.testing.assert_close(traced(other), model(other))


def test_the_layer_without_mmcv_starts_as_mmcvs_does(mmcv_stub):
    torch.manual_seed(0)
    layer = compat_mmcv.ModulatedDeformConv2d(8, 6, 3, padding=1, groups=2, deform_groups=4)
    torch.manual_seed(0)
    drawn = torch.empty(6, 4, 3, 3).uniform_(-1 / 72**0.5, 1 / 72**0.5)
    torch.testing.assert_close(layer.weight.detach(), drawn)
    assert not layer.bias.any()
    assert compat_mmcv.ModulatedDeformConv2d(4, 4, 3, bias=False).bias is None
    with pytest.raises(ValueError, match="in_channels: expected a multiple of deform_groups = 3, got 4"):
        compat_mmcv.ModulatedDeformConv2d(4, 4, 3, deform_groups=3)
