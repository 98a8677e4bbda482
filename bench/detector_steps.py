"""The measurement that `bench.train_step` and `bench.inference` share: options, timing, counts, rows.

Options are measured against the plain float32 step, one by one or joined as in `bf16+graph`; each is a provider of its
own in the tables:

- `channels_last`: the weights too are stored so (the images and features always are).
- `bf16`: under autocast.
- `tf32`: float32 products on tensor cores, CUDA only.
- `fused`: batch norms folded into the convolutions, detection only.
- `compile`: `torch.compile` of the network and its losses; minutes of compilation before the first step.
- `graph`: one CUDA graph per shape of the batch, CUDA only; measured after all others, since a capture that fails may
  leave the device unusable.

torchvision's model is measured as it is and with the same `channels_last`, `bf16` and `tf32`, joined or not.

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
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bench import detector_models
from bench.arguments import positive, usable_device
from bench.detector_models import build_detector, build_torchvision, make_batch
from bench.measure import Timing, peak_memory, record_failure, time_interleaved
from bench.model_parts import WHOLE, PartTimer
from bench.providers import INSTALL
from bench.report import markdown
from bench.rows import COLUMNS, ResultRow, environment_columns, timing_row, write_csv
from detector import Batch, FasterRCNNConfig, fuse_batch_norms
from detector.graph import CudaRecorder
from train.config import PRESETS
from triton_dcn.tf32 import allow_tf32

OPTIONS = ("channels_last", "bf16", "tf32", "fused", "compile", "graph")
CUDA_ONLY = ("tf32", "graph")
PEER_OPTIONS = ("channels_last", "bf16", "tf32")
OURS = "triton_dcn"
PEER = "torchvision"
EXTRA_COLUMNS = ("images_per_second", "launches", "waits")
LAUNCH_EVENTS = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAIT_EVENTS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
STEPS_PER_READING = 5
"""Steps on a CUDA device between two readings of the clock, so that the host may run ahead."""


@dataclass(frozen=True)
class Step:
    """A training or detection step, ready to run.

    Attributes:
        run: makes the step.
        dtype: of the products.
        timer: of the parts of the model, where they can be told apart.
        peak_mib: what a graph's pool held at most while it was captured; a replay allocates nothing. None: to measure.
    """

    run: Callable[[], object]
    dtype: str
    timer: PartTimer | None = None
    peak_mib: float | None = None


Options = frozenset[str]
"""Some of `OPTIONS`, together; none for the plain step."""
MakeStep = Callable[[nn.Module, Batch, Options, torch.device], Step]
"""(model, batch, options, device) -> step; the model is ours or torchvision's."""


def command_line(module: str, doc: str) -> argparse.ArgumentParser:
    """Return the command line that both benchmarks share."""
    cuda = torch.cuda.is_available()
    default_size = [800, 1333] if cuda else [320, 480]
    default_options = [name for name in OPTIONS if name != "compile" and (cuda or name not in CUDA_ONLY)]
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc.split("\n")[0])
    parser.add_argument(
        "--size", nargs="+", type=positive, metavar="PIXELS", default=default_size, help="heights and widths, in turn"
    )
    parser.add_argument("--batch-size", "--batch", type=positive, default=2, help="images per step")
    parser.add_argument("--preset", choices=list(PRESETS), default="coco-1x", help="the model's configuration")
    parser.add_argument("--depth", type=int, choices=(18, 50, 101), help="instead of the preset's")
    parser.add_argument("--dcn", choices=("None", "v1", "v2"), help="instead of the preset's")
    parser.add_argument("--groups", type=positive, help="instead of the preset's; 32 in ResNeXt-101 32x4d")
    parser.add_argument("--width-per-group", type=positive, help="instead of the preset's; 4 in ResNeXt-101 32x4d")
    parser.add_argument("--roi-layer", choices=("align", "dpool", "mdpool"), help="instead of the preset's")
    parser.add_argument("--cascade", action="store_true", help="Cascade R-CNN")
    parser.add_argument("--mask", action="store_true", help="Mask R-CNN")
    parser.add_argument(
        "--options",
        nargs="*",
        type=joined_options,
        default=default_options,
        metavar="OPTION[+OPTION]",
        help=f"measured beside the plain step: {', '.join(OPTIONS)}",
    )
    parser.add_argument(
        "--peer", action=argparse.BooleanOptionalAction, default=True, help="torchvision's, if it is there"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of measurement for each size")
    parser.add_argument("--threads", type=positive, help="of the CPU; default: torch's choice")
    parser.add_argument("--device", type=usable_device, default="cuda" if cuda else "cpu")
    parser.add_argument("--csv", type=Path, help="write the measurements here")
    return parser


def joined_options(text: str) -> str:
    """Return an argument of `--options` as it is.

    Raises:
        argparse.ArgumentTypeError: a part of it is no option.
    """
    for name in text.split("+"):
        if name not in OPTIONS:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(OPTIONS)}, joined by +, got {name!r}")
    return text


