"""A recorder of `detector.graph` for the CPU: it repeats the operators of a function, and none of its Python."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS_VALUES = {torch.ops.aten._local_scalar_dense.default}
"""Operators that bring a value to the host, which a CUDA graph cannot."""


class OperatorRecorder:
    """Records every operator that a function calls, with its tensors, and calls them again in a replay.

    As in a CUDA graph the tensors of a recording stay where they are: a replay sees new contents of those that the
    function read from outside, and nothing else that is new.

    Attributes:
        runs, recordings, replays: what was asked for so far.
    """

    def __init__(self):
        self.runs = 0
        self.recordings = 0
        self.replays = 0

    def run(self, function):
        self.runs += 1
        return function()

    def record(self, function):
        self.recordings += 1
        with _Recording() as recording:
            result = function()

        def replay():
            self.replays += 1
            recording.replay()

        return result, replay


class _Recording(TorchDispatchMode):
    """The calls of operators inside the block."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert operator not in READS_VALUES, f"{operator} waits for the device"
        result = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for operator, args, kwargs, recorded in self.calls:
            storages = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
            result = operator(*args, **kwargs)
            for tensor, new in zip(_tensors(recorded), _tensors(result), strict=True):
                if tensor.untyped_storage().data_ptr() not in storages:  # neither a view nor changed in place
                    assert tensor.shape == new.shape, f"{operator} has a result of another shape"
                    tensor.copy_(new)


def _tensors(nested):
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]
