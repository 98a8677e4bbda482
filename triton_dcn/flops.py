"""Formulas by which `torch.utils.flop_counter.FlopCounterMode` counts the operators.

`import triton_dcn` registers them where triton is installed. Without it, `torch.utils.flop_counter` logs a warning when
it is imported, so there a program that counts imports this file itself, before it makes a counter.

Counted are the products, as for PyTorch's own convolution: where the samples lie and how they are blended is not. So a
deformable convolution has the FLOPs of a convolution of its shape, whichever backend computes it; backend "reference"
consists of PyTorch's operations, which count themselves.

The gradients of input, offset and mask come from one product, of grad_output and weight: where at least one of them is
needed, it is counted once. The gradient of the weight is the other product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from triton_dcn import operator  # defines the operators  # noqa: F401

Shape = Sequence[int]


@register_flop_formula([torch.ops.triton_dcn.deform_conv2d, torch.ops.triton_dcn.deform_conv2d_with_samples])
def forward_flops(
    input: Shape, offset: Shape, mask: Shape | None, weight: Shape, *settings: Any, out_shape: Any, **options: Any
) -> int:
    """Return the FLOPs of a forward pass; a multiplication and an addition are two.

    Args:
        input, offset, mask, weight: shapes of the tensors.
        settings: the other arguments of the operator.
        out_shape: of the output, (B, O, Ho, Wo), or that and the shape of the samples.
        options: arguments given by name.
    """
    output = out_shape if isinstance(out_shape, torch.Size) else out_shape[0]
    return _product_flops(weight, output)


@register_flop_formula(torch.ops.triton_dcn.deform_conv2d_backward)
def backward_flops(
    grad_output: Shape,
    input: Shape,
    offset: Shape,
    mask: Shape | None,
    weight: Shape,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
    needs: Sequence[bool],
    *settings: Any,
    **options: Any,
) -> int:
    """Return the FLOPs of a backward pass: as many as a forward pass for each product that is needed.

    Args:
        grad_output, input, offset, mask, weight: shapes of the tensors.
        stride, padding, dilation, backend, needs, settings: the other arguments of the operator.
        options: arguments given by name, and the shapes of the results.
    """
    needs_column_gradients = any(needs[:3])
    needs_weight = needs[3]
    return (needs_column_gradients + needs_weight) * _product_flops(weight, grad_output)


def _product_flops(weight: Shape, output: Shape) -> int:
    return 2 * math.prod(output) * math.prod(weight[1:])
