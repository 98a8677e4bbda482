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
) -> Value:
    """Write `triton_dcn::roi_pool` as one `RoiAlign` per level over the rois of that level.

    The rois of a level are picked with `NonZero` and their result is scattered into zeros, so that a roi is pooled once
    and one that is ignored, such as padding with batch index -1, stays zero.
    """
    if offset is not None:
        raise NotImplementedError("roi_pool: expected no offset, got one: deformable RoI pooling has no ONNX operator")
    image = op.Cast(op.Gather(rois, _scalar(0), axis=1), to=ir.DataType.INT64)  # (R,)
    boxes = _columns(rois, 1, 5)  # (R, 4)
    live = _live_rois(image, boxes, num_images=op.Squeeze(op.Shape(features[0], start=0, end=1)))

    bins = _vector(*output_size)
    shape = op.Concat(op.Shape(rois, start=0, end=1), op.Shape(features[0], start=1, end=2), bins, axis=0)
    pooled = op.ConstantOfShape(shape)  # (R, C, S, S) zeros
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
