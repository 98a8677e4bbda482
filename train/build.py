"""Builds what a run needs: its data, model and optimizer, with initial weights or the newest checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detector import FasterRCNN
from detector.weights.checkpoint import Checkpoint, read_checkpoint
from detector.weights.load_weights import CLASSIFIER, copy_weights, count_classes
from train.checkpoint import TrainState, from_checkpoint, load_newest_checkpoint
from train.config import Config
from train.data.coco_dataset import CocoDetection
from train.data.transforms import Transform
from train.distributed import World
from train.run_folder import ROOT, RunFolder
from train.schedule import make_optimizer
from train.synthetic.generate import ensure_generated

GENERATED_DATA = ROOT / "data" / "generated"

# The processes need not exchange buffers: these change only in a batch norm that trains, which is allowed for one
# process, or for several with "syncbn", which keeps them equal. PyTorch 2.13 renamed the option.
_HAS_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
KEEP_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _HAS_NEW_NAME else "broadcast_buffers": False}


def open_split(config: Config, world: World, split: str, classes: Sequence[str] | None = None) -> CocoDetection:
    """Open the training or the validation images of the run's data set; generate one if none is named.

    Only rank 0 parses the annotations; the others receive the arrays.

    Args:
        config: of the run; its model decides the size of the images and whether masks are read.
        world: the processes.
        split: "train" or "val".
        classes: names by label; None takes those of the file.

    Raises:
        OSError, ValueError: see `CocoDetection`.
    """
    data = config.data
    root = data.root or ensure_generated(GENERATED_DATA, progress=world.local_rank == 0)
    dataset = None
    if world.is_main:
        if not root.is_dir():
            raise FileNotFoundError(f"--data.root: expected a folder, got {root}")
        training = split == "train"
        if training:
            annotation_file = root / data.train_annotations
            image_folder = root / data.train_images
            transform = Transform(config.model.image_scale, data.flip, config.seed, data.short_sides)
        else:
            annotation_file = root / data.val_annotations
            image_folder = root / data.val_images
            transform = Transform(config.model.image_scale)

        dataset = CocoDetection(
            annotation_file,
            image_folder,
            transform,
            training=training,
            classes=classes,
            limit=data.limit,
            masks=config.model.mask,
            max_pixels=data.max_pixels,
        )
        if training and not len(dataset):
            raise ValueError(f"{annotation_file}: expected an image with an annotation of its classes, got none")

    dataset = world.broadcast(dataset)
    assert dataset is not None
    return dataset


def build(config: Config, world: World) -> tuple[TrainState, Callable[..., Any]]:
    """Create model, optimizer and what belongs to them, equal on all processes.

    Returns:
        The state, and the network to call in training: the model itself, compiled or data parallel as asked for.
    """
    torch.manual_seed(config.seed)
    # The activations of the model are channels_last, so its weights are, too.
    model: nn.Module = FasterRCNN(config.model)
    model = model.to(device=world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in stubs
    if uses_sync_batch_norm(config, world):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = make_optimizer(model, config.optim)
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp == "fp16")
    average = None
    if config.optim.ema:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.optim.ema), use_buffers=False)
    state = TrainState(model, optimizer, scaler, average)

    network: Callable[..., Any] = torch.compile(model) if config.compile else model
    if world.size > 1:
        device_ids = [world.device] if world.device.type == "cuda" else None
        network = DistributedDataParallel(network, device_ids, gradient_as_bucket_view=True, **KEEP_BUFFERS)
    return state, network


def uses_sync_batch_norm(config: Config, world: World) -> bool:
    """Tell whether batch norms take their statistics over all processes; PyTorch supports this on GPUs only."""
    return config.model.norm == "syncbn" and world.size > 1 and world.device.type == "cuda"


def check_weights_exist(path: Path) -> None:
    """Raise FileNotFoundError, which names the flag, if --weights is not a file."""
    if not path.is_file():
        raise FileNotFoundError(f"--weights: expected a file, got {path}")


def load_initial_weights(state: TrainState, config: Config, classes: Sequence[str]) -> list[str]:
    """Load --weights into a new run; return notes about it.

    The last layers are left out where the file was made for other classes.
    """
    if config.weights is None:
        model = config.model
        keeps_statistics = model.norm == "bn" and model.norm_eval
        if model.frozen_stages >= 0 or keeps_statistics:
            return ["no --weights: the frozen layers stay random; the recipe starts from resnet50-0676ba61.pth"]
        return ["weights: random"]

    check_weights_exist(config.weights)
    checkpoint = read_checkpoint(config.weights)
    summary = copy_weights(state.model, checkpoint, skip_heads=_has_other_classes(checkpoint, classes))
    if state.average is not None:
        state.average.module.load_state_dict(state.model.state_dict())
    return [f"weights: {line.strip()}" for line in str(summary).splitlines()]


def _has_other_classes(checkpoint: Checkpoint, classes: Sequence[str]) -> bool:
    """Tell whether a checkpoint is of a detector whose classes differ in number or name."""
    if CLASSIFIER not in checkpoint.state:
        return False  # no detector: weights of a backbone
    if count_classes(checkpoint.state) != len(classes):
        return True
    if not checkpoint.classes:
        return False  # their names are not known
    return tuple(checkpoint.classes) != tuple(classes)


def resume(
    state: TrainState,
    run_folder: RunFolder,
    config: Config,
    world: World,
    classes: Sequence[str],
    batches_per_epoch: int,
) -> list[str]:
    """Go on from the newest whole checkpoint of the folder, or start with --weights; return notes about it.

    Only rank 0 reads the file. With another number of images per step the epoch goes on at the same share of its
    images; a few of them are then seen twice or not at all.

    Raises:
        ValueError: every checkpoint is damaged, or the run had other classes.
    """
    notes: list[str] = []
    content = None
    if world.is_main:
        content = load_newest_checkpoint(run_folder.checkpoints, notes.append)
    content = world.broadcast(content)

    if content is None:
        if world.is_main:
            run_folder.drop_metrics_after(0)
        return load_initial_weights(state, config, classes)

    if content["classes"] != list(classes):
        names = ", ".join(content["classes"])
        raise ValueError(f"--out {run_folder.path}: expected a run with the classes of the data, got one with {names}")
    from_checkpoint(state, content)
    if world.is_main:
        run_folder.drop_metrics_after(state.step)

    images_per_batch = config.data.batch_size * world.size
    images_per_batch_before = content["images_per_batch"]
    if images_per_batch != images_per_batch_before:
        batch = min(state.batch * images_per_batch_before // images_per_batch, batches_per_epoch - 1)
        state.batch = batch - batch % config.optim.accumulate
        notes.append(
            f"{images_per_batch_before} images per batch before, {images_per_batch} now: the learning rate follows"
        )

    position = f"going on after step {state.step}, epoch {state.epoch_number}"
    if state.batch:
        position += f", batch {state.batch} of {batches_per_epoch}"
    notes.append(position)
    return notes
