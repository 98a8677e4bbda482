"""The folder of a run: which run it belongs to, what it was started with, and its numbers so far."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from detector.files import open_regular, remove_leftovers, write_json
from detector.precision import PrecisionName
from detector.text import shown
from train.config import RENAMED, RENAMED_VALUES, Config, as_dict
from train.folder_lock import locked
from train.metrics_file import append_lines, parse_lines, read_lines, rewind

ROOT = Path(__file__).resolve().parent.parent

# Values that may differ between two starts of one run. All others decide what is trained.
MAY_CHANGE = {
    "out",
    "given",
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


@dataclass(frozen=True)
class Choices:
    """What a run has chosen by its first step: it keeps this, whatever the next start would choose.

    Attributes:
        precision: of its products.
        warmup: steps of its warm-up.
    """

    precision: PrecisionName
    warmup: int


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
        self._handle: int | None = None  # of the folder, while it is locked

    @contextlib.contextmanager
    def lock(self) -> Iterator[list[str]]:
        """Create the folder and keep other runs out of it; remove what killed writers have left there.

        Gives the block notes: how many leftovers there were, and whether the file system has no locks.

        Raises:
            OSError: the folder cannot be written.
            ValueError: another run is in it.
        """
        self._create()
        with contextlib.ExitStack() as stack:
            try:
                has_locks = stack.enter_context(locked(self.path))
                self._handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except BlockingIOError as error:
                raise ValueError(
                    f"--out {self.path}: expected a folder that no other run uses, got one in use by {error}: "
                    "wait until it ends, or choose another folder"
                ) from error
            except OSError as error:
                raise OSError(f"cannot write into --out {self.path}: {error.strerror or error}") from error
            stack.callback(self._unlock)

            notes = []
            if not has_locks:
                notes.append(f"{self.path} is on a file system without locks: let no other run use it")
            count = sum(remove_leftovers(folder) for folder in (self.path, self.checkpoints, self.pictures))
            if count:
                notes.append(f"files removed that a killed run had begun to write: {count}")
            yield notes

    def _create(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot write into --out {self.path}: {error.strerror or error}") from error

    def _unlock(self) -> None:
        assert self._handle is not None
        os.close(self._handle)
        self._handle = None

    def check_presence(self) -> None:
        """Raise FileNotFoundError if the folder that was locked is not at its path any more."""
        if self._handle is None:
            return
        try:
            is_here = os.path.samestat(os.fstat(self._handle), self.path.stat())
        except OSError:
            is_here = False
        if not is_here:
            raise FileNotFoundError(
                f"--out {self.path}: expected the folder that this run began to use, got another one or none: "
                "it was deleted, moved or replaced while the run was going on"
            )

    def recorded_choices(self) -> Choices | None:
        """Return what the run in the folder has chosen, None if it has not made a step.

        Raises:
            OSError, ValueError: see `claim`.
        """
        record = self.recorded()
        if record is None:
            return None
        values = values_before(record)
        names: tuple[PrecisionName, ...] = get_args(PrecisionName)
        precision: PrecisionName = next((name for name in names if name == values.get("precision")), "float32")
        # earlier versions took the warm-up of the configuration, however long
        warmup = record["starts"][-1].get("warmup", values.get("optim.warmup"))
        if type(warmup) is not int:
            warmup = Config().optim.warmup
        return Choices(precision, warmup)

    def claim(
        self, config: Config, world_size: int, *, warmup: int | None = None, forced: Sequence[str] = ()
    ) -> list[str]:
        """Take the folder for this run, or check that it already belongs to it; write config.json.

        Args:
            config: of this start.
            world_size: number of processes.
            warmup: steps of the warm-up; None for those of the configuration.
            forced: names of values that differ because this machine leaves no choice.

        Returns:
            Notes about what differs from the start before, where this is allowed.

        Raises:
            OSError: the folder cannot be written.
            ValueError: the folder holds another run with at least one step, or something else than a run.
        """
        self.check_content()
        if warmup is None:
            warmup = config.optim.warmup
        start = {"world_size": world_size, "warmup": warmup, "time": time.strftime("%Y-%m-%d %H:%M:%S"), **provenance()}
        notes: list[str] = []
        earlier_starts: list[Any] = []
        is_without_weights = False  # as earlier versions began a run without a flag
        record, has_progress = self._read_earlier()
        if record is not None:
            earlier_starts = record["starts"]
            if has_progress:
                notes = self._compare(record, config, world_size, forced)
                is_without_weights = record.get("weights", "none") is None and self._has_checkpoint()
        self._create()
        values = as_dict(config)
        if is_without_weights:
            values["weights"] = None
        write_json(self._config, {**values, "starts": [*earlier_starts, start]}, indent=2, durable=True)
        return notes

    def check_content(self) -> None:
        """Raise ValueError if there is a folder with something else than a run, which must stay as it is."""
        if self.path.is_dir() and not self._config.exists():
            names = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
            if names:
                raise ValueError(
                    f"--out {self.path}: expected a new folder or one of a run, got a folder with {names[0]}"
                )
        for folder in (self.checkpoints, self.pictures):
            if os.path.lexists(folder) and not folder.is_dir():
                raise ValueError(f"{folder}: expected a folder, got something else under its name; move it away")

    def check_no_other_run(self, weights: Path) -> None:
        """Raise ValueError if this is the folder of a run, and `weights` is no checkpoint of it."""
        if self._config.exists() and weights.resolve().parent != self.checkpoints.resolve():
            raise ValueError(
                f"--out {self.path}: expected a folder of its own for the results of {weights}, got that of a run"
            )

    def recorded(self) -> dict[str, Any] | None:
        """Return what config.json holds of a run with at least one step, or None if there is no such run here.

        Raises:
            OSError, ValueError: see `claim`.
        """
        record, has_progress = self._read_earlier()
        return record if has_progress else None

    def _has_progress(self) -> bool:
        lines, damaged = parse_lines(self.metrics)
        return self._has_checkpoint() or bool(lines or damaged)

    def _has_checkpoint(self) -> bool:
        return any(self.checkpoints.glob("[!.]*.pt"))

    def _read_earlier(self) -> tuple[dict[str, Any] | None, bool]:
        """Return what the start before wrote into config.json, if it did, and whether its run has made a step.

        A start that failed before its first step claims nothing, so its file need not be readable.
        """
        if not self._config.exists():
            return None, False
        has_progress = self._has_progress()
        try:
            return self._read_record(), has_progress
        except ValueError:
            if has_progress:
                raise
            return None, False

    def _read_record(self) -> dict[str, Any]:
        """Return the content of config.json.

        Raises:
            OSError: the file cannot be read.
            ValueError: it does not hold what `claim` writes.
        """
        problem = f"{self._config}: expected what a run writes there"
        cure = "restore the file, or choose another --out; the newest checkpoint holds the configuration, too"
        try:
            with open_regular(self._config) as file:
                record = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{problem}, got no JSON ({error}); {cure}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{problem}, got {shown(record)}; {cure}")
        starts = record.get("starts")
        if not isinstance(starts, list) or not starts or not all(map(_is_start, starts)):
            raise ValueError(f"{problem}, got {shown(starts)} as its 'starts'; {cure}")
        return record

    def _compare(self, record: dict[str, Any], config: Config, world_size: int, forced: Sequence[str]) -> list[str]:
        """Return what differs from the start before; raise ValueError where it must not differ."""
        values = flatten(as_dict(config))
        before = values_before(record)
        for precision_of in (values, before):
            precision_of["precision"] = precision_of["precision"] or "float32"
        if before["weights"] is None and config.weights in ("imagenet", "none"):
            before["weights"] = config.weights  # before there was a default, None said what both say now

        allowed = may_change(values).union(forced)
        differences = []
        for name, value in values.items():
            if value != before.get(name) and name not in allowed:
                differences.append(f"{name} was {before.get(name)}, is {value}")
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
        """Add lines to metrics.jsonl.

        Raises:
            OSError: the file cannot be written, or the folder is gone.
        """
        self.check_presence()
        append_lines(self.metrics, lines)

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl from this run's evaluations; without annotations they have no AP."""
        return [line for line in read_lines(self.metrics) if "step" in line and "loss" not in line]

    def drop_metrics_after(self, step: int) -> list[str]:
        """Drop the lines of metrics.jsonl after a step: the resumed run writes them again. See `rewind`."""
        return rewind(self.metrics, step)


def _is_start(value: object) -> bool:
    """Tell whether this is what `RunFolder.claim` notes about a start."""
    return isinstance(value, dict) and type(value.get("world_size")) is int


def may_change(values: dict[str, Any]) -> set[str]:
    """Return the names of the values that may differ between two starts of a run that has `values`, as `flatten` does.

    The learning rate of a cosine and the size of the images depend on the length of the run.
    """
    depends_on_length = values["optim.schedule"] == "cosine" or values["data.half_size"]
    return MAY_CHANGE - {"epochs"} if depends_on_length else MAY_CHANGE


def values_before(record: dict[str, Any]) -> dict[str, Any]:
    """Return the values of config.json with dotted keys, by their present names.

    A field that is newer than the run had its default.
    """
    values = flatten(as_dict(Config()))
    for name, value in flatten(record).items():
        values[RENAMED.get(name, name)] = RENAMED_VALUES.get(name, {}).get(str(value), value)
    return values


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
