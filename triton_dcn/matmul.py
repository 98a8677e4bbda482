"""Library matrix products over channel groups: what `triton_backend` does with columns, column gradients and T.

They accumulate in float32, whatever the dtype and the device. On a GPU these are cuBLAS calls in the dtype of the
operands, and the user's settings in `torch.backends.cuda.matmul` apply as to every product: TF32 where it is allowed,
in half precision `allow_*_reduced_precision_reduction` and `allow_fp16_accumulation`. On a CPU, operands in half
precision are converted to float32 first, because products there need not accumulate in float32.

Letters: G channel groups; rows, m, k and n are the sizes of a product.
"""

from __future__ import annotations

import torch
from torch import Tensor

# the overload exists on ROCm, too, but some versions raise when it is called
HAS_OUT_DTYPE = "dtype" in torch.ops.aten.bmm.overloads() and not torch.version.hip


def multiply(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
    """Write left @ right + bias to `out`, the groups side by side.

    Args:
        out: (rows, G*n), contiguous, written in full.
        left: (G, rows, k), any strides.
        right: (G, k, n), any strides.
        bias: (G*n,) or None.
    """
    groups, rows, _ = left.shape
    if groups == 1 and out.is_cuda:
        if bias is None:
            torch.mm(left[0], right[0], out=out)
        else:
            torch.addmm(bias, left[0], right[0], out=out)
        return

    groups_apart = out.view(rows, groups, -1).transpose(0, 1)
    if bias is None and (out.is_cuda or out.dtype == torch.float32):
        torch.bmm(left, right, out=groups_apart)
        return

    left = _float32_on_cpu(left)
    right = _float32_on_cpu(right)
    bias_of_groups = None if bias is None else _float32_on_cpu(bias).view(groups, 1, -1)
    product = left @ right if bias_of_groups is None else torch.baddbmm(bias_of_groups, left, right)
    groups_apart.copy_(product)


def multiply_groups(left: Tensor, right: Tensor) -> Tensor:
    """Return left (G, rows, k) @ right (G, k, n), dtype of `left`."""
    if left.is_cuda:
        return left @ right
    return (left.float() @ right.float()).to(left.dtype)


def accumulate(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return total + left (G, m, rows) @ right (G, rows, n), float32.

    Args:
        total: (G, m, n), float32, overwritten; None stands for zeros, which need not be written and read.
        left: any strides.
        right: any strides.
    """
    if not left.is_cuda:
        left = left.float()
        right = right.float()
    if left.dtype == torch.float32:
        return torch.bmm(left, right) if total is None else total.baddbmm_(left, right)

    # a float32 product is not rounded to half precision before it is added
    if HAS_OUT_DTYPE and not _sums_in_float16(left):
        product = torch.bmm(left, right, out_dtype=torch.float32)
    else:
        product = torch.bmm(left, right)
    return product.float() if total is None else total.add_(product)


def _sums_in_float16(tensor: Tensor) -> bool:
    """Tell whether the user allows sums in float16, for which cuBLAS has no float32 output; torch 2.7 or later."""
    allowed = getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)
    return tensor.dtype == torch.float16 and allowed


def _float32_on_cpu(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cuda else tensor.float()
