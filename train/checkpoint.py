"""Checkpoints that survive faults: written whole or not at all, verified before they are used.

A checkpoint is one file, `step-00001200-1f3a5c7e90b2d4f6.pt`: the number of finished steps and the first 16 digits of
the SHA-256 of its bytes. A file that is cut off or damaged does not match its own name.

Everything random in a run is a function of (seed, epoch, image) or (seed, step, rank), so no state of a random
generator has to be kept, and the number of processes may change between two starts.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim
from torch.optim.swa_utils import AveragedModel

from detector.files import replacing

BEST = "best.pt"
_NAME = re.compile(r"step-(?P<step>\d{8,})-(?P<digest>[0-9a-f]{16})\.pt")


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
    """

    model: nn.Module
    optimizer: optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None = None
    epoch: int = 0
    batch: int = 0
    step: int = 0

    @property
    def evaluated_model(self) -> nn.Module:
        """The model whose detections count: the averaged one where there is one."""
        if self.average is None:
            return self.model
        return self.average.module

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
    }
    if state.average is not None:
        content["raw_model"] = state.model.state_dict()
        content["averaged"] = int(state.average.n_averaged)
    return content | metadata


def from_checkpoint(state: TrainState, content: dict[str, Any]) -> None:
    """Put the content of a checkpoint into `state`; the opposite of `to_checkpoint`."""
    state.model.load_state_dict(content.get("raw_model", content["model"]))
    state.optimizer.load_state_dict(content["optimizer"])
    state.scaler.load_state_dict(content["scaler"])
    if state.average is not None:
        state.average.module.load_state_dict(content["model"])
        state.average.n_averaged.fill_(content.get("averaged", 0))
    state.epoch = content["epoch"]
    state.batch = content["batch"]
    state.step = content["step"]


def save_checkpoint(folder: Path, content: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint, then delete all but the newest `keep`.

    Raises:
        OSError: the disk is full or the folder cannot be written; what was there before is untouched.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path = folder / f"step-{content['step']:08d}-{_digest(buffer.getbuffer())}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=True) as partial:
            partial.write_bytes(buffer.getbuffer())
    except OSError as error:
        raise OSError(f"cannot write a checkpoint into {folder}: {error.strerror or error}") from error

    for older_path in list_checkpoints(folder)[keep:]:
        if older_path != path:
            older_path.unlink(missing_ok=True)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, newest first."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(paths, key=_age_key, reverse=True)


def newest_checkpoint(folder: Path, report_damaged: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that is whole, or None if there is none.

    Args:
        folder: where checkpoints are.
        report_damaged: is called with a message about every damaged file that is skipped.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    paths = list_checkpoints(folder)
    for path in paths:
        if _digest(path.read_bytes()) == _parse_name(path)["digest"]:
            return path
        size = path.stat().st_size
        report_damaged(f"checkpoint {path} is damaged ({size} bytes do not match its hash): taking the one before")
    if paths:
        raise ValueError(
            f"{folder}: expected an undamaged checkpoint, got {len(paths)} damaged ones; "
            "delete the folder to start again"
        )
    return None


def load_newest_checkpoint(folder: Path, report_damaged: Callable[[str], None]) -> dict[str, Any] | None:
    """Return the content of the newest whole checkpoint, or None if there is none; rename damaged newer ones.

    Args:
        folder: where checkpoints are.
        report_damaged: see `newest_checkpoint`.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    newest_path = newest_checkpoint(folder, report_damaged)
    if newest_path is None:
        return None
    for damaged_path in itertools.takewhile(lambda path: path != newest_path, list_checkpoints(folder)):
        damaged_path.rename(damaged_path.with_suffix(".damaged"))
    return load_checkpoint(newest_path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, on the CPU."""
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


def mark_best(path: Path) -> None:
    """Link or copy this checkpoint to `best.pt` in its folder; `best.pt` stays when `path` is deleted."""
    with replacing(path.with_name(BEST)) as partial:
        try:
            os.link(path, partial)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, partial)


def _parse_name(path: Path) -> dict[str, str]:
    """Return step and digest in the name of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return match.groupdict()


def _age_key(path: Path) -> tuple[int, int]:
    """Sort by step; of two files of one step, the younger is the newer one."""
    return int(_parse_name(path)["step"]), path.stat().st_mtime_ns


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
