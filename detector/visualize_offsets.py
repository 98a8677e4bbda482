"""Show where deformable convolutions look: `python -m detector.visualize_offsets IMAGE --weights FILE --out PNG`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import tyro
from torch import Tensor, nn

from detector.files import check_is_no_input
from detector.image import read_image, resize_keep_ratio, stack_images, write_image
from detector.model.faster_rcnn import FasterRCNN
from detector.picture import BLACK, WHITE, enlarge, side_by_side
from detector.predict import predict_images
from detector.structures import Batch
from detector.text import lasting_output, printable, short_name, show, show_message
from detector.weights.load_detector import load
from triton_dcn.nn import DeformConv2dPack, ModulatedDeformConv2dPack

MIN_SIDE = 640  # smaller images are enlarged before points are drawn
RED = (255, 40, 40)


@dataclass(frozen=True)
class VisualizeOffsetsOptions:
    """Draw the positions that deformable layers read for one point of a photograph.

    In each stage the last layer reads 9 positions, the one before 9 for each.

    The more a position counts, the more opaque it is; the cross is the point.
    """

    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Image file."""
    weights: Path
    """Checkpoint of a detector with deformable layers."""
    out: Path
    """Picture to write, PNG by preference."""
    point: tuple[float, float] | None = None
    """Pixel (x, y) of the image; default: the middle of the best detection, or of the image."""
    layers: int = 3
    """Layers to follow back in each stage."""
    device: str = "auto"
    """Where to compute, `cpu` or `cuda:1`, say; auto takes a GPU where there is one."""


@dataclass(frozen=True)
class SamplingPoints:
    """Positions that a chain of deformable layers reads for one point.

    Attributes:
        name: stage of the backbone, such as "layer3".
        positions: (N, 2) float64, x and y in pixels of the image; positions outside of the layer's input are left out.
        weights: (N,) float64 in [0, 1], products of the masks on the way; 1 everywhere in version 1.
    """

    name: str
    positions: Tensor
    weights: Tensor


