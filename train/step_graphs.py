"""`--graph`: the training step from CUDA graphs, one for each padded shape of a batch and one for the update.

The number of shapes is bounded: batches are padded to a grid of sizes, and their ground truths to a few counts. A batch
is copied into tensors that stay where they are, and the graphs read these. Nothing else is computed otherwise than
without graphs, see `train.step`.

Gradients lie in one tensor that stays, too. Several processes add theirs between the two graphs, so that it does not
matter which of them have a graph for their batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, optim

from detector import Batch, Target
from detector.graph import Graphs, Recorder
from detector.structures import NO_OBJECT, SIZE_DIVISOR, StackedTargets, padded_side
from train.checkpoint import TrainState
from train.distributed import World
from train.step import apply_gradients, compute_gradients

STEPS_OF_GRID = 10
"""A step of the grid is the longest side divided by this, rounded down to a multiple of `SIZE_DIVISOR`."""
FEWEST_TARGETS = 16
GROWTH_OF_TARGETS = 4
MAX_GRAPHS = 64
"""Batches of further shapes are computed without a graph."""
GRADIENT_ALIGNMENT = 64
"""Elements: the kernels of the optimizer load several at once."""


@dataclass(frozen=True)
class Grid:
    """The padded sizes of batches.

    A side is padded to the longest side of an image minus a multiple of the step; a side that is no longer than the
    longest short side to that one minus a multiple of the step. The two most frequent sides thus get no padding.

    Attributes:
        long_side: the longest padded side of an image.
        short_side: the longest padded short side.
    """

    long_side: int
    short_side: int

    @classmethod
    def from_scale(cls, image_scale: tuple[int, int], short_sides: Sequence[int] = ()) -> Grid:
        """Return the grid of images that are resized to fit `image_scale`, see `train.data.transforms.Transform`."""
        short_side = max(short_sides, default=min(image_scale))
        return cls(padded_side(max(*image_scale, short_side)), padded_side(short_side))

    @property
    def step(self) -> int:
        """Distance of neighbors in the grid, pixels."""
        return max(self.long_side // STEPS_OF_GRID // SIZE_DIVISOR, 1) * SIZE_DIVISOR

    def pad_side(self, side: int) -> int:
        """Return the padded length of a side."""
        largest = self.short_side if side <= self.short_side else max(self.long_side, padded_side(side))
        return largest - (largest - side) // self.step * self.step

    @staticmethod
    def pad_count(count: int) -> int:
        """Return the padded number of ground truths of an image: 16, 64, 256, ..."""
        powers = itertools.accumulate(itertools.repeat(GROWTH_OF_TARGETS), int.__mul__, initial=FEWEST_TARGETS)
        return next(padded for padded in powers if padded >= count)

    def shape_of(self, batch: Batch) -> BatchShape:
        """Return the padded shape of a batch with targets; no value is read from the device."""
        assert batch.targets is not None
        num_images, _, height, width = batch.images.shape
        most_targets = _stack(batch.targets).labels.shape[1]
        return BatchShape(num_images, self.pad_side(height), self.pad_side(width), self.pad_count(most_targets))


@dataclass(frozen=True)
class BatchShape:
    """The shape of a batch after padding to the grid.

    Attributes:
        images: number of images.
        height, width: pixels.
        targets: ground truths of each image.
    """

    images: int
    height: int
    width: int
    targets: int

    def empty_batch(self, like: Batch) -> Batch:
        """Return a batch of this shape for `copy_batch`, with the dtypes and the device of a batch."""
        assert like.targets is not None
        stacked = _stack(like.targets)
        images = like.images.new_zeros(self.images, 3, self.height, self.width)
        masks = None
        if stacked.masks is not None:
            shape = (self.images, self.targets, self.height, self.width)
            masks = tuple(stacked.masks[0].new_zeros(shape))
        targets = StackedTargets(
            boxes=stacked.boxes.new_zeros(self.images, self.targets, 4),
            labels=stacked.labels.new_zeros(self.images, self.targets),
            counts=(self.targets,) * self.images,
            masks=masks,
        )
        seeds = None if like.seeds is None else torch.zeros_like(like.seeds)
        return Batch(images, torch.zeros_like(like.sizes), targets, seeds)


def copy_batch(batch: Batch, into: Batch) -> None:
    """Copy a batch into one of the same or a larger padded shape.

    Images keep their sizes, so that what is padding counts as padding; its pixels may be left over from another batch.
    Padded ground truths have the label `NO_OBJECT`.
    """
    assert batch.targets is not None
    assert isinstance(into.targets, StackedTargets)
    height, width = batch.images.shape[2:]
    into.images[:, :, :height, :width].copy_(batch.images)
    into.sizes.copy_(batch.sizes)
    if batch.seeds is not None:
        assert into.seeds is not None
        into.seeds.copy_(batch.seeds)

    targets = _stack(batch.targets)
    count = targets.labels.shape[1]
    into.targets.boxes[:, :count].copy_(targets.boxes)
    into.targets.labels[:, :count].copy_(targets.labels)
    into.targets.labels[:, count:].fill_(NO_OBJECT)
    if targets.masks is not None:
        assert into.targets.masks is not None
        for mask, padded in zip(targets.masks, into.targets.masks, strict=True):
            mask_count, mask_height, mask_width = mask.shape
            padded[:mask_count].zero_()
            padded[:mask_count, :mask_height, :mask_width].copy_(mask)


def _stack(targets: Sequence[Target]) -> StackedTargets:
    """Return targets as the loader stacks them."""
    return targets if isinstance(targets, StackedTargets) else StackedTargets.of(targets)


class StepGraphs:
    """Makes training steps from graphs.

    Args:
        state: of the run; its optimizer has been through `prepare_for_graphs`. The gradients of its parameters stay
            where this puts them: `clear` sets them to zero, `zero_grad` would take them away.
        grid: of padded shapes.
        recorder: records the graphs.
        world: the processes.
        clip_grad: largest norm of the gradient; 0 does not clip.
        autocast: returns the context of forward and backward.
        tell: is called with a line for people, once, when there are too many shapes.
    """

    def __init__(
        self,
        state: TrainState,
        grid: Grid,
        recorder: Recorder,
        world: World,
        *,
        clip_grad: float,
        autocast: Callable[[], AbstractContextManager[object]],
        tell: Callable[[str], None],
        max_graphs: int = MAX_GRAPHS,
    ) -> None:
        self.state = state
        self.grid = grid
        self.world = world
        self.clip_grad = clip_grad
        self.autocast = autocast
        self.tell = tell
        self._gradients = _attach_gradients(state.optimizer)
        self._batches: dict[BatchShape, Batch] = {}
        self._backward_graphs = Graphs(recorder, max_graphs)
        self._update_graph = Graphs(recorder, 1)

    def clear(self) -> None:
        """Set the gradients to zero."""
        self._gradients.zero_()

    def backward(self, batch: Batch, share: float) -> dict[str, Tensor]:
        """Add the gradients of a batch that makes up `share` of its step.

        Returns:
            The losses, scalars that are valid until the next call.
        """
        shape = self.grid.shape_of(batch)
        padded = self._batches.get(shape)
        if padded is None:
            padded = shape.empty_batch(batch)
            if not self._backward_graphs.is_full:
                self._batches[shape] = padded
        copy_batch(batch, padded)

        def compute() -> dict[str, Tensor]:
            with self.autocast():
                return compute_gradients(self.state, self.state.model, padded, share)

        was_full = self._backward_graphs.is_full
        losses = self._backward_graphs((shape, share), compute)
        if self._backward_graphs.is_full and not was_full:
            limit = self._backward_graphs.limit
            self.tell(f"--graph: {limit} graphs for as many shapes of batches; further shapes are computed without one")
        return losses

    def update(self) -> None:
        """Apply the gradients of all processes, and set them to zero."""
        if self.world.size > 1:
            self._gradients /= self.world.size
            dist.all_reduce(self._gradients)

        starts_average = self.state.starts_average

        def apply() -> None:
            apply_gradients(self.state, self.clip_grad, starts_average=starts_average)
            self.clear()

        self._update_graph(starts_average, apply)


def _attach_gradients(optimizer: optim.Optimizer) -> Tensor:
    """Give every parameter of an optimizer a gradient of zeros in one tensor, laid out as the parameter; return it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    lengths = [-(-parameter.numel() // GRADIENT_ALIGNMENT) * GRADIENT_ALIGNMENT for parameter in parameters]
    gradients: Tensor = parameters[0].new_zeros(sum(lengths))
    for parameter, gradient in zip(parameters, gradients.split(lengths), strict=True):
        parameter.grad = gradient.as_strided(parameter.shape, parameter.stride())
    return gradients
