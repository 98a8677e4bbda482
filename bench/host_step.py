"""What the host does in one training step of the recipe, counted on a machine without a GPU.

    python -m bench.host_step [--ema] [--graph] [--precision bf16] [--steps 100]

A GPU waits for its host wherever launching takes longer than computing. So the step is run as on a GPU, the loop of
`train.loop` included, but the tensors are on the CPU and so small that computing them takes next to no time; what is
left is Python, PyTorch's dispatcher and autograd. The batch stands for 2 images of 800x1333 in 800x1344:

- Its images are 32x32, a 25th and a 42nd of the padded sides, and the channels a 16th of the model's. Every map of
  the pyramid has at least one pixel, so all layers and all operators are there.
- `Tensor.is_cuda` is true, so the code of a GPU runs: the Triton kernels of deformable layers, NMS and RoIAlign, and
  the fused optimizer. Triton's launches go through all of its Python, up to the call of the driver, which is left out.
- The tile table is asked for the sizes of the whole batch on an H100, and buffers are cut as there.

What a figure is:

    kernels   operators that compute or copy, at least one launch each: leaves of the profile that are not views
    triton    launches of Triton kernels
    waits     operators for whose result the host waits
    calls     Python functions and built-in ones
    us        processor time of the one thread without profilers: of each stage, what a tenth of the steps stay below

The time is that of this machine. It has the CPU's kernels on a few numbers where a GPU has launches, two to three
microseconds each. Convolutions only allocate their results: a Python function, whose time the table tells, stands for
the call of cuDNN. There are no copies to the device, which are few (see `train.data.prefetch`), no driver's launches of
the Triton kernels, and no exchange between processes. With `--graph` the two replays of a step do nothing, and what is
counted is what remains around them.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.optim import optimizer
from torch.profiler import ProfilerActivity, profile, record_function
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from bench.arguments import positive
from bench.report import markdown_table
from detector import Batch, Target
from detector.model import faster_rcnn, resnet
from detector.ops import nms
from detector.ops.kernels import nms as nms_kernels
from detector.precision import PrecisionName, autocast, product_settings
from detector.structures import StackedTargets
from train import log as log_module
from train import loop
from train.build import build
from train.checkpoint import TrainState
from train.config import PRESETS, Config
from train.data.collate import LoadedBatch
from train.distributed import World
from train.log import LossBuffer, TrainLog
from train.progress import TrainingProgress
from train.run_folder import RunFolder
from train.schedule import Schedule
from train.step_graphs import Grid, StepGraphs
from triton_dcn import functional, tile_table, workspace
from triton_dcn.geometry import conv_output_size

CHANNELS = 16
"""Channels of the model for one channel here."""
PIXELS = 25 * 42
"""Pixels of the batch for one pixel here."""
SIDE = 32
ARCHITECTURE = "sm90"
BOXES = (7, 12)
"""Ground truths of the images; COCO has 7.3 on average."""
REST = "loop"
READING = "reading"
"""Of the losses, every so many steps: its time is divided among these."""
NO_CONTEXT = nullcontext()
STAGE_MARK = "stage "
METHODS = {
    "normalize": (("", "normalize"),),
    "backbone": (("backbone", "forward"),),
    "fpn": (("neck", "forward"),),
    "rpn head": (("rpn_head", "forward"),),
    "anchors, targets": (("rpn_head.anchor_generator", "forward"), ("rpn_head.anchor_generator", "valid_flags")),
    "rpn sampling": (("rpn_head", "sample"),),
    "proposals": (("rpn_head", "propose"),),
    "roi sampling": (("roi_head", "sample"),),
    "roi head": (("roi_head", "forward"),),
    "losses": (("rpn_head", "losses"), ("roi_head", "losses")),
}
"""Stage -> (path of the module, method) of the model. A stage inside another one is not counted in that one."""
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal")
"""Operators whose result or shape comes from the device's memory."""
WHOLE = ("aten::convolution", "aten::_foreach", "aten::_fused")
"""Operators that count as one: convolutions, which only allocate here, and those for lists of tensors: a few launches
on a GPU, where a CPU goes through the tensors."""
NO_LAUNCH = ("as_strided_", "detach_", "resize_", "resize_as_", "result_type", "set_", "squeeze_", "unsqueeze_")
"""Operators that change what a tensor says of itself, and none of its numbers."""


