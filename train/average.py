"""A moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

TensorLists = list[tuple[list[Tensor], list[Tensor]]]
"""Tensors of the average beside those of the model, a pair of lists for each dtype."""


class WeightAverage:
    """An exponential moving average of the parameters of a model; buffers are those of the model.

    An update is one operator for all parameters, and on a GPU the host waits for nothing. Both are why this is not
    `torch.optim.swa_utils.AveragedModel`: it goes through the modules at every update, copies one buffer after the
    other, and sends the number of updates to the device. The numbers are the same.

    Args:
        model: whose parameters stay the same tensors from now on.
        decay: the share that stays of the average at each update; the first update copies the model.

    Attributes:
        module: a copy of the model with the averages as its parameters.
        updates: so far.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model)
        self.decay = decay
        self.updates = 0
        self._parameters = _by_dtype(list(self.module.parameters()), list(model.parameters()))
        self._buffers = _by_dtype(list(self.module.buffers()), list(model.buffers()))

    @torch.no_grad()
    def take_in(self, is_first: bool) -> None:
        """Take in the model as it is now; `updates` is counted by the caller, as a CUDA graph cannot.

        Args:
            is_first: whether to copy the model, as in the first update.
        """
        for averages, values in self._parameters:
            if is_first:
                torch._foreach_copy_(averages, values)
            else:
                torch._foreach_lerp_(averages, values, 1 - self.decay)
        for copies, values in self._buffers:
            torch._foreach_copy_(copies, values)


def _by_dtype(copies: list[Tensor], originals: list[Tensor]) -> TensorLists:
    """Put tensors of one dtype together: for such lists a GPU needs few launches."""
    lists: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for of_copy, of_model in zip(copies, originals, strict=True):
        copies_of_dtype, originals_of_dtype = lists.setdefault(of_model.dtype, ([], []))
        copies_of_dtype.append(of_copy)
        originals_of_dtype.append(of_model)
    return list(lists.values())
