"""Builds what a run needs: its data, model and optimizer, with initial weights or the newest checkpoint."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detector import FasterRCNN
from detector.graph import CudaRecorder
from detector.precision import autocast
from detector.text import plural
from detector.weights.checkpoint import Checkpoint, read_checkpoint
from detector.weights.checkpoint_name import parse_name
from detector.weights.load_detector import find_config, is_detector
from detector.weights.load_weights import copy_weights, count_classes
from train.average import WeightAverage
from train.checkpoint import (
    TrainState,
    check_content,
    from_checkpoint,
    list_checkpoints,
    load_newest_checkpoint,
)
from train.compiled import CompiledNetwork
from train.config import Config
from train.data.coco_dataset import CocoDetection
from train.data.identity import describe_change, identify_images
from train.data.transforms import Transform
from train.distributed import World
from train.fine_tuning import find_new_layers
from train.pretrained import ensure_imagenet_file, imagenet_file, imagenet_network, publisher
from train.run_folder import ROOT, RunFolder
from train.schedule import make_optimizer, prepare_for_graphs
from train.step_graphs import Grid, StepGraphs
from train.synthetic.generate import ensure_generated

GENERATED_DATA = ROOT / "data" / "generated"

# The processes need not exchange buffers: these change only in a batch norm that trains, which is allowed for one
# process, or for several with "syncbn", which keeps them equal. PyTorch 2.13 renamed the option.
_HAS_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
KEEP_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _HAS_NEW_NAME else "broadcast_buffers": False}


def prepare_data(config: Config, world: World) -> None:
    """Generate the default data set if the run takes that and it is not there yet.

    Raises:
        OSError, RuntimeError, ValueError: see `ensure_generated`.
    """
    if config.data.root is None:
        ensure_generated(GENERATED_DATA, progress=world.local_rank == 0)


def open_split(config: Config, world: World, split: str, classes: Sequence[str] | None = None) -> CocoDetection:
    """Open the training or the validation images of the run's data set, see `prepare_data`.

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
    root = data.root or GENERATED_DATA
    dataset = None
    if world.is_main:
        if not root.is_dir():
            raise FileNotFoundError(f"--data.root: expected a folder, got {root}")
        training = split == "train"
        if training:
            annotation_file = root / data.train_annotations
            image_folder = root / data.train_images
            transform = Transform(
                config.model.image_scale,
                data.flip,
                config.seed,
                data.short_sides,
                half_size_epochs=config.half_size_epochs,
            )
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
        if dataset.other_sizes:
            raise ValueError(f"{annotation_file}: {dataset.other_sizes}")
        if training and not len(dataset.boxes):
            raise ValueError(f"{annotation_file}: expected boxes to train on, got none: {_without_boxes(dataset)}")

    dataset = world.broadcast(dataset)
    assert dataset is not None
    return dataset


def _without_boxes(dataset: CocoDetection) -> str:
    """Return why there are no boxes to train on."""
    images = dataset.image_counts
    boxes = dataset.counts
    if not images.total:
        return "the file lists no images"
    if not boxes.total:
        return "the file has no annotations"
    if not dataset.classes:
        return "the file lists no categories"
    reasons = [f"{plural(boxes.total, 'annotation')}: {boxes}"]
    if str(images):
        reasons.append(f"{plural(images.total, 'image')}: {images}")
    return "; ".join(reasons + dataset.mistakes)


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
    if config.graph:
        prepare_for_graphs(optimizer)
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
    average = None
    if config.optim.ema:
        average = WeightAverage(model, config.optim.ema)
    state = TrainState(model, optimizer, scaler, average)

    network: nn.Module = CompiledNetwork(model) if config.compile else model
    if world.size > 1 and not config.graph:  # graphs exchange gradients themselves
        device_ids = [world.device] if world.device.type == "cuda" else None
        network = DistributedDataParallel(network, device_ids, gradient_as_bucket_view=True, **KEEP_BUFFERS)
    return state, network


