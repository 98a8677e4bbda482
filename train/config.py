"""What a run is: frozen dataclasses, the presets, and the command line that overrides them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from detector import FasterRCNNConfig

BASE_BATCH = 16  # `optim.lr` is meant for this many images per step
PresetName = Literal["coco-1x", "small", "tiny"]


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and how they reach the model."""

    root: Path | None = None
    """Folder in COCO 2017 layout; without it a data set is generated once, beside the package."""
    train_annotations: str = "annotations/instances_train2017.json"
    """Annotations to train on, below root."""
    train_images: str = "train2017"
    """Folder of the training images, below root."""
    val_annotations: str = "annotations/instances_val2017.json"
    """Annotations to evaluate on, below root; a file without annotations gives detections only."""
    val_images: str = "val2017"
    """Folder of the validation images, below root."""
    limit: int = 0
    """Use only the first so many images of either split; 0 uses all."""
    batch: int = 2
    """Images per process and step."""
    workers: int = 4
    """Processes per training process that decode and resize; 0 does it in the training process."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    short_sides: Annotated[tuple[int, ...], tyro.conf.arg(help_behavior_hint="(default: empty)")] = ()
    """Multi-scale training: the short side of an image is drawn from these; empty keeps model.image_scale."""


@dataclass(frozen=True)
class OptimConfig:
    """How parameters move."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Update rule."""
    lr: float = 0.02
    """Learning rate at 16 images per step; it is scaled linearly to the batch of the run."""
    offset_lr: float = 1.0
    """Learning rate of the layers that predict offsets and masks, as a share of lr; the recipe has 1."""
    momentum: float = 0.9
    """Momentum of sgd; first beta of adamw."""
    weight_decay: float = 1e-4
    """On every trained parameter."""
    warmup: int = 500
    """Steps over which the learning rate rises linearly."""
    warmup_factor: float = 0.001
    """Where the rise starts, as a share of the learning rate."""
    schedule: Literal["steps", "cosine"] = "steps"
    """Fall at the milestones, or by a half cosine down to zero over the run."""
    milestones: tuple[int, ...] = (8, 11)
    """Epochs after which the learning rate falls."""
    gamma: float = 0.1
    """Factor of each fall."""
    accumulate: int = 1
    """Batches per step, for a larger batch than memory holds."""
    clip_grad: float = 0.0
    """Largest norm of the whole gradient; 0 does not clip."""
    ema: float = 0.0
    """Decay of an average of the weights, which is then what is evaluated; 0 keeps none."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and how many stay."""

    every: int = 1000
    """Steps between checkpoints inside an epoch; 0 writes at the ends of epochs only."""
    keep: int = 3
    """Newest checkpoints that stay; the best one stays as best.pt as well."""


