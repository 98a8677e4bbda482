"""Compile, on a pretended GPU, every kernel that the benchmarks, the smoke run and the tests of a GPU launch.

    TRITON_CACHE_DIR=FOLDER python -m bench.gpu_kit.inventory [--dry-run] [--share 0 2] [--used FILE]

What to launch is read from the plan of `bench.gpu`, the layers of `bench.gpu_kit.smoke` and the cases of the tests, and
the project's own launchers choose kernels and tiles: a new kernel or row of the tile table comes in by itself. The exit
status is 1 where a call fails, or where nothing launches a kernel of the tile table; with --share, that is only said.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.utils import deterministic as deterministic_memory

from bench import atomics, ceilings, gpu
from bench.cases import Case, Inputs, select_cases
from bench.device import DTYPES
from bench.gpu_kit.pretended_gpu import ARCHITECTURE, Record, pretended_gpu
from bench.gpu_kit.smoke import LAYERS, LIMITS, cache_key, deterministic
from bench.measure import first_line
from bench.triton_calls import GRADIENTS, run_backward, run_forward
from detector import FasterRCNNConfig
from detector.ops.kernels import nms
from triton_dcn import tile_table, triton_backend
from triton_dcn.offset_mask import OffsetMask, OffsetMaskGrad
from triton_dcn.roi_pool.geometry import RoIPoolGeometry
from triton_dcn.roi_pool.kernels import launchers as roi_pool
from triton_dcn.tf32 import allow_tf32

OPERATOR_BENCHMARKS = ("deform_conv", "kernel_times", "accuracy")
"""Modules of the plan that call the operator for cases and dtypes of their command line."""
PYRAMID = ((200, 336), (100, 168), (50, 84), (25, 42))
"""Levels P2 to P5 of an image of 800 x 1333."""


@dataclass(frozen=True)
class Item:
    """Calls whose kernels to compile.

    Attributes:
        name: for the list.
        dtype: of `DTYPES`.
        run: makes the calls on the pretended GPU.
    """

    name: str
    dtype: str
    run: Callable[[], object]


def items(device: torch.device) -> Iterator[Item]:
    """Yield everything to compile, the most valuable first."""
    for layer in LAYERS:
        for dtype in LIMITS:
            run = partial(run_operator, layer.case, dtype, device, layer.gradients, sorts=layer.deterministic)
            yield Item(f"smoke: {layer.case.name}", dtype, run)
    yield from _detector_operators(device)
    for case, dtype in planned_calls():
        yield Item(f"{case.name} {case.shape}", dtype, partial(run_operator, case, dtype, device))
    yield from _detector_layers(device)
    yield from _tests(device)
    yield from _scatter_methods(device)


def planned_calls() -> list[tuple[Case, str]]:
    """Return the cases and dtypes that the plan of `bench.gpu` has, and each case with the one image of its check."""
    calls: dict[tuple[Case, str], None] = {}
    for benchmark in gpu.PLAN:
        if benchmark.module not in OPERATOR_BENCHMARKS:
            continue
        options = importlib.import_module(f"bench.{benchmark.module}").parse(list(benchmark.arguments))
        batch_size = getattr(options, "batch_size", None)
        offset_groups = getattr(options, "deform_groups", None)
        for case in select_cases(options.cases, batch_size, offset_groups):
            for dtype in options.dtypes:
                calls[case, dtype] = None
                calls[replace(case, batch=1), dtype] = None
    return list(calls)


def run_operator(
    case: Case,
    dtype: str,
    device: torch.device,
    gradients: tuple[str, ...] = GRADIENTS,
    *,
    sorts: bool = False,
) -> None:
    """Run forward and backward of a case, with bins filled by a stable sort or not."""
    inputs = empty_inputs(case, dtype, device)
    with deterministic(sorts):
        run_forward(inputs)
        run_backward(inputs, gradients)


def empty_inputs(case: Case, dtype: str, device: torch.device) -> Inputs:
    """Return the tensors of a call, without values."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPES[dtype], device=device)

    planes = case.offset_groups * case.taps
    return Inputs(
        case,
        input=empty(case.batch, case.channels, case.height, case.width),
        offset=empty(case.batch, 2 * planes, *case.out_size),
        mask=empty(case.batch, planes, *case.out_size),
        weight=empty(case.out_channels, case.channels // case.groups, *case.kernel),
        grad_output=empty(case.batch, case.out_channels, *case.out_size),
    )


def _run_layer(case: Case, dtype: str, device: torch.device, has_bias: bool, relu: bool) -> None:
    """Run a layer of the detector, which predicts offsets and mask logits as one map; fused ones have bias and relu."""
    inputs = empty_inputs(case, dtype, device)
    offset = torch.cat([inputs.offset, inputs.mask], 1)
    offset_mask = OffsetMask.of(offset, None, True)
    bias = torch.empty(case.out_channels, dtype=inputs.weight.dtype, device=device) if has_bias else None
    triton_backend.forward(inputs.geometry, inputs.input, offset_mask, inputs.weight, bias, relu=relu)
    triton_backend.backward(
        inputs.geometry,
        inputs.grad_output,
        inputs.input,
        offset_mask,
        inputs.weight,
        OffsetMaskGrad.of(torch.empty_like(offset), None, True),
        needs_input=True,
        needs_weight=True,
    )


def _detector_layers(device: torch.device) -> Iterator[Item]:
    """Yield the deformable layers of R50 at 800 x 1333, for training and for detection."""
    for case in select_cases(["r50", "r50-down"]):
        for dtype in ("bfloat16", "tf32", "float32"):
            yield Item(f"layer {case.name}", dtype, partial(_run_layer, case, dtype, device, False, False))
            one_image = replace(case, batch=1)
            yield Item(f"fused layer {case.name}", dtype, partial(_run_layer, one_image, dtype, device, True, True))


def _detector_operators(device: torch.device) -> Iterator[Item]:
    """Yield NMS, RoIAlign and deformable RoI pooling of the default configuration."""
    config = FasterRCNNConfig()
    for groups, size, threshold in ((10, 2000, config.rpn_nms_iou), (80, 1000, config.nms_iou)):
        yield Item(f"nms {threshold}", "float32", partial(_run_nms, groups, size, threshold, device))
    for dtype in ("bfloat16", "float32", "float16"):
        for bins in (7, 14):
            yield Item(f"RoIAlign {bins}x{bins}", dtype, partial(_run_roi_pool, dtype, bins, False, device))
        yield Item("deformable RoI pooling", dtype, partial(_run_roi_pool, dtype, 7, True, device))


def _run_nms(groups: int, size: int, threshold: float, device: torch.device) -> None:
    boxes = torch.empty(groups, size, 4, device=device)
    scores = torch.empty(groups, size, device=device)
    valid = torch.empty(groups, size, dtype=torch.bool, device=device)
    nms.batched_nms(boxes, scores, valid, threshold)


def _run_roi_pool(dtype: str, bins: int, deformed: bool, device: torch.device) -> None:
    heights, widths = zip(*PYRAMID, strict=True)
    scales = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
    geometry = RoIPoolGeometry(2, heights, widths, scales, (bins, bins), sampling_ratio=0)
    features = [torch.empty(2, 256, *size, dtype=DTYPES[dtype], device=device) for size in PYRAMID]
    rois = torch.empty(64, 5, device=device)
    levels = torch.empty(64, dtype=torch.int64, device=device)
    offset = torch.empty(64, 2, bins, bins, dtype=DTYPES[dtype], device=device) if deformed else None
    grad = torch.empty(64, 256, bins, bins, dtype=DTYPES[dtype], device=device)
    _, cells = roi_pool.forward(geometry, features, rois, levels, offset, keep_cells=deformed)
    roi_pool.backward(geometry, grad, cells, rois, levels, offset, needs_features=True, needs_offset=deformed)


def _tests(device: torch.device) -> Iterator[Item]:
    """Yield the layers of the tests that need a GPU."""
    from tests.triton_dcn.test_gpu import SPECS  # not at the top: it needs pytest

    for case in SPECS.values():
        for dtype in ("float32", "float16", "bfloat16"):
            for sorts in (False, True):
                name = f"test: {case.name}{', stable sort' if sorts else ''}"
                yield Item(name, dtype, partial(_run_test, case, dtype, device, sorts))


def _run_test(case: Case, dtype: str, device: torch.device, sorts: bool) -> None:
    with deterministic(sorts):
        inputs = empty_inputs(case, dtype, device)
        bias = torch.empty(case.out_channels, dtype=inputs.weight.dtype, device=device)
        offset_mask = OffsetMask(inputs.offset, inputs.mask)
        triton_backend.forward(inputs.geometry, inputs.input, offset_mask, inputs.weight, bias)
        run_backward(inputs, GRADIENTS)


def _scatter_methods(device: torch.device) -> Iterator[Item]:
    """Yield the kernels of `bench.atomics` and of the ceilings that it measures."""
    for name, (call, _) in ceilings.ceiling_calls(device, nbytes=1 << 26, rows=1 << 14).items():
        yield Item(name, "float32", call)
    options = next(atomics.parse(list(entry.arguments)) for entry in gpu.PLAN if entry.module == "atomics")
    for case in select_cases(options.cases, options.batch_size):
        for dtype in options.dtypes:
            for mode in atomics.GRADIENTS_OF_MODE:
                yield Item(f"atomics {case.name} {mode}", dtype, partial(_run_scatter, case, dtype, mode, device))


def _run_scatter(case: Case, dtype: str, mode: str, device: torch.device) -> None:
    for call in atomics.scatter_methods(empty_inputs(case, dtype, device), mode).values():
        call()


def run_items(record: Record, share: tuple[int, int]) -> list[str]:
    """Run every item of the share, print what each compiled, and return the names of those that failed."""
    index, shares = share
    failed = []
    for number, item in enumerate(items(record.device)):
        if number % shares != index:
            continue
        before = len(record.compilations)
        try:
            with allow_tf32(item.dtype == "tf32"):
                item.run()
        except Exception as error:  # the other kernels are worth having
            traceback.print_exc(limit=6)
            print(f"FAILED {item.name} {item.dtype}: {first_line(error)}", flush=True)
            failed.append(f"{item.name} {item.dtype}")
        new = [compilation for compilation in record.compilations[before:] if not compilation.cached]
        if new:
            kernels = ", ".join(f"{compilation.kernel} {compilation.seconds:.1f}" for compilation in new)
            print(f"{item.name:40s} {item.dtype:9s} {kernels}", flush=True)
    return failed


def unlaunched_kernels(record: Record) -> list[str]:
    """Return the kernels of the tile table for this architecture that nothing launched."""
    kernels = {f"{row.kernel}_kernel" for row in tile_table.TABLE if ARCHITECTURE in row.archs}
    if "bins_kernel" in kernels:  # its row has the name of the task
        kernels = kernels - {"bins_kernel"} | {"bin_kernel"}
    return sorted(kernels - set(record.launches))


def main(arguments: list[str] | None = None) -> int:
    """Compile, or with --dry-run only go through the launches; print a summary and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_kit.inventory", description=__doc__.splitlines()[0])
    parser.add_argument("--share", nargs=2, type=int, default=(0, 1), metavar=("INDEX", "SHARES"), help="of the items")
    parser.add_argument("--used", type=Path, help="write here which folders of the cache were used, one a line")
    parser.add_argument("--dry-run", action="store_true", help="compile nothing; any version of Triton does")
    options = parser.parse_args(arguments)
    deterministic_memory.fill_uninitialized_memory = False
    start = time.monotonic()
    with pretended_gpu(compiling=not options.dry_run) as record:
        failed = run_items(record, tuple(options.share))

    if options.used:
        options.used.write_text("\n".join(sorted(record.cache_keys)))
    compiled = [compilation for compilation in record.compilations if not compilation.cached]
    seconds = time.monotonic() - start
    variants = len(record.compilations)
    print(f"{len(record.launches)} launches of {variants} variants, {len(compiled)} compilations, {seconds:.0f} s")
    if not options.dry_run:
        print(f"key of the cache: {cache_key()}")
    unlaunched = unlaunched_kernels(record)
    if unlaunched:
        print(f"not launched: {', '.join(unlaunched)}")
    _, shares = options.share
    return int(bool(failed or (unlaunched and shares == 1)))


if __name__ == "__main__":
    sys.exit(main())
