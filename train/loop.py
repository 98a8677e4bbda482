"""One pass over the training images: receives loaded batches, changes the state of the run, hands losses to the log."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from detector.precision import PrecisionName, autocast
from train.checkpoint import TrainState
from train.data.collate import LoadedBatch
from train.data.prefetch import prefetch_to_device
from train.log import TrainLog
from train.schedule import Schedule, set_learning_rate
from train.step import apply_gradients, compute_gradients, count_step
from train.step_graphs import StepGraphs


def train_one_epoch(
    state: TrainState,
    network: Callable[..., dict[str, Tensor]],
    batches: Iterable[LoadedBatch],
    schedule: Schedule,
    log: TrainLog,
    *,
    batches_per_epoch: int,
    seed: int = 0,
    rank: int = 0,
    accumulate: int = 1,
    clip_grad: float = 0.0,
    precision: PrecisionName = "float32",
    graphs: StepGraphs | None = None,
) -> Iterator[int]:
    """Train on the rest of the current epoch; yield the number of finished steps after every step.

    At a yield `state` is complete: it may be saved, and the caller may stop.

    Args:
        state: model, optimizer and position; all of them change.
        network: `state.model` or a wrapper of it (parallel, compiled), called with a batch; returns the losses.
        batches: from number `state.batch` of the epoch on.
        schedule: learning rate.
        log: receives the losses of every step.
        batches_per_epoch: per process.
        seed: of the run; with step and rank it seeds PyTorch's own generator.
        rank: number of this process.
        accumulate: batches per step; the last step of an epoch takes what is left.
        clip_grad: largest norm of the gradient; 0 does not clip.
        precision: of the forward and backward pass, see `detector.precision`.
        graphs: make the steps in the place of `network`, with a `clip_grad` and a precision of their own.

    Raises:
        FloatingPointError: a loss is not finite.
        OSError: no image of a batch can be read.
        ValueError: too many images cannot be read, or the batches end before the epoch.
    """
    epoch = state.epoch
    state.model.train()
    device = next(state.model.parameters()).device
    if graphs is None:
        state.optimizer.zero_grad()
    else:
        graphs.clear()
    log.start_epoch()

    for loaded in log.watch_loading(prefetch_to_device(batches, device)):
        if loaded.batch is None:
            *_, reason = loaded.unreadable.values()
            raise OSError(f"no image of a whole batch can be read: {reason}")

        first_batch_of_step = state.batch - state.batch % accumulate
        batches_of_step = min(accumulate, batches_per_epoch - first_batch_of_step)
        is_last_of_step = state.batch + 1 - first_batch_of_step == batches_of_step
        share = 1 / batches_of_step

        _seed_generators(device, seed, state.step, rank)
        if graphs is None:
            with _gradient_exchange(network, enabled=is_last_of_step), autocast(device, precision):
                losses = compute_gradients(state, network, loaded.batch, share)
        else:
            losses = graphs.backward(loaded.batch, share)
        log.add_batch(losses, share, loaded)
        state.batch += 1
        if not is_last_of_step:
            continue

        rate = schedule.learning_rate(state.step, state.epoch + first_batch_of_step / batches_per_epoch)
        set_learning_rate(state.optimizer, rate)
        if graphs is None:
            apply_gradients(state, clip_grad, starts_average=state.starts_average)
            state.optimizer.zero_grad()
        else:
            graphs.update()
        count_step(state)
        log.end_step(state.step, state.epoch + 1, rate)
        if state.batch == batches_per_epoch:
            state.epoch += 1
            state.batch = 0
        yield state.step

    if state.epoch == epoch:  # without an end of the epoch the caller would ask for its rest without end
        raise ValueError(f"batches: expected {batches_per_epoch} in epoch {epoch + 1}, got {state.batch}")


def _gradient_exchange(
    network: Callable[..., dict[str, Tensor]], enabled: bool
) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the processes exchange gradients, or do not: once per step is enough."""
    if enabled or not isinstance(network, DistributedDataParallel):
        return contextlib.nullcontext()
    no_sync: contextlib.AbstractContextManager[None] = network.no_sync()
    return no_sync


def _seed_generators(device: torch.device, *numbers: int) -> None:
    """Seed PyTorch's generators of the CPU and of `device` with what differs for different numbers.

    `torch.manual_seed` also goes through all other devices.
    """
    wide_seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    seed = int(wide_seed >> np.uint64(1))  # torch takes 63 bits
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
