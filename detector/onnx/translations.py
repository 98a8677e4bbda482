"""Translations of the detector's operators to ONNX, for `custom_translation_table` of `torch.onnx.export`.

Every graph computes what the operator computes, equal scores and padding included, in float32. This module needs
onnxscript, which comes with the extra `export`; only `detector.export` loads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from onnxscript import ir

from triton_dcn.onnx import TRANSLATIONS as CONVOLUTIONS
from triton_dcn.onnx import Value, op

LOWEST = float(np.finfo(np.float32).min)


def roi_align(
    features: Sequence[Value],
    rois: Value,
    levels: Value,
    strides: Sequence[float],
    output_size: int,
    sampling_ratio: int,
) -> Value:
    """Write `detector.ops.roi_align` as one `RoiAlign` per level over the regions of that level.

    The rows of a level are picked with `NonZero` and its result is scattered into zeros, so that a region is pooled
    once and one that does not exist (batch index -1) stays zero.
    """
    index = op.Cast(op.Gather(rois, _int(0), axis=1), to=ir.DataType.INT64)  # (R,)
    boxes = op.Slice(rois, _ints(1), _ints(5), _ints(1))  # (R, 4)
    sides = op.Sub(op.Slice(boxes, _ints(2), _ints(4), _ints(1)), op.Slice(boxes, _ints(0), _ints(2), _ints(1)))
    numbers = op.Concat(boxes, sides, axis=1)
    broken = op.Cast(op.Or(op.IsNaN(numbers), op.IsInf(numbers)), to=ir.DataType.INT64)
    finite = op.Equal(op.ReduceSum(broken, _ints(1), keepdims=0), _int(0))
    images = op.Squeeze(op.Shape(features[0], start=0, end=1))
    live = op.And(finite, op.And(op.GreaterOrEqual(index, _int(0)), op.Less(index, images)))
    window = op.Concat(op.Shape(features[0], start=1, end=2), _ints(output_size, output_size), axis=0)
    pooled = op.ConstantOfShape(op.Concat(op.Shape(rois, start=0, end=1), window, axis=0))
    for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        rows = op.NonZero(op.And(live, op.Equal(levels, _int(level))))  # (1, n)
        rows = op.Squeeze(rows, _ints(0))
        found = op.RoiAlign(
            feature,
            op.Gather(boxes, rows),
            op.Gather(index, rows),
            mode="avg",
            coordinate_transformation_mode="half_pixel",
            output_height=output_size,
            output_width=output_size,
            sampling_ratio=sampling_ratio,
            spatial_scale=1 / stride,
        )
        pooled = op.ScatterND(pooled, op.Unsqueeze(rows, _ints(1)), found)
    return pooled


def batched_nms(boxes: Value, scores: Value, valid: Value, iou_threshold: float) -> Value:
    """Write `detector.batched_nms` as one `NonMaxSuppression`: a group is an image with one class.

    Boxes that are not valid get a score below the score threshold; the selected indices become a mask again.
    """
    scores = op.Where(valid, scores, op.Constant(value_float=-np.inf))
    kept = op.NonMaxSuppression(
        boxes,
        op.Unsqueeze(scores, _ints(1)),
        op.Shape(scores, start=1, end=2),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[LOWEST]),
    )  # (n, 3): group, class, box
    place = op.Gather(kept, _ints(0, 2), axis=1)
    nothing = op.ConstantOfShape(op.Shape(valid), value=_flag(False))
    return op.ScatterND(nothing, place, op.ConstantOfShape(op.Shape(place, start=0, end=1), value=_flag(True)))


def sort_stable(values: Value, stable: bool, dim: int = -1, descending: bool = False) -> tuple[Value, Value]:
    """Write `aten.sort.stable` as a `TopK` of everything, which puts the lower index first among equals."""
    axis = dim % len(values.shape)
    count = op.Shape(values, start=axis, end=axis + 1)
    ordered, index = op.TopK(values, count, axis=axis, largest=int(descending), sorted=1)
    return ordered, index


def _int(value: int) -> Value:
    return op.Constant(value_int=value)


def _ints(*values: int) -> Value:
    return op.Constant(value_ints=values)


def _flag(value: bool) -> ir.TensorProtocol:
    return ir.tensor([value], dtype=ir.DataType.BOOL)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    **CONVOLUTIONS,
    torch.ops.detector.roi_align.default: roi_align,
    torch.ops.detector.batched_nms.default: batched_nms,
    torch.ops.aten.sort.stable: sort_stable,
}
