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
from tqdm import tqdm

from detector.draw import draw_boxes
from detector.graph import CudaRecorder
from detector.image import read_image, resize_keep_ratio, stack_images
from detector.inference import Inference, for_inference
from detector.model.faster_rcnn import FasterRCNN
from detector.precision import PrecisionName, autocast, check_precision, product_settings, what_is_missing
from detector.results import CocoRow, coco_rows, encode_masks, full_masks, undo_resize
from detector.results_folder import ResultsFolder, is_picture
from detector.structures import Batch, Detections
from detector.text import lasting_output, one_line, printable, show, show_message
from detector.weights.load_detector import load

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # read from a folder


@dataclass(frozen=True)
class PredictOptions:
    """Detect objects in images.

    OUT gets one annotated picture per image, and detections.json.

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
    score: float = 0.3
    """Detections below this score are left out."""
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
    images: Iterable[str | Path | np.ndarray],
    *,
    batch_size: int = 1,
    score: float = 0.0,
) -> Iterator[Detections]:
    """Detect in images, a batch at a time; results come in the order of the images.

    An image is read when its batch begins, so an endless iterator of images works too.

        model, names = detector.load("best.pt")
        for detections in predict_images(model, ["a.jpg", "b.jpg"], score=0.5): ...

    Args:
        model: in evaluation mode; `detector.inference` has faster ones.
        images: files, or pixels (H, W, 3) uint8 RGB.
        batch_size: images that go through the model at once. The padding of a batch changes scores a little.
        score: detections below it are left out.

    Returns:
        An iterator that gives for each image its `Detections` on the CPU, boxes in the pixels of that image.

    Raises:
        OSError, ValueError: an image cannot be read, or is not (H, W, 3) uint8.
        ValueError: the model is in training mode, or `batch_size` is less than 1.
    """
    inference = model if isinstance(model, Inference) else Inference(model)
    if inference.model.training:
        raise ValueError("model: expected evaluation mode, got training mode; call model.eval() first")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    return _predict_batches(inference, iter(images), batch_size, score)


def _predict_batches(
    inference: Inference, images: Iterator[str | Path | np.ndarray], batch_size: int, score: float
) -> Iterator[Detections]:
    while batch := list(islice(images, batch_size)):
        pixels = [_as_pixels(image) for image in batch]
        yield from _predict_batch(inference, pixels, score)


def _predict_batch(inference: Inference, images: Sequence[np.ndarray], score: float) -> list[Detections]:
    model = inference.model
    resized_images = []
    resize_factors = []
    for image in images:
        resized, factors = resize_keep_ratio(image, model.config.image_scale)
        resized_images.append(resized)
        resize_factors.append(factors)

    stacked, sizes = stack_images(resized_images)
    batch = Batch(stacked, sizes).to(_device_of(model))
    wait = inference.start(batch)

    batch_detections = []
    for detections, factors in zip(wait(), resize_factors, strict=True):
        detections = undo_resize(detections, factors)
        batch_detections.append(_keep_scores_from(detections, score))
    return batch_detections


def _as_pixels(image: str | Path | np.ndarray) -> np.ndarray:
    if not isinstance(image, np.ndarray):
        return read_image(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"image: expected (H, W, 3) uint8, got {image.shape} {image.dtype}")
    return image


def _keep_scores_from(detections: Detections, min_score: float) -> Detections:
    keep = detections.scores >= min_score
    masks = None
    if detections.masks is not None:
        masks = detections.masks[keep]
    return Detections(detections.boxes[keep], detections.scores[keep], detections.labels[keep], masks)


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
            messages.append(f"no images in folder {pattern}" if Path(pattern).is_dir() else f"no file {pattern}")
        for file in sorted(matches):
            files.setdefault(file.resolve(), file)

    return list(files.values()), messages


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


def image_rows(
    detections: Detections, class_names: Sequence[str], image_id: int, file_name: str, size: tuple[int, int]
) -> list[CocoRow]:
    """Return an image's detections in COCO's results format, with file_name and category_name beside the ids.

    Args:
        detections: in pixels of the image; its masks, if any, become `segmentation`.
        class_names: by label.
        image_id, file_name: of the image.
        size: height and width of the image.
    """
    labels = detections.labels.numpy()
    rows = coco_rows(
        image_ids=np.full(len(labels), image_id),
        category_ids=labels + 1,
        boxes=detections.boxes.double().numpy(),
        scores=detections.scores.numpy(),
        masks=encode_masks(detections, *size),
    )

    named_rows = []
    for row, label in zip(rows, labels, strict=True):
        named_row = {
            "image_id": row["image_id"],
            "file_name": file_name,
            "category_id": row["category_id"],
            "category_name": class_names[label],
        }
        named_rows.append(named_row | row)
    return named_rows


def predict_files(options: PredictOptions) -> list[str]:
    """Detect in files and write pictures and results, see `ResultsFolder`.

    What was found is written in any case: after Ctrl-C too, and where a picture cannot be written or the device fails.

    Returns:
        A message for each image that could not be found, read or drawn, for an error that ended the work, and for
        results that could not be written.

    Raises:
        OSError, ValueError: nothing could be done: weights cannot be read, no image was found, an option is wrong, or
            the results would replace a file of somebody else.
        KeyboardInterrupt: Ctrl-C was pressed; its arguments are all messages.
    """
    if options.batch_size < 1:
        raise ValueError(f"--batch-size: expected at least 1, got {options.batch_size}")
    files, messages = find_images(options.images)
    if not files:
        raise ValueError("; ".join(messages) or "no images given")
    folder = ResultsFolder(options.out, files)
    folder.check()

    device = None if options.device == "auto" else options.device
    model, class_names = load(options.weights, device)
    inference, precision = _prepare(model, options)
    options.out.mkdir(parents=True, exist_ok=True)

    results = _Results(len(files))
    is_interrupted = False
    try:
        with product_settings(precision), autocast(_device_of(model), precision):
            _predict_into(folder, results, files, inference, class_names, options, messages)
    except KeyboardInterrupt:
        is_interrupted = True
        messages.append(f"stopped by Ctrl-C {results.position}")
    except (RuntimeError, MemoryError) as error:  # the device, or its memory
        messages.append(f"stopped {results.position}: {one_line(error)}")
    finally:
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
        images: images that are done.
        rows: their detections.
    """

    total: int
    images: int = 0
    rows: list[CocoRow] = field(default_factory=list)

    @property
    def position(self) -> str:
        return f"after {self.images} of {self.total} images"


