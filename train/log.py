"""What a run tells while it works: a progress line, metrics.jsonl, TensorBoard; the alarm for bad losses and images."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from train.data.collate import LoadedBatch
from train.distributed import World

BROKEN_SHARE = 0.01  # of the images may be unreadable


class TrainLog:
    """Collects every step's losses on the device and reads them back together, once every few steps.

    Args:
        path: metrics.jsonl to append to.
        events: folder of the TensorBoard events.
        world: the processes; losses are means over them, and the first one writes.
        every: steps between readings.
        steps: of the whole run, for the time that is left; step: where it starts.
        images: in the training split.
    """

    def __init__(self, path: Path, events: Path, world: World, every: int, steps: int, step: int, images: int):
        self.world, self.every, self.images = world, every, images
        self._file = path.open("a") if world.first else None
        self._events = SummaryWriter(str(events), purge_step=step + 1) if world.first else None
        self._bar = tqdm(
            desc="starting", total=steps, initial=step, disable=not world.first, mininterval=pause(),
            ncols=80, dynamic_ncols=sys.stderr.isatty(),
            bar_format="{desc} {n_fmt}/{total_fmt} {elapsed}<{remaining} |{bar}|",
        )  # fmt: skip
        self._names: list[str] = []
        self._steps: list[dict[str, Any]] = []
        self._sum: Tensor | None = None
        self._ids: list[int] = []
        self._broken: set[int] = set()
        self._restart_clock()

    def say(self, text: str) -> None:
        """Print a line without disturbing the progress line; the first process only."""
        if self.world.first:
            self._bar.write(text, file=sys.stderr)

    def watch(self, batches: Iterable[LoadedBatch]) -> Iterator[LoadedBatch]:
        """Pass batches on; measure the time spent waiting for them and name what could not be read."""
        self._restart_clock()
        iterator = iter(batches)
        while True:
            begin = time.perf_counter()
            loaded = next(iterator, None)
            self._waited += time.perf_counter() - begin
            if loaded is None:
                return
            for image_id, reason in loaded.unreadable.items():
                if image_id not in self._broken:
                    self._bar.write(f"skipped image {image_id}: {reason}", file=sys.stderr)
                self._broken.add(image_id)
            yield loaded

    def add_batch(self, losses: dict[str, Tensor], share: float, image_ids: list[int]) -> None:
        """Add the losses of a batch that makes up `share` of its step."""
        self._names = list(losses)
        values = torch.stack([loss.detach().double() for loss in losses.values()]) * share
        self._sum = values if self._sum is None else self._sum + values
        self._ids += image_ids

    def end_step(self, step: int, epoch: int, rate: float) -> None:
        """Close step number `step` (from 1) of epoch number `epoch` (from 1)."""
        about = {"step": step, "epoch": epoch, "lr": rate}
        self._steps.append({"about": about, "losses": self._sum, "image_ids": self._ids})
        self._sum, self._ids = None, []
        if len(self._steps) == self.every:
            self.flush()

    def flush(self) -> None:
        """Read the losses of the steps since the last reading, check them and write them down.

        Raises:
            FloatingPointError: a loss is not finite; names it, the step and the images.
            ValueError: more than one percent of the images of this epoch could not be read.
        """
        if not self._steps:
            return
        values = torch.stack([step["losses"] for step in self._steps]).cpu()
        self._check_losses(values)
        self._check_images()
        values = self.world.mean(values)
        elapsed = time.perf_counter() - self._begin
        seconds = elapsed / len(self._steps)
        images = self.world.sum(sum(len(step["image_ids"]) for step in self._steps))
        speed = {
            "seconds": seconds,
            "images_per_second": images / elapsed,
            "data_wait": self._waited / elapsed,
            "memory_mib": _memory_mib(),
        }
        if self._file:
            for step, row in zip(self._steps, values.tolist(), strict=True):
                losses = dict(zip(self._names, row, strict=True))
                self._write({**step["about"], **losses, "loss": sum(row), **speed})
            self._show(values.mean(0).tolist(), speed)
        self._bar.update(len(self._steps))
        self._steps.clear()
        self._restart_clock()

    def evaluation(self, step: int, line: dict[str, Any]) -> None:
        """Show the numbers of an evaluation in TensorBoard."""
        if self._events:
            for name, value in line.items():
                if isinstance(value, float):
                    self._events.add_scalar(f"evaluation/{name}", value, step)

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Show an RGB image (H, W, 3) uint8 in TensorBoard."""
        if self._events:
            self._events.add_image(name, image, step, dataformats="HWC")

    def new_epoch(self) -> None:
        """Begin to count unreadable images anew."""
        self._broken.clear()

    def close(self) -> None:
        """Finish the files and the progress line."""
        self._bar.close()
        if self._file:
            self._file.close()
            self._events.close()

    def _check_losses(self, values: Tensor) -> None:
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            step = self._steps[row]
            raise FloatingPointError(
                f"{self._names[column]} is {values[row, column].item()} at step {step['about']['step']} "
                f"(epoch {step['about']['epoch']}), images {', '.join(map(str, step['image_ids']))}; "
                "the last checkpoint is from before. Try a lower --optim.lr, or --optim.clip-grad"
            )

    def _check_images(self) -> None:
        broken = self.world.sum(len(self._broken))
        if broken > BROKEN_SHARE * self.images:
            raise ValueError(
                f"{broken} of {self.images} training images could not be read, more than {BROKEN_SHARE:.0%}: "
                "see the lines 'skipped image' above"
            )

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _show(self, losses: list[float], speed: dict[str, float]) -> None:
        about = self._steps[-1]["about"]
        for name, value in {**dict(zip(self._names, losses, strict=True)), "loss": sum(losses)}.items():
            self._events.add_scalar(f"loss/{name}", value, about["step"])
        for name, value in {"lr": about["lr"], **speed}.items():
            self._events.add_scalar(f"run/{name}", value, about["step"])
        self._bar.set_description_str(
            f"epoch {about['epoch']} loss {sum(losses):.3f} lr {about['lr']:.2g} "
            f"{speed['images_per_second']:.1f} img/s data {speed['data_wait']:.0%}",
            refresh=False,
        )

    def _restart_clock(self) -> None:
        self._begin, self._waited = time.perf_counter(), 0.0


def pause() -> float:
    """Return the seconds between two refreshes of a progress line; a log file gets a line now and then."""
    return 0.2 if sys.stderr.isatty() else 30.0


def _memory_mib() -> float:
    """Return the largest memory so far: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)