@dataclass(frozen=True)
class Config:
    """Train Faster R-CNN with deformable convolutions, evaluate it and leave pictures.

    The same command with the same --out goes on where the run stopped.
    """

    preset: PresetName = "coco-1x"
    """Values every other flag starts from: the published recipe, a run for a CPU, a smoke test."""
    out: Path | None = None
    """Folder of the run; runs/PRESET without it. --eval-only of --weights needs one for its results."""
    epochs: int = 12
    """Passes over the training images."""
    max_steps: int = 0
    """Stop after so many steps; 0 runs all epochs."""
    seed: int = 0
    """Everything random follows from it."""
    weights: Path | None = None
    """Checkpoint to start from: ours, MMDetection's, or torchvision's ImageNet file for the backbone."""
    eval_only: bool = False
    """Evaluate --weights, or the newest checkpoint of --out, and stop; the results go to --out."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    eval_overlap: int = 1000
    """Validation images from which on an evaluation is counted while the next epoch trains; 0 never does."""
    evaluator: Literal["pycocotools", "faster"] = "pycocotools"
    """What counts: pycocotools, or faster-coco-eval, which gives the same numbers in a seventh of the time."""
    log_every: int = 50
    """Steps between readings of the losses: on a GPU every reading waits for the device."""
    pictures: int = 8
    """Validation images drawn with detections beside ground truth."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Autocast dtype; fp16 scales the loss."""
    compile: bool = False
    """Compile the model with torch.compile."""
    deterministic: bool = False
    """Ask PyTorch for deterministic algorithms on a GPU; slower."""
    timeout: float = 600.0
    """Seconds a process waits for the others before it gives up."""
    data: DataConfig = field(default_factory=DataConfig)
    model: FasterRCNNConfig = field(default_factory=FasterRCNNConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


_SCRATCH = FasterRCNNConfig(
    depth=18, base_channels=32, norm="gn", norm_eval=False, frozen_stages=-1, fpn_channels=64, fc_channels=256,
    rpn_batch_size=128, rpn_pre_nms_top_n=(500, 300), rpn_post_nms_top_n=200, roi_batch_size=64, image_scale=(256, 256),
)  # fmt: skip

PRESETS: dict[str, Config] = {
    "coco-1x": Config(),
    "small": Config(
        preset="small",
        epochs=8,
        eval_every=2,
        log_every=1,
        data=DataConfig(batch=4, workers=1),
        model=_SCRATCH,
        optim=OptimConfig(
            name="adamw", lr=4e-3, offset_lr=0.1, weight_decay=0.05, warmup=50, schedule="cosine", clip_grad=5.0
        ),
        checkpoint=CheckpointConfig(every=100),
    ),
    "tiny": Config(
        preset="tiny",
        epochs=1,
        log_every=1,
        pictures=2,
        data=DataConfig(batch=2, workers=0, limit=8),
        model=replace(_SCRATCH, base_channels=16, fpn_channels=32, fc_channels=64, image_scale=(96, 96)),
        optim=OptimConfig(lr=0.02, warmup=4, clip_grad=10.0),
        checkpoint=CheckpointConfig(every=2),
    ),
}


def parse(argv: Sequence[str], *, gpu: bool, processes: int = 1, quiet: bool = False) -> Config:
    """Turn a command line into a configuration.

    The preset is read first, then every other flag overrides one of its values. A flag that does not exist ends the
    program with exit status 2 and the names of the nearest ones.

    Args:
        argv: arguments without the program's name.
        gpu: whether there is one; it decides the preset where none is named.
        processes: of the run.
        quiet: print nothing, for all but one of several processes.

    Raises:
        SystemExit: help was asked for, or the command line is wrong.
        ValueError: a value is out of its range; the message names the flag.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="coco-1x" if gpu else "small", nargs="?")
    name = first.parse_known_args(argv)[0].preset
    default = PRESETS.get(name, PRESETS["small"])
    config = tyro.cli(Config, default=default, args=list(argv), prog="train/main.py", console_outputs=not quiet)
    if config.out is None:
        if config.eval_only and config.weights:
            raise ValueError("--eval-only with --weights needs --out, a folder for the results")
        config = replace(config, out=Path("runs") / config.preset)
    _check(config)
    _check_norm(config, gpu, processes)
    return config


def as_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as nested dicts of plain values: what JSON and a checkpoint can hold."""
    return _plain(asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _check(config: Config) -> None:
    """Raise ValueError for a value that cannot be meant."""
    data, optim = config.data, config.optim
    least = {
        "epochs": (config.epochs, 1),
        "max-steps": (config.max_steps, 0),
        "seed": (config.seed, 0),
        "eval-every": (config.eval_every, 1),
        "eval-overlap": (config.eval_overlap, 0),
        "log-every": (config.log_every, 1),
        "pictures": (config.pictures, 0),
        "data.batch": (data.batch, 1),
        "data.workers": (data.workers, 0),
        "data.limit": (data.limit, 0),
        "optim.accumulate": (optim.accumulate, 1),
        "optim.warmup": (optim.warmup, 0),
        "optim.clip-grad": (optim.clip_grad, 0),
        "checkpoint.every": (config.checkpoint.every, 0),
        "checkpoint.keep": (config.checkpoint.keep, 1),
    }
    for flag, (value, bound) in least.items():
        if value < bound:
            raise ValueError(f"--{flag} must be at least {bound}, got {value}")
    for flag, value in {"optim.lr": optim.lr, "timeout": config.timeout}.items():
        if not value > 0:
            raise ValueError(f"--{flag} must be above 0, got {value}")
    for flag, value in {
        "data.flip": data.flip,
        "optim.ema": optim.ema,
        "optim.momentum": optim.momentum,
        "optim.offset-lr": optim.offset_lr,
    }.items():
        if not 0 <= value <= 1:
            raise ValueError(f"--{flag} must lie in 0..1, got {value}")
    if any(side < 32 for side in data.short_sides):
        raise ValueError(f"--data.short-sides must be at least 32, got {data.short_sides}")


def _check_norm(config: Config, gpu: bool, processes: int) -> None:
    """Raise ValueError where --model.norm syncbn has nothing to synchronize or no GPU to do it, or bn would need it."""
    if config.model.norm == "gn" or config.eval_only:
        return
    if config.model.norm == "bn":
        if processes > 1 and not config.model.norm_eval:
            raise ValueError(
                f"--model.no-norm-eval with --model.norm bn gives each of {processes} processes statistics of its own; "
                "take --model.norm syncbn (GPUs) or gn"
            )
        return
    flag = "--model.norm syncbn needs"
    if config.model.norm_eval:
        raise ValueError(f"{flag} --model.no-norm-eval: statistics that are kept need no synchronizing")
    if config.model.frozen_stages == 4:
        raise ValueError(f"{flag} --model.frozen-stages below 4: all stages are frozen, and their statistics kept")
    if processes > 1 and (config.device == "cpu" or not gpu):
        raise ValueError(f"{flag} GPUs for {processes} processes; without, --model.norm gn trains from scratch")
