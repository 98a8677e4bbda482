"""Time RoI pooling side by side: RoIAlign, deformable, and that of others: `python -m bench.roi_pool --csv FILE`.

One map of 256 channels, as level P2 of an image of 800 x 1216, and regions of usual sizes. torchvision's RoIAlign and
mmcv's two operators are measured where they can be imported; mmcv has deformable pooling for GPUs only. Every provider
is first compared with float64, then all are timed in turns; the ratios are those of the medians to our RoIAlign.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.arguments import not_negative, positive, usable_device
from bench.device import DTYPES
from bench.measure import TOLERANCE, first_line, largest_error, record_failure, relative_errors, time_interleaved
from bench.providers import INSTALL
from bench.rows import ResultRow, environment_columns, timing_row, write_csv
from triton_dcn import deform_roi_pool

SCALE = 0.25
BINS = 7
COMPARED_ROIS = 20
ROI_ALIGN = "roi_align"
"""Our RoIAlign, to which the ratios are."""
MODES = ("fwd", "both")


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call.

    Attributes:
        features: (B, C, H, W).
        rois: (R, 5).
        offset: (R, 2, S, S).
        grad: (R, C, S, S), gradient of the output.
    """

    features: Tensor
    rois: Tensor
    offset: Tensor
    grad: Tensor

    def to(self, dtype: torch.dtype, rois: int) -> Inputs:
        """Return the first rois alone, in another dtype."""
        parts = (self.features, self.rois[:rois], self.offset[:rois], self.grad[:rois])
        features, first_rois, offset, grad = (part.detach().to(dtype) for part in parts)
        return Inputs(features.requires_grad_(), first_rois, offset.requires_grad_(), grad)


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Attributes:
        call: returns the pooled features.
        deformable: whether it takes the offset.
    """

    call: Callable[[Inputs, int], Tensor]
    deformable: bool

    def run(self, inputs: Inputs, ratio: int, mode: str) -> list[Tensor]:
        """Pool, with mode "both" also backwards, and return the results."""
        if mode == "fwd":
            with torch.no_grad():
                return [self.call(inputs, ratio)]
        output = self.call(inputs, ratio)
        leaves = [inputs.features, inputs.offset] if self.deformable else [inputs.features]
        return [output.detach(), *torch.autograd.grad(output, leaves, inputs.grad)]


def make_inputs(channels: int, size: tuple[int, int], rois: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return two images of features, boxes of about 50 pixels that are clipped to the image, and offsets of N(0, 1)."""
    generator = torch.Generator().manual_seed(0)
    image = torch.tensor([size[1], size[0]]) / SCALE
    center = torch.rand(rois, 2, generator=generator) * image
    half = torch.exp(torch.randn(rois, 2, generator=generator) * 0.7 + 3.3)
    boxes = torch.cat([(center - half).clamp(min=0), (center + half).minimum(image)], 1)
    batch_index = torch.randint(2, (rois, 1), generator=generator)
    features = torch.randn(2, channels, *size, generator=generator)
    offset = torch.randn(rois, 2, BINS, BINS, generator=generator)
    grad = torch.randn(rois, channels, BINS, BINS, generator=generator)
    return Inputs(
        features.to(device, dtype).requires_grad_(),
        torch.cat([batch_index, boxes], 1).to(device),
        offset.to(device, dtype).requires_grad_(),
        grad.to(device, dtype),
    )


def load_providers() -> dict[str, Provider]:
    """Return ours, and those of others that can be imported; say which cannot."""

    def aligned(inputs: Inputs, ratio: int) -> Tensor:
        return deform_roi_pool(
            inputs.features, inputs.rois, None, output_size=BINS, spatial_scale=SCALE, sampling_ratio=ratio
        )

    def deformed(inputs: Inputs, ratio: int) -> Tensor:
        return deform_roi_pool(
            inputs.features, inputs.rois, inputs.offset, output_size=BINS, spatial_scale=SCALE, sampling_ratio=ratio
        )

    providers = {ROI_ALIGN: Provider(aligned, False), "deform_roi_pool": Provider(deformed, True)}
    for name, factory in (("torchvision", _torchvision), ("mmcv", _mmcv)):
        try:
            providers |= factory()
        except (ImportError, OSError, RuntimeError) as error:
            hint = f"; {INSTALL[name]}" if name in INSTALL else ""
            print(f"skipped {name}: {first_line(error)}{hint}", file=sys.stderr)
    return providers


def _torchvision() -> dict[str, Provider]:
    roi_align = importlib.import_module("torchvision.ops").roi_align

    def call(inputs: Inputs, ratio: int) -> Tensor:
        output: Tensor = roi_align(
            inputs.features, inputs.rois.to(inputs.features.dtype), BINS, SCALE, ratio or -1, aligned=True
        )
        return output

    return {"torchvision roi_align": Provider(call, False)}


