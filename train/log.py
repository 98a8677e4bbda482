"""What a run records while it trains: losses on the progress line, in metrics.jsonl and in TensorBoard.

Training stops here when a loss is not finite, or when too many images cannot be read.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detector.text import printable
from train.config import MAX_UNREADABLE_SHARE
from train.data.collate import LoadedBatch
from train.distributed import World
from train.events import Events
from train.progress import TrainingProgress, print_above_progress
from train.run_folder import RunFolder


@dataclass(frozen=True)
class StepLosses:
    """The losses of one step on this process.

    Attributes:
        step: number of the step, from 1.
        epoch: number of its epoch, from 1.
        lr: learning rate of the step.
        values: (losses,) float64 on the device.
        image_ids: of the images of the step.
        boxes: (N, 4) of each image, in pixels of the resized image, on the device.
        scale_factors: (x, y) of each image's resize.
    """

    step: int
    epoch: int
    lr: float
    values: Tensor
    image_ids: list[int]
    boxes: list[Tensor]
    scale_factors: list[tuple[float, float]]

    def describe_boxes(self) -> str:
        """Return the size of the thinnest box of each image, in pixels of the file: very thin ones are suspicious."""
        texts = []
        for image_id, boxes, factors in zip(self.image_ids, self.boxes, self.scale_factors, strict=True):
            if len(boxes):
                sides = (boxes[:, 2:] - boxes[:, :2]).cpu() / torch.tensor(factors)
                thinnest = sides.amin(1).nan_to_num(nan=-torch.inf).argmin()
                width, height = sides[thinnest].tolist()
                texts.append(f"{width:.4g} x {height:.4g} in image {image_id}")
        return ", ".join(texts) or "none"


class LossBuffer:
    """Keeps losses on the device and reads them back together, because every reading waits for a GPU.

    Attributes:
        names: of the losses.
        steps: since the last `clear`.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.steps: list[StepLosses] = []
        self._values: Tensor | None = None
        self._image_ids: list[int] = []
        self._boxes: list[Tensor] = []
        self._scale_factors: list[tuple[float, float]] = []

    def add_batch(self, losses: dict[str, Tensor], share: float, loaded: LoadedBatch) -> None:
        """Add the losses of a batch that makes up `share` of its step."""
        self.names = list(losses)
        with torch.no_grad():
            values = torch.stack(list(losses.values())).double()
            if share != 1:
                values *= share
        self._values = values if self._values is None else self._values + values
        assert loaded.batch is not None
        self._image_ids += loaded.image_ids
        self._boxes += [target.boxes for target in loaded.batch.targets or ()]
        self._scale_factors += loaded.scale_factors

    def end_step(self, step: int, epoch: int, lr: float) -> None:
        """End a step that has got at least one batch."""
        assert self._values is not None
        losses = StepLosses(step, epoch, lr, self._values, self._image_ids, self._boxes, self._scale_factors)
        self.steps.append(losses)
        self._values = None
        self._image_ids = []
        self._boxes = []
        self._scale_factors = []

    def read(self) -> Tensor:
        """Return the losses of all steps, (steps, losses) float64 on the CPU.

        Raises:
            FloatingPointError: a loss is not finite; the message names it, the step, the images and their boxes.
        """
        values = torch.stack([step.values for step in self.steps]).cpu()
        positions = (~values.isfinite()).nonzero()
        if len(positions):
            step_index, loss_index = positions[0].tolist()
            step = self.steps[step_index]
            raise FloatingPointError(
                f"{self.names[loss_index]} is {values[step_index, loss_index].item()} at step {step.step} "
                f"(epoch {step.epoch}), images {', '.join(map(str, step.image_ids))}; "
                f"the last checkpoint is from before. Look at their boxes (the thinnest: {step.describe_boxes()}), "
                "or try a lower --optim.lr or --optim.clip-grad"
            )
        return values

    def count_images(self) -> int:
        """Return how many images the steps had on this process."""
        return sum(len(step.image_ids) for step in self.steps)

    def clear(self) -> None:
        """Forget the steps."""
        self.steps.clear()