def run(make_step: MakeStep, mode: str, options: argparse.Namespace) -> int:
    """Measure every size with every option, print a table and write the CSV; return 1 where something failed.

    Args:
        make_step: of the module that is run.
        mode: "train" or "detect", for the rows.
        options: of `command_line`.
    """
    if len(options.size) % 2:
        sys.exit(f"bench: --size: expected heights and widths in turn, got {len(options.size)} numbers")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device
    config = configure_model(options)
    environment = environment_columns(device)
    groups = _groups_of_steps(options, mode, config, device)
    sizes = list(zip(options.size[::2], options.size[1::2], strict=True))

    rows: list[ResultRow] = []
    failed: list[str] = []
    for size, providers in itertools.product(sizes, groups):
        seconds = options.seconds * len(providers) / sum(len(group) for group in groups)
        shape = f"{options.batch_size}x3x{size[0]}x{size[1]}"
        what = f"{mode} {shape}"
        # by default torch lets cuDNN use tf32 in float32 convolutions, which the deformable ones would not use
        with record_failure(f"{what} {', '.join(providers)}", failed), allow_tf32(False):
            batch = make_batch(config, options.batch_size, size).to(device)
            steps = {}
            for provider in providers:
                with record_failure(f"{what} {provider}", failed):
                    steps[provider] = build_step(make_step, provider, config, batch, size, device)
            measurements = measure_steps(steps, mode, options.batch_size, device, seconds, failed)
            rows += _rows(measurements, config, shape, environment)
        write_csv(options.csv, rows)

    print(markdown(rows))
    for row in rows:
        if row["mode"] == mode:
            print(_rate_line(row))
    return int(bool(failed))


def _groups_of_steps(
    options: argparse.Namespace, mode: str, config: FasterRCNNConfig, device: torch.device
) -> list[list[str]]:
    """Return the providers of the steps that are measured side by side; those with a graph come alone and last."""
    providers = [OURS]
    peers = [PEER]
    with_graph = []
    for name in options.options:
        parts = set(name.split("+"))
        if parts.intersection(CUDA_ONLY) and device.type != "cuda":
            continue
        if "fused" in parts and (mode != "detect" or config.norm == "gn"):
            continue
        if "graph" in parts:
            with_graph.append([f"{OURS} {name}"])
            continue
        providers.append(f"{OURS} {name}")
        if parts.issubset(PEER_OPTIONS):
            peers.append(f"{PEER} {name}")
    if options.peer and detector_models.TorchvisionFasterRCNN is None:
        print(f"skipped torchvision: it cannot be imported; {INSTALL['torchvision']}", file=sys.stderr)
    elif options.peer:
        providers += peers
    return [providers, *with_graph]


def configure_model(options: argparse.Namespace) -> FasterRCNNConfig:
    """Return the preset's configuration with the changes of the command line."""
    changes: dict[str, Any] = {}
    for name in ("depth", "groups", "width_per_group", "roi_layer"):
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    if options.dcn is not None:
        changes["dcn"] = None if options.dcn == "None" else options.dcn
    for name in ("cascade", "mask"):
        if getattr(options, name):
            changes[name] = True
    return replace(PRESETS[options.preset].model, **changes)


def build_step(
    make_step: MakeStep,
    provider: str,
    config: FasterRCNNConfig,
    batch: Batch,
    size: tuple[int, int],
    device: torch.device,
) -> Step:
    """Return the step of a provider: `OURS` or `PEER`, followed by its options, if any."""
    name, _, joined = provider.partition(" ")
    options = frozenset(joined.split("+")) if joined else frozenset()
    model = build_torchvision(config, size, device) if name == PEER else build_detector(config, device)
    if "tf32" not in options:
        return make_step(model, batch, options, device)
    with allow_tf32(True):
        step = make_step(model, batch, options, device)
    return replace(step, run=with_tf32(step.run), dtype="tf32" if step.dtype == "float32" else step.dtype)


def apply_options(model: nn.Module, options: Options) -> nn.Module:
    """Return the model with its weights as the options have them."""
    if "fused" in options:
        model = fuse_batch_norms(model.eval())
    if "channels_last" in options:
        model = model.to(memory_format=torch.channels_last)
    return model


def autocast_for(options: Options, device: torch.device) -> tuple[Callable[[], AbstractContextManager[Any]], str]:
    """Return the context of the forward pass and the name of the dtype, for some options."""
    if "bf16" in options:
        return lambda: torch.autocast(device.type, torch.bfloat16), "bfloat16"
    return nullcontext, "float32"


