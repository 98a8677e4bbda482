"""The steps that `bench.train_step` and `bench.inference` time: detectors, batches, options, counts, rows.

Options are measured one by one against the plain float32 step; each is a provider of its own in the tables:

- `channels_last`: the weights too are stored so (the images and features always are).
- `bf16`: under autocast.
- `tf32`: float32 products on tensor cores, CUDA only.
- `fused`: batch norms folded into the convolutions, detection only.
- `compile`: `torch.compile` of the network and its losses; minutes of compilation before the first step.
- `graph`: one CUDA graph per shape of the batch, CUDA only; measured after all others, since a capture that fails may
  leave the device unusable.

What fails is named, gives the exit status 1, and leaves the rows of the others.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench.deform_conv import COLUMNS, allow_tf32, environment
from bench.measure import Timing, interleave, peak_memory, surviving
from bench.report import markdown, write_csv
from bench.stages import Stages
from detector import Batch, FasterRCNN, FasterRCNNConfig, Target, fuse_batch_norms
from train.config import PRESETS

try:
    from torchvision.models.detection import FasterRCNN as PeerFasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
except (ImportError, RuntimeError):  # RuntimeError: a build for another torch
    PeerFasterRCNN = None

OPTIONS = ("channels_last", "bf16", "tf32", "fused", "compile", "graph")
CUDA_ONLY = ("tf32", "graph")
PROVIDERS = {"plain": "triton_dcn", "torchvision": "torchvision"}  # the options are called "triton_dcn OPTION"
EXTRA = ("images_per_second", "launches", "waits")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
BURST = 10  # steps on a CUDA device between two readings of the clock, so that the host may run ahead
OBJECTS = 8  # boxes per image


@dataclass(frozen=True)
class Step:
    """One way to make a step.

    Attributes:
        run: makes the step.
        dtype: of the products.
        stages: of the model, if they can be told apart.
        peak_mib: what a graph's pool held at most while it was captured; a replay allocates nothing. None: to measure.
    """

    run: Callable[[], object]
    dtype: str
    stages: Stages | None = None
    peak_mib: float | None = None


def command_line(prog: str, doc: str) -> argparse.ArgumentParser:
    """Return the command line that both benchmarks share."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=doc.split("\n")[0])
    size = {"nargs": "+", "type": int, "metavar": "PIXELS"}
    parser.add_argument(
        "--size", default=[800, 1333] if cuda else [320, 480], help="heights and widths, in turn", **size
    )
    parser.add_argument("--batch", type=int, default=2, help="images per step")
    parser.add_argument("--preset", choices=list(PRESETS), default="coco-1x", help="the model's configuration")
    parser.add_argument("--depth", type=int, choices=(18, 50, 101), help="instead of the preset's")
    parser.add_argument("--dcn", choices=("none", "v1", "v2"), help="instead of the preset's")
    parser.add_argument("--mask", action="store_true", help="Mask R-CNN")
    usual = [name for name in OPTIONS if name != "compile" and (cuda or name not in CUDA_ONLY)]
    parser.add_argument("--options", nargs="*", choices=OPTIONS, default=usual, help="measured beside the plain step")
    parser.add_argument(
        "--peer", action=argparse.BooleanOptionalAction, default=True, help="torchvision's, if it is there"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of measurement for each size")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's choice")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--csv", type=Path, help="write the measurements here")
    return parser


def run(make: Callable, mode: str, options: argparse.Namespace) -> int:
    """Measure every size with every option, print a table and write the CSV; return 1 where something failed.

    Args:
        make: (model, batch, option, device) -> `Step`; the model is ours or torchvision's.
        mode: "train" or "detect", for the rows.
        options: of `command_line`.
    """
    if len(options.size) % 2:
        sys.exit(f"bench: --size takes heights and widths in turn, found {len(options.size)} numbers")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    config, rows, failed, where = configure(options), [], [], environment(device)
    chosen = [name for name in options.options if device.type == "cuda" or name not in CUDA_ONLY]
    if mode != "detect" or config.norm == "gn":
        chosen = [name for name in chosen if name != "fused"]
    case = f"r{config.depth} {config.dcn or 'plain'}" + (" mask" if config.mask else "")
    names = ["plain", *(name for name in chosen if name != "graph")]
    if options.peer and PeerFasterRCNN is None:
        print("skipped torchvision: it cannot be imported", file=sys.stderr)
    elif options.peer:
        names.append("torchvision")
    rounds = [names, ["graph"]] if "graph" in chosen else [names]
    blank = dict.fromkeys(COLUMNS + EXTRA, "")
    for size, names in itertools.product(zip(options.size[::2], options.size[1::2], strict=True), rounds):
        shape = f"{options.batch}x3x{size[0]}x{size[1]}"
        seconds = options.seconds * len(names) / sum(map(len, rounds))
        # not cuDNN's default: the convolutions called float32 would use tf32, and the deformable ones not
        with surviving(f"{mode} {shape} {', '.join(names)}", failed), allow_tf32(False):
            batch, steps = make_batch(config, options.batch, size).to(device), {}
            for name in names:
                with surviving(f"{mode} {shape} {name}", failed):
                    step = build_step(make, name, config, batch, size, device)
                    steps[PROVIDERS.get(name, f"triton_dcn {name}")] = step
            for name, key, values in measure(steps, mode, options.batch, device, seconds, failed):
                keys = dict(zip(COLUMNS[:5], (name, case, shape, *key), strict=True))
                rows.append({**blank, **keys, **values, **where})
        write_csv(options.csv, rows)
    print(markdown(rows))
    for row in rows:
        if row["mode"] == mode:
            rate, launches, waits = (row[key] for key in EXTRA)
            counts = f"{launches} launches, {waits} waits" if waits != "" else f"{launches or 'unknown'} operators"
            print(f"{row['provider']}, {row['shape']}: {rate} images/s, {counts} per step")
    return int(bool(failed))


