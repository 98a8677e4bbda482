"""Translations of the detector's operators to ONNX, for `custom_translation_table` of `torch.onnx.export`.

Every graph computes in float32 what the operator computes, also where scores are equal and in padding. This module
needs onnxscript, which comes with the extra `export`; only `detector.export` loads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from onnxscript import ir

from triton_dcn.onnx import TRANSLATIONS as CONVOLUTION_TRANSLATIONS
from triton_dcn.onnx import Value, op

LOWEST = float(np.finfo(np.float32).min)
"""Score threshold that only -inf is below."""


def roi_pool(
    features: Sequence[Value],
    rois: Value,
    levels: Value,
    offset: Value | None,
    scales: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    gamma: float,
    backend: str,
    keep_cells: bool,
) -> tuple[Value, Value]:
    """Write `triton_dcn::roi_pool` as one `RoiAlign` per level over the rois of that level.

    With an offset every bin is a roi of its own, which has one bin. Its samples are counted from its own sides: where
    the side of a bin is a whole number of cells, to the last bits, `RoiAlign` may take one more.

    Returns:
        (R, C, Ph, Pw), and what the operator keeps for the gradient: nothing.
    """
    image = op.Cast(op.Gather(rois, _scalar(0), axis=1), to=ir.DataType.INT64)  # (R,)
    boxes = _columns(rois, 1, 5)  # (R, 4)
    no_cells = op.ConstantOfShape(_vector(0))
    if offset is None:
        return _align(features, boxes, image, levels, scales, output_size, sampling_ratio), no_cells

    num_bins = _vector(output_size[0] * output_size[1])
    bins = op.Reshape(_bin_boxes(boxes, offset, output_size, gamma), _vector(-1, 4))  # (R * P, 4)
    image, levels = (_repeat(numbers, num_bins) for numbers in (image, levels))
    pooled = _align(features, bins, image, levels, scales, (1, 1), sampling_ratio)  # (R * P, C, 1, 1)
    channels = op.Shape(features[0], start=1, end=2)
    pooled = op.Reshape(pooled, op.Concat(_vector(-1, *output_size), channels, axis=0))
    return op.Transpose(pooled, perm=[0, 3, 1, 2]), no_cells


def _bin_boxes(boxes: Value, offset: Value, output_size: Sequence[int], gamma: float) -> Value:
    """Write the boxes (R, Ph, Pw, 4) of the bins of boxes (R, 4), moved by an offset (R, 2, Ph, Pw)."""
    offset = op.Cast(offset, to=ir.DataType.FLOAT)
    starts = []
    ends = []
    for axis, bins in ((0, output_size[1]), (1, output_size[0])):  # x, y
        first = _bin_axis(_columns(boxes, axis, axis + 1))
        side = op.Sub(_bin_axis(_columns(boxes, axis + 2, axis + 3)), first)
        shift = op.Mul(op.Mul(op.Constant(value_float=gamma), side), op.Gather(offset, _scalar(axis), axis=1))
        length = op.Div(side, op.Constant(value_float=float(bins)))
        numbers = op.Constant(value_floats=[float(number) for number in range(bins)])
        numbers = op.Unsqueeze(numbers, _vector(0, 1) if axis == 0 else _vector(0, 2))
        start = op.Add(op.Add(first, shift), op.Mul(numbers, length))  # (R, Ph, Pw)
        starts.append(start)
        ends.append(op.Add(start, length))
    return op.Concat(*(op.Unsqueeze(corner, _vector(3)) for corner in (*starts, *ends)), axis=3)


def _bin_axis(column: Value) -> Value:
    """Write a column (R, 1) as (R, 1, 1)."""
    return op.Unsqueeze(column, _vector(2))


def _repeat(numbers: Value, count: Value) -> Value:
    """Write numbers (R,) as (R * count,), each repeated."""
    rows = op.Unsqueeze(numbers, _vector(1))
    shape = op.Concat(op.Shape(numbers), count, axis=0)
    return op.Reshape(op.Expand(rows, shape), _vector(-1))


def _align(
    features: Sequence[Value],
    boxes: Value,
    image: Value,
    levels: Value,
    scales: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
) -> Value:
    """Write one `RoiAlign` per level.

    The rois of a level are picked with `NonZero` and their result is scattered into zeros, so that a roi is pooled once
    and one that is ignored, such as padding with batch index -1, stays zero.
    """
    live = _live_rois(image, boxes, num_images=op.Squeeze(op.Shape(features[0], start=0, end=1)))
    bins = _vector(*output_size)
    shape = op.Concat(op.Shape(image), op.Shape(features[0], start=1, end=2), bins, axis=0)
    pooled = op.ConstantOfShape(shape)  # (R, C, Ph, Pw) zeros
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        in_level = op.And(live, op.Equal(levels, _scalar(level)))
        rows = op.Squeeze(op.NonZero(in_level), _vector(0))  # (n,)
        pooled_level = op.RoiAlign(
            feature,
            op.Gather(boxes, rows),
            op.Gather(image, rows),
            mode="avg",
            coordinate_transformation_mode="half_pixel",
            output_height=output_size[0],
            output_width=output_size[1],
            sampling_ratio=sampling_ratio,
            spatial_scale=scale,
        )
        pooled = op.ScatterND(pooled, op.Unsqueeze(rows, _vector(1)), pooled_level)
    return pooled


def _live_rois(image: Value, boxes: Value, num_images: Value) -> Value:
    """Write which rois (R,) have an image and a finite box, also its width and height."""
    sides = op.Sub(_columns(boxes, 2, 4), _columns(boxes, 0, 2))
    numbers = op.Concat(boxes, sides, axis=1)
    not_finite = op.Cast(op.Or(op.IsNaN(numbers), op.IsInf(numbers)), to=ir.DataType.INT64)
    finite = op.Equal(op.ReduceSum(not_finite, _vector(1), keepdims=0), _scalar(0))
    exists = op.And(op.GreaterOrEqual(image, _scalar(0)), op.Less(image, num_images))
    return op.And(finite, exists)


def batched_nms(boxes: Value, scores: Value, valid: Value, iou_threshold: float) -> Value:
    """Write `detector::batched_nms` as one `NonMaxSuppression`: a group is an image with one class.

    Boxes that are not valid get a score below the score threshold; the selected indices become a mask again.
    """
    scores = op.Where(valid, scores, op.Constant(value_float=-np.inf))
    selected = op.NonMaxSuppression(
        boxes,
        op.Unsqueeze(scores, _vector(1)),
        op.Shape(scores, start=1, end=2),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[LOWEST]),
    )  # (n, 3): group, class, box
    kept = op.Gather(selected, _vector(0, 2), axis=1)  # (n, 2): group, box
    none_kept = op.ConstantOfShape(op.Shape(valid), value=_bool(False))
    return op.ScatterND(none_kept, kept, op.ConstantOfShape(op.Shape(kept, start=0, end=1), value=_bool(True)))


def top_k(scores: Value, count: int | Value) -> tuple[Value, Value]:
    """Write `detector::top_k` as a `TopK`, which puts the lower index first among equals, too."""
    length = _vector(count) if isinstance(count, int) else op.Reshape(count, _vector(1))
    ordered, index = op.TopK(scores, length, axis=1, largest=1, sorted=1)
    return ordered, index


def _columns(matrix: Value, start: int, stop: int) -> Value:
    """Write matrix[:, start:stop]."""
    return op.Slice(matrix, _vector(start), _vector(stop), _vector(1))


def _scalar(value: int) -> Value:
    return op.Constant(value_int=value)


def _vector(*values: int) -> Value:
    return op.Constant(value_ints=values)


def _bool(value: bool) -> ir.TensorProtocol:
    return ir.tensor([value], dtype=ir.DataType.BOOL)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    **CONVOLUTION_TRANSLATIONS,
    torch.ops.triton_dcn.roi_pool.default: roi_pool,
    torch.ops.detector.batched_nms.default: batched_nms,
    torch.ops.detector.top_k.default: top_k,
}
