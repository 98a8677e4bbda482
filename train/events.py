"""TensorBoard's events of a run. Where they cannot be written, the run goes on: metrics.jsonl has the same numbers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from detector.files import describe_space
from train.progress import print_above_progress


class Events:
    """Writes numbers and pictures for TensorBoard; after an error, which is told once, nothing.

    Args:
        folder: of the events; it must exist.
        first_step: TensorBoard hides what an earlier start wrote from this step on.
    """

    def __init__(self, folder: Path, first_step: int):
        self.folder = folder
        self._writer: SummaryWriter | None = None
        # A thread writes the file; its error comes back with the next event, and needs no traceback on the terminal.
        self._hook_before = threading.excepthook
        threading.excepthook = self._excepthook
        try:
            self._writer = SummaryWriter(str(folder), purge_step=first_step)
        except OSError as error:
            self._give_up(error)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Add a number."""
        self._write(lambda writer: writer.add_scalar(name, value, step))

    def add_image(self, name: str, image: np.ndarray, step: int) -> None:
        """Add an RGB image (H, W, 3) uint8."""
        self._write(lambda writer: writer.add_image(name, image, step, dataformats="HWC"))

    def close(self) -> None:
        """Write what is left."""
        self._write(lambda writer: writer.close())
        threading.excepthook = self._hook_before

    def _write(self, call: Callable[[SummaryWriter], None]) -> None:
        if self._writer is None:
            return
        try:
            call(self._writer)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        reason = f"{error.strerror or error}{describe_space(error, self.folder / 'events')}"
        print_above_progress(f"cannot write TensorBoard's events into {self.folder}: {reason}; going on without them")

    def _excepthook(self, arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError):
            self._hook_before(arguments)
