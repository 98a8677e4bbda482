"""Detect objects in image files: `python -m detector.predict IMAGES... --weights FILE --out DIR`."""

from __future__ import annotations

import glob
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from detector.ctrl_c import CtrlC
from detector.detect import DEFAULT_SCORE, check_score, name_images
from detector.graph import CudaRecorder
from detector.image import Image, read_image
from detector.inference import Inference, for_inference
from detector.model.faster_rcnn import FasterRCNN
from detector.precision import PrecisionName, autocast, check_precision, product_settings, what_is_missing
from detector.results import CocoRow, ImageDetections
from detector.results_folder import ResultsFolder, is_picture
from detector.text import command_name, lasting_output, one_line, plural, printable, show, show_message
from detector.weights.load_detector import load

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # read from a folder
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}  # named if nothing is


@dataclass(frozen=True)
class PredictOptions:
    """Detect objects in images.

    OUT gets one annotated picture per image, small ones enlarged to 640 pixels, and detections.json.

    The latter is in COCO's results format, in the pixels of the image files.

    `category_id` counts the checkpoint's classes from 1, `image_id` the images.
    """

    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES...")]
    """Image files, folders of images, or patterns (`photos/**/*.jpg`).

    Pictures that this command wrote count only where they are named one by one.
    """
    weights: Path
    """Checkpoint of the detector."""
    out: Path
    """Folder for the results; made if it is not there. Only what an earlier prediction wrote is replaced."""
    score: float = DEFAULT_SCORE
    """Detections below this score, 0 to 1, are left out."""
    batch_size: int = 1
    """Images that go through the model at once."""
    device: str = "auto"
    """Where to compute, `cpu` or `cuda:1`, say; auto takes a GPU where there is one."""
    precision: PrecisionName | None = None
    """Arithmetic; without it tf32 on a GPU that has it, float32 elsewhere."""
    graph: bool = False
    """On a GPU, compute from CUDA graphs, one for each padded size of images that comes again."""


def predict_images(
    model: FasterRCNN | Inference,
    images: Iterable[Image],
    *,
    score: float = DEFAULT_SCORE,
    batch_size: int = 1,
) -> Iterator[ImageDetections]:
    """Do `FasterRCNN.predict` with images that come one after the other; results come as soon as they are there.

    An image is read when its batch begins, so an endless iterator of images works too.

        model, names = detector.load("best.pt")
        for found in predict_images(model, Path("photographs").glob("*.jpg")): ...

    Args:
        model: in evaluation mode; `detector.inference` has faster ones.
        images: paths, or images as `FasterRCNN.predict` takes them.
        score: detections below it are left out.
        batch_size: images that go through the model at once. The padding of a batch changes scores a little.

    Returns:
        An iterator of the detections in each image, in their order. An image that cannot be read ends it with an error
        of `FasterRCNN.predict`.

    Raises:
        TypeError: `images` is one image.
        ValueError: the model is in training mode, or `score` or `batch_size` is out of its range.
    """
    is_pixels = isinstance(images, np.ndarray | Tensor) and images.ndim < 4
    if is_pixels or not isinstance(images, Iterable) or isinstance(images, str):
        raise TypeError("images: expected an iterable of images, got one image; model.predict takes one")
    inference = model if isinstance(model, Inference) else Inference(model)
    detector = inference.model.image_detector(inference.start)
    return detector.detect(name_images(images), score, batch_size)


def find_images(patterns: Iterable[str]) -> tuple[list[Path], list[str]]:
    """Turn files, folders and patterns into files, in the order given and by name within one; each file once.

    Pictures of predictions are left out of folders and patterns: with `--out` in the folder of the images the same
    command would find twice as many each time.

    Returns:
        The files, and a message for each entry that led to none.
    """
    messages = []
    files: dict[Path, Path] = {}  # resolved path -> path as given: a file that is named twice is taken once
    for pattern in patterns:
        try:
            matches = _match(pattern)
        except OSError as error:  # a folder that cannot be read, a name that is too long
            messages.append(str(error))
            continue
        if not matches:
            messages.append(_nothing_message(pattern))
        for file in sorted(matches):
            files.setdefault(file.resolve(), file)

    return list(files.values()), messages


def _nothing_message(pattern: str) -> str:
    """Return what to say about a folder or pattern that led to no image."""
    path = Path(pattern)
    if not path.is_dir():
        return f"no file {pattern}"
    files = list(path.iterdir())
    if any(file.suffix.lower() in VIDEO_SUFFIXES for file in files):
        return f"no images in folder {pattern}; the frames of its videos are not read"
    if any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
        return f"no images in folder {pattern} but pictures of predictions, which count only where named one by one"
    return f"no images in folder {pattern}"


