"""ONNX files of the detector in onnxruntime, and how far their detections are from the model's."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from detector.structures import Batch, Detections

AVAILABLE = importlib.util.find_spec("onnxruntime") is not None


def run_onnx(path: str | Path, batch: Batch) -> list[Detections]:
    """Detect with an ONNX file in onnxruntime, on the CPU.

    Args:
        path: a file of `export_onnx`.
        batch: images and sizes as the file takes them.

    Raises:
        ValueError: onnxruntime is missing, or cannot run the file on these images.
    """
    if not AVAILABLE:
        raise ValueError("no package onnxruntime; pip install 'triton-dcn[export]'")
    runtime = importlib.import_module("onnxruntime")
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        arrays = session.run(None, {"images": batch.images.cpu().numpy(), "sizes": batch.sizes.cpu().numpy()})
    except Exception as error:  # onnxruntime's errors have no common class
        raise ValueError(f"{path}: onnxruntime cannot run it: {error}") from error
    boxes, scores, labels, valid, *masks = (torch.from_numpy(array) for array in arrays)
    columns = boxes, scores, labels, *masks
    return [Detections(*(column[image, keep] for column in columns)) for image, keep in enumerate(valid)]


def difference(ours: Sequence[Detections], theirs: Sequence[Detections]) -> tuple[float, float]:
    """Return the largest difference of a coordinate in pixels and of a score, over the detections of all images.

    The partner of a detection is the nearest one of the same image and label in the other list, so that the order of
    equal scores does not matter; without one the difference is infinite.
    """
    box = score = 0.0
    for a, b in zip(ours, theirs, strict=True):
        for one, other in ((a, b), (b, a)):
            if len(one.boxes):
                distance = (one.boxes[:, None] - other.boxes).abs().amax(2)  # (n, m)
                distance = torch.where(one.labels[:, None] == other.labels, distance, torch.inf)
                distance, nearest = F.pad(distance, (0, 1), value=torch.inf).min(1)  # a partner at infinity
                scores = F.pad(other.scores, (0, 1), value=torch.inf)[nearest]
                box = max(box, float(distance.max()))
                score = max(score, float((one.scores - scores).abs().max()))
    return box, score
