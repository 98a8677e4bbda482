"""Small calls whose results others have published: the node tests of ONNX, and the tests of Detectron2 and mmcv."""

import pytest
import torch

from tests.triton_dcn.cases import device_of
from triton_dcn import DeformConv2dPack, ModulatedDeformConv2dPack, deform_conv2d
from triton_dcn.functional import convolve

BACKENDS = ["reference", "torch", "triton"]

# one image, its kernel is 2x2 and all ones: input, padding, places of the offset and of the mask that are not 0 and 1,
# bias, output
ONNX_NODES = {
    "basic_deform_conv_with_padding": (
        [torch.arange(9.0)],
        1,
        {(0, 0, 0): 0.5, (5, 1, 2): -0.1},
        None,
        None,
        [[0.0, 1.0, 3.0, 2.0], [3.0, 8.0, 11.9, 7.0], [9.0, 20.0, 24.0, 13.0], [6.0, 13.0, 15.0, 8.0]],
    ),
    "basic_deform_conv_without_padding": (
        [torch.arange(9.0)],
        0,
        {(0, 0, 0): 0.5, (5, 0, 1): -0.1},
        None,
        None,
        [[9.5, 11.9], [20.0, 24.0]],
    ),
    "deform_conv_with_mask_bias": (
        [torch.arange(9.0)],
        0,
        {(0, 0, 0): 0.5, (5, 0, 1): -0.1},
        {(2, 1, 1): 0.2},
        1.0,
        [[10.5, 12.9], [21.0, 19.4]],
    ),
    "deform_conv_with_multiple_offset_groups": (
        [torch.arange(9.0), torch.arange(8.0, -1.0, -1.0)],
        0,
        {(0, 0, 0): 0.5, (13, 0, 1): -0.1},
        None,
        None,
        [[33.5, 32.1], [32.0, 32.0]],
    ),
}


