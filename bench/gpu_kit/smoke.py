"""Every kernel once in every dtype against float64, one line each: `python -m bench.gpu_kit.smoke`.

It is the first thing to run on a GPU and takes well under a minute. `--dry-run` makes the same calls with tiny sizes in
Triton's interpreter (TRITON_INTERPRET=1); `--few-pixels` runs the same kernels on small images, for compute-sanitizer.
The exit status is 0 where all is right, 1 where something is wrong and 2 where nothing is right.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from bench.cases import Case, make_inputs
from bench.device import DTYPES, gpu_or_dry_run
from bench.gpu_kit.pretended_gpu import COMPILING_TRITON
from bench.measure import first_line, reference_results, relative_errors
from bench.triton_calls import GRADIENTS, run_backward, run_forward, select_gradients
from detector.graph import CudaRecorder
from detector.ops import nms_cpu
from detector.ops.kernels import nms
from detector.ops.roi_align import roi_levels
from triton_dcn import deform_conv2d
from triton_dcn.roi_pool import torch_backend as roi_pool_torch
from triton_dcn.roi_pool.geometry import RoIPoolGeometry
from triton_dcn.roi_pool.kernels import launchers as roi_pool_triton
from triton_dcn.tf32 import allow_tf32

LIMITS = {"bfloat16": 1.6e-2, "float16": 2e-3, "tf32": 4e-3, "float32": 2e-5}
"""Largest relative l2 error to float64, by dtype, the most used first."""
ROI_LIMITS = {"bfloat16": 8e-3, "float16": 8e-3, "float32": 1e-5}
FEW_ROWS = 4
TINY_SIZE = (4, 6)
TINY_CHANNELS = 32
TINY_KERNEL = 2
NOTHING_RIGHT = 2
"""Exit status: there is no use in measuring anything."""


@dataclass(frozen=True)
class Layer:
    """A call of the operator.

    Attributes:
        case: its sizes.
        gradients: to compute, of `GRADIENTS`.
        deterministic: whether bins are filled by a stable sort.
    """

    case: Case
    gradients: tuple[str, ...] = GRADIENTS
    deterministic: bool = False

    def few_pixels(self) -> Layer:
        """Return the layer for a short image; the compiled kernels are the same, as its width decides about them."""
        return replace(self, case=replace(self.case, batch=1, height=FEW_ROWS))

    def tiny(self) -> Layer:
        """Return the layer with few pixels, taps, groups and channels of a group."""
        case = self.case
        groups = min(case.groups, 2)
        offset_groups = min(case.offset_groups, 2)
        divisor = max(groups, offset_groups)
        channels = divisor * min(case.channels // max(case.groups, case.offset_groups), TINY_CHANNELS)
        out_channels = divisor * min(case.out_channels // max(case.groups, case.offset_groups), TINY_CHANNELS)
        kernel = min(case.kernel[0], TINY_KERNEL)
        tiny_case = replace(
            case,
            batch=1,
            channels=channels,
            out_channels=out_channels,
            height=TINY_SIZE[0],
            width=TINY_SIZE[1],
            kernel=(kernel, kernel),
            padding=(0, 0),
            groups=groups,
            offset_groups=offset_groups,
        )
        return replace(self, case=tiny_case)


LAYERS = (
    Layer(Case("C 128", 2, 128, 128, 26, 70)),
    Layer(Case("C 256", 2, 256, 256, 26, 70)),
    Layer(Case("C 512", 2, 512, 512, 26, 70)),
    Layer(Case("C 64", 2, 64, 64, 26, 70)),
    Layer(Case("four offset groups", 2, 128, 128, 26, 70, offset_groups=4)),
    Layer(Case("C 64, D 8", 2, 64, 64, 26, 70, offset_groups=8)),
    Layer(Case("C 128, O 64, D 16", 2, 128, 64, 26, 70, offset_groups=16)),
    Layer(Case("C 120, D 12", 2, 120, 120, 26, 70, offset_groups=12)),
    Layer(Case("C 96, G 96, D 96", 2, 96, 96, 26, 70, groups=96, offset_groups=96)),
    Layer(Case("C 20, O 36, G 2", 2, 20, 36, 26, 70, groups=2)),
    Layer(Case("7x7, O 256", 1, 64, 256, 26, 70, kernel=(7, 7), padding=(3, 3))),
    Layer(Case("1x1, stride 2", 2, 64, 16, 26, 70, kernel=(1, 1), stride=(2, 2), padding=(0, 0))),
    Layer(Case("no gradient of the input", 2, 128, 128, 26, 70), ("grad_offset", "grad_mask", "grad_weight")),
    Layer(Case("stable sort", 2, 128, 128, 26, 70), deterministic=True),
)


def tiny_layers() -> list[Layer]:
    """Return the layers in tiny sizes, without those that have become like another."""
    layers: dict[Layer, Layer] = {}
    for layer in LAYERS:
        tiny = layer.tiny()
        without_name = replace(tiny, case=replace(tiny.case, name=""))
        layers.setdefault(without_name, tiny)
    return list(layers.values())


class Smoke:
    """Prints a line for each check and counts those that are right."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.right = 0
        self.wrong: list[str] = []

    def check(self, what: str, measure: Callable[[], Sequence[float]], limit: float) -> None:
        """Compare the largest of the measured errors with a limit; an exception is wrong, too."""
        try:
            errors = measure()
            right = all(error < limit for error in errors)  # not so for NaN
            text = " ".join(f"{error:.1e}" for error in errors)
        except Exception as error:  # the other checks are worth having
            right = False
            text = f"{type(error).__name__}: {first_line(error)}"
            traceback.print_exc(limit=4)
        if right:
            self.right += 1
        else:
            self.wrong.append(what)
        seconds = time.monotonic() - self._start
        print(f"{seconds:6.1f} s  {'ok  ' if right else 'FAIL'}  {what:44s} {text}", flush=True)

    def status(self) -> int:
        """Print the result and return the exit status."""
        if not self.wrong:
            print("smoke: all right", flush=True)
            return 0
        print(f"smoke: {len(self.wrong)} wrong: {', '.join(self.wrong)}", flush=True)
        return 1 if self.right else NOTHING_RIGHT


