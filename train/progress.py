"""The progress lines on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from detector.text import message_line

T = TypeVar("T")


def training_progress(total_steps: int, first_step: int, enabled: bool) -> tqdm[None]:
    """Return the progress line of a run."""
    return tqdm(
        desc="starting",
        total=total_steps,
        initial=first_step,
        disable=not enabled,
        mininterval=_refresh_seconds(),
        ncols=80,
        dynamic_ncols=sys.stderr.isatty(),
        bar_format="{desc} {n_fmt}/{total_fmt} {elapsed}<{remaining} |{bar}|",
    )


def evaluation_progress(batches: Iterable[T], enabled: bool) -> Iterable[T]:
    """Return `batches` with a progress line that disappears at the end."""
    progress: Iterable[T] = tqdm(
        batches,
        "evaluating",
        leave=False,
        disable=not enabled,
        mininterval=_refresh_seconds(),
        dynamic_ncols=True,
    )
    return progress


def download_progress(name: str, size: int | None, enabled: bool) -> tqdm[None]:
    """Return the progress line of a download, in bytes; one that takes less than a second shows none."""
    return tqdm(
        desc=f"fetching {name}",
        total=size,
        disable=not enabled,
        delay=1.0,
        mininterval=_refresh_seconds(),
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
    )


def print_above_progress(text: str) -> None:
    """Print a line to stderr without disturbing a progress line."""
    tqdm.write(message_line(text), file=sys.stderr)


def _refresh_seconds() -> float:
    """Return the seconds between two refreshes; a log file gets a line only now and then."""
    return 0.2 if sys.stderr.isatty() else 30.0
