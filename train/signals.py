"""Requests to stop: signals are noted when they come, and the processes stop together between two steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.distributed import World

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


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

    Signals are caught inside `with`. A second signal of the same kind has its usual effect.

    Args:
        world: the processes that must agree.

    Attributes:
        received: number of the last signal that this process received; 0 if there was none.
    """

    def __init__(self, world: World):
        self.world = world
        self.received = 0
        self._previous_handlers: dict[int, Any] = {}
        self._pending: tuple[Tensor, dist.Work] | None = None

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous_handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        failed_beside_others = error is not None and self.world.size > 1
        if isinstance(error, Interrupted) or failed_beside_others:
            return  # a launcher then sends signals to all processes, and they must not cut off the last message
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = number
        usual_handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, usual_handler)

    def check(self) -> None:
        """Raise Interrupted if this process was asked to stop; for places where the processes need not agree."""
        if self.received:
            raise Interrupted(self.received, "during the evaluation; the checkpoint of this epoch is written")

    def agreed(self) -> int:
        """Return the signal that stops all processes after this step, or 0; all processes get the same answer.

        Each call starts an exchange and returns the result of the exchange that the previous call started, so that no
        process has to wait for an answer.
        """
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
