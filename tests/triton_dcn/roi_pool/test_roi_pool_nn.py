"""The layers of deformable RoI pooling: mmcv's numbers, names, arguments and initial values."""

import inspect

import pytest
import torch

from triton_dcn import DeformRoIPool, DeformRoIPoolPack, ModulatedDeformRoIPoolPack, deform_roi_pool

LAYERS = {layer.__name__: layer for layer in (DeformRoIPoolPack, ModulatedDeformRoIPoolPack)}
PACKS = pytest.mark.parametrize("pack", LAYERS.values())


def relative_error(actual, expected):
    expected = torch.as_tensor(expected).double()
    return float((actual.detach().double() - expected).norm() / expected.norm().clamp(min=1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", ["p00", "p01", "p02", "p03"])
def test_golden(golden, case, dtype, tolerance):
    arrays, parameters = golden("deform_roi_pool")
    values = parameters[case]

    def array(name):
        return torch.from_numpy(arrays[f"{case}.{name}"]).to(dtype)

    layer = LAYERS[values["layer"]](
        tuple(values["output_size"]),
        values["C"],
        values["deform_fc_channels"],
        values["spatial_scale"],
        values["sampling_ratio"],
        values["gamma"],
    ).to(dtype)
    layer.load_state_dict({name: array(name) for name in layer.state_dict()})
    features = array("feat").requires_grad_()
    output = layer(features, array("rois"))
    output.backward(array("grad_out"))
    assert relative_error(output, arrays[f"{case}.output"]) < tolerance
    assert relative_error(features.grad, arrays[f"{case}.grad_feat"]) < tolerance
    for name, parameter in layer.named_parameters():
        assert relative_error(parameter.grad, arrays[f"{case}.grad_{name}"]) < tolerance, name

    aligned = DeformRoIPool.forward(layer, features, array("rois"))
    assert relative_error(layer.predict_offset(aligned), arrays[f"{case}.offset"]) < tolerance


@PACKS
def test_arguments_and_parameters_are_those_of_mmcv(pack):
    names = list(inspect.signature(pack).parameters)
    assert names == [
        "output_size",
        "output_channels",
        "deform_fc_channels",
        "spatial_scale",
        "sampling_ratio",
        "gamma",
    ]
    layer = pack(7, 256)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    expected = {"offset_fc.0": (1024, 12544), "offset_fc.2": (1024, 1024), "offset_fc.4": (98, 1024)}
    if pack is ModulatedDeformRoIPoolPack:
        expected |= {"mask_fc.0": (1024, 12544), "mask_fc.2": (49, 1024)}
    assert shapes == {f"{name}.weight": shape for name, shape in expected.items()} | {
        f"{name}.bias": shape[:1] for name, shape in expected.items()
    }
    assert list(inspect.signature(DeformRoIPool).parameters) == [
        "output_size",
        "spatial_scale",
        "sampling_ratio",
        "gamma",
    ]


@PACKS
def test_starts_as_roi_align(pack):
    layer = pack((2, 3), 4, 8, 0.5, 2)
    features = torch.randn(1, 4, 9, 9)
    rois = torch.tensor([[0, 1.0, 2.0, 13.0, 11.0]])
    aligned = deform_roi_pool(features, rois, output_size=(2, 3), spatial_scale=0.5, sampling_ratio=2)
    factor = 0.5 if pack is ModulatedDeformRoIPoolPack else 1
    torch.testing.assert_close(layer(features, rois), factor * aligned)

    layer(features, rois).sum().backward()
    moved = {name for name, parameter in layer.named_parameters() if parameter.grad.any()}
    last = {"offset_fc.4.weight", "offset_fc.4.bias"}
    if pack is ModulatedDeformRoIPoolPack:
        last |= {"mask_fc.2.weight", "mask_fc.2.bias"}
    assert moved == last
    hidden = layer.offset_fc[0]
    bound = hidden.in_features**-0.5
    assert 0.8 * bound < hidden.weight.abs().max() <= bound
    assert hidden.bias.abs().max() <= bound


@PACKS
def test_without_rois_gradients_are_zero(pack):
    layer = pack(2, 4, 8)
    features = torch.randn(1, 4, 9, 9, requires_grad=True)
    output = layer(features, torch.zeros(0, 5))
    assert output.shape == (0, 4, 2, 2)
    output.sum().backward()
    for tensor in (features, *layer.parameters()):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_pool_takes_an_offset_or_none():
    layer = DeformRoIPool((2, 3), spatial_scale=0.5, sampling_ratio=1, gamma=0.2)
    features = torch.randn(2, 4, 9, 9)
    rois = torch.tensor([[0, 1.0, 2.0, 13.0, 11.0], [1, 4.0, 3.0, 9.0, 15.0]])
    offset = torch.randn(2, 2, 2, 3)
    settings = {"output_size": (2, 3), "spatial_scale": 0.5, "sampling_ratio": 1, "gamma": 0.2}
    assert torch.equal(layer(features, rois, offset), deform_roi_pool(features, rois, offset, **settings))
    assert torch.equal(layer(features, rois), deform_roi_pool(features, rois, **settings))
    assert repr(layer) == "DeformRoIPool(output_size=(2, 3), spatial_scale=0.5, sampling_ratio=1, gamma=0.2)"


@PACKS
def test_errors(pack):
    with pytest.raises(ValueError, match=r"input: expected 4 channels \(output_channels\), got 3"):
        pack(2, 4, 8)(torch.zeros(1, 3, 9, 9), torch.zeros(1, 5))
    with pytest.raises(ValueError, match="sampling_ratio: expected 0 .* got 1.7"):
        pack(2, 3, sampling_ratio=1.7)
    with pytest.raises(TypeError, match="features: expected a tensor, got list"):
        pack(2, 3)([[1.0]], torch.zeros(1, 5))
    with pytest.raises(ValueError, match="output_size"):
        pack(0, 4)
    with pytest.raises(ValueError, match="output_channels: expected at least 1, got 0"):
        pack(2, 0)
    with pytest.raises(ValueError, match="deform_fc_channels: expected at least 1, got 0"):
        pack(2, 4, 0)
