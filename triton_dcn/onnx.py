"""Translation of the operator to ONNX `DeformConv` (operator set 19 or later).

    from triton_dcn.onnx import TRANSLATIONS

    torch.onnx.export(model, inputs, "model.onnx", dynamo=True, opset_version=20, custom_translation_table=TRANSLATIONS)

This module needs onnxscript, which comes with the extra `export`; nothing else in the package imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset20

op: Any = opset20  # its annotations know arrays, not the values of a graph
Value = Any
"""`onnxscript.ir.Value`, a tensor of the graph; torch reads the annotations and does not know that class."""


def deform_conv2d(
    input: Value,
    offset: Value,
    mask: Value | None,
    weight: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
    packed: bool = False,
    relu: bool = False,
) -> Value:
    """Write the operator as one `DeformConv`: offsets and masks have the same channel order in both.

    Args:
        input, offset, mask, weight, bias, stride, padding, dilation: as in `triton_dcn.deform_conv2d`.
        backend: without meaning in the graph.
        packed: whether `offset` holds the offsets and, in its last third of channels, what the sigmoid makes the mask.
        relu: whether negative outputs become 0.
    """
    moves = _sizes("offset", offset)[1]
    offset, mask = _cast(offset, input), None if mask is None else _cast(mask, input)
    if packed:
        moves = moves // 3 * 2
        zero, border, end, axis = (op.Constant(value_ints=[value]) for value in (0, moves, moves + moves // 2, 1))
        offset, mask = op.Slice(offset, zero, border, axis), op.Sigmoid(op.Slice(offset, border, end, axis))
    (_, channels, *_), (_, group_channels, *kernel) = _sizes("input", input), _sizes("weight", weight)
    output = op.DeformConv(
        input,
        weight,
        offset,
        bias,
        mask,
        kernel_shape=kernel,
        strides=tuple(stride),
        pads=(*padding, *padding),
        dilations=tuple(dilation),
        group=channels // group_channels,
        offset_group=moves // (2 * kernel[0] * kernel[1]),
    )
    return op.Relu(output) if relu else output


def _cast(value: Value, like: Value) -> Value:
    """Return a value in the dtype of another: offsets and masks may be float32 beside a half-precision input."""
    return value if value.dtype == like.dtype else op.CastLike(value, like)


def _sizes(name: str, value: Value) -> list[Any]:
    """Return the sizes of a tensor; of the channels and of the weight they must be known numbers."""
    if value.shape is None:
        raise ValueError(f"{name}: its shape must be known for the export to ONNX")
    return list(value.shape)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.triton_dcn.deform_conv2d.default: deform_conv2d}
"""For the argument `custom_translation_table` of `torch.onnx.export`."""
