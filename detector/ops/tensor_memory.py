"""Tensors that depend on nothing but their key, made once and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=Tensor | Sequence[Tensor])


class TensorMemory(Generic[T]):
    """Keeps the tensors of the keys that were asked for last; whoever receives them must not change them.

    A copy of the memory, or one that was pickled, is empty. Nothing is kept of what has no values of its own: fake
    tensors, tensors inside `torch.func`, and what torch.compile and torch.export trace or a CUDA graph records; a graph
    would not hold on to the memory of a tensor made before, either. Each stream of a GPU has tensors of its own: it
    would not wait until another one has made them, nor would the other one wait before it reuses their memory.

    Args:
        limit: largest number of keys.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._values: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, like: Tensor, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` returns, or has returned for the same key.

        Args:
            like: the result has its device, and its dtype where it is of floating point.
            key: what else the result depends on.
            make: makes the tensors.
        """
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or _is_recorded(like):
            return make()
        stream = torch.cuda.current_stream(like.device) if like.is_cuda else None
        whole_key = (key, like.device, like.dtype, type(like), torch.is_inference_mode_enabled(), stream)
        value = self._values.pop(whole_key, None)  # and back to the end; another thread may come between
        if value is None:
            value = make()
            tensors = [value] if isinstance(value, Tensor) else value
            if any(type(tensor) is not Tensor for tensor in tensors):
                return value
        self._values[whole_key] = value
        if len(self._values) > self.limit:
            self._values.popitem(last=False)
        return value

    def __len__(self) -> int:
        """Return the number of keys that are kept."""
        return len(self._values)

    def __reduce__(self) -> tuple[Any, ...]:
        return TensorMemory, (self.limit,)


def _is_recorded(tensor: Tensor) -> bool:
    """Tell whether operators on a tensor go into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
