"""The mapped dimension of `torch.func.vmap` as a part of the first dimension, and back."""

from __future__ import annotations

from torch import Tensor


def fold(tensor: Tensor, dim: int | None, elements: int) -> Tensor:
    """Move the mapped dimension into the first one; repeat what all elements share, for which `dim` is None."""
    tensor = tensor.expand(elements, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def unfold(tensor: Tensor, elements: int) -> Tensor:
    """Undo `fold`."""
    return tensor.reshape(elements, tensor.shape[0] // elements, *tensor.shape[1:])
