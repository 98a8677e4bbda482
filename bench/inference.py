"""Time detection: `python -m bench.inference --size 800 1333 --batch-size 1 --depth 50 --csv FILE`.

From images on the device to lists of detections; the host reads their numbers at the end of each step. It is compared
with torchvision's Faster R-CNN, where it can be imported: the same depth, without deformable layers.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

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
    """Return the detection step of a model, ours or torchvision's, with options of `bench.detector_steps`."""
    ours = isinstance(model, FasterRCNN)
    model = apply_options(model, options).eval()
    if not options.isdisjoint(("compile", "graph")):
        return _fixed_shape_step(model, batch, options, device)

    autocast, dtype = autocast_for(options, device)
    timer = PartTimer(model, device) if ours else None
    images = batch if ours else torchvision_inputs(batch)[0]

    def step() -> object:
        with torch.no_grad(), autocast():
            return model(images)

    return Step(step, dtype, timer)


def _fixed_shape_step(model: FasterRCNN, batch: Batch, options: Options, device: torch.device) -> Step:
    """Return the step that is compiled or captured: its detections are tensors of a fixed shape."""
    autocast, dtype = autocast_for(options, device)
    detect = compile_if("compile" in options, model.detect)
    detections: tuple[Tensor, ...] = ()

    def detect_batch() -> None:
        nonlocal detections
        with torch.no_grad(), autocast():
            detections = detect(batch)

    run_detection = detect_batch
    peak_mib = None
    if "graph" in options:
        run_detection, peak_mib = capture_graph(detect_batch)

    def step() -> list[int]:
        run_detection()
        valid = detections[3]
        return valid.sum(1).tolist()  # waits for the device, as the lists of the plain step do

    return Step(step, dtype, None, peak_mib)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, print the table, write the CSV; return the exit status."""
    parser = command_line("bench.inference", __doc__)
    parser.set_defaults(batch_size=1)
    return run(make_step, "detect", parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