@dataclass
class Counts:
    """What one step takes, by stage.

    Attributes:
        kernels: PyTorch's operators that compute.
        triton: launches of Triton kernels.
        waits: operators that wait for the device.
        calls: Python calls.
        microseconds: processor time.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    triton: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    microseconds: dict[str, float] = field(default_factory=dict)


class Stages:
    """Knows which stage of the step runs, and adds up the time of each.

    Attributes:
        current: name of the stage.
        launched: Triton launches by stage.
        seconds: processor time by stage.
        marked: whether to mark the stages in a profile.
    """

    def __init__(self) -> None:
        self.current = REST
        self.launched: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.marked = False
        self._since = time.thread_time()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function as a stage of this name."""

        def call(*arguments: Any, **options: Any) -> Any:
            before = self._enter(name)
            try:
                if self.marked:
                    with record_function(STAGE_MARK + name):
                        return function(*arguments, **options)
                return function(*arguments, **options)
            finally:
                self._enter(before)

        return call

    def restart(self) -> None:
        """Forget times and launches."""
        self.launched.clear()
        self.seconds.clear()
        self._since = time.thread_time()

    def stop(self) -> None:
        """Add the time since the last change of stage."""
        self._enter(self.current)

    def _enter(self, name: str) -> str:
        now = time.thread_time()
        self.seconds[self.current] += now - self._since
        before = self.current
        self.current = name
        self._since = now
        return before


class _LaunchedKernel:
    """Stands for a compiled kernel; a launch of it is noted."""

    function = 0
    packed_metadata = ()

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    def run(self, *arguments: Any, **options: Any) -> None:
        self._stages.launched[self._stages.current] += 1

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.run


class _Driver:
    """What Triton asks its active driver before a launch."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    """Allocate the result of a convolution, and no more."""
    size = conv_output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return torch.empty((input.shape[0], weight.shape[0], *size), memory_format=torch.channels_last)


def _convolution_backward(
    grad: Tensor, input: Tensor, weight: Tensor, bias_sizes: list[int] | None, *others: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Allocate the gradients of a convolution, and no more."""
    needs_input, needs_weight, needs_bias = others[-1]
    grad_input = torch.empty_like(input) if needs_input else None
    grad_weight = torch.empty_like(weight) if needs_weight else None
    return grad_input, grad_weight, torch.empty(weight.shape[0]) if needs_bias else None


