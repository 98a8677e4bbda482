"""Checkpoints that survive faults: written whole or not at all, verified before they are used.

A checkpoint is one file, `step-00001200-1f3a5c7e90b2d4f6.pt`, see `detector.weights.checkpoint_name`. A file that is
cut off or damaged does not match its own name.

Everything random in a run is a function of (seed, epoch, image) or (seed, step, rank), so no state of a random
generator has to be kept, and the number of processes may change between two starts.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim

from detector.files import describe_space, replacing
from detector.text import plural, shown
from detector.weights.checkpoint_name import CheckpointName, digest, file_digest, parse_name
from train.average import WeightAverage
from train.data.identity import is_identity

BEST = "best.pt"


@dataclass
class TrainState:
    """What training changes: model, optimizer, and the position in the run.

    Attributes:
        model: the detector itself, without wrappers.
        optimizer: of its parameters.
        scaler: scales the loss for float16.
        average: moving average of the model's weights, or None.
        epoch: finished passes over the data.
        batch: finished batches of the present pass, per process.
        step: finished optimizer steps.
        best_ap: highest AP of the evaluations so far, on rank 0; None before the first.
    """

    model: nn.Module
    optimizer: optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None = None
    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_ap: float | None = None

    @property
    def evaluated_model(self) -> nn.Module:
        """The model whose detections count: the averaged one where there is one."""
        if self.average is None:
            return self.model
        return self.average.module

    @property
    def starts_average(self) -> bool:
        """Whether the next step makes the average a copy of the weights."""
        return self.average is not None and self.average.updates == 0

    @property
    def epoch_number(self) -> int:
        """Number, from 1, of the epoch that the last step belongs to."""
        return self.epoch + 1 if self.batch else self.epoch


def to_checkpoint(state: TrainState, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return all of `state` as plain values and tensors, together with `metadata`.

    `model` holds the weights that are evaluated, so that a reader needs to know nothing about averages.
    """
    content = {
        "model": state.evaluated_model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "epoch": state.epoch,
        "batch": state.batch,
        "step": state.step,
        "best_ap": state.best_ap,
    }
    if state.average is not None:
        content["raw_model"] = state.model.state_dict()
        content["averaged"] = state.average.updates
    return content | metadata


def from_checkpoint(state: TrainState, content: dict[str, Any]) -> None:
    """Put the content of a checkpoint into `state`; the opposite of `to_checkpoint`."""
    state.model.load_state_dict(content.get("raw_model", content["model"]))
    # The hyperparameters are those of the configuration, which cannot differ, and so are the groups of parameters.
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": content["optimizer"]["state"], "param_groups": groups})
    _store_like_parameters(state.optimizer)
    state.scaler.load_state_dict(content["scaler"])
    if state.average is not None:
        state.average.module.load_state_dict(content["model"])
        state.average.updates = content.get("averaged", 0)
    state.epoch = content["epoch"]
    state.batch = content["batch"]
    state.step = content["step"]
    state.best_ap = content.get("best_ap")