def build_graphs(state: TrainState, config: Config, world: World, tell: Callable[[str], None]) -> StepGraphs | None:
    """Return what makes the steps with --graph, None without it; the checkpoint has been loaded into `state` before."""
    if not config.graph:
        return None
    return StepGraphs(
        state,
        Grid.from_scale(config.model.image_scale, config.data.short_sides),
        CudaRecorder(world.device),
        world,
        clip_grad=config.optim.clip_grad,
        autocast=functools.partial(autocast, world.device, config.precision or "float32"),
        tell=tell,
    )


def uses_sync_batch_norm(config: Config, world: World) -> bool:
    """Tell whether batch norms take their statistics over all processes; PyTorch supports this on GPUs only."""
    return config.model.norm == "syncbn" and world.size > 1 and world.device.type == "cuda"


def prepare_initial_weights(config: Config, world: World) -> None:
    """Check that the file of --weights exists, or fetch that of `imagenet`, before anything else of a run starts.

    A run that goes on from a checkpoint needs neither.

    Raises:
        FileNotFoundError: --weights is not a file.
        SharedError: see `ensure_imagenet_file`.
    """
    has_checkpoint = world.is_main and bool(list_checkpoints(RunFolder(config.folder).checkpoints))
    if config.weights == "none" or world.broadcast(has_checkpoint):
        return
    if config.weights == "imagenet":
        ensure_imagenet_file(imagenet_network(config.model), world, config.timeout)
    else:
        check_weights_exist(config.weights)


def check_weights_exist(path: Path) -> None:
    """Raise FileNotFoundError, which names the flag, if --weights is not a file."""
    if not path.is_file():
        raise FileNotFoundError(f"--weights: expected a file, got {path}")


def load_initial_weights(state: TrainState, config: Config, classes: Sequence[str]) -> tuple[str, list[str]]:
    """Load --weights into a new run; return where the weights come from, and notes about them.

    The last layers are left out where the file was made for other classes.
    """
    if config.weights == "none":
        model = config.model
        if model.frozen_stages >= 0:
            return "random", ["--weights none: the frozen layers stay random"]
        if model.norm == "bn" and model.norm_eval:
            return "random", ["--weights none: batch norms keep statistics that no data has made"]
        return "random", []

    is_imagenet = config.weights == "imagenet"
    path = imagenet_file(imagenet_network(config.model)) if is_imagenet else Path(config.weights)
    checkpoint = read_checkpoint(path)
    skip_heads = False
    new_layers: tuple[str, ...] = ()
    if is_detector(checkpoint):
        skip_heads = _has_other_classes(checkpoint, classes)
        new_layers = find_new_layers(find_config(checkpoint), config.model)
    summary = copy_weights(state.model, checkpoint, skip_heads=skip_heads, new_layers=new_layers)
    if state.average is not None:
        state.average.module.load_state_dict(state.model.state_dict())

    count = f"{plural(len(summary.loaded), 'tensor')} loaded"
    if is_imagenet:
        source = publisher(imagenet_network(config.model))
        return f"ImageNet, {count} into the backbone from {source}'s file {path}, SHA-256 checked", []
    is_checked = parse_name(path) is not None
    origin = f"{path}, {count}, {'SHA-256 checked' if is_checked else 'SHA-256 not known'}"
    return origin, [f"weights: {line.strip()}" for line in str(summary).splitlines()[1:]]


def _has_other_classes(checkpoint: Checkpoint, classes: Sequence[str]) -> bool:
    """Tell whether the classes of a detector differ in number or name."""
    if count_classes(checkpoint.state) != len(classes):
        return True
    if not checkpoint.classes:
        return False  # their names are not known
    return tuple(checkpoint.classes) != tuple(classes)


