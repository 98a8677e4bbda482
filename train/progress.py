"""How far things are: a line that renews itself on a terminal, plain lines elsewhere.

In a file, a pipe or the log of a batch system nothing can be renewed. There a line is written from time to time,
without control characters.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

from detector.text import message_line

T = TypeVar("T")

REFRESH_SECONDS = 0.2  # between two states of a line on a terminal
LINE_SECONDS = 30.0  # at least, between two plain lines


class TrainingProgress:
    """The progress of a run. Its plain lines are the first reading of the losses, one every 30 seconds, and the last.

    Args:
        total_steps: of the whole run.
        first_step: steps that are finished already.
        enabled: whether to show anything.
    """

    def __init__(self, total_steps: int, first_step: int, enabled: bool):
        self._lines: _TimedLines | None = None
        if enabled and not _is_terminal():
            self._lines = _TimedLines()
        self._start = time.monotonic()
        self._total_steps = total_steps
        self._first_step = first_step
        self._step = first_step
        self._line = tqdm(
            desc="starting",
            total=total_steps,
            initial=first_step,
            disable=not enabled or self._lines is not None,
            mininterval=REFRESH_SECONDS,
            ncols=80,
            dynamic_ncols=True,
            bar_format="{desc} {n_fmt}/{total_fmt} {elapsed}<{remaining} |{bar}|",
        )

    def update(self, steps: int, text: str) -> None:
        """Add steps, and show a text about them."""
        self._line.set_description_str(text, refresh=False)
        self._line.update(steps)
        self._step += steps
        if self._lines is not None:
            self._lines.offer(self._describe(text))
            if self._step >= self._total_steps:
                self._lines.flush()

    def close(self) -> None:
        """End the line on a terminal; elsewhere write the last state if it has not been written."""
        self._line.close()
        if self._lines is not None:
            self._lines.flush()

    def _describe(self, text: str) -> str:
        """Return the same as the line on a terminal, without its bar."""
        seconds = time.monotonic() - self._start
        steps_left = max(0, self._total_steps - self._step)
        seconds_left = steps_left * seconds / (self._step - self._first_step)
        times = f"{tqdm.format_interval(seconds)}<{tqdm.format_interval(seconds_left)}"
        return f"{text} {self._step}/{self._total_steps} {times}"


class CountProgress:
    """The progress of a count to a total that may not be known. Its plain lines come every 30 seconds.

    Args:
        name: what is going on.
        total: where the count ends; None if that is not known.
        enabled: whether to show anything.
        announced: whether a plain line is written at once, and one at the end.
        is_bytes: whether bytes are counted.
        delay: seconds without a line on a terminal.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        enabled: bool,
        *,
        announced: bool = False,
        is_bytes: bool = False,
        delay: float = 0.0,
    ):
        self._lines: _TimedLines | None = None
        if enabled and not _is_terminal():
            self._lines = _TimedLines(starts_now=announced)
        self._name = name
        self._total = total
        self._count = 0
        self._announced = announced
        self._format: Callable[[int], str] = tqdm.format_sizeof if is_bytes else str
        self._line = tqdm(
            desc=name,
            total=total,
            disable=not enabled or self._lines is not None,
            delay=delay,
            mininterval=REFRESH_SECONDS,
            leave=announced,
            unit="B" if is_bytes else "it",
            unit_scale=is_bytes,
            dynamic_ncols=True,
        )
        self.update(0)

    def update(self, count: int = 1) -> None:
        """Add to the count."""
        self._line.update(count)
        self._count += count
        if self._lines is not None:
            total = "" if self._total is None else f"/{self._format(self._total)}"
            self._lines.offer(f"{self._name}: {self._format(self._count)}{total}")

    def __enter__(self) -> CountProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._line.close()
        if self._lines is not None and self._announced:
            self._lines.flush()


class _TimedLines:
    """Prints the first of the texts that are offered, then one every `LINE_SECONDS`.

    Args:
        starts_now: whether the first text is printed at once.
    """

    def __init__(self, starts_now: bool = True):
        self._next_time = time.monotonic()
        if not starts_now:
            self._next_time += LINE_SECONDS
        self._waiting = ""

    def offer(self, text: str) -> None:
        """Print a text if it is time for one."""
        self._waiting = text
        if time.monotonic() >= self._next_time:
            self.flush()

    def flush(self) -> None:
        """Print the last text that was offered, unless it has been."""
        if self._waiting:
            print_above_progress(self._waiting)
            self._waiting = ""
            self._next_time = time.monotonic() + LINE_SECONDS


def evaluation_progress(batches: Iterable[T], total: int, enabled: bool) -> Iterator[T]:
    """Yield `batches`, of which there are `total`, with a line that disappears at the end."""
    with CountProgress("evaluating", total, enabled) as progress:
        for batch in batches:
            yield batch
            progress.update()


def download_progress(name: str, size: int | None, enabled: bool) -> CountProgress:
    """Return the progress of a download, in bytes; one that takes less than a second shows none."""
    return CountProgress(f"fetching {name}", size, enabled, is_bytes=True, delay=1.0)


def print_above_progress(text: str) -> None:
    """Print a line to stderr without disturbing a progress line."""
    tqdm.write(message_line(text), file=sys.stderr)


def _is_terminal() -> bool:
    """Tell whether a line can renew itself: on a terminal, unless that has no size, as some of containers."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:
        return False
