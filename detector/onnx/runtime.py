"""Runs ONNX files of the detector in onnxruntime, and compares their detections with those of the model."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from detector.structures import Batch, Detections

HAS_ONNXRUNTIME = importlib.util.find_spec("onnxruntime") is not None


def run_onnx(path: str | Path, batch: Batch) -> list[Detections]:
    """Detect with an ONNX file in onnxruntime, on the CPU.

    Args:
        path: a file of `export_onnx`.
        batch: images and sizes as the file takes them.

    Raises:
        ValueError: onnxruntime is missing, or cannot run the file on these images.
    """
    if not HAS_ONNXRUNTIME:
        raise ValueError("no package onnxruntime; pip install 'triton-dcn[export]'")
    onnxruntime = importlib.import_module("onnxruntime")
    inputs = {"images": batch.images.cpu().numpy(), "sizes": batch.sizes.cpu().numpy()}
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        outputs = session.run(None, inputs)
    except Exception as error:  # onnxruntime's errors have no common class
        raise ValueError(f"{path}: onnxruntime cannot run it: {error}") from error

    boxes, scores, labels, valid, *masks = (torch.from_numpy(output) for output in outputs)
    detections = []
    for index, keep in enumerate(valid):
        detections.append(
            Detections(
                boxes=boxes[index, keep],
                scores=scores[index, keep],
                labels=labels[index, keep],
                masks=masks[0][index, keep] if masks else None,
            )
        )
    return detections


def largest_difference(expected: Sequence[Detections], actual: Sequence[Detections]) -> tuple[float, float]:
    """Return the largest difference of a coordinate in pixels and of a score, over the detections of all images.

    A detection is compared with the nearest one of the same image and label in the other list, in both directions, so
    that the order of equal scores does not matter; where there is none the difference is infinite.
    """
    largest_distance = 0.0
    largest_score = 0.0
    for image_expected, image_actual in zip(expected, actual, strict=True):
        for detections, others in ((image_expected, image_actual), (image_actual, image_expected)):
            distance, score = _difference_to_nearest(detections, others)
            largest_distance = max(largest_distance, distance)
            largest_score = max(largest_score, score)
    return largest_distance, largest_score


def _difference_to_nearest(detections: Detections, others: Detections) -> tuple[float, float]:
    """Return the largest difference of a coordinate and of a score to the nearest of `others` with the same label."""
    if not len(detections.boxes):
        return 0.0, 0.0
    distance = (detections.boxes[:, None] - others.boxes).abs().amax(2)  # (n, m)
    same_label = detections.labels[:, None] == others.labels
    distance = torch.where(same_label, distance, torch.inf)

    # Add an entry at infinite distance, with an infinite score: it is the nearest where no other has the same label.
    distance, nearest = F.pad(distance, (0, 1), value=torch.inf).min(1)
    nearest_scores = F.pad(others.scores, (0, 1), value=torch.inf)[nearest]
    score = (detections.scores - nearest_scores).abs()
    return float(distance.max()), float(score.max())
