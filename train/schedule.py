"""The learning rate as a function of the position of the run, and the optimizer that uses it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn, optim

from detector.text import plural
from train.config import BASE_BATCH_SIZE, Config, OptimConfig

OFFSET_LAYERS = ("conv_offset", "offset_fc", "mask_fc")  # parts of the names of layers that predict offsets and masks
NEARLY_PEAK = 0.95  # share of the peak that counts as reached: a cosine falls from the first step on


@dataclass(frozen=True)
class Schedule:
    """Learning rate: a linear rise over the first steps, times falls at milestones or a half cosine.

    It has no state, so a resumed run cannot get it wrong.

    Attributes:
        config: rates and milestones.
        images_per_step: of the run, all processes together.
        epochs: length of the run.
    """

    config: OptimConfig
    images_per_step: int
    epochs: int

    @property
    def peak_lr(self) -> float:
        """The configured rate, scaled linearly from 16 images per step to those of the run.

        Source:
            Goyal et al., Accurate, Large Minibatch SGD, 2017, section 2.1.
        """
        return self.config.lr * self.images_per_step / BASE_BATCH_SIZE

    def learning_rate(self, step: int, epoch: float) -> float:
        """Return the learning rate of step number `step` (from 0) that begins after `epoch` passes over the data.

        Source:
            MMEngine's LinearLR (the last warm-up step, number warmup - 1, has the full rate) and MultiStepLR.
        """
        config = self.config
        progress = 1.0
        if config.warmup:
            progress = min(1.0, step / max(1, config.warmup - 1))
        rate = self.peak_lr * (config.warmup_factor + (1 - config.warmup_factor) * progress)

        if config.schedule == "cosine":
            return rate * (1 + math.cos(math.pi * min(1.0, epoch / self.epochs))) / 2
        milestones_passed = sum(epoch >= milestone for milestone in config.milestones)
        return float(rate * config.gamma**milestones_passed)


def choose_warmup(config: Config, steps_per_epoch: int, recorded: int | None) -> tuple[int, list[str]]:
    """Return the steps of the warm-up, a tenth of those of all epochs at most, and notes.

    `max_steps` does not count: a run that stops early and goes on later takes the same steps as a whole one.

    Args:
        config: of this start.
        steps_per_epoch: of the run.
        recorded: warm-up of the run that goes on, which keeps it, or None.
    """
    if recorded is not None:
        return recorded, []
    asked = config.optim.warmup
    steps = config.epochs * steps_per_epoch
    longest = steps // 10
    if asked <= longest:
        return asked, []
    return longest, [f"warm-up shortened from {asked} to {longest} (steps), a tenth of the {steps} of the run"]


def unreached_rates(schedule: Schedule, steps_per_epoch: int, max_steps: int) -> list[str]:
    """Return a line about each learning rate of the schedule that the run never has.

    Args:
        schedule: of the run.
        steps_per_epoch: of the run.
        max_steps: steps after which the run stops; 0 stops it after its epochs.
    """
    optim = schedule.config
    steps = schedule.epochs * steps_per_epoch
    end = f"the run has {schedule.epochs} x {plural(steps_per_epoch, 'step')}"
    is_stopped = 0 < max_steps < steps
    if is_stopped:
        steps = max_steps
        end = f"--max-steps ends the run after {plural(steps, 'step')}"

    lines = []
    rising_steps = range(min(steps, optim.warmup + 1))  # a warm-up of one step has the peak in the step after it
    highest = max(schedule.learning_rate(step, step / steps_per_epoch) for step in rising_steps)
    if steps < optim.warmup or highest < NEARLY_PEAK * schedule.peak_lr:
        reason = end if steps < optim.warmup else "its falls begin before"
        lines.append(
            f"the learning rate never reaches its peak {schedule.peak_lr:g}, {highest:.4g} at most: "
            f"the warm-up takes {plural(optim.warmup, 'step')}, and {reason}"
        )

    last_epoch = (steps - 1) / steps_per_epoch
    if optim.schedule == "cosine":
        if is_stopped:
            rate = schedule.learning_rate(steps - 1, last_epoch)
            lines.append(f"the learning rate falls to {rate:.4g}, not to 0: {end}")
        return lines
    milestones = [str(milestone) for milestone in optim.milestones if milestone > last_epoch]
    if milestones:
        lines.append(f"the learning rate does not fall after epoch {', '.join(milestones)}: {end}")
    return lines


def make_optimizer(model: nn.Module, config: OptimConfig) -> optim.Optimizer:
    """Make the optimizer of every parameter that is trained; weight decay applies to all of them.

    A fused one is one operator for all parameters of a group; on a GPU the host then does not wait, with a loss scaler,
    to learn whether a gradient is finite. On a CPU PyTorch's fused optimizers take no notice of strides: where those of
    a gradient differ from its parameter's, the update is wrong. Autograd stores gradients as their parameters are.
    AdamW is fused on a CPU too, which saves more than half of its time; SGD there has less to gain.
    """
    offset_parameters = []
    other_parameters = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if any(part in name for part in OFFSET_LAYERS):
            offset_parameters.append(parameter)
        else:
            other_parameters.append(parameter)

    groups = [{"params": other_parameters, "share": 1.0}]
    if offset_parameters:
        groups.append({"params": offset_parameters, "share": config.offset_lr})

    if config.name == "adamw":
        betas = (config.momentum, 0.999)
        return optim.AdamW(groups, config.lr, betas=betas, weight_decay=config.weight_decay, fused=True)
    fused = True if any(parameter.is_cuda for parameter in other_parameters) else None
    sgd = optim.SGD(groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused)
    if fused and config.momentum:
        start_momentum(sgd)
    return sgd


def start_momentum(sgd: optim.SGD) -> None:
    """Give every parameter a momentum of zeros, from which the first step gets the same numbers as from none.

    A fused SGD makes its momenta in its first step, out of memory that it does not clear, and leaves them like that if
    the loss scaler finds a gradient that is not finite, as the first ones in float16 often are.
    """
    for group in sgd.param_groups:
        for parameter in group["params"]:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def prepare_for_graphs(optimizer: optim.Optimizer) -> None:
    """Let an optimizer step in CUDA graphs: its learning rates become tensors, and it keeps nothing on the host."""
    for group in optimizer.param_groups:
        device = group["params"][0].device
        # PyTorch's kernels for a GPU read the rate in float32.
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        group["lr"] = torch.tensor(float(group["lr"]), dtype=dtype, device=device)
        group["fused"] = True
        if "capturable" in group:
            group["capturable"] = True


def set_learning_rate(optimizer: optim.Optimizer, rate: float) -> None:
    """Give every parameter group its share of the learning rate `rate`."""
    for group in optimizer.param_groups:
        group_rate = rate * group["share"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(group_rate)
        else:
            group["lr"] = group_rate