def configure(options: argparse.Namespace) -> FasterRCNNConfig:
    """Return the preset's configuration with the changes of the command line."""
    changes = {"depth": options.depth, "dcn": options.dcn, "mask": options.mask or None}
    changes = {name: value for name, value in changes.items() if value is not None}
    if options.dcn == "none":
        changes["dcn"] = None
    return replace(PRESETS[options.preset].model, **changes)


def build_step(
    make: Callable, name: str, config: FasterRCNNConfig, batch: Batch, size: tuple[int, int], device: torch.device
) -> Step:
    """Return the step of our detector with an option or "plain", or the plain one of "torchvision"."""
    if name == "torchvision":
        return make(build_peer(config, size, device), batch, "plain", device)
    step = make(build(config, device), batch, name, device)
    return replace(step, run=on_tensor_cores(step.run), dtype="tf32") if name == "tf32" else step


def build(config: FasterRCNNConfig, device: torch.device) -> FasterRCNN:
    """Build our detector with random weights, the same each time."""
    torch.manual_seed(0)
    model = FasterRCNN(config)
    _give_work(model.rpn_head.rpn_reg, model.roi_head.bbox_head.fc_cls)
    return model.to(device)


def build_peer(config: FasterRCNNConfig, size: tuple[int, int], device: torch.device) -> nn.Module:
    """Build torchvision's Faster R-CNN of the same depth, without deformable layers, frozen and thresholded alike."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name=f"resnet{config.depth}", weights=None, trainable_layers=4 - max(config.frozen_stages, 0)
    )
    model = PeerFasterRCNN(
        backbone, config.num_classes + 1, min_size=min(size), max_size=max(size),
        rpn_pre_nms_top_n_train=config.rpn_pre_nms_top_n[0], rpn_pre_nms_top_n_test=config.rpn_pre_nms_top_n[1],
        rpn_post_nms_top_n_train=config.rpn_post_nms_top_n, rpn_post_nms_top_n_test=config.rpn_post_nms_top_n,
        rpn_batch_size_per_image=config.rpn_batch_size, box_batch_size_per_image=config.roi_batch_size,
    )  # fmt: skip
    _give_work(model.rpn.head.bbox_pred, model.roi_heads.box_predictor.cls_score)
    return model.to(device)


def _give_work(regressor: nn.Module, classifier: nn.Linear) -> None:
    """Make random weights propose boxes near the anchors, of which suppression leaves as many as it may, and find some.

    As torchvision initializes the two layers, it proposes 199 boxes where ours proposes 1000.
    """
    nn.init.normal_(regressor.weight, std=1e-3)
    nn.init.normal_(classifier.weight, std=0.1)


def make_batch(config: FasterRCNNConfig, count: int, size: tuple[int, int]) -> Batch:
    """Return noise with `OBJECTS` boxes per image, padded to a multiple of 32."""
    draw = torch.Generator().manual_seed(0)
    height, width = size
    images = torch.randint(
        256, (count, 3, -(-height // 32) * 32, -(-width // 32) * 32), dtype=torch.uint8, generator=draw
    )
    whole, targets = torch.tensor([width, height]), []
    for _ in range(count):
        side = (0.1 + 0.4 * torch.rand(OBJECTS, 2, generator=draw)) * whole
        corner = torch.rand(OBJECTS, 2, generator=draw) * (whole - side)
        boxes, masks = torch.cat([corner, corner + side], 1), None
        if config.mask:
            x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
            across = (x > boxes[:, :1]) & (x < boxes[:, 2:3])
            masks = (y > boxes[:, 1:2]).logical_and(y < boxes[:, 3:])[:, :, None] & across[:, None]
        targets.append(Target(boxes, torch.randint(config.num_classes, (OBJECTS,), generator=draw), masks))
    return Batch(images, torch.tensor([size] * count), targets, torch.arange(count))


def peer_inputs(batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return the batch as torchvision takes it: images in [0, 1] of their own size, labels from 1."""
    sizes = batch.sizes.tolist()
    images = [image[:, :h, :w].float() / 255 for image, (h, w) in zip(batch.images, sizes, strict=True)]
    return images, [{"boxes": target.boxes, "labels": target.labels + 1} for target in batch.targets]


