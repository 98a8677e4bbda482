"""Detectors that run without this package: `torch.export` programs and ONNX files, and the command that writes one.

python -m detector.export --weights best.pt --out best.onnx
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from detector.files import check_is_no_input, replacing
from detector.image import read_image, resize_keep_ratio, stack_images
from detector.model.faster_rcnn import FasterRCNN
from detector.onnx.runtime import HAS_ONNXRUNTIME, largest_difference, run_onnx
from detector.structures import SIZE_DIVISOR, Batch, Detections, padded_side
from detector.text import lasting_output, printable, show, show_message
from detector.weights.load_detector import load

INPUTS = ("images", "sizes")
OUTPUTS = ("boxes", "scores", "labels", "valid", "masks")
OPSET = 20
MAX_OPEN_SIZE = 1 << 16
"""Upper bound of the sizes that stay open: of the images, and of a side divided by `SIZE_DIVISOR`."""


@dataclass(frozen=True)
class ExportOptions:
    """Write a detector as an ONNX file, and compare the two where onnxruntime is installed.

    The file takes `images` (batch, 3, height, width) uint8 RGB, sides multiples of 32, and `sizes` (batch, 2) int64,
    height and width before padding. It gives `boxes` (batch, n, 4) float32 in pixels of the input, `scores` (batch, n),
    `labels` (batch, n) int64 and `valid` (batch, n) bool: only entries that are valid are detections.
    """

    weights: Path
    """Checkpoint of the detector."""
    out: Path
    """File to write."""
    size: tuple[int, int] | None = None
    """Height and width of the input, multiples of 32; left open if not given."""
    batch_size: Annotated[int | None, tyro.conf.arg(aliases=["--batch"])] = None
    """Images of the input; left open if not given."""
    image: Path | None = None
    """Picture to compare the file and the model on; without one it is noise, in which there may be nothing to find."""


class TensorDetector(nn.Module):
    """A `FasterRCNN` that takes tensors instead of a `Batch`, as `torch.export` needs it.

    Args:
        model: in evaluation mode.

    Shape:
        images (B, 3, H, W) uint8, sizes (B, 2) int64 -> boxes (B, n, 4), scores (B, n), labels (B, n), valid (B, n)
        and, of a model with masks, masks (B, n, 28, 28).
    """

    def __init__(self, model: FasterRCNN):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Detect; see `FasterRCNN.detect`."""
        return self.model.detect(Batch(images, sizes))


def export_program(
    model: FasterRCNN, *, size: tuple[int, int] | None = None, batch: int | None = None
) -> torch.export.ExportedProgram:
    """Export the detection path with `torch.export`.

    Args:
        model: in evaluation mode; the program computes in its dtype, with the kernels of its device.
        size: height and width of the images, multiples of 32; None leaves them open.
        batch: number of images; None leaves it open.

    Returns:
        The program of a `TensorDetector`.

    Raises:
        ValueError: the model is in training mode, or a size is out of its range.
    """
    if model.training:
        raise ValueError("model: expected evaluation mode, got training mode; call model.eval() first")
    if batch is not None and batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    if size is not None and (min(size) < 1 or any(side % SIZE_DIVISOR for side in size)):
        raise ValueError(f"size: expected multiples of {SIZE_DIVISOR}, got {tuple(size)}")

    open_in_images: dict[int, torch.export.Dim] = {}  # dimension -> its name and range
    open_in_sizes: dict[int, torch.export.Dim] = {}
    if batch is None:
        batch_dim = torch.export.Dim("batch", min=1, max=MAX_OPEN_SIZE)
        open_in_images[0] = batch_dim
        open_in_sizes[0] = batch_dim
    if size is None:
        open_in_images[2] = SIZE_DIVISOR * torch.export.Dim("rows", min=1, max=MAX_OPEN_SIZE)
        open_in_images[3] = SIZE_DIVISOR * torch.export.Dim("columns", min=1, max=MAX_OPEN_SIZE)

    height, width = size or _default_size(model)
    example_batch = batch or 2  # torch.export makes a constant of a size that is 1 in its example
    device = next(model.parameters()).device
    images = torch.zeros(example_batch, 3, height, width, dtype=torch.uint8, device=device)
    sizes = torch.tensor([[height, width]] * example_batch, device=device)
    with torch.no_grad(), _without_warnings():
        return torch.export.export(
            TensorDetector(model), (images, sizes), dynamic_shapes=(open_in_images, open_in_sizes)
        )


