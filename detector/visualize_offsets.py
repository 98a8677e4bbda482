"""Show where deformable convolutions look: `python -m detector.visualize_offsets IMAGE --weights FILE --out PNG`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import tyro
from torch import Tensor, nn

from detector.draw import BLACK, WHITE, enlarge, side_by_side
from detector.image import read_image, resize_keep_ratio, stack_images, write_image
from detector.predict import predict_images
from detector.structures import Batch
from detector.weights.load import load
from triton_dcn.nn import DeformConv2dPack, ModulatedDeformConv2dPack

MIN_SIDE = 640  # smaller images are enlarged before points are drawn
RED = (255, 40, 40)


@dataclass(frozen=True)
class Options:
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
class _Layer:
    """What one deformable layer read from one image: (K, Ho, Wo) per group, in cells of its input."""

    y: Tensor  # (D, K, Ho, Wo)
    x: Tensor  # (D, K, Ho, Wo)
    mask: Tensor  # (D, K, Ho, Wo)
    in_size: tuple[int, int]

    @classmethod
    def of(cls, module: DeformConv2dPack, in_size: tuple[int, int], predicted: Tensor) -> _Layer:
        """Build from a layer and what its `conv_offset` predicted (1, channels, Ho, Wo) for an input of `in_size`."""
        predicted = predicted[0].double().cpu()
        (kh, kw), height, width = module.kernel_size, *predicted.shape[1:]
        taps, groups = kh * kw, module.deform_groups
        y, x = predicted[: 2 * groups * taps].view(groups, taps, 2, height, width).unbind(2)
        mask = torch.ones_like(y)
        if isinstance(module, ModulatedDeformConv2dPack):
            mask = predicted[2 * groups * taps :].view(groups, taps, height, width).sigmoid()
        steps = [torch.arange(n, dtype=torch.float64) for n in (height, width, kh, kw)]
        rows = steps[0] * module.stride[0] - module.padding[0]
        columns = steps[1] * module.stride[1] - module.padding[1]
        y = y + rows[:, None] + (steps[2] * module.dilation[0]).repeat_interleave(kw)[:, None, None]
        x = x + columns + (steps[3] * module.dilation[1]).repeat(kh)[:, None, None]
        return cls(y, x, mask, in_size)

    def read(self, positions: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions (M, 2), x and y, in the input, and weights (M,), read for (N, 2) and (N,) of the output."""
        cells = positions.round().long()
        row, column = cells[:, 1].clamp(0, self.y.shape[2] - 1), cells[:, 0].clamp(0, self.y.shape[3] - 1)
        y, x, mask = (values[:, :, row, column] for values in (self.y, self.x, self.mask))
        inside = (y > -1) & (y < self.in_size[0]) & (x > -1) & (x < self.in_size[1])
        return torch.stack([x[inside], y[inside]], 1), (mask * weights)[inside]