def filled(shape, value, changes):
    """Return a map (1, C, Ho, Wo) of one value, but for some places."""
    tensor = torch.full((1, *shape), value)
    for place, changed in changes.items():
        tensor[(0, *place)] = changed
    return tensor


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ONNX_NODES)
def test_onnx_nodes(name, backend):
    """Source: onnx/backend/test/case/node/deformconv.py."""
    planes, padding, offset_changes, mask_changes, bias, expected = ONNX_NODES[name]
    channels = len(planes)
    size = (len(expected), len(expected))
    arguments = {
        "input": torch.stack(planes).view(1, channels, 3, 3),
        "offset": filled((8 * channels, *size), 0.0, offset_changes),
        "weight": torch.ones(1, channels, 2, 2),
        "mask": None if mask_changes is None else filled((4 * channels, *size), 1.0, mask_changes),
        "bias": None if bias is None else torch.tensor([bias]),
    }
    device = device_of(backend)
    on_device = {key: value if value is None else value.to(device) for key, value in arguments.items()}
    output = deform_conv2d(**on_device, padding=padding, backend=backend)
    torch.testing.assert_close(output.cpu(), torch.tensor([[expected]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_tap_moved_by_half_a_pixel(backend):
    """Versions 1 and 2. Source: Detectron2's tests/layers/test_deformable.py."""
    device = device_of(backend)
    x = torch.arange(25.0, device=device).view(1, 1, 5, 5)
    offset = torch.full((1, 18, 5, 5), 0.5, device=device)
    mask = torch.full((1, 9, 5, 5), 0.5, device=device)
    weight = torch.ones(1, 1, 3, 3, device=device)
    expected = torch.tensor(
        [
            [30.0, 41.25, 48.75, 45.0, 28.75],
            [62.25, 81.0, 90.0, 80.25, 50.25],
            [99.75, 126.0, 135.0, 117.75, 72.75],
            [105.0, 131.25, 138.75, 120.0, 73.75],
            [71.75, 89.25, 93.75, 80.75, 49.5],
        ]
    )
    output = deform_conv2d(x, offset, weight, padding=1, backend=backend)
    torch.testing.assert_close(output[0, 0].cpu(), expected)
    output = deform_conv2d(x, offset, weight, padding=1, mask=mask, backend=backend)
    torch.testing.assert_close(output[0, 0].cpu(), expected / 2)


def predict_and_convolve(pack, x, padding, backend):
    """Do what the pack does, with a backend of choice."""
    return convolve(
        x, pack.conv_offset(x), pack.weight, None, 1, padding, 1, None, mask_logits=pack.mask_logits, backend=backend
    )


def assert_rounds_to(found, expected):
    """Compare with numbers that are published with two or three digits; those that are 0 are exact."""
    expected = torch.tensor(expected, dtype=found.dtype, device=found.device).view(found.shape)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_predicted_offsets_of_version_1(backend):
    """In float64: some offsets lead to whole pixels. Source: mmcv's tests/test_ops/test_deform_conv.py."""
    x = torch.tensor([[[[1.0, 2, 3], [0, 1, 2], [3, 5, 2]]]]).double().requires_grad_()
    pack = DeformConv2dPack(1, 1, 2).double()
    predicting = [
        [0.1, 0.4, 0.6, 0.1],
        [0.3, 0.2, 0.1, 0.3],
        [0.5, 0.5, 0.2, 0.8],
        [0.8, 0.3, 0.9, 0.1],
        [0.3, 0.1, 0.2, 0.5],
        [0.3, 0.7, 0.5, 0.3],
        [0.6, 0.2, 0.5, 0.3],
        [0.4, 0.1, 0.8, 0.4],
    ]
    with torch.no_grad():
        pack.weight.copy_(torch.tensor([0.4, 0.2, 0.1, 0.9]).view(1, 1, 2, 2))
        pack.conv_offset.weight.copy_(torch.tensor(predicting).view(8, 1, 2, 2))
        pack.conv_offset.bias.copy_(torch.tensor([0.7, 0.1, 0.8, 0.5, 0.6, 0.5, 0.4, 0.7]))

    output = predict_and_convolve(pack, x, 0, backend)
    output.sum().backward()
    assert_rounds_to(output, [1.65, 0, 0, 0])
    assert_rounds_to(x.grad, [-0.666, 0.204, 0, 0.03, -0.416, 0.012, 0, 0.252, 0.129])
    assert_rounds_to(pack.weight.grad, [3.62, 0, 0.4, 0.18])
    of_offsets = torch.tensor([1.44, -0.72, 0, 0, -0.1, -0.08, -0.54, -0.54], dtype=torch.float64)
    assert_rounds_to(pack.conv_offset.bias.grad, of_offsets.tolist())
    under_first_tap = torch.tensor([1, 2, 0, 1], dtype=torch.float64)
    assert_rounds_to(pack.conv_offset.weight.grad, torch.outer(of_offsets, under_first_tap).tolist())


@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float64), ("torch", torch.float64), ("triton", torch.float32)]
)
def test_first_step_of_version_2(backend, dtype):
    """Offsets of zero, so that border taps lie at -1 and size exactly: their offsets have no gradient there.

    Source: mmcv's tests/test_ops/test_modulated_deform_conv.py.
    """
    device = device_of(backend)
    x = torch.tensor([[[[1.0, 2, 3]] * 3]], dtype=dtype, device=device).requires_grad_()
    pack = ModulatedDeformConv2dPack(1, 1, 2, padding=1, bias=False).to(device, dtype)
    torch.nn.init.ones_(pack.weight)

    output = predict_and_convolve(pack, x, 1, backend)
    output.sum().backward()
    outer_row = [0.5, 1.5, 2.5, 1.5]
    inner_row = [1, 3, 5, 3]
    assert_rounds_to(output, [outer_row, inner_row, inner_row, outer_row])
    assert_rounds_to(x.grad, [[2.0] * 3] * 3)
    assert_rounds_to(pack.weight.grad, [9.0] * 4)
    assert_rounds_to(pack.conv_offset.bias.grad, [-3, -1.5] * 4 + [4.5] * 4)
    of_offsets = [
        [-7, -4, 0, 0],
        [-9, 7.5, -6, 5],
        [-4, -7, 0, 0],
        [-7.5, -9, -5, -6],
        [-7, -4, -7, -4],
        [-6, 5, -9, 7.5],
        [-4, -7, -4, -7],
        [-5, -6, -7.5, -9],
    ]
    of_masks = [[10.5, 6, 7, 4], [6, 10.5, 4, 7], [7, 4, 10.5, 6], [4, 7, 6, 10.5]]
    assert_rounds_to(pack.conv_offset.weight.grad, of_offsets + of_masks)
