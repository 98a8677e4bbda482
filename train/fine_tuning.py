"""Fine-tuning: a run that starts from a detector takes its model from the file, and learns more slowly."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from detector import FasterRCNNConfig
from detector.text import shown
from detector.weights.checkpoint import Checkpoint, read_checkpoint
from detector.weights.load_detector import find_config, is_detector, make_skeleton, stored_config
from detector.weights.load_weights import match_weights
from train.command_line import PYTHON_ONLY
from train.config import PRESETS, Config
from train.run_folder import RunFolder

LR_SHARE = 0.1
"""Learning rate of fine-tuning, as a share of the preset's, which is for a detector that has seen nothing."""

OFFSETS = ".conv_offset."
MASK_HEAD = "roi_head.mask_head."
DECIDED_BY_WEIGHTS = ("depth", "base_channels", "fpn_channels", "fc_channels")
"""Fields of the model that the weights of a file decide: nothing would fit another value."""


def adapt_to_weights(config: Config, run_folder: RunFolder) -> tuple[Config, list[str]]:
    """Give a run that starts from a detector the model of this detector, and a lower learning rate.

    Values that were asked for stay: those in `config.given`, and in Python those that differ from the preset's. A run
    that goes on keeps what it was started with, and needs the file no more.

    Args:
        config: of the run, with the values of the preset and of the flags.
        run_folder: of the run.

    Returns:
        The configuration to train with, and notes for people.

    Raises:
        OSError: a file cannot be read.
        ValueError: the file is damaged, or does not fit what was asked for; the message names the file or the flag.
    """
    if not isinstance(config.weights, Path):
        return config, []
    record = run_folder.recorded()
    if record is not None:
        return _go_on(config, record), []
    checkpoint = read_checkpoint(config.weights)
    if not is_detector(checkpoint):
        return config, []  # weights of a backbone: the rest of the model is the preset's
    return _start(config, checkpoint)


def find_new_layers(stored: FasterRCNNConfig, model: FasterRCNNConfig) -> tuple[str, ...]:
    """Return parts of the names of the layers that a model has and the one in a file has not, or the reverse."""
    layers = []
    if stored.mask != model.mask:
        layers.append(MASK_HEAD)
    if _offset_fields(stored) != _offset_fields(model):
        layers.append(OFFSETS)
    return tuple(layers)


def _offset_fields(model: FasterRCNNConfig) -> tuple[object, ...]:
    return model.dcn, model.dcn_stages, model.deform_groups


def _start(config: Config, checkpoint: Checkpoint) -> tuple[Config, list[str]]:
    """Do `adapt_to_weights` for a new run from a detector."""
    path = checkpoint.path
    stored = find_config(checkpoint)
    given = _find_given(config)
    model, changes = _replace_given(stored, config.model, given)
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
    if "optim.lr" not in given:
        notes.append(
            f"fine-tuning: the learning rate is {LR_SHARE:g} of the preset's {optim.lr:g}; --optim.lr sets another"
        )
        optim = replace(optim, lr=optim.lr * LR_SHARE)
    return replace(config, model=model, optim=optim, given=tuple(sorted(given))), notes


def _go_on(config: Config, record: dict[str, Any]) -> Config:
    """Do `adapt_to_weights` for a run that has taken a step, from its config.json."""
    given = _find_given(config)
    given_before = record.get("given", [])
    if isinstance(given_before, list):  # runs of earlier versions have none
        given |= set(map(str, given_before))
    try:
        stored = stored_config(record)
    except ValueError as error:
        raise ValueError(f"config.json in --out {config.folder}: {error}") from error

    model, _ = _replace_given(stored, config.model, given)
    optim = config.optim
    recorded_optim = record.get("optim")
    if "optim.lr" not in given and isinstance(recorded_optim, dict):
        lr = recorded_optim.get("lr")
        if not isinstance(lr, float):
            raise ValueError(f"config.json in --out {config.folder}: expected a number as 'optim.lr', got {shown(lr)}")
        optim = replace(optim, lr=lr)
    return replace(config, model=model, optim=optim)


def _find_given(config: Config) -> set[str]:
    """Return the names of the values that were asked for: on the command line, or as others than the preset's."""
    preset = PRESETS[config.preset]
    names = set(config.given)
    for field in fields(FasterRCNNConfig):
        if getattr(config.model, field.name) != getattr(preset.model, field.name):
            names.add(f"model.{field.name}")
    if config.optim.lr != preset.optim.lr:
        names.add("optim.lr")
    return names


def _replace_given(
    stored: FasterRCNNConfig, asked: FasterRCNNConfig, given: set[str]
) -> tuple[FasterRCNNConfig, dict[str, str]]:
    """Return `stored` with the given values of `asked`, and a text about each that is another one, by field."""
    values: dict[str, Any] = {}
    changes = {}
    for field in fields(FasterRCNNConfig):
        value = getattr(asked, field.name)
        stored_value = getattr(stored, field.name)
        if f"model.{field.name}" in given and field.name != "num_classes" and value != stored_value:
            values[field.name] = value
            changes[field.name] = f"{_flag(field.name)} {value} ({stored_value} in the file)"
    return replace(stored, **values), changes


def _flag(name: str) -> str:
    """Return the flag of a field of the model, or its name in Python where it has none."""
    name = f"model.{name}"
    if name in PYTHON_ONLY:
        return name
    return "--" + name.replace("_", "-")
