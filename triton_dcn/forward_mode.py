"""Forward-mode differentiation, which the operators of torch.library do not have."""

from __future__ import annotations

from torch import Tensor
from torch.autograd import forward_ad


def refuse_tangents(message: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError in forward mode, where PyTorch would silently use 0 as an operator's derivative."""
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(message)