def layer_errors(layer: Layer, dtype: str, device: torch.device) -> list[float]:
    """Return the errors of the output and of the gradients of a layer."""
    inputs = make_inputs(layer.case, DTYPES[dtype], device, 2.0, seed=1)
    with allow_tf32(dtype == "tf32"), deterministic(layer.deterministic):
        results = [run_forward(inputs), *run_backward(inputs, layer.gradients)]
    with allow_tf32(False):
        expected = reference_results(inputs)
    return relative_errors(results, [expected[0], *select_gradients(expected, layer.gradients)])


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Ask for deterministic algorithms, if wanted."""
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def nms_errors(groups: int, size: int, device: torch.device) -> list[float]:
    """Return the share of boxes about which the kernels decide otherwise than the CPU."""
    corner = torch.rand(groups, size, 2) * 300
    boxes = torch.cat([corner, corner + torch.rand(groups, size, 2) * 80], -1)
    scores = torch.rand(groups, size)
    valid = torch.rand(groups, size) > 0.1
    expected = nms_cpu.batched_nms(boxes, scores, valid, 0.5)
    kept = nms.batched_nms(boxes.to(device), scores.to(device), valid.to(device), 0.5)
    return [(kept.cpu() != expected).double().mean().item()]


def roi_pool_errors(dtype: str, deformed: bool, tiny: bool, device: torch.device) -> list[float]:
    """Return the errors of the pooled features and of the gradients to the CPU's in float64, with an offset or not."""
    if tiny:
        sizes: tuple[tuple[int, int], ...] = ((6, 9), (3, 5))
        channels, count, bins = 16, 2, 2
    else:
        sizes = ((64, 72), (32, 36), (16, 18), (8, 9))
        channels, count, bins = 256, 100, 7
    heights, widths = zip(*sizes, strict=True)
    scales = tuple(0.25 / 2**level for level in range(len(sizes)))
    geometry = RoIPoolGeometry(2, heights, widths, scales, (bins, bins), sampling_ratio=0)
    features = [torch.randn(2, channels, *size).to(DTYPES[dtype]) for size in sizes]
    image_size = 4 * torch.tensor([widths[0], heights[0]])
    corner = torch.rand(count, 2) * image_size * 0.7
    boxes = torch.cat([corner, corner + torch.rand(count, 2) * image_size * 0.4], 1)
    rois = torch.cat([torch.randint(2, (count, 1)).float(), boxes], 1)
    levels = roi_levels(boxes, len(sizes), finest_scale=image_size.min().item() / 8)
    grad = torch.randn(count, channels, bins, bins).to(DTYPES[dtype])

    offset = torch.randn(count, 2, bins, bins).to(DTYPES[dtype]) if deformed else None

    def run(module: ModuleType, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        maps = [feature.to(device, dtype) for feature in features]
        places = (rois.to(device), levels.to(device), None if offset is None else offset.to(device))
        pooled, cells = module.forward(geometry, maps, *places, keep_cells=deformed)
        gradients = module.backward(
            geometry, grad.to(device, dtype), cells, *places, needs_features=True, needs_offset=deformed
        )
        return [tensor.cpu() for tensor in (pooled, *gradients) if tensor is not None]

    results = run(roi_pool_triton, device, DTYPES[dtype])
    return relative_errors(results, run(roi_pool_torch, torch.device("cpu"), torch.float64))


def graph_errors(device: torch.device) -> list[float]:
    """Return the errors of a replayed graph of forward and backward to the calls that it was captured from."""
    inputs = make_inputs(Case("graph", 2, 128, 128, 24, 70), torch.bfloat16, device, 2.0, channels_last=True)

    def step() -> list[Tensor]:
        output = deform_conv2d(inputs.input, inputs.offset, inputs.weight, padding=1, mask=inputs.mask)
        return [output, *torch.autograd.grad(output, inputs.leaves, inputs.grad_output)]

    expected = [result.detach().double() for result in step()]
    recorder = CudaRecorder(device)
    recorder.run(step)
    results, _ = recorder.record(step)
    torch.cuda.synchronize()
    return relative_errors([result.detach() for result in results], expected)


def imported_kernels() -> Iterator[JITFunction]:
    """Yield every kernel of this project that is imported, in the order of their names."""
    kernels: dict[str, JITFunction] = {}
    for name, module in list(sys.modules.items()):
        if name.startswith(("triton_dcn.kernels.", "triton_dcn.roi_pool.kernels.", "detector.ops.kernels.")):
            for value in vars(module).values():
                if isinstance(value, JITFunction) and value.fn.__name__.endswith("_kernel"):
                    kernels[value.fn.__name__] = value
    for _, kernel in sorted(kernels.items()):
        yield kernel


def print_kernels() -> None:
    """Print how often each kernel was compiled, its registers and spills, and which kernels did not run."""
    for kernel in imported_kernels():
        compiled = [variant for device in kernel.device_caches.values() for variant in device[0].values()]
        loaded = [variant for variant in compiled if variant.module is not None]  # the others have no numbers
        if not loaded:
            print(f"   {kernel.fn.__name__}: did not run")
            continue
        registers = max(variant.n_regs for variant in loaded)
        spills = max(variant.n_spills for variant in loaded)
        print(
            f"   {kernel.fn.__name__}: {len(loaded)} of {len(compiled)} variants ran, "
            f"at most {registers} registers and {spills} spills"
        )


def cache_key() -> str:
    """Return a short form of what Triton's version adds to every key of its cache; `make gpu-kit` prints it, too."""
    from triton.runtime.cache import triton_key  # not at the top: other versions have it elsewhere

    return hashlib.sha256(triton_key().encode()).hexdigest()[:16]


def _print_machine() -> None:
    properties = torch.cuda.get_device_properties(0)
    print(
        f"torch {torch.__version__}, triton {triton.__version__}, {properties.name}, "
        f"{properties.multi_processor_count} multiprocessors, {properties.total_memory >> 20} MiB, "
        f"L2 {properties.L2_cache_size >> 20} MiB"
    )
    if triton.__version__.startswith(COMPILING_TRITON):
        print(f"key of the cache: {cache_key()}")


def main(arguments: list[str] | None = None) -> int:
    """Check everything; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_kit.smoke", description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--few-pixels", action="store_true", help="small images, for compute-sanitizer")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, kernels interpreted")
    options = parser.parse_args(arguments)
    device = gpu_or_dry_run(options.dry_run)
    on_gpu = device.type == "cuda"
    tiny = options.few_pixels or options.dry_run
    layers: Sequence[Layer] = LAYERS
    if options.dry_run:
        layers = tiny_layers()
    elif options.few_pixels:
        layers = [layer.few_pixels() for layer in LAYERS]

    smoke = Smoke()
    torch.manual_seed(0)
    if on_gpu:
        _print_machine()
    for dtype in options.dtypes:
        if dtype == "tf32" and not on_gpu:
            continue
        for layer in layers:
            errors = partial(layer_errors, layer, dtype, device)
            smoke.check(f"{dtype} {layer.case.name}", errors, LIMITS[dtype])
    smoke.check("nms", partial(nms_errors, 2 if tiny else 4, 80 if tiny else 700, device), 1e-9)
    for dtype, limit in ROI_LIMITS.items():
        if dtype in options.dtypes:
            for name, deformed in (("RoIAlign", False), ("deformable RoI pooling", True)):
                errors = partial(roi_pool_errors, dtype, deformed, options.dry_run, device)
                smoke.check(f"{dtype} {name}", errors, limit)
    if on_gpu and not options.few_pixels:  # compute-sanitizer runs without the caching allocator, which a graph needs
        smoke.check("graph of forward and backward", partial(graph_errors, device), 1e-2)
    if on_gpu:
        print_kernels()
    return smoke.status()


if __name__ == "__main__":
    sys.exit(main())
