"""Fine-tuning: a run that starts from a detector takes its model from the file."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from detector import FasterRCNNConfig
from detector.weights.checkpoint import read_checkpoint
from detector.weights.load_detector import find_config, is_detector, make_skeleton
from detector.weights.load_weights import match_weights
from train.command_line import PYTHON_ONLY
from train.config import Config

LR_SHARE = 0.3
"""Learning rate of fine-tuning a network of another width than the preset's, as a share of the preset's rate.

The preset's rate is for the preset's network. It is best there in fine-tuning, too: docs/training.md has measurements,
and MMDetection's Cityscapes configurations fine-tune detectors of COCO at the recipe's rate. A wide network that meets
the rate of a narrow one would lose what it has learned.
"""

OFFSETS = ".conv_offset."
MASK_HEAD = "roi_head.mask_head."
ROI_EXTRACTOR = "roi_head.bbox_roi_extractor."
ROI_HEAD = "roi_head."
DECIDED_BY_WEIGHTS = (
    "depth",
    "groups",
    "width_per_group",
    "base_channels",
    "fpn_channels",
    "fc_channels",
    "pixel_mean",
    "pixel_std",
)
"""Fields of the model that the weights of a file decide: nothing would fit another value."""


def adapt_to_weights(config: Config) -> tuple[Config, list[str]]:
    """Give a new run that starts from a detector the model of this detector, and a learning rate for it.

    Args:
        config: of the run, with the values of the preset and of the flags; those in `given` were asked for, and stay.

    Returns:
        The configuration to train with, and notes for people.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or does not fit what was asked for; the message names the file or the flag.
    """
    if not isinstance(config.weights, Path):
        return config, []
    path = config.weights
    checkpoint = read_checkpoint(path)
    if not is_detector(checkpoint):
        return config, []  # weights of a backbone: the rest of the model is the preset's

    stored = find_config(checkpoint)
    model, changes = _replace_given(stored, config)
    for name in changes:
        if name in DECIDED_BY_WEIGHTS or (name == "norm" and "gn" in (stored.norm, model.norm)):
            raise ValueError(
                f"{_flag(name)}: expected {getattr(stored, name)}, as in {path}, got {getattr(model, name)}: "
                "the weights fit no other value"
            )
    match_weights(make_skeleton(model, path), checkpoint, new_layers=find_new_layers(stored, model))

    note = f"fine-tuning: the model is the one in {path}, not the preset's"
    if changes:
        note += f", but for {', '.join(changes.values())}"
    notes = [note]
    optim = config.optim
    if "optim.lr" not in config.given and stored.base_channels != config.model.base_channels:
        notes.append(
            f"fine-tuning: the learning rate is {LR_SHARE:g} of the preset's {optim.lr:g}, because the network is as "
            f"wide as {stored.base_channels} base channels, the preset's {config.model.base_channels}; --optim.lr "
            "sets another"
        )
        optim = replace(optim, lr=optim.lr * LR_SHARE)
    return replace(config, model=model, optim=optim), notes


def find_new_layers(stored: FasterRCNNConfig, model: FasterRCNNConfig) -> tuple[str, ...]:
    """Return parts of the names of the layers that a model has and the one in a file has not, or the reverse."""
    layers = []
    if stored.cascade != model.cascade:
        layers.append(ROI_HEAD)  # every layer of it has another name
    if stored.mask != model.mask:
        layers.append(MASK_HEAD)
    if stored.roi_layer != model.roi_layer:
        layers.append(ROI_EXTRACTOR)
    if _offset_fields(stored) != _offset_fields(model):
        layers.append(OFFSETS)
    return tuple(layers)


def _offset_fields(model: FasterRCNNConfig) -> tuple[object, ...]:
    return model.dcn, model.dcn_stages, model.deform_groups


def _replace_given(stored: FasterRCNNConfig, config: Config) -> tuple[FasterRCNNConfig, dict[str, str]]:
    """Return `stored` with the values of `config` that were asked for, and a text about each that is another one."""
    values: dict[str, Any] = {}
    changes = {}
    for field in fields(FasterRCNNConfig):
        value = getattr(config.model, field.name)
        stored_value = getattr(stored, field.name)
        if f"model.{field.name}" in config.given and field.name != "num_classes" and value != stored_value:
            values[field.name] = value
            changes[field.name] = f"{_flag(field.name)} {value} ({stored_value} in the file)"
    return replace(stored, **values), changes


def _flag(name: str) -> str:
    """Return the flag of a field of the model, or its name in Python where it has none."""
    name = f"model.{name}"
    if name in PYTHON_ONLY:
        return name
    return "--" + name.replace("_", "-")