def compile_if(wanted: bool, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, compiled if wanted."""
    return torch.compile(function, fullgraph=True) if wanted else function


def with_tf32(step: Callable[[], object]) -> Callable[[], object]:
    """Return the step with tf32 allowed in its float32 products."""

    def run() -> object:
        with allow_tf32(True):
            return step()

    return run


def capture_graph(step: Callable[[], object]) -> tuple[Callable[[], None], float | None]:
    """Record a step on a CUDA device, after warming up; return what replays it, and the MiB it needs at most."""
    device = torch.device("cuda")
    recorder = CudaRecorder(device)
    for _ in range(3):
        recorder.run(step)
    replays = []

    def record() -> None:
        _, replay = recorder.record(step)
        replays.append(replay)

    peak_mib = peak_memory(record, device)
    return replays[0], peak_mib


@dataclass(frozen=True)
class StepMeasurement:
    """Time of a step, or of one part of its model.

    Attributes:
        provider: as in the rows.
        dtype: of the products.
        mode: "train" or "detect"; for a part, with its name.
        timing: of one step.
        extra: values of `EXTRA_COLUMNS`; none for a part.
    """

    provider: str
    dtype: str
    mode: str
    timing: Timing
    extra: ResultRow


def measure_steps(
    steps: dict[str, Step], mode: str, batch_size: int, device: torch.device, seconds: float, failed: list[str]
) -> list[StepMeasurement]:
    """Time steps side by side, then count what they launch, then time the parts of their models.

    Args:
        steps: by provider.
        mode: "train" or "detect".
        batch_size: images of a step.
        device: where they run.
        seconds: for the rounds together.
        failed: receives the names of what fails.
    """
    repeats = STEPS_PER_READING if device.type == "cuda" else 1

    def repeated(step: Step) -> Callable[[], None]:
        def call() -> None:
            for _ in range(repeats):
                step.run()

        return call

    functions = {provider: repeated(step) for provider, step in steps.items()}
    timings = time_interleaved(functions, device, seconds, mode, failed)
    measurements = []
    for provider, timing in timings.items():
        step = steps[provider]
        peak_mib = timing.peak_mib if step.peak_mib is None else step.peak_mib
        timing = Timing(timing.p50 / repeats, timing.p20 / repeats, timing.p80 / repeats, peak_mib)
        extra = {"images_per_second": f"{1000 * batch_size / timing.p50:.3g}"}
        measurements.append(StepMeasurement(provider, step.dtype, mode, timing, extra))
        with record_failure(f"{mode}: {provider}: counting", failed):
            launches, waits = count_launches(step, device)
            extra["launches"] = str(launches)
            extra["waits"] = "" if waits is None else str(waits)
        with record_failure(f"{mode}: {provider}: parts", failed):
            for part, share in part_shares(step).items():
                part_timing = Timing(share * timing.p50, share * timing.p20, share * timing.p80, None)
                measurements.append(StepMeasurement(provider, step.dtype, f"{mode} {part}", part_timing, {}))
    return measurements


def part_shares(step: Step, repeats: int = 3) -> dict[str, float]:
    """Return the share of each part of the model in the time of a step, {} where the parts cannot be told apart."""
    if step.timer is None:
        return {}
    with step.timer.active(), step.timer.whole():
        for _ in range(repeats):
            step.run()
    spent = step.timer.milliseconds()
    whole = spent.pop(WHOLE)
    return {part: milliseconds / whole for part, milliseconds in spent.items()}


def count_launches(step: Step, device: torch.device) -> tuple[int, int | None]:
    """Return how many kernels a step launches and how often it waits for the device; on a CPU operators, and None."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU]
    if cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as profiler:
        step.run()
    counts = {event.key: event.count for event in profiler.key_averages()}
    if not cuda:
        operators = sum(number for key, number in counts.items() if "::" in key)
        return operators, None
    launches = sum(counts.get(key, 0) for key in LAUNCH_EVENTS)
    waits = sum(counts.get(key, 0) for key in WAIT_EVENTS)
    return launches, waits


def _rows(
    measurements: list[StepMeasurement], config: FasterRCNNConfig, shape: str, environment: ResultRow
) -> list[ResultRow]:
    """Return the rows of the CSV: `COLUMNS`, then `EXTRA_COLUMNS`."""
    case = f"{config.backbone_name.lower()} {config.dcn or 'plain'}"
    if config.roi_layer != "align":
        case += f" {config.roi_layer}"
    if config.cascade:
        case += " cascade"
    if config.mask:
        case += " mask"
    blank = dict.fromkeys((*COLUMNS, *EXTRA_COLUMNS), "")
    rows = []
    for item in measurements:
        row = timing_row(item.provider, case, shape, item.dtype, item.mode, item.timing, environment)
        rows.append({**blank, **row, **item.extra})
    return rows


def _rate_line(row: ResultRow) -> str:
    """Return the line about images per second and counts of a step."""
    launches = row["launches"]
    waits = row["waits"]
    counts = f"{launches} launches, {waits} waits" if waits else f"{launches or 'unknown'} operators"
    return f"{row['provider']}, {row['shape']}: {row['images_per_second']} images/s, {counts} per step"