@dataclass(frozen=True)
class _SamplingGrid:
    """What one deformable layer reads from one image.

    Attributes:
        y: (D, K, Ho, Wo) float64, rows of the layer's input that are read, for D groups and K taps.
        x: (D, K, Ho, Wo) float64, columns of the layer's input that are read.
        mask: (D, K, Ho, Wo) float64, their weights; 1 everywhere in version 1.
        in_size: height and width of the layer's input.
    """

    y: Tensor
    x: Tensor
    mask: Tensor
    in_size: tuple[int, int]

    @classmethod
    def from_prediction(cls, module: DeformConv2dPack, in_size: tuple[int, int], predicted: Tensor) -> _SamplingGrid:
        """Build from a layer and what its `conv_offset` predicted (1, channels, Ho, Wo) for an input of `in_size`."""
        predicted = predicted[0].double().cpu()
        height, width = predicted.shape[1:]
        kernel_height, kernel_width = module.kernel_size
        taps = kernel_height * kernel_width
        groups = module.deform_groups
        offset_channels = 2 * groups * taps

        offset = predicted[:offset_channels].view(groups, taps, 2, height, width)
        offset_y, offset_x = offset.unbind(2)
        if isinstance(module, ModulatedDeformConv2dPack):
            mask = predicted[offset_channels:].view(groups, taps, height, width).sigmoid()
        else:
            mask = torch.ones_like(offset_y)

        stride_y, stride_x = module.stride
        padding_y, padding_x = module.padding
        dilation_y, dilation_x = module.dilation
        window_y = _arange(height) * stride_y - padding_y  # top row of the window of each output row
        window_x = _arange(width) * stride_x - padding_x
        tap_y = (_arange(kernel_height) * dilation_y).repeat_interleave(kernel_width)  # taps in row-major order
        tap_x = (_arange(kernel_width) * dilation_x).repeat(kernel_height)

        y = offset_y + window_y[:, None] + tap_y[:, None, None]
        x = offset_x + window_x + tap_x[:, None, None]
        return cls(y, x, mask, in_size)

    def trace_back(self, positions: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Find what the layer reads for positions of its output.

        Args:
            positions: (N, 2), x and y in cells of the output; each stands for its nearest cell.
            weights: (N,), how much each counts.

        Returns:
            Positions (M, 2), x and y in cells of the input, without those outside of it, and their weights (M,).
        """
        cells = positions.round().long()
        column = cells[:, 0].clamp(0, self.x.shape[3] - 1)
        row = cells[:, 1].clamp(0, self.y.shape[2] - 1)
        y = self.y[:, :, row, column]  # (D, K, N)
        x = self.x[:, :, row, column]
        mask = self.mask[:, :, row, column]

        height, width = self.in_size
        inside = (y > -1) & (y < height) & (x > -1) & (x < width)
        return torch.stack([x[inside], y[inside]], 1), (mask * weights)[inside]


def _arange(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float64)


@torch.inference_mode()
def sampling_points(
    model: FasterRCNN, image: np.ndarray, point: tuple[float, float], layers: int = 3
) -> list[SamplingPoints]:
    """Find what the deformable layers of each stage read for a point of an image.

    Between two deformable layers lie ordinary ones, which read around each position; they are not followed.

    Args:
        model: a `FasterRCNN` in evaluation mode.
        image: (H, W, 3) uint8, RGB.
        point: x and y in pixels of `image`.
        layers: how many layers to follow back from the end of each stage, at most all of the stage.

    Returns:
        One entry for each stage with deformable layers.

    Raises:
        ValueError: the model has no deformable layer, the point is not in the image, or `layers` is less than 1.

    Source:
        Dai et al., Deformable Convolutional Networks, ICCV 2017, figure 6.
    """
    height, width = image.shape[:2]
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        raise ValueError(f"point: expected x in [0, {width}) and y in [0, {height}), got {point}")
    if layers < 1:
        raise ValueError(f"layers: expected at least 1, got {layers}")

    resized, factors = resize_keep_ratio(image, model.config.image_scale)
    stacked, sizes = stack_images([resized])
    batch = Batch(stacked, sizes).to(next(model.parameters()).device)
    grids_by_stage = _record_grids(model, batch)
    if not grids_by_stage:
        raise ValueError("model: expected deformable layers, got none")

    padded_height = batch.images.shape[2]
    resize = torch.tensor(factors, dtype=torch.float64)
    stages = []
    for name, grids in grids_by_stage.items():
        grids = grids[-layers:]

        # cell i of a feature map is centered on pixel i * stride
        out_stride = padded_height / grids[-1].y.shape[2]
        positions = torch.tensor([point], dtype=torch.float64) * resize / out_stride
        weights = torch.ones(1, dtype=torch.float64)
        for grid in reversed(grids):
            positions, weights = grid.trace_back(positions, weights)

        in_stride = padded_height / grids[0].in_size[0]
        stages.append(SamplingPoints(name, positions * in_stride / resize, weights))
    return stages


def _record_grids(model: FasterRCNN, batch: Batch) -> dict[str, list[_SamplingGrid]]:
    """Run the backbone on one image; return what its deformable layers read, by stage, in the order they ran."""
    grids_by_stage: dict[str, list[_SamplingGrid]] = {}

    def recorder(stage: str, module: DeformConv2dPack) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def record(_: nn.Module, inputs: tuple[Tensor], predicted: Tensor) -> None:
            height, width = inputs[0].shape[2:]
            grid = _SamplingGrid.from_prediction(module, (height, width), predicted)
            grids_by_stage.setdefault(stage, []).append(grid)

        return record

    hooks = []
    for name, module in model.backbone.named_modules():
        if isinstance(module, DeformConv2dPack):
            stage = name.split(".")[0]
            hooks.append(module.conv_offset.register_forward_hook(recorder(stage, module)))
    try:
        model.backbone(model.normalize(batch))
    finally:
        for hook in hooks:
            hook.remove()
    return grids_by_stage


def draw_sampling_points(image: np.ndarray, point: tuple[float, float], stages: Sequence[SamplingPoints]) -> np.ndarray:
    """Draw one picture for each stage, side by side.

    Args:
        image: (H, W, 3) uint8, RGB.
        point: x and y in pixels of `image`, drawn as a cross.
        stages: see `sampling_points`.

    Returns:
        A picture (H', W', 3) uint8, RGB.
    """
    image, factor = enlarge(image, MIN_SIDE)
    gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    radius = max(image.shape[:2]) // 90
    center = round(point[0] * factor), round(point[1] * factor)

    pictures = []
    for stage in stages:
        picture = gray.copy()
        opacity = stage.weights
        if len(opacity):
            opacity = opacity / opacity.max().clamp(min=1e-12)
        most_opaque_last = opacity.argsort()
        pixels = (stage.positions[most_opaque_last] * factor).tolist()
        for (x, y), dot_opacity in zip(pixels, opacity[most_opaque_last].tolist(), strict=True):
            _draw_dot(picture, round(x), round(y), radius, dot_opacity)

        size = 4 * radius
        thickness = max(2, radius // 3)
        cv2.drawMarker(picture, center, BLACK, cv2.MARKER_CROSS, size, thickness + 2, cv2.LINE_AA)
        cv2.drawMarker(picture, center, WHITE, cv2.MARKER_CROSS, size, thickness, cv2.LINE_AA)
        pictures.append(picture)

    titles = [f"{_stage_name(stage.name)}: {len(stage.weights)} positions" for stage in stages]
    return side_by_side(pictures, titles)


def _stage_name(module: str) -> str:
    """Return what the documentation calls a stage: c3 is the module `layer2` of the backbone."""
    return f"c{int(module.removeprefix('layer')) + 1}"


def _draw_dot(picture: np.ndarray, x: int, y: int, radius: int, opacity: float) -> None:
    """Blend a red dot with a white rim into the picture, touching only the pixels around it."""
    reach = radius + radius // 4 + 1  # the rim is drawn along the edge
    left = max(x - reach, 0)
    top = max(y - reach, 0)
    right = x + reach + 1
    bottom = y + reach + 1
    if right <= 0 or bottom <= 0:
        return
    patch = picture[top:bottom, left:right]
    if not patch.size:
        return
    dot = cv2.circle(patch.copy(), (x - left, y - top), radius, RED, -1, cv2.LINE_AA)
    cv2.circle(dot, (x - left, y - top), radius, WHITE, max(1, radius // 4), cv2.LINE_AA)
    patch[:] = cv2.addWeighted(dot, opacity, patch, 1 - opacity, 0)


def visualize(options: VisualizeOffsetsOptions) -> None:
    """Draw the picture that the options ask for, and say which point it is about."""
    check_is_no_input(options.out, {"IMAGE": options.image, "--weights": options.weights})
    image = read_image(options.image)
    device = None if options.device == "auto" else options.device
    model, class_names = load(options.weights, device)

    if options.point is None:
        point, description = _default_point(model, image, class_names)
    else:
        point = options.point
        description = "the point given"

    stages = sampling_points(model, image, point, options.layers)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_image(options.out, draw_sampling_points(image, point, stages))
    show(printable(f"{options.out}: what is read for ({point[0]:.0f}, {point[1]:.0f}), {description}"))


def _default_point(model: FasterRCNN, image: np.ndarray, class_names: Sequence[str]) -> tuple[tuple[float, float], str]:
    """Return the middle of the best detection, or of the image if nothing is detected, and what it is."""
    (detections,) = predict_images(model, [image], score=0.0)
    if not len(detections.labels):
        height, width = image.shape[:2]
        return (width / 2, height / 2), "the middle of the image"

    x1, y1, x2, y2 = detections.boxes[0].tolist()
    class_name = short_name(class_names[int(detections.labels[0])])
    return ((x1 + x2) / 2, (y1 + y2) / 2), f"the best detection, {class_name}"


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    try:
        visualize(tyro.cli(VisualizeOffsetsOptions, prog="python -m detector.visualize_offsets", args=arguments))
    except (OSError, ValueError) as error:
        show_message(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
