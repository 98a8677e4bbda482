"""The evaluation of a model: receives model and data set, hands on one line for metrics.jsonl.

All processes detect, each in its share of the images. Rank 0 gathers their detections as rows of COCO's results format,
draws pictures, writes detections.json and compares the rows with the ground truth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from detector import FasterRCNN
from detector.detect import DEFAULT_SCORE
from detector.files import write_json
from detector.image import write_image
from detector.inference import Inference, for_inference
from detector.precision import PrecisionName, autocast
from detector.results import CocoRow, coco_rows, encode_masks, undo_resize
from detector.structures import Detections
from train.config import MAX_UNREADABLE_SHARE, Config
from train.data.coco_dataset import CocoDetection
from train.data.collate import LoadedBatch
from train.data.loader import evaluation_loader
from train.data.prefetch import prefetch_to_device
from train.distributed import World
from train.evaluation.coco_metrics import coco_metrics
from train.evaluation.curve_picture import draw_score_curves
from train.evaluation.pictures import CURVES, draw_pictures
from train.progress import evaluation_progress, print_above_progress
from train.run_folder import RunFolder


def _ignore_picture(name: str, picture: np.ndarray) -> None:
    pass


def _never_stop() -> None:
    pass


def evaluate(
    model: FasterRCNN,
    dataset: CocoDetection,
    config: Config,
    world: World,
    run_folder: RunFolder,
    *,
    show_picture: Callable[[str, np.ndarray], None] = _ignore_picture,
    check_stop: Callable[[], None] = _never_stop,
) -> dict[str, Any] | None:
    """Evaluate a model; write detections.json and pictures, of the score curves too.

    No image is evaluated twice, so the numbers are the same for any number of processes.

    Args:
        model: is in evaluation mode afterwards; `for_inference` makes the one that detects.
        dataset: the images.
        config: of the run.
        world: the processes.
        run_folder: receives the results.
        show_picture: is called with name and pixels of every picture.
        check_stop: is called between images and may raise.

    Returns:
        On rank 0 COCO's numbers, see `coco_metrics`, and `evaluation_seconds`; None on the other processes.

    Raises:
        ValueError: more than one percent of the images could not be read.
    """
    start = time.perf_counter()
    pin_memory = world.device.type == "cuda"
    loader = evaluation_loader(dataset, config.data.workers, pin_memory, world.rank, world.size, config.timeout)
    batches = evaluation_progress(loader, len(loader), enabled=world.is_main)
    precision = config.precision or "float32"
    fast_model = for_inference(model)
    rows, unreadable = detect(fast_model, batches, dataset.category_ids, precision=precision, check_stop=check_stop)
    _check_unreadable_images(unreadable, dataset, world)

    rows_of_ranks = world.gather(rows)
    if not world.is_main:
        return None
    rows = _sort_by_image(rows_of_ranks, dataset)

    run_folder.check_presence()
    write_json(run_folder.detections, rows, durable=True)

    metrics, curves = coco_metrics(rows, dataset)
    min_score = metrics.get("score_threshold", -1.0)
    if min_score < 0:  # no ground truth, or nothing is right
        min_score = DEFAULT_SCORE
    for path, picture in draw_pictures(dataset, rows, run_folder.pictures, config.pictures, min_score):
        show_picture(path.stem, picture)
    if curves and config.pictures:
        picture = draw_score_curves(curves)
        write_image(run_folder.pictures / f"{CURVES}.png", picture)
        show_picture(CURVES, picture)
    return {**metrics, "evaluation_seconds": time.perf_counter() - start}


@torch.no_grad()
def detect(
    model: FasterRCNN,
    batches: Iterable[LoadedBatch],
    category_ids: np.ndarray,
    *,
    precision: PrecisionName = "float32",
    check_stop: Callable[[], None] = _never_stop,
) -> tuple[list[CocoRow], dict[int, str]]:
    """Detect in every image of `batches`; a GPU works on the next batch while the host reads the results of this one.

    Args:
        model: in evaluation mode.
        batches: images of this process.
        category_ids: (classes,) int64, by label.
        precision: of the model, see `detector.precision`.
        check_stop: is called before every batch and may raise.

    Returns:
        The detections in pixels of the image files, and image id -> reason of the images that could not be read.
    """
    device = next(model.parameters()).device
    inference = Inference(model)
    rows: list[CocoRow] = []
    unreadable: dict[int, str] = {}
    started: tuple[Callable[[], list[Detections]], LoadedBatch] | None = None
    for loaded in prefetch_to_device(batches, device):
        check_stop()
        unreadable |= loaded.unreadable
        if loaded.batch is None:
            continue
        with autocast(device, precision):
            wait = inference.start(loaded.batch)
        if started is not None:
            rows += _batch_rows(*started, category_ids)
        started = wait, loaded
    if started is not None:
        rows += _batch_rows(*started, category_ids)
    return rows, unreadable


def _batch_rows(wait: Callable[[], list[Detections]], loaded: LoadedBatch, category_ids: np.ndarray) -> list[CocoRow]:
    """Wait for the detections of a batch and return them in COCO's results format."""
    images = zip(
        wait(),
        loaded.image_ids,
        loaded.scale_factors,
        loaded.original_sizes,
        strict=True,
    )
    rows: list[CocoRow] = []
    for detections, image_id, scale_factors, original_size in images:
        detections_in_file = undo_resize(detections, scale_factors)
        rows += _to_rows(detections_in_file, image_id, original_size, category_ids)
    return rows


def _to_rows(
    detections: Detections, image_id: int, original_size: tuple[int, int], category_ids: np.ndarray
) -> list[CocoRow]:
    """Return the detections of one image, in pixels of its file, in COCO's results format."""
    height, width = original_size
    return coco_rows(
        np.full(len(detections.boxes), image_id),
        category_ids[detections.labels.numpy()],
        detections.boxes.numpy(),
        detections.scores.numpy(),
        encode_masks(detections, height, width),
    )


def _check_unreadable_images(unreadable: dict[int, str], dataset: CocoDetection, world: World) -> None:
    """Print which images could not be read; raise ValueError if they are too many."""
    for image_id, reason in unreadable.items():
        print_above_progress(f"skipped validation image {image_id}: {reason}")
    count = world.sum(len(unreadable))
    if count > MAX_UNREADABLE_SHARE * len(dataset):
        raise ValueError(
            f"{count} of {len(dataset)} validation images could not be read, more than {MAX_UNREADABLE_SHARE:.0%}"
        )


def _sort_by_image(rows_of_ranks: list[list[CocoRow]], dataset: CocoDetection) -> list[CocoRow]:
    """Put the rows of all processes together, in the order of the images in the data set."""
    index_of_image = {image_id: index for index, image_id in enumerate(dataset.image_ids.tolist())}
    rows = [row for rows_of_rank in rows_of_ranks for row in rows_of_rank]
    return sorted(rows, key=lambda row: index_of_image[row["image_id"]])
