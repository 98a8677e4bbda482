"""The folder of a run: which run it belongs to, what it was started with, and its numbers so far."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from detector.files import replacing, write_json
from train.config import RENAMED, Config, as_dict

ROOT = Path(__file__).resolve().parent.parent

# Values that may differ between two starts of one run. All others decide what is trained.
MAY_CHANGE = {
    "out",
    "epochs",
    "max_steps",
    "eval_only",
    "eval_every",
    "log_every",
    "pictures",
    "timeout",
    "device",
    "data.workers",
    "data.max_pixels",
    "data.batch_size",
    "optim.accumulate",
    "checkpoint.every",
    "checkpoint.keep",
}
_PACKAGES = ("torch", "triton", "numpy", "opencv-python-headless", "pycocotools", "faster-coco-eval")


def provenance() -> dict[str, Any]:
    """Return command, commit and versions: what it takes to run this again."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {"command": shlex.join(sys.argv), "commit": _commit(), "versions": versions}


def _commit() -> str:
    """Return the commit of this repository, with "+changes" if files differ from it."""
    try:
        commit = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+changes" if changes else commit


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class RunFolder:
    """`OUT` of one run.

    Args:
        path: the folder; it need not exist yet.

    Attributes:
        checkpoints: folder of the checkpoints.
        pictures: folder of the validation images with detections.
        metrics: metrics.jsonl, a line for each step and each evaluation.
        detections: detections.json of the last evaluation.
    """

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.pictures = path / "pictures"
        self.metrics = path / "metrics.jsonl"
        self.detections = path / "detections.json"
        self._config = path / "config.json"

    def claim(self, config: Config, world_size: int) -> list[str]:
        """Take the folder for this run, or check that it already belongs to it; write config.json.

        Args:
            config: of this start.
            world_size: number of processes.

        Returns:
            Notes about what differs from the start before, where this is allowed.

        Raises:
            OSError: the folder cannot be written.
            ValueError: the folder holds another run with at least one step, or something else than a run.
        """
        start = {"world_size": world_size, "time": time.strftime("%Y-%m-%d %H:%M:%S"), **provenance()}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            notes = []
            earlier_starts = []
            if self._config.exists():
                record = json.loads(self._config.read_text())
                earlier_starts = record["starts"]
                if self._has_progress():  # a start that failed before its first step claims nothing
                    notes = self._compare(record, config, world_size)
            else:
                self._check_empty()
            write_json(self._config, {**as_dict(config), "starts": [*earlier_starts, start]}, indent=2)
        except OSError as error:
            raise OSError(f"cannot write into --out {self.path}: {error.strerror or error}") from error
        return notes

    def _has_progress(self) -> bool:
        has_checkpoint = any(self.checkpoints.glob("[!.]*.pt"))
        return has_checkpoint or bool(read_lines(self.metrics))

    def _check_empty(self) -> None:
        names = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
        if names:
            raise ValueError(f"--out {self.path}: expected a new folder or one of a run, got a folder with {names[0]}")

    def _compare(self, record: dict[str, Any], config: Config, world_size: int) -> list[str]:
        """Return what differs from the start before; raise ValueError where it must not differ."""
        values = _flatten(as_dict(config))
        values_before = _flatten(as_dict(Config()))  # a field that is newer than the run had its default
        for name, value in _flatten(record).items():
            values_before[RENAMED.get(name, name)] = value

        may_change = MAY_CHANGE
        if config.optim.schedule == "cosine":
            may_change = MAY_CHANGE - {"epochs"}  # the learning rate depends on the length of the run
        differences = []
        for name, value in values.items():
            value_before = values_before.get(name)
            if value != value_before and name not in may_change:
                differences.append(f"{name} was {value_before}, is {value}")
        if differences:
            raise ValueError(
                f"--out {self.path}: expected the folder of this run, got that of another run: "
                f"{'; '.join(differences[:4])}. Choose another folder, delete this one, or repeat its command"
            )

        world_size_before = record["starts"][-1]["world_size"]
        if world_size_before == world_size:
            return []
        return [f"number of processes: {world_size_before} before, {world_size} now"]

    def append_metrics(self, *lines: dict[str, Any]) -> None:
        """Add lines to metrics.jsonl."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with self.metrics.open("a") as file:
            file.write(text)

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl from this run's evaluations; without annotations they have no AP."""
        return [line for line in read_lines(self.metrics) if "step" in line and "loss" not in line]

    def drop_metrics_after(self, step: int) -> None:
        """Drop the lines of metrics.jsonl after a step: the resumed run writes them again."""
        lines = read_lines(self.metrics)
        if not lines:
            return
        kept_lines = [line for line in lines if line.get("step", 0) <= step]
        with replacing(self.metrics) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept_lines))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
