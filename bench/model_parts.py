"""The time of each part of a detector inside its step, on the clock of the device that it runs on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

MODEL_PARTS = {
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
"""Part -> (path of the module in a `FasterRCNN`, method). What one of these methods calls counts as part of it."""
WHOLE = "whole"
"""Name of the time of all parts and of what is between them."""


class PartTimer:
    """Adds up the time of each part of a model, over all steps made inside `active`.

    CUDA devices are read through events, which neither wait nor slow the step down.

    Args:
        model: a `FasterRCNN`; its methods are wrapped in place.
        device: on which it runs.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device
        self._spans: list[tuple[str, Any, Any]] = []  # name, start, end: CUDA events, or seconds
        self._depth = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Time the parts of the model inside the block, from zero."""
        self._spans.clear()
        wrapped = []
        for name, methods in MODEL_PARTS.items():
            for path, method in methods:
                module = self.model.get_submodule(path)
                if hasattr(module, method):
                    setattr(module, method, self._timed(name, getattr(module, method)))
                    wrapped.append((module, method))
        try:
            yield
        finally:
            for module, method in wrapped:
                delattr(module, method)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block as a part, unless it lies inside another part, which then counts it."""
        self._depth += 1
        start = self._now()
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._spans.append((name, start, self._now()))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Time the block as `WHOLE`, which contains the parts."""
        start = self._now()
        yield
        self._spans.append((WHOLE, start, self._now()))

    def milliseconds(self) -> dict[str, float]:
        """Return the time of each part, summed over the steps; waits for the device."""
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(self.device)
        totals: dict[str, float] = {}
        for name, start, end in self._spans:
            spent = start.elapsed_time(end) if on_cuda else (end - start) * 1000
            totals[name] = totals.get(name, 0.0) + spent
        return totals

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return method(*args, **kwargs)

        return call

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
