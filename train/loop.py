"""One pass over the training images and one over the validation images: plain functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train.checkpoint import TrainState
from train.data.coco_dataset import BrokenImage
from train.data.loader import Loaded, on_device
from train.evaluation.coco_metrics import CocoDetections
from train.log import TrainLog
from train.schedule import Schedule, set_rate

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def train_one_epoch(
    state: TrainState,
    network: Callable[..., dict[str, Tensor]],
    batches: Iterable[Loaded],
    schedule: Schedule,
    log: TrainLog,
    *,
    batches_per_epoch: int,
    seed: int = 0,
    rank: int = 0,
    accumulate: int = 1,
    clip_grad: float = 0.0,
    amp: str = "none",
) -> Iterator[int]:
    """Train on what is left of the present epoch; yield the number of finished steps after every step.

    At a yield `state` is complete: it may be saved, and the caller may stop.

    Args:
        state: model, optimizer and position; all are moved on.
        network: `state.model` or a wrapper of it (parallel, compiled), called with a batch; returns the losses.
        batches: from number `state.batch` of the epoch on.
        schedule: learning rate.
        log: is told of every step.
        batches_per_epoch: per process.
        seed, rank: seed PyTorch's own generator, together with the step.
        accumulate: batches per step; the last step of an epoch takes what is left.
        clip_grad: largest norm of the gradient; 0 does not clip.
        amp: key of `AMP_DTYPES`.

    Raises:
        FloatingPointError: a loss is not finite.
        ValueError: too many images cannot be read.
    """
    state.model.train()
    device = next(state.model.parameters()).device
    state.optimizer.zero_grad()
    log.new_epoch()
    for loaded in log.watch(on_device(batches, device)):
        if loaded.batch is None:
            raise OSError(f"no image of a whole batch can be read: {loaded.broken[-1].reason}")
        first = state.batch - state.batch % accumulate
        share = 1 / min(accumulate, batches_per_epoch - first)
        last = state.batch + 1 - first == round(1 / share)
        torch.manual_seed(_mix(seed, state.step, rank))
        with _without_exchange(network, not last), autocast(device, amp):
            losses = network(loaded.batch)
            state.scaler.scale(sum(losses.values()) * share).backward()
        log.add_batch(losses, share, loaded.image_ids)
        state.batch += 1
        if not last:
            continue
        rate = schedule.at(state.step, state.epoch + first / batches_per_epoch)
        _update(state, rate, clip_grad)
        log.end_step(state.step, state.epoch + 1, rate)
        if state.batch == batches_per_epoch:
            state.epoch, state.batch = state.epoch + 1, 0
        yield state.step


def _update(state: TrainState, rate: float, clip_grad: float) -> None:
    """Take one optimizer step with the gradients at hand."""
    set_rate(state.optimizer, rate)
    if clip_grad:
        state.scaler.unscale_(state.optimizer)
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    if state.average is not None:
        state.average.update_parameters(state.model)
    state.step += 1


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Return the autocast of `AMP_DTYPES`; with "none" it does nothing."""
    return torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "none")


def _without_exchange(network: Callable, wanted: bool) -> contextlib.AbstractContextManager:
    """Keep gradients on their process until the last batch of a step."""
    return network.no_sync() if wanted and isinstance(network, DistributedDataParallel) else contextlib.nullcontext()


def _mix(*numbers: int) -> int:
    """Return a seed that differs for different numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Loaded],
    *,
    amp: str = "none",
    between: Callable[[], None] = lambda: None,
) -> tuple[CocoDetections, list[BrokenImage]]:
    """Detect in every image of `batches`.

    Args:
        model: returns `Detections` per image; is in evaluation mode afterwards.
        batches: images of this process.
        amp: key of `AMP_DTYPES`.
        between: is called before every batch and may raise.

    Returns:
        The detections in pixels of the files, and the images that could not be read.
    """
    model.eval()
    device = next(model.parameters()).device
    found, broken = [], []
    for loaded in on_device(batches, device):
        between()
        broken += loaded.broken
        if loaded.batch is None:
            continue
        with autocast(device, amp):
            detections = model(loaded.batch)
        found += [
            CocoDetections.of(one, *about)
            for one, *about in zip(detections, loaded.image_ids, loaded.scales, loaded.sizes, strict=True)
        ]
    return CocoDetections.join(found), broken
