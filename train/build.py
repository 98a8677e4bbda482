"""What a run is made of: its data, its model and optimizer, and where they start."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detector import FasterRCNN
from detector.weights.checkpoint import read_checkpoint
from detector.weights.load_weights import CLASSIFIER, copy_weights
from train import checkpoint
from train.checkpoint import TrainState
from train.config import Config
from train.data.coco_dataset import CocoDetection
from train.data.transforms import Transform
from train.distributed import World
from train.run_folder import ROOT, RunFolder
from train.schedule import make_optimizer
from train.synthetic.generate import ensure_generated

GENERATED = ROOT / "data" / "generated"
# Buffers change in a batch norm that trains alone, and "syncbn" keeps them equal, so none needs to travel. The flag has
# another name since PyTorch 2.13.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
KEEP_BUFFERS = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


def open_split(
    config: Config,
    world: World,
    split: str,
    scale: tuple[int, int],
    classes: Sequence[str] | None = None,
    *,
    masks: bool = False,
) -> CocoDetection:
    """Open the training or the validation images of the run's data set; make the generated one if none is named.

    Only the first process parses the annotations; the others are given the arrays.

    Args:
        split: "train" or "val".
        scale: bounds of the sides after resizing.
        classes: names by label; None takes those of the file.
        masks: whether the model has masks.

    Raises:
        OSError, ValueError: see `CocoDetection`.
    """
    data, training = config.data, split == "train"
    root = data.root or ensure_generated(GENERATED, progress=world.local_rank == 0)
    if training:
        annotations, images = data.train_annotations, data.train_images
        transform = Transform(scale, data.flip, config.seed, data.short_sides)
    else:
        annotations, images, transform = data.val_annotations, data.val_images, Transform(scale)
    dataset = None
    if world.first:
        if not root.is_dir():
            raise FileNotFoundError(f"--data.root {root} is not a folder")
        dataset = CocoDetection(
            root / annotations, root / images, transform, training=training, classes=classes, limit=data.limit,
            masks=masks,
        )  # fmt: skip
        if training and not len(dataset):
            raise ValueError(f"{dataset.annotation_file} has no image to train on: none with an annotation of its classes")
    return world.broadcast(dataset)


def build(config: Config, world: World) -> tuple[TrainState, Any]:
    """Make model, optimizer and what goes with them, equal on all processes.

    Returns:
        The state, and the network to call in training: the model itself, compiled or data parallel as asked for.
    """
    torch.manual_seed(config.seed)
    model = FasterRCNN(config.model).to(world.device, memory_format=torch.channels_last)  # as its activations are
    if synchronizes(config, world):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp == "fp16")
    average = None
    if config.optim.ema:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.optim.ema), use_buffers=False)
    state = TrainState(model, make_optimizer(model, config.optim), scaler, average)
    network = torch.compile(model) if config.compile else model
    if world.size > 1:
        device = [world.device] if world.device.type == "cuda" else None
        network = DistributedDataParallel(network, device, gradient_as_bucket_view=True, **KEEP_BUFFERS)
    return state, network


def synchronizes(config: Config, world: World) -> bool:
    """Tell whether batch norms take their statistics over all processes; PyTorch can on a GPU only."""
    return config.model.norm == "syncbn" and world.size > 1 and world.device.type == "cuda"


def check_weights(path: Path) -> None:
    """Raise FileNotFoundError, which names the flag, if --weights is not a file."""
    if not path.is_file():
        raise FileNotFoundError(f"--weights {path} is not a file")


def begin(state: TrainState, config: Config, world: World, classes: Sequence[str]) -> list[str]:
    """Load --weights into a new run; return what to tell about it.

    The last layers are left out where the file was made for other classes.
    """
    if config.weights is None:
        frozen = config.model.frozen_stages >= 0 or (config.model.norm == "bn" and config.model.norm_eval)
        warning = "no --weights: the frozen layers stay random; the recipe starts from resnet50-0676ba61.pth"
        return [warning] if frozen else ["weights: random"]
    check_weights(config.weights)
    file = read_checkpoint(config.weights)
    rows = len(file.state[CLASSIFIER]) - 1 if CLASSIFIER in file.state else None
    other = rows is not None and (rows != len(classes) or (file.classes or tuple(classes)) != tuple(classes))
    summary = copy_weights(state.model, file, skip_heads=other)
    if state.average is not None:
        state.average.module.load_state_dict(state.model.state_dict())
    return [f"weights: {line.strip()}" for line in str(summary).splitlines()]


def resume(
    state: TrainState, run: RunFolder, config: Config, world: World, classes: Sequence[str], batches_per_epoch: int
) -> list[str]:
    """Go on from the newest whole checkpoint of the folder, or begin; return what to tell about it.

    Only the first process reads the file. With another number of images per step the epoch goes on at the same share of
    its images; a few of them are then seen twice or not at all.

    Raises:
        ValueError: every checkpoint is damaged.
    """
    notes: list[str] = []
    content = world.broadcast(checkpoint.load_newest(run.checkpoints, notes.append) if world.first else None)
    if content is None:
        if world.first:
            run.rewind(0)
        return begin(state, config, world, classes)
    if content["classes"] != list(classes):
        raise ValueError(f"--out {run.path} was trained on other classes: {', '.join(content['classes'])}")
    checkpoint.restore(state, content)
    if world.first:
        run.rewind(state.step)
    images, before = config.data.batch * world.size, content["images_per_batch"]
    if images != before:
        batch = min(state.batch * before // images, batches_per_epoch - 1)
        state.batch = batch - batch % config.optim.accumulate
        notes.append(f"{before} images per batch before, {images} now: the learning rate follows")
    place = f", batch {state.batch} of {batches_per_epoch}" if state.batch else ""
    notes.append(f"going on after step {state.step}, epoch {state.epoch + bool(state.batch)}{place}")
    return notes
