"""Detection as fast as the device can: no norms, no wait between batches, CUDA graphs where they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from detector.detect import start_copy
from detector.graph import Graphs, Recorder
from detector.model.faster_rcnn import FasterRCNN
from detector.model.fuse import fuse_batch_norms
from detector.results import split_detections
from detector.structures import Batch, Detections

MAX_GRAPHS = 32
"""Batches of further shapes are computed without a graph."""


def for_inference(model: FasterRCNN) -> FasterRCNN:
    """Return a detector as it computes fastest, in evaluation mode; its weights have other names, or other layouts.

    Batch norms become part of the convolutions, in a copy, see `fuse_batch_norms`: the numbers change by rounding.
    Group norms depend on the input and stay, so such a model is returned itself.
    """
    model.eval()
    if model.config.norm != "gn":
        model = fuse_batch_norms(model)
    fast: FasterRCNN = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in stubs
    return fast


class Inference:
    """Starts the detection in batches; whoever wants the results waits for them once for each batch.

    Args:
        model: in evaluation mode.
        recorder: where given, batches are computed from CUDA graphs, one for each padded shape that comes again.
    """

    def __init__(self, model: FasterRCNN, recorder: Recorder | None = None) -> None:
        self.model = model
        self._graphs = None if recorder is None else Graphs(recorder, MAX_GRAPHS)
        self._batches: dict[torch.Size, Batch] = {}

    @torch.no_grad()
    def start(self, batch: Batch) -> Callable[[], list[Detections]]:
        """Start to detect in the images of a batch, and to copy what is found to the CPU.

        Returns:
            A function that waits for the results and returns one `Detections` per image, on the CPU.
        """
        wait = start_copy(self._detect(batch))
        return lambda: split_detections(wait())

    def _detect(self, batch: Batch) -> tuple[Tensor, ...]:
        if self._graphs is None:
            return self.model.detect(batch)
        shape = batch.images.shape
        if shape not in self._batches:
            if self._graphs.is_full:
                return self.model.detect(batch)
            self._batches[shape] = Batch(torch.empty_like(batch.images), torch.empty_like(batch.sizes))
        static = self._batches[shape]
        static.images.copy_(batch.images)
        static.sizes.copy_(batch.sizes)
        return self._graphs(shape, lambda: self.model.detect(static))
