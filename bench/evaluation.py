"""What counting costs: seconds of `measure` with pycocotools and with faster-coco-eval, by stage.

    python -m bench.evaluation [--images 5000] [--boxes 36781] [--detections 100]

Writes a JSON of the size of val2017 into a temporary folder and shifts its boxes to detections, half of them of another
class. Time of the processor, in one process; the numbers of both agree to 15 digits.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np

from bench.data import make_coco
from train.data.coco_dataset import CocoDetection
from train.data.transforms import Transform
from train.evaluation.coco_metrics import CocoDetections, Metrics, evaluator_classes, measure, results

STAGES = ("createIndex", "loadRes", "evaluate", "accumulate")  # methods; loadRes contains a createIndex of its own


def detect(dataset: CocoDetection, count: int) -> CocoDetections:
    """Return `count` detections of every image: shifted boxes of the truth, half of them of its class."""
    random = np.random.default_rng(1)
    parts = []
    for index, image_id in enumerate(dataset.image_ids.tolist()):
        boxes, labels = dataset.ground_truth(index)
        if not len(boxes):
            continue
        chosen = random.integers(0, len(boxes), count)
        foreign = random.random(count) < 0.5
        labels = np.where(foreign, random.integers(0, len(dataset.classes), count), labels[chosen])
        boxes = boxes[chosen] + random.normal(0, 8, (count, 1)).astype(np.float32)
        scores = np.sort(random.random(count).astype(np.float32))[::-1]
        parts.append(CocoDetections(np.full(count, image_id), boxes, scores, labels))
    return CocoDetections.join(parts)


def clocked(method: Callable, name: str, seconds: Counter) -> Callable:
    """Return a method that adds its time to `seconds`."""

    def call(*arguments: Any, **named: Any) -> Any:
        begin = time.process_time()
        result = method(*arguments, **named)
        seconds[name] += time.process_time() - begin
        return result

    return call


def time_of(name: str, rows: list[dict], dataset: CocoDetection) -> tuple[Metrics, Counter]:
    """Return the numbers and the seconds of each stage and in all."""
    seconds: Counter = Counter()
    with ExitStack() as stack:
        for owner in evaluator_classes(name):
            for stage in STAGES:
                if hasattr(owner, stage):
                    stack.enter_context(mock.patch.object(owner, stage, clocked(getattr(owner, stage), stage, seconds)))
        begin = time.process_time()
        metrics = measure(rows, dataset, name)
        seconds["all"] = time.process_time() - begin
    return metrics, seconds


def main() -> None:
    """Make the data, count with both, print a table."""
    parser = argparse.ArgumentParser(description="Seconds of an evaluation.")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--boxes", type=int, default=36_781)
    parser.add_argument("--detections", type=int, default=100, help="of each image")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        annotations = make_coco(Path(folder), options.images, options.boxes, (480, 640))
        dataset = CocoDetection(annotations, Path(folder), Transform((1333, 800)), training=False)
        found = detect(dataset, options.detections)
        print(f"{len(dataset)} images, {len(dataset.boxes)} boxes, {len(found.scores)} detections")
        print(f"{'seconds':<12} {'  '.join(f'{name:>11}' for name in ('all', *STAGES))}")
        rows, numbers = results(found, dataset.category_ids), []
        for name in ("pycocotools", "faster"):
            metrics, seconds = time_of(name, rows, dataset)
            numbers.append(metrics)
            print(f"{name:<12} {'  '.join(f'{seconds[stage]:11.2f}' for stage in ('all', *STAGES))}")
        print(f"largest difference: {np.abs(np.subtract(*(one.stats for one in numbers))).max():.1e}")


if __name__ == "__main__":
    main()