def _store_like_parameters(optimizer: optim.Optimizer) -> None:
    """Give each tensor of the state the strides of its parameter, which earlier versions may have stored in others.

    A fused optimizer goes through the memory of parameter, gradient and state side by side.
    """
    for parameter, slots in optimizer.state.items():
        for name, value in slots.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                slots[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def save_checkpoint(folder: Path, content: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint, then delete all but the newest `keep`.

    Raises:
        OSError: the disk is full or the folder cannot be written; what was there before is untouched.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    size = buffer.getbuffer().nbytes
    path = folder / str(CheckpointName(content["step"], digest(buffer.getbuffer())))
    try:
        folder.mkdir(exist_ok=True)  # not its parents: where OUT is gone, the run must not go on in a new one
        with replacing(path, durable=True, size=size) as partial:
            partial.write_bytes(buffer.getbuffer())
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        space = describe_space(error, path, size)
        raise OSError(f"cannot write a checkpoint into {folder}: {reason}{space}") from error

    for older_path in list_checkpoints(folder)[keep:]:
        if older_path != path:
            older_path.unlink(missing_ok=True)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, newest first."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if parse_name(path)]
    return sorted(paths, key=_age_key, reverse=True)


def checkpoint_of_step(folder: Path, step: int) -> Path | None:
    """Return the newest checkpoint of this step, or None if there is none."""
    paths = [path for path in list_checkpoints(folder) if _age_key(path)[0] == step]
    return paths[0] if paths else None


def newest_checkpoint(
    folder: Path, report_damaged: Callable[[str], None], cure: str = "delete the folder to start again"
) -> Path | None:
    """Return the newest checkpoint that is whole, or None if there is none.

    Args:
        folder: where checkpoints are.
        report_damaged: is called with a message about every damaged file that is skipped.
        cure: what helps where all are damaged.

    Raises:
        OSError: a checkpoint cannot be read.
        ValueError: there are checkpoints, and all are damaged.
    """
    paths = list_checkpoints(folder)
    for path in paths:
        if file_digest(path) == _name(path).digest:
            return path
        size = path.stat().st_size
        report_damaged(f"checkpoint {path} is damaged ({size} bytes do not match its hash): taking the one before")
    if paths:
        raise ValueError(f"{folder}: expected an undamaged checkpoint, got damaged ones only, {len(paths)}; {cure}")
    return None


def load_newest_checkpoint(folder: Path, report_damaged: Callable[[str], None]) -> dict[str, Any] | None:
    """Return the content of the newest whole checkpoint, or None if there is none; rename damaged newer ones.

    Args:
        folder: where checkpoints are.
        report_damaged: see `newest_checkpoint`.

    Raises:
        OSError: a checkpoint cannot be read.
        ValueError: there are checkpoints, and all are damaged; or PyTorch cannot read the newest whole one.
    """
    newest_path = newest_checkpoint(folder, report_damaged)
    if newest_path is None:
        return None
    for damaged_path in itertools.takewhile(lambda path: path != newest_path, list_checkpoints(folder)):
        damaged_path.rename(damaged_path.with_suffix(".damaged"))
    return load_checkpoint(newest_path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, on the CPU.

    Raises:
        OSError: the file cannot be read.
        ValueError: PyTorch cannot read it as plain data.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of every kind, for a file of another kind
        raise ValueError(
            f"{path}: expected a checkpoint of this run, got a file that PyTorch cannot read as plain data; {_CURE}"
        ) from error
    return content


def mark_best(path: Path) -> None:
    """Link or copy this checkpoint to `best.pt` in its folder; `best.pt` stays when `path` is deleted.

    Raises:
        OSError: the disk is full or the folder cannot be written; `best.pt` is what it was before.
    """
    with replacing(path.with_name(BEST), size=path.stat().st_size) as partial:
        partial.unlink()  # a link needs a name that is free
        try:
            os.link(path, partial)
        except OSError:  # a file system without hard links
            with path.open("rb") as source, partial.open("xb") as copy:
                shutil.copyfileobj(source, copy)


def check_content(path: Path, content: Any, state: TrainState) -> None:
    """Check that a file holds a checkpoint that continues a run: a whole file may still be one of something else.

    Args:
        path: the file.
        content: of the file.
        state: of the run, which `from_checkpoint` will fill with the content.

    Raises:
        ValueError: something is missing, has another type or shape than in the run, or is not finite; the message
            names the file and the value.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a checkpoint of this run, got a {type(content).__name__}; {_CURE}")

    for key, (description, accepts) in _FIELDS.items():
        if key not in content and key not in _NEWER_FIELDS:
            raise ValueError(f"{path}: expected a checkpoint of this run, got one without {key!r}; {_CURE}")
        if key in content and not accepts(content[key]):
            raise ValueError(f"{path}: {key!r}: expected {description}, got {shown(content[key])}; {_CURE}")

    step_of_name = _name(path).step
    if content["step"] != step_of_name:
        raise ValueError(f"{path}: 'step': expected {step_of_name}, as in its name, got {content['step']}; {_CURE}")

    if content["epoch"] > content["step"]:  # every epoch has a step
        raise ValueError(
            f"{path}: 'epoch': expected at most {content['step']}, the number of steps, got {content['epoch']}; {_CURE}"
        )

    try:
        _check_weights("model", content["model"], state.model)
        if state.average is not None:
            _check_weights("raw_model", content.get("raw_model"), state.model)
        _check_optimizer(content["optimizer"], state.optimizer)
        if state.scaler.is_enabled():
            _check_scaler(content["scaler"], state.scaler)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_CURE}") from error


def _check_weights(key: str, weights: Any, model: nn.Module) -> None:
    """Raise ValueError if weights have other names or shapes than those of the model, or are not finite."""
    if not isinstance(weights, dict):
        raise ValueError(f"{key!r}: expected weights by name, got {shown(weights)}")
    expected = model.state_dict()
    for name, value in expected.items():
        _check_tensor(f"{key!r}: {name}", weights.get(name), value.shape, value.is_floating_point())
    unknown = [name for name in weights if name not in expected]
    if unknown:
        raise ValueError(f"{key!r}: expected the weights of this run's model, got {unknown[0]!r} too")


def _check_optimizer(saved: dict[str, Any], optimizer: optim.Optimizer) -> None:
    """Raise ValueError if the state of an optimizer is not that of these parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots = {"momentum_buffer"} if isinstance(optimizer, optim.SGD) else {"step", "exp_avg", "exp_avg_sq"}
    for index, values in saved["state"].items():
        name = f"'optimizer': state {index!r}"
        if not _is_count(index) or index >= len(parameters):
            raise ValueError(f"{name}: expected the number of one of {plural(len(parameters), 'parameter')}")
        if not isinstance(values, dict) or set(values) not in (set(), slots):
            raise ValueError(f"{name}: expected {', '.join(sorted(slots))}, got {shown(values)}")
        for slot, value in values.items():
            shape = torch.Size() if slot == "step" else parameters[index].shape
            if value is not None or slot != "momentum_buffer":  # without momentum SGD keeps None
                _check_tensor(f"{name}: {slot}", value, shape)


def _check_scaler(saved: dict[str, Any], scaler: torch.amp.GradScaler) -> None:
    """Raise ValueError if the state of a loss scaler has other keys or anything else than finite numbers."""
    keys = set(scaler.state_dict())
    is_number = all(type(value) in (int, float) and math.isfinite(value) for value in saved.values())
    if set(saved) != keys or not is_number:
        raise ValueError(f"'scaler': expected numbers for {', '.join(sorted(keys))}, got {shown(saved)}")


def _check_tensor(name: str, value: Any, shape: torch.Size, is_floating_point: bool = True) -> None:
    """Raise ValueError if a value is not a tensor of this shape with finite numbers of this kind."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor of shape {tuple(shape)}, got {shown(value)}")
    if value.shape != shape:
        raise ValueError(f"{name}: expected a tensor of shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.is_floating_point() != is_floating_point or value.is_complex():
        kind = "floating-point" if is_floating_point else "whole"
        raise ValueError(f"{name}: expected {kind} numbers, got {value.dtype}")
    if value.layout != torch.strided or not value.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_positive_count(value: object) -> bool:
    return _is_count(value) and value != 0


def _is_optional_number(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isfinite(value))


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _has_state(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("state"), dict)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_CURE = "delete the file to go on from the checkpoint before it"

# What every checkpoint of a run holds: key -> what messages call the value, and how it is recognized.
_FIELDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "model": ("weights by name", _is_dict),
    "optimizer": ("the state of an optimizer", _has_state),
    "scaler": ("the state of a loss scaler", _is_dict),
    "epoch": ("a whole number from 0", _is_count),
    "batch": ("a whole number from 0", _is_count),
    "step": ("a whole number from 0", _is_count),
    "classes": ("a list of names", _is_names),
    "images_per_batch": ("a whole number from 1", _is_positive_count),
    "best_ap": ("a number or None", _is_optional_number),
    "training_set": ("number and digests of the training images", is_identity),
}
_NEWER_FIELDS = ("best_ap", "training_set")  # checkpoints of earlier versions lack them


def _name(path: Path) -> CheckpointName:
    """Return step and digest in the name of a checkpoint."""
    name = parse_name(path)
    assert name is not None, path
    return name


def _age_key(path: Path) -> tuple[int, int]:
    """Sort by step; of two files of one step, the younger is the newer one."""
    return _name(path).step, path.stat().st_mtime_ns
