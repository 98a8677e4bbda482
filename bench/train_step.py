"""Time a training step: `python -m bench.train_step --size 320 480 --batch-size 2 --depth 50 --csv FILE`.

A step is forward, backward and SGD on one batch that is already on the device. It is compared with torchvision's Faster
R-CNN, where it can be imported: the same depth, without deformable layers.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import torch
from torch import nn

from bench.detector_models import torchvision_inputs
from bench.detector_steps import (
    Options,
    Step,
    apply_options,
    autocast_for,
    capture_graph,
    command_line,
    compile_if,
    run,
)
from bench.model_parts import PartTimer
from detector import Batch, FasterRCNN


def make_step(model: nn.Module, batch: Batch, options: Options, device: torch.device) -> Step:
    """Return the training step of a model, ours or torchvision's, with options of `bench.detector_steps`."""
    ours = isinstance(model, FasterRCNN)
    model = apply_options(model, options).train()
    autocast, dtype = autocast_for(options, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 1e-4, momentum=0.9, weight_decay=1e-4)

    timer = None
    if ours and options.isdisjoint(("compile", "graph")):
        timer = PartTimer(model, device)
    part = nullcontext if timer is None else timer.part

    losses = model.losses if ours else model
    losses = compile_if("compile" in options, losses)
    inputs = (batch,) if ours else torchvision_inputs(batch)

    def step() -> None:
        with autocast():
            loss = sum(losses(*inputs).values())
        optimizer.zero_grad()
        # in the calling thread, as in `train.step`
        with part("backward"), torch.autograd.set_multithreading_enabled(False):
            loss.backward()
        with part("optimizer"):
            optimizer.step()

    if "graph" in options:
        replay, peak_mib = capture_graph(step)
        return Step(replay, dtype, timer, peak_mib)
    return Step(step, dtype, timer)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, print the table, write the CSV; return the exit status."""
    parser = command_line("bench.train_step", __doc__)
    return run(make_step, "train", parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
