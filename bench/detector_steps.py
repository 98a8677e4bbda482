"""The steps that `bench.train_step` and `bench.inference` time: detectors, batches, options, counts, rows.

Options are measured one by one against the plain float32 step; each is a provider of its own in the tables:

- `channels_last`: the weights too are stored so (the images and features always are).
- `bf16`: under autocast.
- `tf32`: float32 products on tensor cores, CUDA only.
- `fused`: batch norms folded into the convolutions, detection only.
- `compile`: `torch.compile` of the network and its losses; minutes of compilation before the first step.
- `graph`: one CUDA graph per shape of the batch, CUDA only.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench.deform_conv import COLUMNS, environment
from bench.measure import Timing, interleave
from bench.report import markdown
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
    """

    run: Callable[[], object]
    dtype: str
    stages: Stages | None = None


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


def run(make: Callable, mode: str, options: argparse.Namespace) -> None:
    """Measure every size with every option, print a table and write the CSV.

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
    config, rows, where = configure(options), [], environment(device)
    chosen = [name for name in options.options if device.type == "cuda" or name not in CUDA_ONLY]
    if mode != "detect" or config.norm == "gn":
        chosen = [name for name in chosen if name != "fused"]
    case = f"r{config.depth} {config.dcn or 'plain'}" + (" mask" if config.mask else "")
    for size in zip(options.size[::2], options.size[1::2], strict=True):
        batch = make_batch(config, options.batch, size).to(device)
        steps = {}
        for name in ("plain", *chosen):
            step = make(build(config, device), batch, name, device)
            if name == "tf32":
                step = replace(step, run=on_tensor_cores(step.run), dtype="tf32")
            steps["triton_dcn" if name == "plain" else f"triton_dcn {name}"] = step
        if options.peer and PeerFasterRCNN is None:
            print("skipped torchvision: it cannot be imported", file=sys.stderr)
        elif options.peer:
            steps["torchvision"] = make(build_peer(config, size, device), batch, "plain", device)
        shape = f"{options.batch}x3x{size[0]}x{size[1]}"
        rows += [
            {**dict(zip(COLUMNS[:5], (name, case, shape, *key), strict=True)), **values, **where}
            for name, key, values in measure(steps, mode, options.batch, device, options.seconds)
        ]
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS + EXTRA)
            writer.writeheader()
            writer.writerows(rows)
    print(markdown(rows))
    for row in rows:
        if row["mode"] == mode:
            rate, launches, waits = (row[key] for key in EXTRA)
            counts = f"{launches} launches, {waits} waits" if waits != "" else f"{launches} operators"
            print(f"{row['provider']}, {row['shape']}: {rate} images/s, {counts} per step")


def configure(options: argparse.Namespace) -> FasterRCNNConfig:
    """Return the preset's configuration with the changes of the command line."""
    changes = {"depth": options.depth, "dcn": options.dcn, "mask": options.mask or None}
    changes = {name: value for name, value in changes.items() if value is not None}
    if options.dcn == "none":
        changes["dcn"] = None
    return replace(PRESETS[options.preset].model, **changes)


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
        rpn_pre_nms_top_n_train=config.rpn_candidates[0], rpn_pre_nms_top_n_test=config.rpn_candidates[1],
        rpn_post_nms_top_n_train=config.rpn_proposals, rpn_post_nms_top_n_test=config.rpn_proposals,
        rpn_batch_size_per_image=config.rpn_samples, box_batch_size_per_image=config.rcnn_samples,
    )  # fmt: skip
    _give_work(model.rpn.head.bbox_pred, model.roi_heads.box_predictor.cls_score)
    return model.to(device)


def _give_work(regressor: nn.Module, classifier: nn.Linear) -> None:
    """Make random weights propose boxes near the anchors, of which suppression leaves as many as it may, and find some.

    As torchvision initialises the two layers, it proposes 199 boxes where ours proposes 1000.
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
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

    def run() -> object:
        before = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32 = cudnn.allow_tf32 = True
        try:
            return step()
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before

    return run


def capture(step: Callable[[], object]) -> Callable[[], None]:
    """Record a step on a CUDA device, after warming up, and return what replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def measure(steps: dict[str, Step], mode: str, images: int, device: torch.device, seconds: float) -> list[tuple]:
    """Time steps side by side, then their stages, then count what they launch.

    Returns:
        (provider, (dtype, mode), columns) for each step, and for each of its stages, whose mode is "MODE STAGE".
    """
    burst = BURST if device.type == "cuda" else 1

    def several(step: Step) -> Callable[[], None]:
        return lambda: [step.run() for _ in range(burst)] and None

    timings = interleave({name: several(step) for name, step in steps.items()}, device, seconds)
    rows = []
    for name, step in steps.items():
        timing = timings[name]
        timing = Timing(timing.p50 / burst, timing.p20 / burst, timing.p80 / burst, timing.peak_mib)
        launches, waits = count(step, device)
        rate = f"{1000 * images / timing.p50:.3g}"
        extra = dict(zip(EXTRA, (rate, launches, "" if waits is None else waits), strict=True))
        rows.append((name, (step.dtype, mode), {**_columns(timing), **extra}))
        for stage, spent in shares(step, device).items():
            found = Timing(spent * timing.p50, spent * timing.p20, spent * timing.p80, None)
            rows.append((name, (step.dtype, f"{mode} {stage}"), {**_columns(found), **dict.fromkeys(EXTRA, "")}))
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
