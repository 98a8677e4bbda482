"""Processes of the training script that have nothing left to import: a server imports once, and forks them.

To start each anew takes longer than what most of them compute; the tests' own process has threads, and may have a GPU,
which are nothing to fork.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

import train.main

MAIN = Path(__file__).parents[2] / "train" / "main.py"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


class ScriptProcess:
    """The training script, or torchrun with it, in a process and a process group of its own.

    Args:
        arguments: of the script.
        torchrun: arguments of torchrun; None for the script alone.
        variables: the whole environment.
        printed: file for stdout and stderr.
    """

    def __init__(
        self, arguments: Sequence[str], torchrun: Sequence[str] | None, variables: dict[str, str], printed: Path
    ):
        self.printed = printed
        self._process = CONTEXT.Process(target=_run, args=(arguments, torchrun, variables, printed))
        self._process.start()
        self.pid = self._process.pid

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """End it at once, and all that it started."""
        self._process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()

    def finish(self, seconds: float = 200.0) -> tuple[int, str]:
        """Wait for its end; return the exit status and what was printed."""
        self._process.join(seconds)
        text = self.printed.read_text()
        assert not self.is_alive(), text
        return self._process.exitcode, text


def _run(arguments: Sequence[str], torchrun: Sequence[str] | None, variables: dict[str, str], printed: Path) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    with printed.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(1)
    if torchrun is None:
        sys.argv = [str(MAIN), *arguments]
        sys.exit(train.main.main())

    from torch.distributed.run import main as run_all

    run_all([*torchrun, str(MAIN), *arguments])