def is_finished(state: TrainState, config: Config) -> bool:
    """Tell whether a run has all of its epochs or steps."""
    if state.epoch >= config.epochs:
        return True
    return 0 < config.max_steps <= state.step


@dataclass(frozen=True)
class Resumption:
    """How a run goes on.

    Attributes:
        weights: where they come from.
        notes: for people.
        is_epoch_repeated: whether an epoch that had begun starts again from its first batch.
    """

    weights: str
    notes: list[str]
    is_epoch_repeated: bool = False


def resume(
    state: TrainState, run_folder: RunFolder, config: Config, world: World, train_set: CocoDetection, batches: int
) -> Resumption:
    """Go on from the newest whole checkpoint of the folder, or start with --weights.

    Only rank 0 reads the file. With another number of images per step the epoch goes on at the same share of its
    images; a few of them are then seen twice or not at all. With other training images, or a position that the epoch
    does not have, an epoch that has begun starts again from its first batch; between two epochs the run just goes on.
    In a finished run nothing of this matters.

    Args:
        state: of the run; receives the content of the checkpoint.
        run_folder: of the run; metrics after the checkpoint are dropped.
        config: of the run.
        world: the processes.
        train_set: the training images.
        batches: per epoch and process.

    Raises:
        OSError: a file of the folder cannot be read or written.
        ValueError: every checkpoint is damaged, or the newest is not of this run, or the run had other classes.
    """
    notes: list[str] = []
    content = None
    if world.is_main:
        content = load_newest_checkpoint(run_folder.checkpoints, notes.append)
        if content is not None:
            check_content(list_checkpoints(run_folder.checkpoints)[0], content, state)
    content = world.broadcast(content)

    if content is None:
        if world.is_main:
            notes += run_folder.drop_metrics_after(0)
        weights, weight_notes = load_initial_weights(state, config, train_set.classes)
        return Resumption(weights, [*notes, *weight_notes])

    if content["classes"] != list(train_set.classes):
        names = ", ".join(content["classes"])
        raise ValueError(f"--out {run_folder.path}: expected a run with the classes of the data, got one with {names}")
    from_checkpoint(state, content)
    weights = f"of the run's checkpoint after step {state.step}"
    if world.is_main:
        notes += run_folder.drop_metrics_after(state.step)
        aps = [float(line["AP"]) for line in run_folder.evaluations() if "AP" in line]
        if state.best_ap is not None:
            aps.append(state.best_ap)  # its line may have been lost
        state.best_ap = max(aps, default=None)

    if is_finished(state, config):
        notes.append(f"finished after step {state.step}, epoch {state.epoch_number}: nothing is left to train")
        return Resumption(weights, notes)

    images_per_batch = config.data.batch_size * world.size
    images_per_batch_before = content["images_per_batch"]
    if images_per_batch != images_per_batch_before:
        batch = min(state.batch * images_per_batch_before // images_per_batch, batches - 1)
        state.batch = batch - batch % config.optim.accumulate
        notes.append(
            f"{plural(images_per_batch_before, 'image')} per batch before, {images_per_batch} now: "
            "the learning rate follows"
        )

    change = ""
    if "training_set" in content:  # checkpoints of earlier versions have none
        change = describe_change(content["training_set"], identify_images(train_set))
    if not change and state.batch >= batches:
        change = f"batch {state.batch} does not exist in epochs of {batches} now"
    starts_again = bool(change) and state.batch > 0
    if change:
        what_follows = "the run goes on with the next epoch"
        if starts_again:
            what_follows = f"epoch {state.epoch_number} starts again from its beginning"
        notes.append(f"other training images than at step {state.step}: {change}; {what_follows}")
    if starts_again:
        state.batch = 0
        return Resumption(weights, notes, is_epoch_repeated=True)

    position = f"going on after step {state.step}, epoch {state.epoch_number}"
    if state.batch:
        position += f", batch {state.batch} of {batches}"
    return Resumption(weights, [*notes, position])