def export_onnx(
    model: FasterRCNN,
    path: str | Path,
    *,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    classes: Sequence[str] = (),
) -> None:
    """Write the detection path as an ONNX file; it appears under its name only when it is complete.

    Args:
        model: in evaluation mode, float32.
        path: file to write; its folder must exist.
        size: as in `export_program`.
        batch: as in `export_program`.
        classes: class names by label, stored as JSON under "classes" in the metadata of the file.

    Raises:
        ValueError: as `export_program`, the model is not float32, or a package is missing.
        OSError: the file cannot be written.
    """
    dtype = next(model.parameters()).dtype
    if dtype != torch.float32:
        raise ValueError(f"model: expected float32, got {dtype}; call model.float() first")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"no package {' and no '.join(missing)}; pip install 'triton-dcn[export]'")
    program = export_program(model, size=size, batch=batch)
    write_onnx(program, path, classes)


def write_onnx(program: torch.export.ExportedProgram, path: str | Path, classes: Sequence[str] = ()) -> None:
    """Write a program of `export_program` as an ONNX file; arguments as in `export_onnx`."""
    output_names = OUTPUTS[: len(program.graph_signature.user_outputs)]
    with _without_warnings():
        translations = importlib.import_module("detector.onnx.translations")  # needs onnxscript
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=output_names,
            verbose=False,
            custom_translation_table=translations.TRANSLATIONS,
        )
    assert onnx_program is not None  # it is None only if an argument `f` names a file
    onnx_program.model.metadata_props["classes"] = json.dumps(list(classes))
    with replacing(path) as partial:
        onnx_program.save(partial)


def export_file(options: ExportOptions) -> str:
    """Write the file and compare it with the model.

    Returns:
        What was compared and how far apart the two are.

    Raises:
        OSError, ValueError: weights cannot be read, the file cannot be written, an option is wrong.
    """
    if not options.out.parent.is_dir():
        raise ValueError(f"--out: no folder {options.out.parent}")
    check_is_no_input(options.out, {"--weights": options.weights, "--image": options.image})
    model, classes = load(options.weights, "cpu")
    export_onnx(model, options.out, size=options.size, batch=options.batch_size, classes=classes)
    if not HAS_ONNXRUNTIME:
        return "not compared with the model: onnxruntime is not installed"

    with torch.no_grad():
        batch = _comparison_batch(options, model)
    model_detections: list[Detections] = model(batch)
    file_detections = run_onnx(options.out, batch)
    pixels, score = largest_difference(model_detections, file_detections)
    count = sum(len(detections.boxes) for detections in model_detections)
    picture = options.image or "noise (--image compares on a picture)"
    return f"largest difference of {count} detections in {picture}: {pixels:.2g} pixels, {score:.2g} of the score"


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    options = tyro.cli(ExportOptions, prog="python -m detector.export", args=arguments)
    try:
        comparison = export_file(options)
    except (OSError, ValueError) as error:
        show_message(f"error: {error}")
        return 1
    show(printable(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB"))
    show(printable(comparison))
    return 0


def _comparison_batch(options: ExportOptions, model: FasterRCNN) -> Batch:
    """Return images to compare on, in the sizes that the file takes."""
    if options.image is not None:
        scale = model.config.image_scale
        images, sizes = _picture(options.image, scale, options.size)
    else:
        images, sizes = _noise(options.size or sorted(model.config.image_scale))

    image_height, image_width = images.shape[2:]
    height, width = options.size or (padded_side(image_height), padded_side(image_width))
    images = F.pad(images, (0, width - image_width, 0, height - image_height))
    count = options.batch_size or 1
    return Batch(images.repeat(count, 1, 1, 1), sizes.repeat(count, 1))


def _picture(path: Path, scale: tuple[int, int], size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Return an image file as (1, 3, H, W) and its size (1, 2), resized to `scale` or, if given, to fit `size`."""
    image = read_image(path)
    if size is not None:
        height, width = image.shape[:2]
        factor = min(size[0] / height, size[1] / width)
        scale = (max(int(height * factor), 1), max(int(width * factor), 1))
    resized, _ = resize_keep_ratio(image, scale)
    return stack_images([resized])


def _noise(size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return smooth noise (1, 3, H, W) uint8 of a size, and the size as (1, 2)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 3, 16, 16, generator=generator) * 64 + 128
    images = F.interpolate(coarse, size=list(size), mode="bilinear").clamp(0, 255).to(torch.uint8)
    return images, torch.tensor([list(size)])


def _default_size(model: FasterRCNN) -> tuple[int, int]:
    """Return height and width of a landscape image of the configured scale, after padding."""
    short_side, long_side = sorted(model.config.image_scale)
    return padded_side(short_side), padded_side(long_side)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide the warnings of torch's exporter about itself and about packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