def _mmcv() -> dict[str, Provider]:
    ops = importlib.import_module("mmcv.ops")

    def aligned(inputs: Inputs, ratio: int) -> Tensor:
        rois = inputs.rois.to(inputs.features.dtype)
        output: Tensor = ops.roi_align(inputs.features, rois, BINS, SCALE, ratio, "avg", True)
        return output

    def deformed(inputs: Inputs, ratio: int) -> Tensor:
        rois = inputs.rois.to(inputs.features.dtype)
        output: Tensor = ops.deform_roi_pool(inputs.features, rois, inputs.offset, BINS, SCALE, ratio, 0.1)
        return output

    return {"mmcv roi_align": Provider(aligned, False), "mmcv deform_roi_pool": Provider(deformed, True)}


def agrees(name: str, provider: Provider, inputs: Inputs, ratio: int, dtype: str) -> bool:
    """Compare a few rois with the reference in float64; say what does not agree or run."""
    few = inputs.to(inputs.features.dtype, COMPARED_ROIS)
    exact = few.to(torch.float64, COMPARED_ROIS)
    output = deform_roi_pool(
        exact.features,
        exact.rois,
        exact.offset if provider.deformable else None,
        output_size=BINS,
        spatial_scale=SCALE,
        sampling_ratio=ratio,
        backend="reference",
    )
    leaves = [exact.features, exact.offset] if provider.deformable else [exact.features]
    expected = [output.detach(), *torch.autograd.grad(output, leaves, exact.grad)]
    try:
        error = largest_error(relative_errors(provider.run(few, ratio, "both"), expected))
    except Exception as reason:  # mmcv has no deformable pooling on a CPU
        print(f"{name} cannot: {first_line(reason)}", file=sys.stderr)
        return False
    if not error < TOLERANCE[dtype]:
        print(f"{name} disagrees by {error:.1e} and is not timed", file=sys.stderr)
        return False
    return True


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.roi_pool", description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs=2, type=positive, default=(200, 304), metavar=("H", "W"), help="of the map")
    parser.add_argument("--channels", type=positive, default=256)
    parser.add_argument("--rois", type=positive, default=1000)
    parser.add_argument(
        "--sampling-ratios", nargs="+", type=not_negative, default=[0, 2], help="samples per bin; 0: adaptive"
    )
    dtypes = [name for name in DTYPES if name != "tf32"]
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=dtypes)
    parser.add_argument("--channels-last", action="store_true", help="layout of the features")
    parser.add_argument("--device", type=usable_device, default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=positive, help="of the CPU; default: torch's")
    parser.add_argument("--seconds", type=float, default=1.0 if cuda else 10.0, help="for the rounds of a table row")
    parser.add_argument("--csv", type=Path, help="write the measurements here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table with the ratios, write the CSV; return the exit status."""
    options = parse(arguments)
    device = options.device
    if options.threads:
        torch.set_num_threads(options.threads)
    providers = load_providers()
    environment = environment_columns(device)
    rows: list[ResultRow] = []
    failed: list[str] = []
    print("| dtype | samples | mode | provider | ms | of RoIAlign |\n|---|---|---|---|---|---|")
    for dtype in options.dtypes:
        inputs = make_inputs(options.channels, tuple(options.size), options.rois, DTYPES[dtype], device)
        if options.channels_last:
            features = inputs.features.detach().to(memory_format=torch.channels_last)
            inputs = Inputs(features.requires_grad_(), inputs.rois, inputs.offset, inputs.grad)
        shape = f"{options.channels}x{options.size[0]}x{options.size[1]} r{options.rois}"
        if options.channels_last:
            shape += " nhwc"
        for ratio in options.sampling_ratios:
            with record_failure(f"{dtype} {ratio}", failed):
                agreeing = {}
                for name, provider in providers.items():
                    if agrees(name, provider, inputs, ratio, dtype):
                        agreeing[name] = provider
                    elif name in (ROI_ALIGN, "deform_roi_pool"):
                        failed.append(f"{dtype} {ratio}: {name}")
                rows += _measure(agreeing, inputs, ratio, dtype, shape, options, environment, failed)
                write_csv(options.csv, rows)
    return int(bool(failed))


def _measure(
    providers: dict[str, Provider],
    inputs: Inputs,
    ratio: int,
    dtype: str,
    shape: str,
    options: argparse.Namespace,
    environment: ResultRow,
    failed: list[str],
) -> list[ResultRow]:
    """Time all providers side by side, print the lines of the table and return the rows."""
    rows = []
    samples = str(ratio) if ratio else "adaptive"
    for mode in MODES:
        functions: dict[str, Callable[[], object]] = {}
        for name, provider in providers.items():
            functions[name] = lambda provider=provider, mode=mode: provider.run(inputs, ratio, mode)
        device = inputs.features.device
        timings = time_interleaved(functions, device, options.seconds, f"{dtype} {samples} {mode}", failed)
        for name, timing in timings.items():
            share = f"{timing.p50 / timings[ROI_ALIGN].p50:.2f}" if ROI_ALIGN in timings else ""
            print(f"| {dtype} | {samples} | {mode} | {name} | {timing.p50:.2f} | {share} |", flush=True)
            rows.append(timing_row(name, f"roi-pool {samples}", shape, dtype, mode, timing, environment))
    return rows


if __name__ == "__main__":
    sys.exit(main())
