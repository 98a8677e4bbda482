"""The learning rate as a function of where the run is, and the optimizer that uses it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn, optim

from train.config import BASE_BATCH, OptimConfig


@dataclass(frozen=True)
class Schedule:
    """Learning rate: a linear rise over the first steps, times falls at milestones or a half cosine.

    It has no state, so a resumed run cannot get it wrong.

    Attributes:
        config: rates and milestones.
        images: images per step of the run, all processes together.
        epochs: length of the run.
    """

    config: OptimConfig
    images: int
    epochs: int

    @property
    def peak(self) -> float:
        """The configured rate, scaled linearly from 16 images per step to those of the run.

        Source:
            Goyal et al., Accurate, Large Minibatch SGD, 2017, section 2.1.
        """
        return self.config.lr * self.images / BASE_BATCH

    def at(self, step: int, epoch: float) -> float:
        """Return the learning rate of step number `step` (from 0) that begins after `epoch` passes over the data.

        Source:
            MMEngine's LinearLR (the last warm-up step, number warmup - 1, has the full rate) and MultiStepLR.
        """
        config = self.config
        rise = min(1.0, step / max(1, config.warmup - 1)) if config.warmup else 1.0
        rate = self.peak * (config.warmup_factor + (1 - config.warmup_factor) * rise)
        if config.schedule == "cosine":
            return rate * (1 + math.cos(math.pi * min(1.0, epoch / self.epochs))) / 2
        return rate * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)


def make_optimizer(model: nn.Module, config: OptimConfig) -> optim.Optimizer:
    """Make the optimizer of every parameter that is trained; weight decay applies to all of them."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [{"params": [parameter for name, parameter in trained if "conv_offset" not in name], "share": 1.0}]
    offsets = [parameter for name, parameter in trained if "conv_offset" in name]
    if offsets:
        groups.append({"params": offsets, "share": config.offset_lr})
    if config.name == "adamw":
        return optim.AdamW(groups, config.lr, betas=(config.momentum, 0.999), weight_decay=config.weight_decay)
    return optim.SGD(groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def set_rate(optimizer: optim.Optimizer, rate: float) -> None:
    """Give every parameter group its share of the learning rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]
