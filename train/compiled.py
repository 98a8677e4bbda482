"""`--compile`: the losses of a model by torch.compile, which compiles again for few of the shapes of batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector import Batch, Target
from detector.structures import NO_OBJECT
from train.step_graphs import Grid

COMPILER_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"reorder_for_peak_memory": False}
"""Of Inductor, for right gradients: in PyTorch 2.13 this pass lets sums be read before all of their terms are added.

It moves what reads a tensor in front of the `scatter_add` that fills it, in the gradients of indexing, interpolation
and pooling, if other operators happen to stand between. Seen on a CPU; nothing in the pass asks for the device.
"""


class CompiledNetwork(nn.Module):
    """A model under torch.compile; called with a batch, it returns the losses of the model.

    torch.compile takes the sizes 0 and 1 for constants. Each combination of such counts of ground truths would be
    compiled, up to its limit of eight programs; further batches would be computed without. Here the images of a batch
    have equal counts, so that three programs suffice: for the first batch, for images of all sizes, for all counts.

    Args:
        model: keeps its parameters, which are also those of this module.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.compiled = torch.compile(model, options=COMPILER_OPTIONS)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of a batch with targets.

        Raises:
            ValueError: PyTorch cannot compile them, for example because there is no compiler for C++.
        """
        try:
            losses: dict[str, Tensor] = self.compiled(pad_to_equal_counts(batch))
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error.inner_exception).strip().split("\n")[0]  # below is what the compiler said
            raise ValueError(f"--compile: the compiler failed or was stopped: {reason}") from error
        return losses


def pad_to_equal_counts(batch: Batch) -> Batch:
    """Return a batch whose images have as many ground truths each, by adding some that are none (`NO_OBJECT`).

    Masks get the size of the images. The losses stay the same.
    """
    assert batch.targets is not None
    count = Grid.pad_count(max(len(target.labels) for target in batch.targets))
    height, width = batch.images.shape[2:]
    targets = []
    for target in batch.targets:
        missing = count - len(target.labels)
        masks = target.masks
        if masks is not None:
            right = width - masks.shape[2]
            bottom = height - masks.shape[1]
            masks = F.pad(masks, (0, right, 0, bottom, 0, missing))
        boxes = F.pad(target.boxes, (0, 0, 0, missing))
        labels = F.pad(target.labels, (0, missing), value=NO_OBJECT)
        targets.append(Target(boxes, labels, masks, check=False))
    return replace(batch, targets=targets)
