"""Detectors that run without this package: `torch.export` programs and ONNX files, and the command that writes one.

python -m detector.export --weights best.pt --out best.onnx
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from detector.ctrl_c import CtrlC
from detector.detect import DEFAULT_SCORE
from detector.files import check_is_no_input, replacing
from detector.image import read_image, resize_keep_ratio, stack_images
from detector.model.faster_rcnn import FasterRCNN, default_class_names
from detector.onnx.runtime import HAS_ONNXRUNTIME, largest_difference, run_onnx
from detector.structures import SIZE_DIVISOR, Batch, Detections, padded_side
from detector.text import command_name, lasting_output, printable, show, show_message
from detector.weights.load_detector import load
from triton_dcn import __version__

INPUTS = ("images", "sizes")
OUTPUTS = ("boxes", "scores", "labels", "valid", "masks")
OPSET = 20
MAX_OPEN_SIZE = 1 << 16
"""Upper bound of the sizes that stay open: of the images, and of a side divided by `SIZE_DIVISOR`."""
# It can be pasted into Python's prompt: the only block is the last one, as an empty line must follow a block there.
SNIPPET = Template(
    """\
import json

import cv2
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession($file, providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
keys = ("classes", "image_scale", "size_divisor", "size", "batch")
names, scale, divisor, size, batch = (json.loads(about[key]) for key in keys)

image = cv2.imread($picture)
height, width = image.shape[:2]
largest_height, largest_width = size or (np.inf, np.inf)
factors = max(scale) / max(height, width), min(scale) / min(height, width)
factor = min(*factors, largest_height / height, largest_width / width)
new_height, new_width = (max(int(side * factor + 0.5), 1) for side in (height, width))
resized = cv2.resize(image, (new_width, new_height))[:, :, ::-1]  # OpenCV reads BGR, the file takes RGB

padded_height, padded_width = size or (-(-side // divisor) * divisor for side in (new_height, new_width))
images = np.zeros((batch or 1, 3, padded_height, padded_width), np.uint8)
images[:, :, :new_height, :new_width] = resized.transpose(2, 0, 1)
sizes = np.array([[new_height, new_width]] * len(images), np.int64)
outputs = session.run(None, {"images": images, "sizes": sizes})

boxes, scores, labels, valid = (output[0] for output in outputs[:4])
boxes = boxes / [new_width / width, new_height / height, new_width / width, new_height / height]
for box, score, label in zip(boxes[valid], scores[valid], labels[valid]):
    if score >= $min_score:
        print(names[label], f"{score:.2f}", box.round(1).tolist())  # x1 y1 x2 y2 in pixels of the picture
"""
)
"""Detection in a picture with an ONNX file and nothing of this package; see `usage`."""


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
    """File to write, `.onnx`; one that exists is replaced."""
    size: tuple[int, int] | None = None
    """Height and width of the input, multiples of 32; left open if not given."""
    batch_size: Annotated[int | None, tyro.conf.arg(aliases=["--batch"])] = None
    """Images of the input; left open if not given."""
    image: Path | None = None
    """Picture to compare the file and the model on, and for the program that is printed at the end.

    Without one it is noise, in which there may be nothing to find.
    """


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


def describe(
    model: FasterRCNN,
    classes: Sequence[str] = (),
    *,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    weights: str = "",
) -> dict[str, str]:
    """Return what a program needs to know to run an exported model: the metadata of an ONNX file.

    `torch.export.save(program, path, extra_files=describe(model, names))` puts the same into a file of torch.export.

    Args:
        model: which is exported.
        classes: class names by label; without them "class 0", "class 1", ...
        size: as in `export_program`.
        batch: as in `export_program`.
        weights: where the weights come from, such as the name of their file; left out if empty.

    Returns:
        Key -> text. Numbers, lists and null are JSON; docs/export.md says what each is.

    Raises:
        ValueError: there are names, but not one for each class.
    """
    config = model.config
    if classes and len(classes) != config.num_classes:
        raise ValueError(f"classes: expected {config.num_classes} names, one per class, got {len(classes)}")
    metadata = {
        "classes": json.dumps(list(classes or default_class_names(config.num_classes))),
        "image_scale": json.dumps([max(config.image_scale), min(config.image_scale)]),
        "size": json.dumps(size),
        "batch": json.dumps(batch),
        "size_divisor": json.dumps(SIZE_DIVISOR),
        "channel_order": "RGB",
        "layout": "NCHW",
        "dtype": "uint8",
        "normalization": "inside the model",
        "pixel_mean": json.dumps(config.pixel_mean),
        "pixel_std": json.dumps(config.pixel_std),
        "boxes": "x1 y1 x2 y2 in pixels of the resized image",
        "masks": "28 x 28 probabilities on a regular grid over the box" if config.mask else "none",
        "score_threshold": json.dumps(config.score_threshold),
        "nms_iou": json.dumps(config.nms_iou),
        "max_detections": json.dumps(config.max_detections),
        "triton_dcn": __version__,
    }
    if weights:
        metadata["weights"] = printable(weights)
    return metadata


def export_onnx(
    model: FasterRCNN,
    path: str | Path,
    *,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    classes: Sequence[str] = (),
    weights: str = "",
) -> None:
    """Write the detection path as an ONNX file; it appears under its name only when it is complete.

    Args:
        model: in evaluation mode, float32.
        path: file to write; its folder must exist.
        size: as in `export_program`.
        batch: as in `export_program`.
        classes: as in `describe`, whose result is the metadata of the file.
        weights: as in `describe`.

    Raises:
        ValueError: as `export_program` and `describe`, the model is not float32, or a package is missing.
        OSError: the file cannot be written.
    """
    dtype = next(model.parameters()).dtype
    if dtype != torch.float32:
        raise ValueError(f"model: expected float32, got {dtype}; call model.float() first")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"no package {' and no '.join(missing)}; pip install 'triton-dcn[export]'")
    metadata = describe(model, classes, size=size, batch=batch, weights=weights)
    program = export_program(model, size=size, batch=batch)
    write_onnx(program, path, metadata)


def write_onnx(program: torch.export.ExportedProgram, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write a program of `export_program` as an ONNX file with the metadata of `describe`."""
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
    onnx_program.model.metadata_props.update(metadata)
    with replacing(path) as partial:
        onnx_program.save(partial)


def usage(path: Path, picture: Path = Path("photo.jpg")) -> str:
    """Return a Python program that detects in a picture with an ONNX file of `export_onnx`.

    It needs onnxruntime, numpy and OpenCV, reads everything else from the metadata of the file, and prints each object
    with its score and its box in pixels of the picture.
    """
    # Strings of JSON are strings of Python, but for JSON's escapes of letters outside of 16 bits.
    file, image = (json.dumps(str(name), ensure_ascii=False) for name in (path, picture))
    return SNIPPET.substitute(file=file, picture=image, min_score=DEFAULT_SCORE)


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
    if options.out.suffix != ".onnx":
        raise ValueError(f"--out: expected a name ending in .onnx, got {options.out}")
    picture = None if options.image is None else read_image(options.image)  # before what takes a minute
    model, classes = load(options.weights, "cpu")
    export_onnx(
        model,
        options.out,
        size=options.size,
        batch=options.batch_size,
        classes=classes,
        weights=options.weights.name,
    )
    if not HAS_ONNXRUNTIME:
        return "not compared with the model: onnxruntime is not installed"

    with torch.no_grad():
        batch = _comparison_batch(picture, model.config.image_scale, options.size, options.batch_size or 1)
    model_detections: list[Detections] = model(batch)
    file_detections = run_onnx(options.out, batch)
    pixels, score = largest_difference(model_detections, file_detections)
    count = sum(len(detections.boxes) for detections in model_detections)
    source = options.image or "noise (--image compares on a picture)"
    return f"largest difference of {count} detections in {source}: {pixels:.2g} pixels, {score:.2g} of the score"


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 0, 130 after Ctrl-C, else 1."""
    with CtrlC():
        try:
            options = tyro.cli(ExportOptions, prog=command_name("detector.export"), args=arguments)
            comparison = export_file(options)
        except KeyboardInterrupt:
            show_message("error: stopped by Ctrl-C")
            return 128 + signal.SIGINT
        except (OSError, ValueError) as error:
            show_message(f"error: {error}")
            return 1
    show(printable(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB"))
    show(printable(comparison))
    show("\nTo detect with this file in Python, with onnxruntime, numpy and opencv-python-headless alone:\n")
    show(usage(options.out, options.image or Path("photo.jpg")))
    return 0


def _comparison_batch(
    picture: np.ndarray | None, scale: tuple[int, int], size: tuple[int, int] | None, count: int
) -> Batch:
    """Return images to compare on, in the sizes that the file takes.

    Args:
        picture: (H, W, 3) uint8, RGB, is resized to fit `scale` and, if given, `size`; None takes noise.
        scale: bounds of the long and the short side, in any order.
        size: height and width of the input, if they are fixed.
        count: images of the batch, all of them the same.
    """
    if picture is None:
        images, sizes = _noise(size or sorted(scale))
    else:
        resized, _ = resize_keep_ratio(picture, _bounds(picture, scale, size))
        images, sizes = stack_images([resized])

    image_height, image_width = images.shape[2:]
    height, width = size or (padded_side(image_height), padded_side(image_width))
    images = F.pad(images, (0, width - image_width, 0, height - image_height))
    return Batch(images.repeat(count, 1, 1, 1), sizes.repeat(count, 1))


def _bounds(picture: np.ndarray, scale: tuple[int, int], size: tuple[int, int] | None) -> tuple[int, int]:
    """Return the bounds of the long and the short side of a resized picture: `scale`, and `size` if it is fixed."""
    long_side, short_side = max(scale), min(scale)
    if size is None:
        return long_side, short_side
    height, width = picture.shape[:2]
    along_long_side, along_short_side = size if height > width else size[::-1]
    long_side = min(long_side, along_long_side)
    return long_side, min(short_side, along_short_side, long_side)


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