@contextmanager
def as_on_a_gpu(stages: Stages, precision: PrecisionName) -> Iterator[None]:
    """Let CPU tensors take the paths of a GPU, and note the launches of Triton kernels.

    Args:
        stages: receives the launches.
        precision: of the products, see `detector.precision`.
    """
    kernel = _LaunchedKernel(stages)

    def compile_nothing(jit: Any, key: Any, signature: Any, device: int, *others: Any) -> _LaunchedKernel:
        jit.device_caches[device][0][key] = kernel
        return kernel

    def run_nothing(interpreted: Any, *arguments: Any, **options: Any) -> _LaunchedKernel:
        kernel.run()
        return kernel

    @lru_cache(maxsize=4096)
    def search(
        task: str, arch: str, arithmetic: str, channels: int, out_channels: int, *, offset_groups: int, positions: int
    ) -> tile_table.TileRow | None:
        whole = (channels * CHANNELS, out_channels * CHANNELS)
        row = tile_table.match_row(
            task, arch, arithmetic, *whole, offset_groups=offset_groups, positions=positions * PIXELS
        )
        if row is None:
            return None
        # weights are put into the order of blocks, of which these few channels have to be at least one
        return replace(row, tile=replace(row.tile, block_c=min(row.tile.block_c, channels), lanes=4))

    patches: list[tuple[Any, str, Any]] = [
        (Tensor, "is_cuda", True),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "current_stream", lambda device=None: None),
        (nms.nms_cpu, "batched_nms", nms_kernels.batched_nms),
        (functional, "choose_backend", lambda name, input: "triton"),
        (tile_table, "architecture", lru_cache(lambda device: ARCHITECTURE)),
        (tile_table, "_search_once", search),
        (workspace, "WORKSPACE_BYTES", workspace.WORKSPACE_BYTES // (PIXELS * CHANNELS)),
        (workspace, "KEPT_SAMPLE_BYTES", workspace.KEPT_SAMPLE_BYTES // PIXELS),
        (optimizer, "_get_foreach_kernels_supported_devices", lambda: ["cpu"]),
        (resnet, "_check_sizes", lambda dcn_stages, base_channels: None),
        (triton.JITFunction, "_do_compile", compile_nothing),
        (InterpretedFunction, "run", run_nothing),
        (log_module, "TrainingProgress", lambda total, first, enabled: TrainingProgress(total, first, enabled=False)),
        # what the kernels would have written is not there, so the losses may be anything
        (LossBuffer, "read", lambda buffer: torch.zeros(len(buffer.steps), len(buffer.names), dtype=torch.float64)),
    ]
    active = driver._active
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(product_settings(precision))
        library = torch.library.Library("aten", "IMPL")
        stack.callback(library._destroy)
        library.impl("convolution", _convolution, "CPU")
        library.impl("convolution_backward", _convolution_backward, "CPU")
        driver.set_active(_Driver())
        try:
            yield
        finally:
            driver._active = active


def make_batch() -> LoadedBatch:
    """Return a batch of two images with `BOXES` ground truths."""
    generator = torch.Generator().manual_seed(0)
    count = len(BOXES)
    images = torch.randint(256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    targets = []
    for number in BOXES:
        corner = torch.rand(number, 2, generator=generator) * SIDE / 2
        size = torch.rand(number, 2, generator=generator) * SIDE / 2
        labels = torch.randint(80, (number,), generator=generator)
        targets.append(Target(torch.cat([corner, corner + size], 1), labels))
    batch = Batch(images, torch.full((count, 2), SIDE), StackedTargets.of(targets), torch.arange(count))
    return LoadedBatch(batch, list(range(count)), [(1.0, 1.0)] * count, [(SIDE, SIDE)] * count, {})


def make_config(ema: bool) -> Config:
    """Return the recipe with a 16th of the channels."""
    config = PRESETS["coco-1x"]
    model = replace(
        config.model,
        base_channels=64 // CHANNELS,
        fpn_channels=config.model.fpn_channels // CHANNELS,
        fc_channels=config.model.fc_channels // CHANNELS,
        rpn_pre_nms_top_n=(3, 3),  # all of the last levels, as most of them there: no level is padded
    )
    return replace(config, model=model, optim=replace(config.optim, ema=0.999 if ema else 0.0))


class _NoReplays:
    """A recorder of graphs whose replays do nothing."""

    def run(self, function: Callable[[], Any]) -> Any:
        return function()

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        return function(), lambda: None


class HostStep:
    """The training loop of the recipe on a pretended GPU, with its stages.

    Args:
        folder: of the run.
        ema: whether a moving average of the weights is kept.
        precision: see `detector.precision`.
        graph: whether the steps come from CUDA graphs.
    """

    def __init__(
        self, folder: Path, *, ema: bool = False, precision: PrecisionName = "tf32", graph: bool = False
    ) -> None:
        self.stages = Stages()
        self._precision = precision
        self._config = replace(make_config(ema), graph=graph)
        self._world = World(0, 1, 0, torch.device("cpu"))
        self._loaded = make_batch()
        self._run_folder = RunFolder(folder)
        self._log: TrainLog | None = None
        with as_on_a_gpu(self.stages, precision):
            self._state, self._network = build(self._config, self._world)
        self._graphs = self._make_graphs() if graph else None

    def run(self, steps: int, watch: AbstractContextManager[Any] = NO_CONTEXT) -> list[dict[str, float]]:
        """Begin an epoch, make a step, then some more under watch; return the seconds of these by stage."""
        state = self._state
        state.batch = 0
        schedule = Schedule(self._config.optim, 16, self._config.epochs)
        options = {"batches_per_epoch": 2 * steps + 2, "precision": self._precision, "graphs": self._graphs}
        seconds = []
        with ExitStack() as stack:
            stack.enter_context(as_on_a_gpu(self.stages, self._precision))
            interval = self._config.log_every
            numbers = {"interval": interval, "total_steps": steps + 1, "first_step": 0, "num_images": 1000}
            log = TrainLog(self._run_folder, self._world, **numbers)
            stack.callback(log.close)
            for owner, name, function in self._stage_functions(state, log):
                stack.enter_context(mock.patch.object(owner, name, function))
            batches = itertools.repeat(self._loaded)
            epoch = loop.train_one_epoch(state, self._network, batches, schedule, log, **options)
            stack.callback(epoch.close)
            next(epoch)
            with watch:
                for _ in range(steps):
                    self.stages.restart()
                    next(epoch)
                    self.stages.stop()
                    seconds.append(dict(self.stages.seconds))
        return seconds

    def _make_graphs(self) -> StepGraphs:
        return StepGraphs(
            self._state,
            Grid(SIDE, SIDE),
            _NoReplays(),
            self._world,
            clip_grad=0.0,
            autocast=partial(autocast, self._world.device, self._precision),
            tell=print,
        )

    def _stage_functions(self, state: TrainState, log: TrainLog) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        """Yield what to replace for the stages to be known: owner, name of the function, function."""
        owned: list[tuple[str, Any, str]] = [
            (stage, state.model.get_submodule(path), method)
            for stage, methods in METHODS.items()
            for path, method in methods
        ]
        owned += [
            ("anchors, targets", faster_rcnn, "pad_targets"),
            ("backward", Tensor, "backward"),
            ("optimizer", loop, "apply_gradients"),
            ("logging", log, "add_batch"),
            ("logging", log, "end_step"),
            (READING, log, "flush"),
        ]
        if state.average is not None:
            owned.append(("average", state.average, "take_in"))
        for stage, owner, name in owned:
            yield owner, name, self.stages.wrap(stage, getattr(owner, name))


def count(step: HostStep, steps: int) -> Counts:
    """Count one step, then time some; what is only done once is done before."""
    step.run(2)
    counts = Counts()
    _count_operators(step, counts)
    _count_calls(step, counts)
    counts.microseconds = _time(step, steps)
    return counts


def _time(step: HostStep, steps: int) -> dict[str, float]:
    """Return microseconds of one step by stage: a low quantile, since other programs on the machine only add to it."""
    times: dict[str, list[float]] = {}
    for seconds in step.run(steps):
        for stage, spent in seconds.items():
            times.setdefault(stage, []).append(1e6 * spent)
    reading = sum(times.pop(READING, [0.0])) / steps
    return {**{stage: statistics.quantiles(values, n=10)[0] for stage, values in times.items()}, READING: reading}


def _count_operators(step: HostStep, counts: Counts) -> None:
    """Count kernels, waits and Triton launches of one step."""
    step.stages.marked = True
    profiler = profile(activities=[ProfilerActivity.CPU], acc_events=True)
    step.run(1, profiler)
    step.stages.marked = False
    counts.triton = Counter(step.stages.launched)
    for event in profiler.events():
        if event.name in READS:
            counts.waits[_stage_of(event)] += 1
        if _computes(event):
            counts.kernels[_stage_of(event)] += 1


def _count_calls(step: HostStep, counts: Counts) -> None:
    """Count the Python calls of one step, those that replace a launch or mark a stage included."""

    def note(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            counts.calls[step.stages.current] += 1

    @contextmanager
    def watch() -> Iterator[None]:
        sys.setprofile(note)
        try:
            yield
        finally:
            sys.setprofile(None)

    step.run(1, watch())


def _stage_of(event: FunctionEvent) -> str:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith(STAGE_MARK):
            return parent.name.removeprefix(STAGE_MARK)
        parent = parent.cpu_parent
    return REST


def _computes(event: FunctionEvent) -> bool:
    """Tell whether an event is an operator of PyTorch that launches something on a GPU."""
    if not event.name.startswith("aten::") or _is_free(event.name):
        return False
    if event.name.startswith(WHOLE):
        return True
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith(WHOLE):
            return False
        parent = parent.cpu_parent
    return not any(child.name.startswith("aten::") and not _is_free(child.name) for child in event.cpu_children)


@cache
def _is_free(name: str) -> bool:
    """Tell whether an operator makes a view or allocates, or only calls others and so does nothing by itself."""
    name = name.removeprefix("aten::")
    if "empty" in name or name in NO_LAUNCH:
        return True
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    is_composite = []
    for overload in packet.overloads():
        operator = getattr(packet, overload)
        aliases = [result.alias_info for result in operator._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return True
        if torch._C._dispatch_has_kernel(operator.name()) and "Dimname" not in str(operator._schema):
            is_composite.append(
                torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd")
            )
    return all(is_composite)


def table(counts: Counts) -> str:
    """Return the counts by stage as a markdown table, with their sums."""
    lines = []
    for stage in (*METHODS, "backward", "optimizer", "average", "logging", READING, REST):
        if stage in counts.microseconds:
            lines.append(
                [
                    stage,
                    str(counts.kernels[stage]),
                    str(counts.triton[stage]),
                    str(counts.waits[stage]),
                    str(counts.calls[stage]),
                    f"{counts.microseconds[stage]:.0f}",
                ]
            )
    sums = [counts.kernels.total(), counts.triton.total(), counts.waits.total(), counts.calls.total()]
    lines.append(["whole step", *map(str, sums), f"{sum(counts.microseconds.values()):.0f}"])
    return markdown_table(["stage", "kernels", "triton", "waits", "calls", "us"], lines)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, count, print the table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.host_step", description=__doc__.splitlines()[0])
    parser.add_argument("--ema", action="store_true", help="with a moving average of the weights")
    parser.add_argument("--graph", action="store_true", help="with the steps from CUDA graphs")
    parser.add_argument("--precision", choices=("float32", "tf32", "bf16"), default="tf32", help="of the products")
    parser.add_argument("--steps", type=positive, default=100, help="steps to time")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error(f"argument --steps: expected at least 2, got {options.steps}")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder:
        step = HostStep(Path(folder), ema=options.ema, precision=options.precision, graph=options.graph)
        print(table(count(step, options.steps)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
