"""Calls of the Triton backend without the operator around it, for measurements of single passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.cases import Inputs
from triton_dcn import triton_backend
from triton_dcn.offset_mask import OffsetMask, OffsetMaskGrad

GRADIENTS = ("grad_input", "grad_offset", "grad_mask", "grad_weight")
"""Gradients in the order of `Inputs.leaves`."""


def run_forward(inputs: Inputs) -> Tensor:
    """Return the output, (B, O, Ho, Wo)."""
    input, offset, mask, weight = (leaf.detach() for leaf in inputs.leaves)
    return triton_backend.forward(inputs.geometry, input, OffsetMask(offset, mask), weight, None)


def run_backward(inputs: Inputs, gradients: Sequence[str]) -> list[Tensor]:
    """Return gradients, computed from `inputs.grad_output`; those that are not asked for are not computed.

    Args:
        inputs: of the call.
        gradients: of `GRADIENTS`, in their order.
    """
    input, offset, mask, weight = (leaf.detach() for leaf in inputs.leaves)
    grad_offset_mask = OffsetMaskGrad(
        offset=torch.empty_like(offset) if "grad_offset" in gradients else None,
        mask=torch.empty_like(mask) if "grad_mask" in gradients else None,
    )
    grad_input, grad_weight = triton_backend.backward(
        inputs.geometry,
        inputs.grad_output,
        input,
        OffsetMask(offset, mask),
        weight,
        grad_offset_mask,
        needs_input="grad_input" in gradients,
        needs_weight="grad_weight" in gradients,
    )
    results = (grad_input, grad_offset_mask.offset, grad_offset_mask.mask, grad_weight)
    return [result for result in results if result is not None]


def select_gradients(results: Sequence[Tensor], gradients: Sequence[str]) -> list[Tensor]:
    """Return some of the gradients that `measure.reference_results` returns after the output."""
    by_name = dict(zip(GRADIENTS, results[1:], strict=True))
    return [by_name[name] for name in gradients]
