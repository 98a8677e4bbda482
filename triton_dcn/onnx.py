"""Translation of the operator to ONNX `DeformConv` (operator set 19 or later).

    from triton_dcn.onnx import TRANSLATIONS

    torch.onnx.export(model, inputs, "model.onnx", dynamo=True, opset_version=20, custom_translation_table=TRANSLATIONS)

An older operator set has no `DeformConv`: with torch 2.8 or newer, exporting to one fails, and the error says so.

This module needs onnxscript, which comes with the extra `export`; nothing else in the package imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import evaluator, opset20
from torch.torch_version import TorchVersion

OLDEST_OPSET = 19
"""The first operator set with `DeformConv`."""
TRANSLATES_TO_REQUESTED_OPSET = TorchVersion(torch.__version__) >= TorchVersion("2.8")
"""Older versions of torch translate to operator set 18 whatever is asked for, and convert the graph afterwards."""

op: Any = opset20  # onnxscript annotates these functions for arrays, and here they are called with values of a graph
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
    mask_logits: bool = False,
    relu: bool = False,
) -> Value:
    """Write the operator as one `DeformConv`: offsets and masks have the same channel order in both.

    Args:
        input, offset, mask, weight, bias, stride, padding, dilation: as in `triton_dcn.deform_conv2d`.
        backend: ignored.
        mask_logits: `offset` holds in its last third of channels the logits of the mask; `mask` is None.
        relu: whether negative outputs become 0.

    Raises:
        ValueError: the shape of a tensor is not known, or the operator set has no `DeformConv`.
    """
    _check_opset()
    _, channels, *_ = _shape("input", input)
    _, channels_per_group, *kernel = _shape("weight", weight)
    _, offset_channels, *_ = _shape("offset", offset)
    taps = kernel[0] * kernel[1]

    offset = _cast_like(offset, input)
    if mask_logits:
        map_channels = offset_channels
        offset_channels = map_channels // 3 * 2
        mask = op.Sigmoid(_slice_channels(offset, offset_channels, map_channels))
        offset = _slice_channels(offset, 0, offset_channels)
    elif mask is not None:
        mask = _cast_like(mask, input)

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
        group=channels // channels_per_group,
        offset_group=offset_channels // (2 * taps),
    )
    return op.Relu(output) if relu else output


def _check_opset() -> None:
    """Raise ValueError if the operator set that torch translates to has no `DeformConv`."""
    recorder: Any = evaluator.default()
    opset = recorder.opset.version  # 18 also where an older one is asked for
    if TRANSLATES_TO_REQUESTED_OPSET and opset < OLDEST_OPSET:
        raise ValueError(f"opset_version: expected {OLDEST_OPSET} or later, for DeformConv, got {opset} or earlier")


def _slice_channels(value: Value, start: int, end: int) -> Value:
    starts, ends, axes = (op.Constant(value_ints=[number]) for number in (start, end, 1))
    return op.Slice(value, starts, ends, axes)


def _cast_like(value: Value, like: Value) -> Value:
    """Return a value in the dtype of another: offsets and masks may be float32 beside a half-precision input."""
    return value if value.dtype == like.dtype else op.CastLike(value, like)


def _shape(name: str, value: Value) -> list[Any]:
    """Return the sizes of a tensor: numbers, or names of open sizes."""
    if value.shape is None:
        raise ValueError(f"{name}: expected a known shape for the export to ONNX, got none")
    return list(value.shape)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.triton_dcn.deform_conv2d.default: deform_conv2d}
"""For the argument `custom_translation_table` of `torch.onnx.export`."""
