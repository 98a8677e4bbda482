"""Library matrix products over channel groups that accumulate in float32, whatever the dtype and the device.

On a GPU these are cuBLAS calls in the dtype of the operands. `torch.backends.cuda.matmul` rules over them as over every
product: TF32 where it is allowed, and in half precision what its `allow_*_reduction` and `allow_fp16_accumulation` say.
On a CPU, half-precision operands are widened first, because products there need not accumulate in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

HAS_OUT_DTYPE = "dtype" in torch.ops.aten.bmm.overloads() and not torch.version.hip  # ROCm's raises in some versions


def multiply(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
    """Write left @ right + bias to `out`, the groups side by side.

    Args:
        out: (rows, G*n), contiguous, written in full.
        left, right: (G, rows, k) and (G, k, n), any strides.
        bias: (G*n,) or None.
    """
    groups, rows, _ = left.shape
    if groups == 1 and out.is_cuda:
        if bias is None:
            torch.mm(left[0], right[0], out=out)
        else:
            torch.addmm(bias, left[0], right[0], out=out)
        return
    left, right = _wide(left), _wide(right)
    product = left @ right if bias is None else torch.baddbmm(_wide(bias).view(groups, 1, -1), left, right)
    out.view(rows, groups, -1).copy_(product.transpose(0, 1))


def multiply_groups(left: Tensor, right: Tensor) -> Tensor:
    """Return left (G, rows, k) @ right (G, k, n), dtype of `left`."""
    return (_wide(left) @ _wide(right)).to(left.dtype)


def accumulate(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left (G, m, rows) @ right (G, rows, n) to `out` (G, m, n), float32."""
    if left.is_cuda and left.dtype != torch.float32:
        # otherwise the product of a chunk is rounded to half precision; the sum of the chunks never is
        wide = HAS_OUT_DTYPE and not _accumulates_narrowly(left)
        out += torch.bmm(left, right, out_dtype=torch.float32) if wide else torch.bmm(left, right)
    else:
        out.baddbmm_(_wide(left), _wide(right))


def _accumulates_narrowly(tensor: Tensor) -> bool:
    """Tell whether the user allows float16 sums (torch 2.7), with which cuBLAS has no float32 result."""
    allowed = getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)
    return tensor.dtype == torch.float16 and allowed


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cuda else tensor.float()
