"""The operator as ONNX `DeformConv`, run in onnxruntime."""

import io

import pytest
import torch
from torch import nn

import triton_dcn
from triton_dcn.nn import fuse_batch_norm

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", minversion="1.31", reason="older ones have no DeformConv")
TRANSLATIONS = pytest.importorskip("triton_dcn.onnx").TRANSLATIONS
pytestmark = pytest.mark.filterwarnings("ignore")  # warnings that torch's exporter gives about its own code


def run_onnx(module, example_inputs, inputs, **options):
    """Export `module` for `example_inputs`, run the graph on `inputs`, return its first output and its nodes."""
    program = torch.onnx.export(
        module.eval(),
        example_inputs,
        dynamo=True,
        opset_version=20,
        custom_translation_table=TRANSLATIONS,
        verbose=False,
        **options,
    )
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])

    names = [value.name for value in session.get_inputs()]
    arrays = [tensor.numpy() for tensor in inputs if tensor is not None]
    output, *_ = session.run(None, dict(zip(names, arrays, strict=True)))
    nodes = [node.op_type for node in program.model.graph]
    return torch.from_numpy(output), nodes


class FixedConvolution(nn.Module):
    """The functional interface with fixed geometry."""

    def forward(self, input, offset, weight, bias, mask):
        return triton_dcn.deform_conv2d(input, offset, weight, bias, (2, 1), (1, 2), (1, 2), mask)


@pytest.mark.parametrize(
    ("groups", "offset_groups", "bias", "mask"),
    [
        pytest.param(1, 1, True, True, id="v2-bias"),
        pytest.param(2, 4, False, True, id="v2-groups"),
        pytest.param(2, 2, True, False, id="v1-bias-groups"),
        pytest.param(1, 1, False, False, id="v1"),
    ],
)
def test_operator(groups, offset_groups, bias, mask):
    batch, taps, height, width = 2, 6, 7, 19
    offset = torch.randn(batch, 2 * offset_groups * taps, height, width) * 3
    offset[0] = offset[0].round()  # whole pixels, and exactly at the borders
    offset[1, 0] = 1e4
    inputs = (
        torch.randn(batch, 8, 13, 17),
        offset,
        torch.randn(6, 8 // groups, 3, 2),
        torch.randn(6) if bias else None,
        torch.rand(batch, offset_groups * taps, height, width) if mask else None,
    )
    module = FixedConvolution()
    found, nodes = run_onnx(module, inputs, inputs)
    assert nodes == ["DeformConv"]
    torch.testing.assert_close(found, module(*inputs), rtol=0, atol=2e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layer", [triton_dcn.DeformConv2dPack, triton_dcn.ModulatedDeformConv2dPack])
def test_modules_with_open_batch_and_size(layer, fused):
    module = layer(4, 6, 3, stride=2, padding=1, deform_groups=2, bias=False)
    nn.init.normal_(module.conv_offset.weight, std=0.2)
    if fused:
        module = fuse_batch_norm(module, nn.BatchNorm2d(6).eval(), relu=True)
    example = torch.randn(2, 4, 16, 20)
    images = torch.randn(3, 4, 9, 31)
    dynamic = torch.export.Dim.DYNAMIC
    found, nodes = run_onnx(module, (example,), (images,), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},))
    assert nodes.count("DeformConv") == 1
    assert nodes.count("Relu") == fused
    torch.testing.assert_close(found, module(images).detach(), rtol=0, atol=1e-5)


class PlainConvolution(nn.Module):
    """The functional interface, version 1."""

    def forward(self, input, offset, weight):
        return triton_dcn.deform_conv2d(input, offset, weight, padding=1)


@pytest.mark.parametrize("opset", [18, 19])
def test_operator_sets_without_deform_conv_are_refused(opset):
    if not triton_dcn.onnx.TRANSLATES_TO_REQUESTED_OPSET:
        pytest.skip("this version of torch does not tell a translation the operator set")
    inputs = torch.randn(1, 4, 5, 5), torch.randn(1, 18, 5, 5), torch.randn(6, 4, 3, 3)
    settings = {"dynamo": True, "opset_version": opset, "custom_translation_table": TRANSLATIONS, "verbose": False}
    module = PlainConvolution().eval()
    if opset < triton_dcn.onnx.OLDEST_OPSET:
        with pytest.raises(
            torch.onnx.OnnxExporterError, match="opset_version: expected 19 or later, .* got 18 or earl"
        ):
            torch.onnx.export(module, inputs, **settings)
    else:
        assert torch.onnx.export(module, inputs, **settings).model.opset_imports[""] == opset
