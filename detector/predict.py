"""Detect objects in image files: `python -m detector.predict IMAGES... --weights FILE --out DIR`."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import nn
from tqdm import tqdm

from detector.draw import draw_boxes
from detector.image import read_image, resize_keep_ratio, stack_images, write_image
from detector.model.mask_head import paste_masks
from detector.ops.rle import encode_mask
from detector.structures import Batch, Detections
from detector.weights.load import load

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # taken as images inside a folder
RESULTS = "detections.json"


@dataclass(frozen=True)
class Options:
    """Detect objects in images.

    OUT gets one annotated picture per image, and detections.json.

    The latter is in COCO's results format, in the pixels of the image files.

    `category_id` counts the checkpoint's classes from 1, `image_id` the images.
    """

    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES...")]
    """Image files, folders of images, or patterns (`photos/**/*.jpg`)."""
    weights: Path
    """Checkpoint of the detector."""
    out: Path
    """Folder for the results; made if it is not there."""
    score: float = 0.3
    """Detections below this score are left out."""
    batch_size: int = 1
    """Images that go through the model at once."""
    device: str = "auto"
    """Where to compute, `cpu` or `cuda:1`, say; auto takes a GPU where there is one."""


def predict_images(
    model: nn.Module, images: Iterable[str | Path | np.ndarray], *, batch_size: int = 1, score: float = 0.0
) -> Iterator[Detections]:
    """Detect in images, a batch at a time; results come in the order of the images, while the next ones wait.

        model, names = detector.load("best.pt")
        for found in predict_images(model, ["a.jpg", "b.jpg"], score=0.5): ...

    Args:
        model: a `FasterRCNN` in evaluation mode.
        images: files, or pixels (H, W, 3) uint8 RGB.
        batch_size: images that go through the model at once. The padding of a batch changes scores a little.
        score: detections below it are left out.

    Returns:
        An iterator that gives for each image its `Detections` on the CPU, boxes in the pixels of that image.

    Raises:
        OSError, ValueError: an image cannot be read, or is not (H, W, 3) uint8.
        ValueError: the model is in training mode, or `batch_size` is less than 1.
    """
    if model.training:
        raise ValueError("model: expected evaluation mode, call model.eval() first")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
    return _predict_batches(model, iter(images), batch_size, score)


def _predict_batches(
    model: nn.Module, images: Iterator[str | Path | np.ndarray], batch_size: int, score: float
) -> Iterator[Detections]:
    while batch := list(islice(images, batch_size)):
        yield from _predict_batch(model, [_pixels(image) for image in batch], score)


@torch.inference_mode()
def _predict_batch(model: nn.Module, images: Sequence[np.ndarray], score: float) -> list[Detections]:
    resized, factors = zip(*(resize_keep_ratio(image, model.config.image_scale) for image in images), strict=True)
    batch = Batch(*stack_images(resized)).to(next(model.parameters()).device)
    return [_in_original_pixels(found, factor, score) for found, factor in zip(model(batch), factors, strict=True)]


def _pixels(image: str | Path | np.ndarray) -> np.ndarray:
    if not isinstance(image, np.ndarray):
        return read_image(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"image: expected (H, W, 3) uint8, found {image.shape} {image.dtype}")
    return image


def _in_original_pixels(found: Detections, factor: tuple[float, float], score: float) -> Detections:
    keep = (found.scores >= score).cpu()
    boxes, scores, labels = (tensor.cpu()[keep] for tensor in (found.boxes, found.scores, found.labels))
    masks = None if found.masks is None else found.masks.cpu()[keep]
    return Detections(boxes / boxes.new_tensor(factor * 2), scores, labels, masks)


def full_masks(found: Detections, height: int, width: int) -> Iterator[np.ndarray]:
    """Draw the masks of an image's detections into that image, one after the other: (height, width) bool.

    Args:
        found: in pixels of the image; if it has no masks, nothing comes.
        height, width: of the image.
    """
    for index in range(0 if found.masks is None else len(found.masks)):
        part = slice(index, index + 1)
        yield paste_masks(found.masks[part], found.boxes[part], height, width)[0].numpy()


def find_images(patterns: Iterable[str]) -> tuple[list[Path], list[str]]:
    """Turn files, folders and patterns into files, in the order given and by name within one; each file once.

    Returns:
        The files, and a message for each entry that led to none.
    """
    problems = []
    found: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        elif path.exists():
            files = [path]
        else:
            files = sorted(Path(file) for file in glob.glob(pattern, recursive=True) if Path(file).is_file())
        if not files:
            problems.append(f"no images in folder {path}" if path.is_dir() else f"no file {pattern}")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values()), problems


def coco_results(
    found: Detections, class_names: Sequence[str], image_id: int, file_name: str, size: tuple[int, int]
) -> list[dict]:
    """Return an image's detections in COCO's results format, with the names of file and class beside their numbers.

    Args:
        found: in pixels of the image; its masks, if any, become `segmentation`.
        class_names: by label.
        image_id, file_name: of the image.
        size: height and width of the image.
    """
    boxes = found.boxes.double()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    results = [
        {
            "image_id": image_id,
            "file_name": file_name,
            "category_id": label + 1,
            "category_name": class_names[label],
            "bbox": box,
            "score": score,
        }
        for box, label, score in zip(boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True)
    ]
    for result, mask in zip(results, full_masks(found, *size), strict=False):
        result["segmentation"] = encode_mask(mask)
    return results


def predict_files(options: Options) -> list[str]:
    """Detect in files and write pictures and results.

    Returns:
        A message for each image that could not be found or read; all others are done.

    Raises:
        OSError, ValueError: nothing could be done: weights cannot be read, no image was found, an option is wrong.
    """
    if options.batch_size < 1:
        raise ValueError(f"--batch-size: expected at least 1, found {options.batch_size}")
    files, failed = find_images(options.images)
    if not files:
        raise ValueError("; ".join(failed) or "no images given")
    model, names = load(options.weights, None if options.device == "auto" else options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    namer = _PictureNames(options.out, files)
    results, broken = [], 0
    with tqdm(total=len(files), unit="image", disable=None) as progress:
        for start in range(0, len(files), options.batch_size):
            numbers, images = [], []
            for number, file in enumerate(files[start : start + options.batch_size], start + 1):
                try:
                    images.append(read_image(file))
                    numbers.append(number)
                except (OSError, ValueError) as error:
                    failed.append(str(error))
                    broken += 1
            found = predict_images(model, images, batch_size=options.batch_size, score=options.score)
            for number, image, detections in zip(numbers, images, found, strict=True):
                file, size = files[number - 1], image.shape[:2]
                results += coco_results(detections, names, number, str(file), size)
                masks = full_masks(detections, *size)
                picture = draw_boxes(image, detections.boxes, detections.labels, names, detections.scores, masks)
                write_image(namer.name(file), picture)
            progress.update(len(files[start : start + options.batch_size]))
    _write_json(options.out / RESULTS, results)
    print(f"{len(results)} detections in {len(files) - broken} images: {options.out / RESULTS}")
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status, 0 if every image was done."""
    try:
        errors = predict_files(tyro.cli(Options, prog="python -m detector.predict", args=arguments))
    except (OSError, ValueError) as error:
        errors = [str(error)]
    for message in errors:
        print(f"error: {message}", file=sys.stderr)
    return 1 if errors else 0


class _PictureNames:
    """Names for annotated pictures in one folder: no two alike, and none that is a file the user gave."""

    def __init__(self, folder: Path, inputs: Iterable[Path]):
        self.folder = folder
        self.inputs = {_identity(file) for file in inputs if file.exists()}
        self.used: set[str] = set()

    def name(self, image: Path) -> Path:
        """Return the path for the picture of `image`: its own name, numbered if that is taken."""
        for number in count(1):
            path = self.folder / (f"{image.stem}.jpg" if number == 1 else f"{image.stem}-{number}.jpg")
            free = path.name.casefold() not in self.used
            if free and not (path.exists() and _identity(path) in self.inputs):
                break
        self.used.add(path.name.casefold())
        return path


def _identity(file: Path) -> tuple[int, int]:
    """Return what two names of one file have in common, on any file system."""
    status = os.stat(file)
    return status.st_dev, status.st_ino


def _write_json(path: Path, content: list[dict]) -> None:
    """Write a JSON file that appears under its name only when it is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
