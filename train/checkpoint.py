"""Checkpoints that survive faults: written whole or not at all, verified before they are believed.

A checkpoint is one file, `step-00001200-1f3a5c7e90b2d4f6.pt`: the number of finished steps and the first 16 digits of
the SHA-256 of its bytes, so a cut or damaged file is known without a second file that could disagree.

Everything random in a run is a function of (seed, epoch, image) or (seed, step, rank), so no state of a random
generator has to be kept, and the number of processes may change between two starts.
"""

from __future__ import annotations

import contextlib
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

_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.pt")
BEST = "best.pt"
CANDIDATE = "candidate.pt"  # may become the best: it is being counted


@dataclass
class TrainState:
    """What a run changes, and where it is.

    Attributes:
        model: without wrappers; `average`: of its weights, or None.
        optimizer, scaler: of the parameters and of the loss.
        epoch: finished passes over the data; batch: finished batches of the present pass, per process.
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
    def evaluated(self) -> nn.Module:
        """The model whose detections count: the averaged one where there is one."""
        return self.model if self.average is None else self.average.module


def pack(state: TrainState, about: dict[str, Any]) -> dict[str, Any]:
    """Return all of `state` as plain values and tensors, together with `about`.

    `model` holds the weights that are evaluated, so that a reader needs to know nothing of averages.
    """
    content = {
        "model": state.evaluated.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "epoch": state.epoch,
        "batch": state.batch,
        "step": state.step,
    }
    if state.average is not None:
        content |= {"raw_model": state.model.state_dict(), "averaged": int(state.average.n_averaged)}
    return content | about


def restore(state: TrainState, content: dict[str, Any]) -> None:
    """Put the content of a checkpoint into `state`; the opposite of `pack`."""
    state.model.load_state_dict(content.get("raw_model", content["model"]))
    state.optimizer.load_state_dict(content["optimizer"])
    state.scaler.load_state_dict(content["scaler"])
    if state.average is not None:
        state.average.module.load_state_dict(content["model"])
        state.average.n_averaged.fill_(content.get("averaged", 0))
    state.epoch, state.batch, state.step = content["epoch"], content["batch"], content["step"]


def save(folder: Path, content: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint, then delete all but the newest `keep`.

    Raises:
        OSError: the disk is full or the folder cannot be written; what was there before is untouched.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path = folder / f"step-{content['step']:08d}-{_digest(buffer.getbuffer())}.pt"
    partial = folder / f".partial-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(folder)
    except OSError as error:
        raise OSError(f"cannot write a checkpoint into {folder}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    for old in find(folder)[keep:]:
        if old != path:
            old.unlink(missing_ok=True)
    return path


def find(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, newest first."""
    if not folder.is_dir():
        return []
    named = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named, key=lambda item: (item[0], item[1].stat().st_mtime_ns), reverse=True)]


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that is whole, or None if there is none.

    Args:
        folder: where checkpoints are.
        say: is told of every damaged file that is passed over.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    paths = find(folder)
    for path in paths:
        if _digest(path.read_bytes()) == _NAME.fullmatch(path.name)[2]:
            return path
        say(f"checkpoint {path} is damaged ({path.stat().st_size} bytes do not match its hash): taking the one before")
    if paths:
        raise ValueError(f"all {len(paths)} checkpoints in {folder} are damaged; delete the folder to start again")
    return None


def load_newest(folder: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Return the content of the newest whole checkpoint, or None if there is none; set damaged newer ones aside.

    Args:
        folder, say: see `newest`.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    path = newest(folder, say)
    if path is None:
        return None
    for damaged in itertools.takewhile(lambda other: other != path, find(folder)):
        damaged.rename(damaged.with_suffix(".damaged"))
    return load(path)


def load(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


def mark(path: Path, name: str = BEST) -> None:
    """Let `name` beside `path` be this checkpoint, whatever becomes of `path`."""
    partial = path.with_name(f".{name}.{os.getpid()}")
    try:
        try:
            os.link(path, partial)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, partial)
        partial.replace(path.with_name(name))
    finally:
        partial.unlink(missing_ok=True)


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _sync_folder(folder: Path) -> None:
    """Make the new name as durable as the bytes behind it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
