"""The layers of published models: channels, groups, kernels, strides and dilations as there, maps of a few pixels.

Output and all gradients of every backend in every dtype, against the reference in float64 on the same rounded inputs.
"""

from dataclasses import replace

import pytest
import torch

from tests.triton_dcn.cases import DEVICE, OperatorCase, make_case, relative, run_operator

LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
TAPS = {torch.float32: 2, torch.bfloat16: 1}
"""Taps of the kernels' tests in Triton's interpreter, whose time grows with them."""
ALL_TAPS = pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.slow


def layer(name, channels, out_channels, size=(3, 4), kernel=1, stride=1, dilation=1, version=2, **groups):
    """A layer of one image; its output is as large as the input, divided by the stride."""
    padding = dilation * (kernel // 2)
    return OperatorCase(
        name,
        1,
        channels,
        out_channels,
        *size,
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(padding, padding),
        dilation=(dilation, dilation),
        has_mask=version == 2,
        has_bias=version == 2,
        **groups,
    )


LAYERS = (
    layer("BasicVSR++", 128, 64, kernel=3, offset_groups=16),
    layer("VRT", 120, 120, kernel=3, offset_groups=12),
    layer("360 channels", 360, 360, kernel=3, groups=3, offset_groups=24),
    layer("BiRefNet 1x1", 64, 256, kernel=1),
    layer("BiRefNet 3x3", 64, 256, kernel=3),
    layer("BiRefNet 7x7", 64, 256, kernel=7),
    layer("TOOD", 4, 4, kernel=1, version=1, groups=4, offset_groups=4),
    layer("D-LKA", 96, 96, kernel=7, dilation=3, version=1, groups=96),
    layer("33 channels", 64, 33, (5, 7), kernel=3, stride=2, offset_groups=2),
    layer("3 channels", 27, 3, kernel=3),
)


def few_taps(dtype):
    """Return the layers with one or two taps in a row, without those that have become like another."""
    layers = {}
    for spec in LAYERS:
        taps = min(TAPS[dtype], spec.taps)
        dilation = spec.dilation if taps > 1 else (1, 1)
        small = replace(spec, name="", kernel=(1, taps), dilation=dilation, padding=(0, dilation[1] * (taps - 1)))
        layers.setdefault(small, replace(small, name=spec.name))
    return list(layers.values())


def check(spec, dtype, *backends):
    """Compare output and gradients with the reference in float64 on the same rounded inputs."""
    case = make_case(spec, dtype)
    exact, exact_grads = run_operator(case.double(), "reference")
    for backend in backends:
        output, grads = run_operator(case, backend)
        for found, expected in zip((output, *grads), (exact, *exact_grads), strict=True):
            assert (found is None) == (expected is None)
            if expected is not None:
                assert found.dtype == dtype
                assert found.shape == expected.shape
                assert expected.any()
                assert relative(found, expected) <= LIMITS[dtype], backend


def named(value):
    """Return what a layer or a dtype is called in the name of a test."""
    return value.name if isinstance(value, OperatorCase) else str(value)


@pytest.mark.parametrize("dtype", LIMITS, ids=named)
@pytest.mark.parametrize("spec", LAYERS, ids=named)
def test_plain_backends(spec, dtype):
    check(spec, dtype, "torch", "reference")


@pytest.mark.parametrize(("dtype", "spec"), [(dtype, spec) for dtype in TAPS for spec in few_taps(dtype)], ids=named)
def test_kernels(spec, dtype):
    check(spec, dtype, "triton")


@ALL_TAPS
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", [dtype for dtype in LIMITS if dtype != torch.float64], ids=named)
@pytest.mark.parametrize("spec", LAYERS, ids=named)
def test_kernels_with_all_taps(spec, dtype):
    check(spec, dtype, "triton")