class TrainLog:
    """Writes what happens in a run. Losses are means over the processes, and rank 0 writes.

    Args:
        run_folder: receives metrics.jsonl and the TensorBoard events; it must exist.
        world: the processes.
        interval: steps between readings of the losses.
        total_steps: of the whole run, to show the time that is left.
        first_step: steps that are finished already.
        num_images: in the training split.
    """

    def __init__(
        self, run_folder: RunFolder, world: World, *, interval: int, total_steps: int, first_step: int, num_images: int
    ):
        self.run_folder = run_folder
        self.world = world
        self.interval = interval
        self.num_images = num_images
        self._losses = LossBuffer()
        self._unreadable: set[int] = set()  # image ids of this epoch
        self._with_lost_boxes: set[int] = set()  # image ids of the whole run
        self._events: Events | None = None
        if world.is_main:
            run_folder.metrics.touch()
            # Events after first_step are from steps that will be taken again: TensorBoard hides them.
            self._events = Events(run_folder.path, first_step + 1)
        is_shown = world.is_main and first_step < total_steps
        self._progress = TrainingProgress(total_steps, first_step, enabled=is_shown)
        self._restart_clock()

    def print(self, text: str) -> None:
        """Print a line above the progress line; rank 0 only."""
        if self.world.is_main:
            print_above_progress(text)

    def start_epoch(self) -> None:
        """Count unreadable images from zero again."""
        self._unreadable.clear()

    def watch_loading(self, batches: Iterable[LoadedBatch]) -> Iterator[LoadedBatch]:
        """Pass batches on; measure the time spent waiting for them and print which images or boxes are left out."""
        self._restart_clock()
        iterator = iter(batches)
        while True:
            wait_start = time.perf_counter()
            loaded = next(iterator, None)
            self._wait_seconds += time.perf_counter() - wait_start
            if loaded is None:
                return
            for image_id, reason in loaded.unreadable.items():
                if image_id not in self._unreadable:
                    print_above_progress(f"skipped image {image_id}: {reason}")
                self._unreadable.add(image_id)
            self._tell_lost_boxes(loaded)
            yield loaded

    def _tell_lost_boxes(self, loaded: LoadedBatch) -> None:
        """Print which boxes of a batch were dropped, once for each image."""
        for image_id, boxes in loaded.lost_boxes.items():
            if image_id not in self._with_lost_boxes:
                self._with_lost_boxes.add(image_id)
                shown = ", ".join(str([round(value, 3) for value in box]) for box in boxes[:3])
                more = " ..." if len(boxes) > 3 else ""
                print_above_progress(
                    f"image {image_id}: boxes dropped because nothing of them is left inside the image: "
                    f"{len(boxes)}, x1 y1 x2 y2 = {shown}{more}"
                )

    def add_batch(self, losses: dict[str, Tensor], share: float, loaded: LoadedBatch) -> None:
        """Add the losses of a batch that makes up `share` of its step."""
        self._losses.add_batch(losses, share, loaded)

    def end_step(self, step: int, epoch: int, lr: float) -> None:
        """End step number `step` (from 1) of epoch number `epoch` (from 1); flush after every `interval` steps."""
        self._losses.end_step(step, epoch, lr)
        if len(self._losses.steps) == self.interval:
            self.flush()

    def flush(self) -> None:
        """Read the losses of the steps since the last reading, check them and write them.

        Raises:
            FloatingPointError: a loss is not finite; the message names it, the step and the images.
            ValueError: more than one percent of the images of this epoch could not be read.
        """
        steps = self._losses.steps
        if not steps:
            return
        values = self._losses.read()
        self._check_unreadable_images()
        values = self.world.mean(values)
        speed = self._measure_speed()

        if self.world.is_main:
            lines = []
            for step, step_values in zip(steps, values.tolist(), strict=True):
                losses = dict(zip(self._losses.names, step_values, strict=True))
                position = {"step": step.step, "epoch": step.epoch, "lr": step.lr}
                lines.append({**position, **losses, "loss": sum(step_values), **speed})
            self.run_folder.append_metrics(*lines)
            text = self._show(steps[-1], values.mean(0).tolist(), speed)
            self._progress.update(len(steps), text)
        self._losses.clear()
        self._restart_clock()

    def add_evaluation(self, step: int, line: dict[str, Any]) -> None:
        """Show the numbers of an evaluation in TensorBoard, and AP and AP50 of the classes that have ground truth."""
        if self._events is None:
            return
        for name, value in line.items():
            if isinstance(value, float):
                self._events.add_scalar(f"evaluation/{name}", value, step)
        for kind in ("", "segm_"):
            for name, (ap, ap50, _) in line.get(f"{kind}classes", {}).items():
                if ap >= 0:
                    self._events.add_scalar(f"{kind}AP_of_class/{printable(name)}", ap, step)
                    self._events.add_scalar(f"{kind}AP50_of_class/{printable(name)}", ap50, step)

    def add_picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Show an RGB image (H, W, 3) uint8 in TensorBoard."""
        if self._events is not None:
            self._events.add_image(printable(name), image, step)

    def close(self) -> None:
        """Close the TensorBoard events and the progress line."""
        self._progress.close()
        if self._events is not None:
            self._events.close()

    def _check_unreadable_images(self) -> None:
        count = self.world.sum(len(self._unreadable))
        if count > MAX_UNREADABLE_SHARE * self.num_images:
            raise ValueError(
                f"{count} of {self.num_images} training images could not be read, more than "
                f"{MAX_UNREADABLE_SHARE:.0%}: see the lines 'skipped image' above"
            )

    def _measure_speed(self) -> dict[str, float]:
        """Return speed and memory of the steps since the last reading."""
        seconds = time.perf_counter() - self._start
        images = self.world.sum(self._losses.count_images())
        return {
            "seconds": seconds / len(self._losses.steps),
            "images_per_second": images / seconds,
            "data_wait": self._wait_seconds / seconds,
            "memory_mib": _peak_memory_mib(),
        }

    def _show(self, last_step: StepLosses, mean_losses: list[float], speed: dict[str, float]) -> str:
        """Write TensorBoard events; return the text of the progress line; rank 0 only."""
        assert self._events is not None
        total = sum(mean_losses)
        for name, value in zip(self._losses.names, mean_losses, strict=True):
            self._events.add_scalar(f"loss/{name}", value, last_step.step)
        self._events.add_scalar("loss/loss", total, last_step.step)
        for name, value in {"lr": last_step.lr, **speed}.items():
            self._events.add_scalar(f"run/{name}", value, last_step.step)

        return (
            f"epoch {last_step.epoch} loss {total:.3f} lr {last_step.lr:.2g} "
            f"{speed['images_per_second']:.1f} img/s data {speed['data_wait']:.0%}"
        )

    def _restart_clock(self) -> None:
        self._start = time.perf_counter()
        self._wait_seconds = 0.0


def _peak_memory_mib() -> float:
    """Return the largest memory so far: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    units_per_mib = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_mib
