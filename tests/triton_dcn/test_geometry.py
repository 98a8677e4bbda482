"""Sizes that follow from the tensors, and errors that name the argument, what was expected and what was given."""

import pytest
import torch
import torch.nn.functional as F

from triton_dcn.geometry import ConvGeometry, conv_output_size, even_slices


def make_geometry(
    input=(2, 4, 7, 9),
    offset=(2, 18, 7, 9),
    weight=(6, 4, 3, 3),
    mask=None,
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
):
    tensors = [None if shape is None else torch.empty(shape) for shape in (input, offset, weight, mask)]
    return ConvGeometry.of(*tensors, stride, padding, dilation)


def test_derived_sizes():
    geom = make_geometry(
        input=(3, 8, 11, 10),
        offset=(3, 60, 6, 6),
        weight=(6, 4, 3, 5),
        mask=(3, 30, 6, 6),
        stride=(2, 1),
        padding=(1, 2),
        dilation=(1, 2),
    )
    assert (geom.groups, geom.offset_groups, geom.taps, geom.positions) == (2, 2, 15, 36)
    assert geom.output_shape == (3, 6, 6, 6)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [
        ((7, 9), (3, 3), (1, 1), (1, 1), (1, 1)),
        ((11, 10), (3, 5), (2, 1), (1, 2), (1, 2)),
        ((8, 6), (2, 5), (2, 3), (0, 3), (3, 2)),
    ],
)
def test_output_size_is_that_of_a_convolution(size, kernel, stride, padding, dilation):
    output = F.conv2d(torch.empty(1, 1, *size), torch.empty(1, 1, *kernel), None, stride, padding, dilation)
    assert conv_output_size(size, kernel, stride, padding, dilation) == output.shape[2:]


def test_even_slices():
    assert even_slices(0, 4) == []
    assert even_slices(4, 4) == [slice(0, 4)]
    assert even_slices(9, 4) == [slice(0, 3), slice(3, 6), slice(6, 9)]
    assert even_slices(10, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": (4, 7, 9)}, ["input", "4 dimensions", "(4, 7, 9)"]),
        ({"offset": (2, 18, 7)}, ["offset", "(2, 18, 7)"]),
        ({"input": (2, 6, 7, 9)}, ["input", "6 channels", "4"]),
        ({"input": (2, 8, 7, 9), "weight": (3, 4, 3, 3)}, ["weight", "3 output channels", "2 groups"]),
        ({"offset": (2, 17, 7, 9)}, ["offset", "17", "9 taps"]),
        ({"offset": (2, 54, 7, 9)}, ["offset", "54", "4 input channels"]),
        ({"offset": (2, 18, 7, 8)}, ["offset", "(2, 18, 7, 8)", "(2, 18, 7, 9)"]),
        ({"offset": (1, 18, 7, 9)}, ["offset", "(1, 18, 7, 9)", "(2, 18, 7, 9)"]),
        ({"mask": (2, 18, 7, 9)}, ["mask", "(2, 18, 7, 9)", "(2, 9, 7, 9)"]),
        ({"stride": (0, 1)}, ["stride", "(0, 1)"]),
        ({"padding": (-1, 1)}, ["padding", "(-1, 1)"]),
        ({"dilation": (1, 0)}, ["dilation", "(1, 0)"]),
        ({"weight": (6, 4, 0, 3)}, ["weight", "(6, 4, 0, 3)"]),
        ({"dilation": (5, 1)}, ["output", "-1x9", "kernel (3, 3)", "dilation (5, 1)"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors(change, words):
    with pytest.raises(ValueError, match=".*") as error:
        make_geometry(**change)
    for word in words:
        assert word in str(error.value)