@torch.inference_mode()
def sampling_points(
    model: nn.Module, image: np.ndarray, point: tuple[float, float], layers: int = 3
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
        raise ValueError(f"point: expected x in [0, {width}) and y in [0, {height}), found {point}")
    if layers < 1:
        raise ValueError(f"layers: expected at least 1, found {layers}")
    resized, factors = resize_keep_ratio(image, model.config.image_scale)
    batch = Batch(*stack_images([resized])).to(next(model.parameters()).device)
    to_pixels = torch.tensor(factors, dtype=torch.float64)
    stages = _watch(model, batch)
    if not stages:
        raise ValueError("model: expected deformable layers, found none")
    found = []
    for name, chain in stages.items():
        chain = chain[-layers:]
        stride = batch.images.shape[2] / chain[-1].y.shape[2]  # cell i of a map is centerd on pixel i * stride
        positions = torch.tensor([point], dtype=torch.float64) * to_pixels / stride
        weights = torch.ones(1, dtype=torch.float64)
        for layer in reversed(chain):
            positions, weights = layer.read(positions, weights)
        in_stride = batch.images.shape[2] / chain[0].in_size[0]
        found.append(SamplingPoints(name, positions * in_stride / to_pixels, weights))
    return found


def _watch(model: nn.Module, batch: Batch) -> dict[str, list[_Layer]]:
    """Run the backbone on one image; return what its deformable layers read, by stage, in the order they ran."""
    stages: dict[str, list[_Layer]] = {}
    hooks = []
    for name, module in model.backbone.named_modules():
        if isinstance(module, DeformConv2dPack):

            def note(_: nn.Module, inputs: tuple[Tensor], predicted: Tensor, name=name, module=module) -> None:
                size = tuple(inputs[0].shape[2:])
                stages.setdefault(name.split(".")[0], []).append(_Layer.of(module, size, predicted))

            hooks.append(module.conv_offset.register_forward_hook(note))
    try:
        model.backbone(model.normalize(batch))
    finally:
        for hook in hooks:
            hook.remove()
    return stages


def draw_sampling_points(image: np.ndarray, point: tuple[float, float], found: Sequence[SamplingPoints]) -> np.ndarray:
    """Draw one picture for each entry of `found`, side by side.

    Args:
        image: (H, W, 3) uint8, RGB.
        point: x and y in pixels of `image`, drawn as a cross.
        found: see `sampling_points`.

    Returns:
        A picture (H', W', 3) uint8, RGB.
    """
    image, factor = enlarge(image, MIN_SIDE)
    gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    radius = max(2, max(image.shape[:2]) // 250)
    pictures = []
    for points in found:
        picture = gray.copy()
        opacity = points.weights / points.weights.max().clamp(min=1e-12) if len(points.weights) else points.weights
        order = opacity.argsort()  # what counts most on top
        for (x, y), share in zip((points.positions[order] * factor).tolist(), opacity[order].tolist(), strict=True):
            _dot(picture, round(x), round(y), radius, share)
        center = round(point[0] * factor), round(point[1] * factor)
        cv2.drawMarker(picture, center, BLACK, cv2.MARKER_CROSS, 8 * radius, radius + 2, cv2.LINE_AA)
        cv2.drawMarker(picture, center, WHITE, cv2.MARKER_CROSS, 8 * radius, max(1, radius - 1), cv2.LINE_AA)
        pictures.append(picture)
    return side_by_side(pictures, [f"{points.name}: {len(points.weights)} positions" for points in found])


def _dot(picture: np.ndarray, x: int, y: int, radius: int, opacity: float) -> None:
    """Blend a red dot into the picture, touching only the pixels around it."""
    top, left = max(y - radius - 1, 0), max(x - radius - 1, 0)
    patch = picture[top : y + radius + 2, left : x + radius + 2]
    if y + radius + 2 <= 0 or x + radius + 2 <= 0 or not patch.size:
        return
    dot = cv2.circle(patch.copy(), (x - left, y - top), radius, RED, -1, cv2.LINE_AA)
    patch[:] = cv2.addWeighted(dot, opacity, patch, 1 - opacity, 0)


def visualize(options: Options) -> None:
    """Draw the picture that the options ask for, and say which point it is about."""
    image = read_image(options.image)
    model, names = load(options.weights, None if options.device == "auto" else options.device)
    point, what = options.point, "the point given"
    if point is None:
        (detections,) = predict_images(model, [image])
        point, what = (image.shape[1] / 2, image.shape[0] / 2), "the middle of the image"
        if len(detections.labels):
            x1, y1, x2, y2 = detections.boxes[0].tolist()
            point, what = ((x1 + x2) / 2, (y1 + y2) / 2), f"the best detection, {names[detections.labels[0]]}"
    found = sampling_points(model, image, point, options.layers)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_image(options.out, draw_sampling_points(image, point, found))
    print(f"{options.out}: what is read for ({point[0]:.0f}, {point[1]:.0f}), {what}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    try:
        visualize(tyro.cli(Options, prog="python -m detector.visualize_offsets", args=arguments))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
