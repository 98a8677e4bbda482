"""The learning rate as a function of the position of the run, and the optimizer that uses it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn, optim

from train.config import BASE_BATCH_SIZE, OptimConfig


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


def make_optimizer(model: nn.Module, config: OptimConfig) -> optim.Optimizer:
    """Make the optimizer of every parameter that is trained; weight decay applies to all of them."""
    offset_parameters = []
    other_parameters = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "conv_offset" in name:
            offset_parameters.append(parameter)
        else:
            other_parameters.append(parameter)

    groups = [{"params": other_parameters, "share": 1.0}]
    if offset_parameters:
        groups.append({"params": offset_parameters, "share": config.offset_lr})

    if config.name == "adamw":
        return optim.AdamW(groups, config.lr, betas=(config.momentum, 0.999), weight_decay=config.weight_decay)
    return optim.SGD(groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


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