def _write_results(folder: ResultsFolder, results: _Results, messages: list[str]) -> None:
    """Write what has been found; an error joins the messages, so that those before it are not lost."""
    try:
        folder.write_results(results.rows)
    except OSError as error:
        messages.append(str(error))
    else:
        show(printable(f"{len(results.rows)} detections in {results.images} images: {folder.results}"))


def _predict_into(
    folder: ResultsFolder,
    results: _Results,
    files: Sequence[Path],
    inference: Inference,
    class_names: Sequence[str],
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
            batch_detections = predict_images(inference, images, batch_size=options.batch_size, score=options.score)
            for (number, file, image), detections in zip(readable, batch_detections, strict=True):
                height, width = image.shape[:2]
                results.rows += image_rows(detections, class_names, number, str(file), (height, width))
                results.images += 1

                masks = full_masks(detections, height, width)
                picture = draw_boxes(image, detections.boxes, detections.labels, class_names, detections.scores, masks)
                try:
                    folder.write_picture(file, picture)
                except (OSError, ValueError) as error:
                    messages.append(str(error))
            progress.update(len(batch))


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 0 if every image was done, 130 after Ctrl-C, else 1."""
    options = tyro.cli(PredictOptions, prog="python -m detector.predict", args=arguments)
    messages: Sequence[object]
    try:
        messages = predict_files(options)
        status = 1 if messages else 0
    except KeyboardInterrupt as error:
        messages = error.args or ["stopped by Ctrl-C"]
        status = 128 + signal.SIGINT
    except (OSError, ValueError) as error:
        messages = [error]
        status = 1
    for message in messages:
        show_message(f"error: {message}")
    return status


if __name__ == "__main__":
    sys.exit(main())
