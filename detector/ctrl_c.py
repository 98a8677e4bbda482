"""Ctrl-C in a command: no traceback, and time to write what was found. Imports the standard library alone."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType


def quiet_imports() -> Callable[[], object]:
    """Let Ctrl-C end the process at once while a command imports this package, which takes seconds.

    Elsewhere, in a program that imports the package, nothing changes.

    Returns:
        A function that undoes it.
    """
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    is_command = program == "-m" or program.startswith("dcn-")  # `python -m`, while it looks for the module; a script
    if not is_command or not _raises_keyboard_interrupt():
        return lambda: None
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return lambda: signal.signal(signal.SIGINT, signal.default_int_handler)


class CtrlC:
    """In a `with` block the first Ctrl-C raises KeyboardInterrupt, and those after it do nothing.

    Nor do they where the process ends, as Python would show tracebacks of what it interrupts there.

    Where Ctrl-C does something else before, as under `nohup`, nothing changes.
    """

    def __enter__(self) -> CtrlC:
        self._is_active = _raises_keyboard_interrupt()
        if self._is_active:
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_active:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)

    def ignore(self) -> None:
        """Ignore Ctrl-C up to the end of the block: what is left to do takes a moment."""
        if self._is_active:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.ignore()
        raise KeyboardInterrupt


def _raises_keyboard_interrupt() -> bool:
    """Tell whether Ctrl-C does what Python makes it do, and may be changed from here."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    return is_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
