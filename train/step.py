"""The two halves of a training step, the same from Python and in CUDA graphs: gradients of a batch, and the update."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from detector import Batch
from train.checkpoint import TrainState


def compute_gradients(
    state: TrainState, network: Callable[..., dict[str, Tensor]], batch: Batch, share: float
) -> dict[str, Tensor]:
    """Add the gradients of a batch, which makes up `share` of its step; return its losses without their history."""
    losses = network(batch)
    total_loss = functools.reduce(torch.add, losses.values())
    # handing each operator to autograd's own thread costs the host of a GPU a tenth of the step
    with torch.autograd.set_multithreading_enabled(False):
        state.scaler.scale(total_loss * share).backward()
    return {name: loss.detach() for name, loss in losses.items()}


def apply_gradients(state: TrainState, clip_grad: float, *, starts_average: bool) -> None:
    """Change the weights by the gradients, and their average by the weights; nothing is counted, see `count_step`.

    Args:
        state: of the run.
        clip_grad: largest norm of the gradient; 0 does not clip.
        starts_average: `TrainState.starts_average`, which has to be read before: no value is read from a tensor here.
    """
    if clip_grad:
        state.scaler.unscale_(state.optimizer)
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.average is not None:
        state.average.take_in(is_first=starts_average)


def count_step(state: TrainState) -> None:
    """Count a step whose gradients have been applied."""
    state.step += 1
    if state.average is not None:
        state.average.updates += 1
