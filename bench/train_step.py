"""Time a training step: `python -m bench.train_step --size 320 480 --batch 2 --depth 50 --csv FILE`.

A step is forward, backward and SGD on one batch that is already on the device. Beside ours stands torchvision's Faster
R-CNN, where it can be imported: the same depth, without deformable layers.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import torch
from torch import nn

from bench.detector_steps import Step, capture, command_line, compiled, peer_inputs, precision, run, stored
from bench.stages import Stages
from detector import Batch, FasterRCNN


def make_step(model: nn.Module, batch: Batch, option: str, device: torch.device) -> Step:
    """Return the training step of a model, ours or torchvision's, with an option of `bench.detector_steps`."""
    ours = isinstance(model, FasterRCNN)
    model = stored(model, option).train()
    context, dtype = precision(option, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 1e-4, momentum=0.9, weight_decay=1e-4)
    stages = Stages(model, device) if ours and option not in ("compile", "graph") else None
    stage = nullcontext if stages is None else stages.stage
    forward, inputs = (model.losses, (batch,)) if ours else (model, peer_inputs(batch))
    forward = compiled(forward, option == "compile")

    def step() -> None:
        with context():
            loss = sum(forward(*inputs).values())
        optimizer.zero_grad()
        with stage("backward"):
            loss.backward()
        with stage("optimizer"):
            optimizer.step()

    ready, peak = capture(step) if option == "graph" else (step, None)
    return Step(ready, dtype, stages, peak)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, print the table, write the CSV; return the exit status."""
    return run(make_step, "train", command_line("bench.train_step", __doc__).parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
