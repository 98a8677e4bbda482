"""The folder of a run: whose it is, what it was started with, and its numbers so far."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from train.config import Config, as_dict

# These may differ between two starts of one run: they do not change what it computes.
FREE = {
    "out", "epochs", "max_steps", "eval_only", "eval_every", "eval_overlap", "evaluator", "log_every", "pictures",
    "timeout", "device", "data.workers", "data.batch", "optim.accumulate", "checkpoint.every", "checkpoint.keep",
}  # fmt: skip
_PACKAGES = ("torch", "triton", "numpy", "opencv-python-headless", "pycocotools", "faster-coco-eval")
ROOT = Path(__file__).resolve().parent.parent


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
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changed.stdout.strip() else "")


class RunFolder:
    """`OUT` of one run.

    Args:
        path: the folder; it need not exist yet.

    Attributes:
        checkpoints, pictures, metrics, detections: where things are.
        uncounted: detections whose evaluation is not finished, see `train.counting`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints, self.pictures = path / "checkpoints", path / "pictures"
        self.metrics, self.detections = path / "metrics.jsonl", path / "detections.json"
        self.uncounted = path / "uncounted.json"

    def claim(self, config: Config, world_size: int) -> list[str]:
        """Make the folder this run's, or check that it already is.

        Args:
            config: of this start.
            world_size: number of processes.

        Returns:
            What differs from the start before and may differ.

        Raises:
            OSError: the folder cannot be written.
            ValueError: the folder holds another run that got as far as a step, or something that is no run.
        """
        record = self.path / "config.json"
        start = {"world_size": world_size, "time": time.strftime("%Y-%m-%d %H:%M:%S"), **provenance()}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not record.exists():
                foreign = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
                if foreign:
                    raise ValueError(f"--out {self.path} holds {foreign[0]}, which is no run; choose another folder")
                write_json(record, {**as_dict(config), "starts": [start]})
                return []
            before = json.loads(record.read_text())
            begun = any(self.checkpoints.glob("*.pt")) or bool(read_lines(self.metrics))
            notes = self._compare(before, config, world_size) if begun else []  # a start that failed claims nothing
            write_json(record, {**as_dict(config), "starts": [*before["starts"], start]})
        except OSError as error:
            raise OSError(f"cannot write into --out {self.path}: {error.strerror or error}") from error
        return notes

    def _compare(self, before: dict[str, Any], config: Config, world_size: int) -> list[str]:
        now = _flat(as_dict(config))
        then = _flat(as_dict(Config())) | _flat(before)  # a field that is younger than the run had its default
        changed = {key: (then.get(key), value) for key, value in now.items() if then.get(key) != value}
        free = FREE - {"epochs"} if config.optim.schedule == "cosine" else FREE
        other = [f"{key} was {old}, is {new}" for key, (old, new) in changed.items() if key not in free]
        if other:
            raise ValueError(
                f"--out {self.path} holds another run: {'; '.join(other[:4])}. "
                "Choose another folder, delete this one, or repeat its command"
            )
        processes = before["starts"][-1]["world_size"]
        return [f"number of processes: {processes} before, {world_size} now"] if processes != world_size else []

    def append(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl with the evaluations of this run's training; AP needs annotations."""
        return [line for line in read_lines(self.metrics) if "step" in line and "loss" not in line]

    def rewind(self, step: int) -> None:
        """Drop the lines of metrics.jsonl that lie after a step, because they will be written again."""
        lines = read_lines(self.metrics)
        kept = [line for line in lines if line.get("step", 0) <= step]
        if lines:
            partial = self.metrics.with_name(".metrics.partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            partial.replace(self.metrics)


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


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file; it appears under its name only when it is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one, with dotted keys."""
    flat = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
