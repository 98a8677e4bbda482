"""The evaluation of a run: `detect` on all processes, draw pictures, `count` on the first one or beside it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from train.config import Config
from train.data.coco_dataset import CocoDetection
from train.data.loader import evaluation_loader
from train.distributed import World
from train.evaluation.coco_metrics import CocoDetections, measure, results, write_results
from train.evaluation.pictures import draw_pictures
from train.log import BROKEN_SHARE, pause
from train.loop import evaluate
from train.run_folder import RunFolder


def detect(
    model: nn.Module,
    dataset: CocoDetection,
    config: Config,
    world: World,
    run: RunFolder,
    show: Callable[[str, np.ndarray], None],
    between: Callable[[], None],
) -> tuple[list[dict], float] | None:
    """Let a model detect in a data set, and write pictures.

    Every process detects in its share of the images; none is seen twice, so nothing has to be removed, and the numbers
    are those of a single process.

    Args:
        model: the one to evaluate.
        dataset: the images.
        config, world, run: of the run.
        show: is given the name and the pixels of every picture.
        between: is called between images and may raise.

    Returns:
        On the first process the rows of detections.json and the seconds it took; None on the others.

    Raises:
        ValueError: more than one percent of the images could not be read.
    """
    begin = time.perf_counter()
    loader = evaluation_loader(dataset, config.data.workers, world.device.type == "cuda", world.rank, world.size)
    shown = tqdm(loader, "evaluating", leave=False, disable=not world.first, mininterval=pause(), dynamic_ncols=True)
    found, unreadable = evaluate(model, shown, amp=config.amp, between=between)
    for image_id, reason in unreadable.items():
        tqdm.write(f"skipped validation image {image_id}: {reason}", file=sys.stderr)
    failed = world.sum(len(unreadable))
    if failed > BROKEN_SHARE * len(dataset):
        share = f"more than {BROKEN_SHARE:.0%}"
        raise ValueError(f"{failed} of {len(dataset)} validation images could not be read, {share}")
    parts = world.gather(found)
    if not world.first:
        return None
    found = _in_order(CocoDetections.join(parts), dataset)
    for path, picture in draw_pictures(dataset, found, run.pictures, config.pictures):
        show(path.stem, picture)
    return results(found, dataset.category_ids), time.perf_counter() - begin


def count(rows: list[dict], seconds: float, dataset: CocoDetection, run: RunFolder, evaluator: str) -> dict[str, Any]:
    """Write detections.json and compare it with the ground truth.

    Args:
        rows, seconds: from `detect`.
        dataset, run: as there.
        evaluator: see `train.evaluation.coco_metrics.evaluator_classes`.

    Returns:
        COCO's numbers by name, `classes` (AP, AP50, boxes of each class) and `evaluation_seconds`, those of detection
        included; without annotations the numbers are missing. Those of masks, where the data set has them, are named
        `segm_AP` and so on.
    """
    begin = time.perf_counter()
    write_results(run.detections, rows)
    line = {}
    for prefix, iou_type in [("", "bbox"), *([("segm_", "segm")] if dataset.segmentations is not None else [])]:
        metrics = measure(rows, dataset, evaluator, iou_type)
        if metrics is not None:
            line |= {prefix + name: value for name, value in metrics.values.items()}
            line[f"{prefix}classes"] = metrics.per_class
    return {**line, "evaluation_seconds": seconds + time.perf_counter() - begin}


def _in_order(found: CocoDetections, dataset: CocoDetection) -> CocoDetections:
    """Sort detections by image as the data set has them, whoever found them."""
    place = {image_id: index for index, image_id in enumerate(dataset.image_ids.tolist())}
    order = np.argsort([place[image_id] for image_id in found.image_ids.tolist()], kind="stable").astype(int)
    return found.take(order)