def _match(pattern: str) -> list[Path]:
    """Return the files that a file's name, a folder or a pattern stands for."""
    path = Path(pattern)
    if path.is_dir():
        matches = [file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
    elif path.exists():
        return [path]
    else:
        matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
    return [match for match in matches if match.is_file() and not is_picture(match)]


def image_rows(detections: ImageDetections, image_id: int, file_name: str) -> list[CocoRow]:
    """Return an image's detections in COCO's results format, with file_name and category_name beside the ids."""
    named_rows = []
    for row, class_name in zip(detections.to_coco(image_id), detections.names, strict=True):
        named_row = {
            "image_id": row["image_id"],
            "file_name": file_name,
            "category_id": row["category_id"],
            "category_name": class_name,
        }
        named_rows.append(named_row | row)
    return named_rows


def predict_files(options: PredictOptions, ctrl_c: CtrlC) -> list[str]:
    """Detect in files and write pictures and results, see `ResultsFolder`.

    What was found is written in any case: after Ctrl-C too, and where a picture cannot be written or the device fails.
    Where nothing was found and not every image was done, the results of an earlier prediction stay.

    Args:
        options: of the command.
        ctrl_c: is told when Ctrl-C has to wait.

    Returns:
        A message for each image that could not be found, read or drawn, for an error that ended the work, and for
        results that could not be written.

    Raises:
        OSError, ValueError: nothing could be done: weights cannot be read, no image was found, an option is wrong, or
            the results would replace a file of somebody else.
        KeyboardInterrupt: Ctrl-C was pressed; its arguments are all messages.
    """
    check_score(options.score, "--score")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size: expected at least 1, got {options.batch_size}")
    files, messages = find_images(options.images)
    if not files:
        raise ValueError("; ".join(messages) or "no images given")
    folder = ResultsFolder(options.out, files)
    folder.check()

    device = None if options.device == "auto" else options.device
    model, _ = load(options.weights, device)
    inference, precision = _prepare(model, options)
    options.out.mkdir(parents=True, exist_ok=True)

    results = _Results(len(files))
    is_interrupted = False
    try:
        with product_settings(precision), autocast(_device_of(model), precision):
            _predict_into(folder, results, files, inference, options, messages)
    except KeyboardInterrupt:
        is_interrupted = True
        messages.append(f"stopped by Ctrl-C {results.position}")
    except (RuntimeError, MemoryError) as error:  # the device, or its memory
        messages.append(f"stopped {results.position}: {one_line(error)}")
    finally:
        ctrl_c.ignore()
        if results.images:
            _write_results(folder, results, messages)
    if is_interrupted:
        raise KeyboardInterrupt(*messages)
    return messages


def _prepare(model: FasterRCNN, options: PredictOptions) -> tuple[Inference, PrecisionName]:
    """Return what detects, and in which precision.

    Raises:
        ValueError: the device of the model does not have what an option asks for.
    """
    device = _device_of(model)
    check_precision(options.precision, device)
    if options.graph and device.type != "cuda":
        raise ValueError("--graph: expected a GPU, got a CPU, which has no CUDA graphs")
    recorder = CudaRecorder(device) if options.graph else None
    default: PrecisionName = "float32" if what_is_missing("tf32", device) else "tf32"
    return Inference(for_inference(model), recorder), options.precision or default


def _device_of(model: FasterRCNN) -> torch.device:
    return next(model.parameters()).device


@dataclass
class _Results:
    """What has been found so far.

    Attributes:
        total: images to detect in.
        rows_of_images: the detections of each image that is done.
    """

    total: int
    rows_of_images: list[list[CocoRow]] = field(default_factory=list)

    @property
    def images(self) -> int:
        return len(self.rows_of_images)

    @property
    def rows(self) -> list[CocoRow]:
        return [row for rows in self.rows_of_images for row in rows]

    @property
    def position(self) -> str:
        return f"after {self.images} of {plural(self.total, 'image')}"


def _write_results(folder: ResultsFolder, results: _Results, messages: list[str]) -> None:
    """Write what has been found; an error joins the messages, so that those before it are not lost."""
    rows = results.rows
    if not rows and messages and folder.results.exists():
        messages.append(f"nothing found {results.position}: {folder.results} of an earlier prediction is kept")
        return
    try:
        folder.write_results(rows)
    except OSError as error:
        messages.append(str(error))
    else:
        show(printable(f"{plural(len(rows), 'detection')} in {plural(results.images, 'image')}: {folder.results}"))


def _predict_into(
    folder: ResultsFolder,
    results: _Results,
    files: Sequence[Path],
    inference: Inference,
    options: PredictOptions,
    messages: list[str],
) -> None:
    """Detect in files; add to results and messages and write the pictures image by image."""
    numbered_files = enumerate(files, start=1)
    with tqdm(total=len(files), unit="image", disable=None) as progress:
        while batch := list(islice(numbered_files, options.batch_size)):
            readable = []
            for number, file in batch:
                try:
                    readable.append((number, file, read_image(file)))
                except (OSError, ValueError) as error:
                    messages.append(str(error))

            images = [image for _, _, image in readable]
            batch_detections = predict_images(inference, images, score=options.score, batch_size=options.batch_size)
            for (number, file, _), detections in zip(readable, batch_detections, strict=True):
                results.rows_of_images.append(image_rows(detections, number, str(file)))
                try:
                    folder.write_picture(file, detections.draw())
                except (OSError, ValueError) as error:
                    messages.append(str(error))
            progress.update(len(batch))


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 0 if every image was done, 130 after Ctrl-C, else 1."""
    messages: Sequence[object]
    with CtrlC() as ctrl_c:
        try:
            options = tyro.cli(PredictOptions, prog=command_name("detector.predict"), args=arguments)
            messages = predict_files(options, ctrl_c)
            status = 1 if messages else 0
        except KeyboardInterrupt as error:
            messages = error.args or ["stopped by Ctrl-C"]
            status = 128 + signal.SIGINT
        except (OSError, ValueError) as error:
            messages = [error]
            status = 1
        ctrl_c.ignore()
        for message in messages:
            show_message(f"error: {message}")
    return status


if __name__ == "__main__":
    sys.exit(main())
