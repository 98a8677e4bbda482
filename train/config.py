"""What a run is: frozen dataclasses with the values of a run, the presets, and the checks of these values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import Suppress, arg

from detector import FasterRCNNConfig
from detector.image import MAX_PIXELS
from detector.model.config import RENAMED_FIELDS
from detector.precision import PrecisionName
from train.pretrained import imagenet_network

BASE_BATCH_SIZE = 16  # `optim.lr` is meant for this many images per step
MAX_UNREADABLE_SHARE = 0.01  # a run stops when a larger share of the images cannot be read

IMAGENET_CHANNELS = 64  # `base_channels` of the published files

RENAMED = {"data.batch": "data.batch_size", "amp": "precision"} | {
    f"model.{old_name}": f"model.{new_name}" for old_name, new_name in RENAMED_FIELDS.items()
}
"""Former name of a value -> its name in `Config`, for command lines and `config.json` files of earlier versions."""

RENAMED_VALUES = {"amp": {"none": "float32"}}
"""Former name of a value -> what it was under that name -> what it is now, where this differs."""

REMOVED = {
    "eval_overlap": "an evaluation is counted before the next epoch starts",
    "evaluator": "faster-coco-eval counts wherever it is installed, pycocotools elsewhere",
}
"""Name of a value that was removed -> what happens instead. Its flag is accepted, with a note."""

PresetName = Literal["coco-1x", "small", "tiny"]
InitialWeights = Literal["imagenet", "none"] | Path


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
    batch_size: int = 2
    """Images per process and step."""
    workers: int = 4
    """Processes per training process that decode and resize; 0 does it in the training process."""
    max_pixels: int = MAX_PIXELS
    """Images with more pixels are not decoded; they count as unreadable."""
    flip: Suppress[float] = 0.5
    """Probability of a horizontal flip. Python only."""
    short_sides: Annotated[tuple[int, ...], arg(help_behavior_hint="(default: empty)")] = ()
    """Multi-scale training: the short side of an image is drawn from these; empty keeps model.image_scale."""
    half_size: float = 0.0
    """Share of the epochs, the first ones, that see the images at half the size, which takes less time."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, learning rate and gradients."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Update rule."""
    lr: float = 0.02
    """Learning rate at 16 images per step; it is scaled linearly to the batch of the run."""
    offset_lr: Suppress[float] = 1.0
    """Learning rate of the layers that predict offsets and masks, as a share of lr; the recipe has 1. Python only."""
    momentum: float = 0.9
    """Momentum of sgd; first beta of adamw."""
    weight_decay: float = 1e-4
    """Weight decay of every trained parameter."""
    warmup: int = 500
    """Steps over which the learning rate rises linearly."""
    warmup_factor: Suppress[float] = 0.001
    """Where the rise starts, as a share of the learning rate. Python only."""
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
    """Decay of a moving average of the weights, which is evaluated instead of them; 0 keeps none."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and how many stay."""

    every: int = 1000
    """Steps between checkpoints inside an epoch; 0 writes at the ends of epochs only."""
    keep: int = 3
    """Newest checkpoints that stay; the best one stays as best.pt as well."""


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. `train.main.run` takes one, the command line builds one."""

    preset: PresetName = "coco-1x"
    """Values that the other flags start from: the published recipe, which data.root and a GPU choose, a run for a CPU,
    which everything else chooses, or a smoke test."""
    out: Path | None = None
    """Folder of the run; runs/PRESET without it. --eval-only of a file needs one for its results."""
    epochs: int = 12
    """Passes over the training images."""
    max_steps: int = 0
    """Stop after so many steps; 0 runs all epochs."""
    seed: int = 0
    """Seed of everything random."""
    weights: Annotated[InitialWeights, arg(metavar="imagenet|none|FILE")] = "imagenet"
    """What to start from: torchvision's ImageNet file for the depth, which is fetched once; random weights (none); or
    a checkpoint: ours or MMDetection's, which decides the model, or torchvision's."""
    given: Suppress[tuple[str, ...]] = field(default=(), compare=False)
    """Values like "model.mask" that were asked for: where a detector in --weights has others, these count."""
    eval_only: bool = False
    """Evaluate --weights, or the newest checkpoint of --out, and stop; the results go to --out."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    log_every: int = 50
    """Steps between readings of the losses: on a GPU every reading waits for the device. Where the output is no
    terminal, a line comes at the first reading and then every 30 seconds, at a reading."""
    pictures: int = 8
    """Validation images drawn with detections beside ground truth; 0 draws no pictures, none of training images and
    score curves either."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    precision: PrecisionName | None = None
    """Arithmetic: float32 for parity, tf32 on tensor cores, or autocast to bf16 or fp16; None is tf32 for coco-1x on a
    GPU that has it, else float32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    graph: bool = False
    """On a GPU, train from CUDA graphs, one for each padded shape of a batch."""
    deterministic: bool = False
    """Ask PyTorch for deterministic algorithms on a GPU; slower."""
    timeout: float = 600.0
    """Seconds a process waits for the others before it gives up."""
    data: DataConfig = field(default_factory=DataConfig)
    model: Suppress[FasterRCNNConfig] = field(default_factory=FasterRCNNConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def folder(self) -> Path:
        """`out`, or runs/PRESET without it."""
        if self.out is None:
            return Path("runs") / self.preset
        return self.out

    @property
    def half_size_epochs(self) -> int:
        """The first epochs, which see the images at half the size."""
        return round(self.data.half_size * self.epochs)


_FROM_SCRATCH = FasterRCNNConfig(
    depth=18,
    base_channels=32,
    norm="gn",
    norm_eval=False,
    frozen_stages=-1,
    fpn_channels=64,
    fc_channels=256,
    rpn_batch_size=128,
    rpn_pre_nms_top_n=(500, 300),
    rpn_post_nms_top_n=200,
    roi_batch_size=64,
    image_scale=(256, 256),
)

PRESETS: dict[PresetName, Config] = {
    "coco-1x": Config(),
    "small": Config(
        preset="small",
        weights="none",
        epochs=7,
        eval_every=4,
        log_every=1,
        data=DataConfig(batch_size=4, workers=1, half_size=0.57),
        model=replace(
            _FROM_SCRATCH,
            dcn_stages=(False, True, True, False),  # c5 has 4 x 3 cells at half the size
            anchor_scale=4.0,
            roi_positive_fraction=0.5,
        ),
        optim=OptimConfig(
            name="adamw",
            lr=4e-3,
            offset_lr=0.1,
            weight_decay=0.05,
            warmup=50,
            schedule="cosine",
            clip_grad=5.0,
        ),
        checkpoint=CheckpointConfig(every=500),
    ),
    "tiny": Config(
        preset="tiny",
        weights="none",
        epochs=1,
        log_every=1,
        pictures=2,
        data=DataConfig(batch_size=2, workers=0, limit=8),
        model=replace(_FROM_SCRATCH, base_channels=16, fpn_channels=32, fc_channels=64, image_scale=(96, 96)),
        optim=OptimConfig(lr=0.02, warmup=0, milestones=(), clip_grad=10.0),
        checkpoint=CheckpointConfig(every=2),
    ),
}


def complete(config: Config, *, gpu: bool, processes: int = 1) -> Config:
    """Check the values of a configuration and fill in the folder of the run.

    Args:
        config: of the run.
        gpu: whether there is one.
        processes: of the run.

    Returns:
        The same configuration with `out`, and with `weights` as they are written now.

    Raises:
        ValueError: a value is out of its range, or values contradict each other; the message names the flag.
    """
    config = replace(config, weights=read_weights(config.weights))
    if config.out is None:
        if config.eval_only and isinstance(config.weights, Path):
            raise ValueError("--eval-only with --weights: expected --out, a folder for the results, got none")
        config = replace(config, out=config.folder)
    if any("\udc80" <= letter <= "\udcff" for letter in str(config.out)):
        raise ValueError(f"--out {config.out}: expected a name in UTF-8, which TensorBoard needs, got other bytes")

    for section, values in (("", config), ("data.", config.data), ("optim.", config.optim)):
        _check_choices(section, values)
    _check_ranges(config)
    _check_norm(config, gpu, processes)
    _check_imagenet(config)
    _check_graph(config, gpu, processes)
    return config


def read_weights(value: Path | str | None) -> InitialWeights:
    """Return `Config.weights` from a value of a `config.json` file; earlier versions had None for "none"."""
    if value is None:
        return "none"
    if value == "imagenet":
        return "imagenet"
    if value == "none":
        return "none"
    return Path(value)


def as_dict(config: Config | FasterRCNNConfig) -> dict[str, Any]:
    """Return a configuration as nested dicts of plain values: what JSON and a checkpoint can hold."""
    values: dict[str, Any] = _plain(asdict(config))
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def _check_choices(section: str, values: Config | DataConfig | OptimConfig) -> None:
    """Raise ValueError for a value that is not one of those of its field; the command line allows no other."""
    for name, expected in get_type_hints(type(values)).items():
        value = getattr(values, name)
        if get_origin(expected) is Literal and value not in get_args(expected):
            raise ValueError(f"--{section}{name}: expected one of {', '.join(get_args(expected))}, got {value}")


def _check_ranges(config: Config) -> None:
    """Raise ValueError for a value outside its range."""
    data = config.data
    optim = config.optim

    lower_bounds = {
        "--epochs": (config.epochs, 1),
        "--max-steps": (config.max_steps, 0),
        "--seed": (config.seed, 0),
        "--eval-every": (config.eval_every, 1),
        "--log-every": (config.log_every, 1),
        "--pictures": (config.pictures, 0),
        "--data.batch-size": (data.batch_size, 1),
        "--data.workers": (data.workers, 0),
        "--data.limit": (data.limit, 0),
        "--data.max-pixels": (data.max_pixels, 1),
        "--optim.accumulate": (optim.accumulate, 1),
        "--optim.warmup": (optim.warmup, 0),
        "--optim.clip-grad": (optim.clip_grad, 0),
        "--checkpoint.every": (config.checkpoint.every, 0),
        "--checkpoint.keep": (config.checkpoint.keep, 1),
    }
    for flag, (value, bound) in lower_bounds.items():
        if value < bound:
            raise ValueError(f"{flag}: expected at least {bound}, got {value}")

    positive = {"--optim.lr": optim.lr, "--timeout": config.timeout}
    for flag, value in positive.items():
        if not value > 0:
            raise ValueError(f"{flag}: expected more than 0, got {value}")

    shares = {
        "data.flip": data.flip,
        "--data.half-size": data.half_size,
        "--optim.ema": optim.ema,
        "--optim.momentum": optim.momentum,
        "optim.offset_lr": optim.offset_lr,
    }
    for flag, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{flag}: expected 0 to 1, got {value}")

    if any(side < 32 for side in data.short_sides):
        raise ValueError(f"--data.short-sides: expected at least 32, got {data.short_sides}")


def _check_norm(config: Config, gpu: bool, processes: int) -> None:
    """Raise ValueError where --model.norm does not suit the processes or the frozen layers."""
    model = config.model
    if config.eval_only or model.norm == "gn":
        return

    if model.norm == "bn":
        if processes > 1 and not model.norm_eval:
            raise ValueError(
                f"--model.no-norm-eval: expected --model.norm syncbn (on GPUs) or gn with {processes} processes, "
                "got bn: each process would have statistics of its own"
            )
        return

    if model.norm_eval:
        raise ValueError(
            "--model.norm syncbn: expected --model.no-norm-eval, got --model.norm-eval: "
            "statistics that are kept need no synchronizing"
        )
    if model.frozen_stages == 4:
        raise ValueError(
            "--model.norm syncbn: expected --model.frozen-stages below 4, got 4: "
            "all stages are frozen and keep their statistics"
        )
    if processes > 1 and (config.device == "cpu" or not gpu):
        raise ValueError(
            f"--model.norm syncbn: expected GPUs for {processes} processes, got CPUs: "
            "--model.norm gn trains from scratch without a GPU"
        )


def _check_imagenet(config: Config) -> None:
    """Raise ValueError where the model is not one for which there are ImageNet weights."""
    model = config.model
    if config.eval_only or config.weights != "imagenet":
        return
    if model.norm == "gn" or model.base_channels != IMAGENET_CHANNELS:
        raise ValueError(
            f"--weights imagenet: expected a model with batch norm and base_channels {IMAGENET_CHANNELS}, as in the "
            f"published files, got norm {model.norm} and base_channels {model.base_channels}; "
            "--weights none starts from random weights"
        )
    imagenet_network(model)


def _check_graph(config: Config, gpu: bool, processes: int) -> None:
    """Raise ValueError where --graph does not go together with the device or another flag."""
    obstacle = graph_obstacle(config, gpu=gpu, processes=processes)
    if config.graph and obstacle:
        raise ValueError(obstacle)


def graph_obstacle(config: Config, *, gpu: bool, processes: int) -> str:
    """Return why --graph is impossible, an empty text where it is possible; arguments as in `complete`."""
    if config.device == "cpu" or not gpu:
        return "--graph: expected a GPU, got a CPU, which has no CUDA graphs"
    if config.compile:
        return "--graph: expected no --compile, got both"
    if config.precision == "fp16":
        return "--graph: expected --precision float32, tf32 or bf16, got fp16, whose loss scale needs the host"
    if config.model.norm == "syncbn" and processes > 1:
        return (
            f"--graph: expected --model.norm bn or gn with {processes} processes, got syncbn: "
            "batches of different shapes have different graphs, and the processes could not meet inside them"
        )
    return ""
