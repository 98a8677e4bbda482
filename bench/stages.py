"""Where the time of a detector's step goes: its parts are timed in place, on the clock of the device they run on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

PARTS = {
    "normalize": (("", "normalize"),),
    "backbone": (("backbone", "forward"),),
    "fpn": (("neck", "forward"),),
    "rpn": (("rpn_head", "forward"),),
    "rpn loss": (("rpn_head", "sample"), ("rpn_head", "losses")),
    "proposals": (("rpn_head", "propose"),),
    "roi": (("roi_head", "sample"), ("roi_head", "forward")),
    "roi loss": (("roi_head", "losses"),),
    "detections": (("roi_head", "detect"),),
    "masks": (("roi_head", "mask_losses"), ("roi_head", "predict_masks")),
}
"""Stage -> (path of the module in a `FasterRCNN`, method). What a method of the list calls counts as part of it."""


class Stages:
    """Collects the time of each stage, over all steps made inside `watching`.

    Args:
        model: a `FasterRCNN`; its methods are wrapped in place.
        device: CUDA devices are read through events, which neither wait nor slow the step down.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.device = model, device
        self.marks: list[tuple[str, object, object]] = []
        self.depth = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the parts of the model inside the block."""
        wrapped = []
        for name, methods in PARTS.items():
            for path, method in methods:
                part = self.model.get_submodule(path)
                if hasattr(part, method):
                    setattr(part, method, self._timed(name, getattr(part, method)))
                    wrapped.append((part, method))
        try:
            yield
        finally:
            for part, method in wrapped:
                delattr(part, method)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as a stage, or as part of the stage it is inside of."""
        self.depth += 1
        begin = self._now()
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                self.marks.append((name, begin, self._now()))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Time the block as the stage "whole", which contains the others."""
        begin = self._now()
        yield
        self.marks.append(("whole", begin, self._now()))

    def milliseconds(self) -> dict[str, float]:
        """Return the time of each stage, summed over the steps; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        total: dict[str, float] = {}
        for name, begin, end in self.marks:
            spent = begin.elapsed_time(end) if self.device.type == "cuda" else (end - begin) * 1000
            total[name] = total.get(name, 0.0) + spent
        return total

    def _timed(self, name, method):
        def call(*args, **kwargs):
            with self.stage(name):
                return method(*args, **kwargs)

        return call

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
