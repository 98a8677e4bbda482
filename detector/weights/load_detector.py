"""A ready detector from a single file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detector.model.config import FasterRCNNConfig
from detector.model.faster_rcnn import FasterRCNN
from detector.weights.checkpoint import Checkpoint, read_checkpoint
from detector.weights.load_weights import CLASSIFIER, copy_weights

LAST_BLOCK = {(1, 2): 18, (5, 3): 50, (22, 3): 101}  # (last block of layer3, convolutions in a block) -> depth


def load(path: str | Path, device: torch.device | str | None = None) -> tuple[FasterRCNN, list[str]]:
    """Build the model that a checkpoint was written from, with its weights, ready to detect.

        model, class_names = detector.load("best.pt")

    Files of this project hold the configuration. For MMDetection's files of this architecture it is read off the shapes
    of the weights; the thresholds are then the defaults.

    Args:
        path: a checkpoint of training, a `.safetensors` file of `save_weights`, or an MMDetection file.
        device: where to put the model; default: the GPU if there is one.

    Returns:
        The model in evaluation mode and the class names by label. Where the file has no names they are "class 0", ...

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is not a checkpoint of a detector, or the device is not there; the message names it.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # before the long way through the file
        raise ValueError(f"device: cannot compute on {str(device)!r}: {str(error).splitlines()[0]}") from error
    checkpoint = read_checkpoint(path)
    if CLASSIFIER not in checkpoint.state:
        raise ValueError(f"{path}: not the weights of a whole detector, {CLASSIFIER} is missing")
    config = infer_config(checkpoint.state) if checkpoint.config is None else _stored_config(checkpoint)
    found = len(checkpoint.state[CLASSIFIER]) - 1
    if found != config.num_classes:
        raise ValueError(f"{path}: its configuration says {config.num_classes} classes, its weights have {found}")
    names = checkpoint.classes or tuple(f"class {label}" for label in range(found))
    if len(names) != found:
        raise ValueError(f"{path}: {len(names)} class names, but its weights have {found} classes")
    model = FasterRCNN(config)
    copy_weights(model, checkpoint)
    return model.to(device).eval(), list(names)


def infer_config(state: Mapping[str, Tensor]) -> FasterRCNNConfig:
    """Read the architecture off the names and shapes of a detector's weights.

    Args:
        state: state dict under MMDetection's names.

    Returns:
        The configuration; what leaves no trace in the weights (thresholds, frozen stages) has its default.

    Raises:
        ValueError: the weights are not those of a ResNet 18, 50 or 101 with FPN and two fully connected layers.
    """
    last = max((index for index in range(23) if f"backbone.layer3.{index}.conv1.weight" in state), default=None)
    convolutions = 3 if "backbone.layer3.0.conv3.weight" in state else 2
    depth = LAST_BLOCK.get((last, convolutions))
    if depth is None:
        raise ValueError(f"weights: expected a ResNet of depth {sorted(LAST_BLOCK.values())}, found another backbone")
    offsets = [f"backbone.layer{stage}.0.conv2.conv_offset.weight" for stage in range(1, 5)]
    channels = next((len(state[name]) for name in offsets if name in state), 0)
    taps = 27 if channels % 27 == 0 else 18  # per deformable group: offsets and mask, or offsets alone
    return FasterRCNNConfig(
        depth=depth,
        num_classes=len(state[CLASSIFIER]) - 1,
        dcn=None if channels == 0 else "v2" if taps == 27 else "v1",
        dcn_stages=tuple(name in state for name in offsets),
        deform_groups=max(channels // taps, 1),
        mask="roi_head.mask_head.conv_logits.weight" in state,
        norm="bn" if "backbone.bn1.running_mean" in state else "gn",
        base_channels=len(state["backbone.conv1.weight"]),
        fpn_channels=len(state["neck.fpn_convs.0.conv.weight"]),
        fc_channels=len(state["roi_head.bbox_head.shared_fcs.0.weight"]),
    )


def _stored_config(checkpoint: Checkpoint) -> FasterRCNNConfig:
    """Rebuild the configuration of a checkpoint of training, where it is part of the run's, or of shared weights."""
    stored = checkpoint.config.get("model", checkpoint.config)
    known = {field.name for field in fields(FasterRCNNConfig)}
    unknown = sorted(set(stored) - known)
    if unknown:
        raise ValueError(
            f"{checkpoint.path}: unknown fields in its configuration of the model: {', '.join(unknown)}; "
            "a newer version of this package wrote it"
        )
    return FasterRCNNConfig(**{name: _tuples(value) for name, value in stored.items()})


def _tuples(value: Any) -> Any:
    """Undo what JSON does to tuples."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
