"""Commands that run one after another, each in a process of its own that is stopped when its time is up.

`bench.gpu` and `bench.gpu_kit.plan` are lists of such steps: one that hangs, fails or takes too long costs nothing but
itself, and what a step wrote before stays.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from detector.files import replacing

TIMED_OUT = 124
"""Status of a step that was stopped, as of the command `timeout`."""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of its output file, without the ending.
        command: program and arguments.
        seconds: after which it is stopped.
        shown: regular expression of the lines to show; all of them by default. The output file has every line.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    shown: str = ""


def python_step(name: str, module: str, arguments: Sequence[str], seconds: float, shown: str = "") -> Step:
    """Return the step that runs a module with this Python."""
    return Step(name, (sys.executable, "-m", module, *arguments), seconds, shown)


def run_steps(steps: Sequence[Step], folder: Path, prefix: str, deadline: float) -> Iterator[tuple[Step, int | None]]:
    """Run steps and yield each with its exit status, `TIMED_OUT`, or None where no time was left for it.

    What a step prints is in folder/prefix-NAME.txt.

    Args:
        steps: in the order to run.
        folder: of the files.
        prefix: of their names.
        deadline: in seconds of time.monotonic(); a step may not run beyond it.
    """
    for step in steps:
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"bench: no time left for {step.name}", file=sys.stderr, flush=True)
            yield step, None
            continue
        print(f"\n## {step.name}\n", flush=True)
        start = time.monotonic()
        status = run_step(step, folder / f"{prefix}-{step.name}.txt", min(step.seconds, left))
        taken = time.monotonic() - start
        result = "stopped" if status == TIMED_OUT else f"status {status}"
        print(f"-- {step.name}: {result} after {taken:.0f} s", flush=True)
        yield step, status


def run_step(step: Step, output: Path, seconds: float) -> int:
    """Run one step for at most `seconds`, write what it prints to a file, and return its exit status."""
    shown = re.compile(step.shown)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    try:
        process = subprocess.Popen(
            step.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,  # so that the processes that it starts can be stopped with it
        )
    except OSError as error:  # a tool that is not installed
        output.write_text(f"{error}\n")
        print(f"bench: {step.name} failed: {error}", file=sys.stderr, flush=True)
        return 127

    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        assert process.stdout is not None
        with output.open("w") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if shown.search(line):
                    print(line, end="", flush=True)
        status = process.wait()
    except BaseException:  # Ctrl-C reaches this process alone, as the step has a session of its own
        stop()
        process.wait()
        raise
    finally:
        timer.cancel()
    return TIMED_OUT if stopped.is_set() else status


def write_archive(folder: Path, archive: Path) -> None:
    """Pack a folder, in place of the archive that was written before; the archive may lie in the folder itself."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with replacing(archive) as partial, tarfile.open(partial, "w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            if not path.is_dir() and path.resolve() not in (archive.resolve(), partial.resolve()):
                tar.add(path, arcname=f"./{path.relative_to(folder)}")
