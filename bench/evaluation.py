"""Time an evaluation: seconds of `run_coco_eval` with pycocotools and with faster-coco-eval, by method, and of curves.

    python -m bench.evaluation [--images 5000] [--boxes 36781] [--detections 100]

Writes a JSON of the size of val2017 into a temporary folder. The detections are its boxes, shifted, half of them with
another class. Processor time, in one process; the numbers of both agree to 15 digits.
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

from bench.arguments import not_negative, positive
from bench.data import make_coco
from detector.results import coco_rows
from train.data.coco_dataset import CocoDetection
from train.data.transforms import Transform
from train.evaluation.coco_metrics import EVALUATORS, find_score_curves, run_coco_eval

TIMED_METHODS = ("createIndex", "loadRes", "evaluate", "accumulate")
"""Methods of the evaluators; loadRes calls createIndex, whose time counts for both."""


def make_detections(dataset: CocoDetection, per_image: int) -> list[dict[str, Any]]:
    """Return `per_image` detections of every image: shifted boxes of the ground truth, half of them of its class."""
    random = np.random.default_rng(1)
    rows = []
    for index, image_id in enumerate(dataset.image_ids.tolist()):
        boxes, labels = dataset.ground_truth(index)
        if not len(boxes):
            continue
        chosen = random.integers(0, len(boxes), per_image)
        has_random_class = random.random(per_image) < 0.5
        random_labels = random.integers(0, len(dataset.classes), per_image)
        labels = np.where(has_random_class, random_labels, labels[chosen])
        boxes = boxes[chosen] + random.normal(0, 8, (per_image, 1)).astype(np.float32)
        scores = np.sort(random.random(per_image).astype(np.float32))[::-1]
        rows += coco_rows(np.full(per_image, image_id), dataset.category_ids[labels], boxes, scores)
    return rows


def timed(method: Callable[..., Any], name: str, seconds: Counter[str]) -> Callable[..., Any]:
    """Return a method that adds its time to `seconds`."""

    def call(*arguments: Any, **named: Any) -> Any:
        start = time.process_time()
        result = method(*arguments, **named)
        seconds[name] += time.process_time() - start
        return result

    return call


def time_evaluator(name: str, rows: list[dict[str, Any]], dataset: CocoDetection) -> tuple[np.ndarray, Counter[str]]:
    """Return COCO's twelve numbers, and the seconds of each method, of all, and of the score curves after them."""
    seconds: Counter[str] = Counter()
    with ExitStack() as stack:
        for evaluator_class in EVALUATORS[name]:
            for method_name in TIMED_METHODS:
                if hasattr(evaluator_class, method_name):
                    method = timed(getattr(evaluator_class, method_name), method_name, seconds)
                    stack.enter_context(mock.patch.object(evaluator_class, method_name, method))
        start = time.process_time()
        evaluation = run_coco_eval(rows, dataset, evaluator=name)
        seconds["all"] = time.process_time() - start
    start = time.process_time()
    find_score_curves(evaluation, dataset)
    seconds["curves"] = time.process_time() - start
    return evaluation.stats, seconds


def main() -> None:
    """Make the data, evaluate with both, print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.evaluation", description="Seconds of an evaluation.")
    parser.add_argument(
        "--images", type=positive, default=5000, help="of the data set; default: as many as val2017 has"
    )
    parser.add_argument("--boxes", type=positive, default=36_781, help="of all images")
    parser.add_argument("--detections", type=not_negative, default=100, help="of each image")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        annotations = make_coco(Path(folder), options.images, options.boxes, (480, 640))
        dataset = CocoDetection(annotations, Path(folder), Transform((1333, 800)), training=False)
        rows = make_detections(dataset, options.detections)
        print(f"{len(dataset)} images, {len(dataset.boxes)} boxes, {len(rows)} detections")

        columns = ("all", *TIMED_METHODS, "curves")
        print(f"{'seconds':<16} {'  '.join(f'{column:>11}' for column in columns)}")
        numbers = []
        for name in EVALUATORS:
            stats, seconds = time_evaluator(name, rows, dataset)
            numbers.append(stats)
            print(f"{name:<16} {'  '.join(f'{seconds[column]:11.2f}' for column in columns)}")
        difference = np.abs(numbers[0] - numbers[-1]).max()
        print(f"largest difference: {difference:.1e}")


if __name__ == "__main__":
    main()
