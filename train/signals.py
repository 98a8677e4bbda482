"""Requests to stop: signals are noted when they come, and the processes stop together between two steps.

Where no step ends any more, because a file system, an image loader or another process does not answer, a thread ends
the process after a while: the first signal always works.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.distributed import World

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

STOP_SECONDS = 60.0  # after a signal, for the step to end; twice the time of the last step if that is more
SECOND_SIGNAL_SECONDS = 5.0  # after a second one of the same kind, for its usual effect
STDERR = 2  # its file descriptor: the main thread may hold the lock of sys.stderr
_CLOSE = 0  # in the place of a signal's number: there is nothing to watch any more


class Interrupted(Exception):
    """A signal asked the run to stop.

    Args:
        signal_number: of the signal.
        position: where the run stopped, for the message.
    """

    def __init__(self, signal_number: int, position: str):
        super().__init__(signal_number, position)
        self.signal_number = signal_number
        self.position = position


class StopRequest:
    """SIGINT, SIGTERM and SIGUSR1 as a request on which all processes agree between two steps.

    Signals are caught inside `with`. A second signal of the same kind has its usual effect. If the block does not end
    within `STOP_SECONDS` after the first one, or `timeout` if that is less, the process ends without it.

    Args:
        world: the processes that must agree.
        timeout: the longest time in seconds that a process waits for anything.

    Attributes:
        received: number of the last signal that this process received; 0 if there was none.
    """

    def __init__(self, world: World, timeout: float = 600.0):
        self.world = world
        self.timeout = timeout
        self.received = 0
        self._previous_handlers: dict[int, Any] = {}
        self._pending: tuple[Tensor, dist.Work] | None = None
        self._step_seconds = 0.0  # of the last step
        self._last_step_end = time.monotonic()

    def __enter__(self) -> StopRequest:
        # Python calls handlers between two of its instructions, so not while it waits in compiled code. The number of
        # the signal goes into a pipe at once, to a thread.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        for number in STOP_SIGNALS:
            self._previous_handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._previous_wakeup)
        os.write(self._writer, bytes([_CLOSE]))
        self._watcher.join()
        os.close(self._reader)
        os.close(self._writer)

        failed_beside_others = error is not None and self.world.size > 1
        if isinstance(error, Interrupted) or failed_beside_others:
            return  # a launcher then sends signals to all processes, and they must not cut off the last message
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = number
        usual_handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, usual_handler)

    def _watch(self) -> None:
        """Wait for signals, then for the end of the block; end the process if that takes too long."""
        received: list[int] = []
        deadline = None
        while True:
            seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not _is_readable(self._reader, seconds):
                self._end_process(received[0])
            for number in os.read(self._reader, 512):
                if number == _CLOSE:
                    return
                if number not in STOP_SIGNALS:
                    continue
                seconds = SECOND_SIGNAL_SECONDS
                if number not in received:
                    seconds = min(self.timeout, max(STOP_SECONDS, 2 * self._step_seconds))
                received.append(number)
                new_deadline = time.monotonic() + seconds
                deadline = new_deadline if deadline is None else min(deadline, new_deadline)

    def _end_process(self, number: int) -> None:
        """End this process, whatever its main thread waits for, and those that load images for it."""
        with contextlib.suppress(Exception):  # nothing may keep this thread from the last line
            message = (
                f"stopped by {signal.Signals(number).name} without a checkpoint of its own: the step did not end. "
                "The same command goes on from the last checkpoint"
            )
            if self.world.size > 1:
                message = f"rank {self.world.rank}: {message}"
            for child in multiprocessing.active_children():
                child.kill()
            with contextlib.suppress(OSError):  # nobody reads it any more
                if select.select([], [STDERR], [], 1.0)[1]:  # nobody may be reading it at the moment
                    os.write(STDERR, f"\n{message}\n".encode())
        os._exit(128 + number)

    def check(self) -> None:
        """Raise Interrupted if this process was asked to stop; for places where the processes need not agree."""
        if self.received:
            raise Interrupted(self.received, "during the evaluation; the checkpoint of this epoch is written")

    def agreed(self) -> int:
        """Return the signal that stops all processes after this step, or 0; all processes get the same answer.

        Each call starts an exchange and returns the result of the exchange that the previous call started, so that no
        process has to wait for an answer.
        """
        now = time.monotonic()
        self._step_seconds = now - self._last_step_end
        self._last_step_end = now
        if self.world.size == 1:
            return self.received

        answer = 0
        if self._pending is not None:
            received_by_any, exchange = self._pending
            exchange.wait()
            answer = int(received_by_any)

        received_by_any = torch.tensor([self.received])
        exchange = dist.all_reduce(received_by_any, dist.ReduceOp.MAX, async_op=True)
        self._pending = (received_by_any, exchange)
        return answer


def _is_readable(handle: int, seconds: float | None) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(None if seconds is None else 1000 * seconds))


def _stop_watching() -> None:
    """Keep the signals of a forked process from the watcher of the process that it was forked from."""
    signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_stop_watching)