def precision(option: str, device: torch.device) -> tuple[Callable[[], AbstractContextManager], str]:
    """Return what the forward pass runs under, and the name of the dtype, for an option."""
    if option == "bf16":
        return lambda: torch.autocast(device.type, torch.bfloat16), "bfloat16"
    return nullcontext, "float32"


def on_tensor_cores(step: Callable[[], object]) -> Callable[[], object]:
    """Return the step with tf32 allowed in its float32 products."""

    def run() -> object:
        with allow_tf32(True):
            return step()

    return run


def capture(step: Callable[[], object]) -> tuple[Callable[[], None], float | None]:
    """Record a step on a CUDA device, after warming up; return what replays it, and the MiB it needs at most."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()

    def record() -> None:
        with torch.cuda.graph(graph):
            step()

    peak = peak_memory(record, torch.device("cuda"))
    return graph.replay, peak


def measure(
    steps: dict[str, Step], mode: str, images: int, device: torch.device, seconds: float, failed: list[str]
) -> list[tuple]:
    """Time steps side by side, then count what they launch, then time their stages; what fails is added to `failed`.

    Returns:
        (provider, (dtype, mode), columns) for each step, and for each of its stages, whose mode is "MODE STAGE".
    """
    burst = BURST if device.type == "cuda" else 1

    def several(step: Step) -> Callable[[], None]:
        return lambda: [step.run() for _ in range(burst)] and None

    timings = interleave({name: several(step) for name, step in steps.items()}, device, seconds, mode, failed)
    rows = []
    for name, timing in timings.items():
        step = steps[name]
        peak = timing.peak_mib if step.peak_mib is None else step.peak_mib
        timing = Timing(timing.p50 / burst, timing.p20 / burst, timing.p80 / burst, peak)
        values = {**_columns(timing), EXTRA[0]: f"{1000 * images / timing.p50:.3g}"}
        rows.append((name, (step.dtype, mode), values))
        with surviving(f"{mode}: {name}: counting", failed):
            launches, waits = count(step, device)
            values.update(zip(EXTRA[1:], (launches, "" if waits is None else waits), strict=True))
        with surviving(f"{mode}: {name}: stages", failed):
            for stage, spent in shares(step, device).items():
                found = Timing(spent * timing.p50, spent * timing.p20, spent * timing.p80, None)
                rows.append((name, (step.dtype, f"{mode} {stage}"), _columns(found)))
    return rows


def _columns(timing: Timing) -> dict[str, str]:
    peak = "" if timing.peak_mib is None else f"{timing.peak_mib:.1f}"
    return dict(zip(COLUMNS[5:9], (*(f"{t:.4f}" for t in (timing.p50, timing.p20, timing.p80)), peak), strict=True))


def shares(step: Step, device: torch.device, repeats: int = 3) -> dict[str, float]:
    """Return the share of each stage in the time of a step, {} where its parts cannot be seen."""
    if step.stages is None:
        return {}
    with step.stages.watching():
        step.stages.marks.clear()
        with step.stages.whole():
            for _ in range(repeats):
                step.run()
    spent = step.stages.milliseconds()
    whole = spent.pop("whole")
    return {name: value / whole for name, value in spent.items()}


def count(step: Step, device: torch.device) -> tuple[int, int | None]:
    """Return how many kernels a step launches and how often it waits for the device; on a CPU operators, and None."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as found:
        step.run()
    events = {event.key: event.count for event in found.key_averages()}
    if not cuda:
        return sum(number for key, number in events.items() if "::" in key), None
    return tuple(sum(events.get(key, 0) for key in keys) for keys in (LAUNCHES, WAITS))


def compiled(function: Callable, wanted: bool) -> Callable:
    """Return the function, compiled if wanted."""
    return torch.compile(function, fullgraph=True) if wanted else function


def stored(model: nn.Module, option: str) -> nn.Module:
    """Return the model with its weights as the option has them."""
    if option == "fused":
        return fuse_batch_norms(model.eval())
    return model.to(memory_format=torch.channels_last) if option == "channels_last" else model
