"""Time detection: `python -m bench.inference --size 800 1333 --batch 1 --depth 50 --csv FILE`.

From images on the device to lists of detections; the host reads their numbers at the end of each step.
Beside ours stands torchvision's Faster R-CNN, where it can be imported: the same depth, without deformable layers.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from bench.detector_steps import Step, capture, command_line, compiled, peer_inputs, precision, run, stored
from bench.stages import Stages
from detector import Batch, FasterRCNN


def make_step(model: nn.Module, batch: Batch, option: str, device: torch.device) -> Step:
    """Return the detection step of a model, ours or torchvision's, with an option of `bench.detector_steps`."""
    ours = isinstance(model, FasterRCNN)
    model = stored(model, option).eval()
    context, dtype = precision(option, device)
    stages = Stages(model, device) if ours and option not in ("compile", "graph") else None
    inputs, peak = (batch,) if ours else peer_inputs(batch)[:1], None
    if option in ("compile", "graph"):
        found: list = []
        detect = compiled(model.detect, option == "compile")

        def fill() -> None:
            found[:] = detect(batch)

        replay, peak = capture(fill) if option == "graph" else (fill, None)

        def step() -> list[int]:
            with torch.no_grad():
                replay()
            return found[3].sum(1).tolist()  # wait, as for the lists of the plain step

    else:

        def step() -> object:
            with torch.no_grad(), context():
                return model(*inputs)

    return Step(step, dtype, stages, peak)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, print the table, write the CSV; return the exit status."""
    command = command_line("bench.inference", __doc__)
    command.set_defaults(batch=1)
    return run(make_step, "detect", command.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
