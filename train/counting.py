"""Counting an evaluation in a process of its own while the next epoch trains; nothing is lost if the run is stopped.

Before training goes on, `begin` leaves two files: OUT/uncounted.json, the detections, and checkpoints/candidate.pt,
their weights, which stay whatever --checkpoint.keep says. `close_books` removes them when the numbers are in
metrics.jsonl; a run that finds them at its start counts again.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from train.checkpoint import CANDIDATE, find, mark
from train.data.coco_dataset import CocoDetection
from train.evaluation.coco_metrics import write_results
from train.evaluation.validation import count
from train.run_folder import RunFolder

PATIENCE = 0.2  # seconds between two looks at signals


class Counting:
    """The evaluation that is being counted, if there is one. For the first process of a run.

    A process, because pycocotools would hold this one's interpreter lock; spawned, because a fork would take over the
    locks of threads and the state of the GPU.

    Args:
        run, dataset, evaluator: see `train.evaluation.validation.count`.

    Attributes:
        step: after which the model was evaluated; None if nothing is being counted.
    """

    def __init__(self, run: RunFolder, dataset: CocoDetection, evaluator: str):
        self.run, self.dataset, self.evaluator = run, dataset, evaluator
        self.candidate = run.checkpoints / CANDIDATE
        self.step: int | None = None

    def begin(self, step: int, epoch: int, rows: list[dict], seconds: float) -> None:
        """Start to count what was detected after a step, whose checkpoint is the newest."""
        mark(find(self.run.checkpoints)[0], CANDIDATE)
        write_results(self.run.uncounted, {"step": step, "epoch": epoch, "seconds": seconds, "rows": rows})
        self._start(step)

    def take_up(self, step: int) -> None:
        """Count what a stopped run left, unless it is written down, or from after `step`, where this one starts."""
        found = json.loads(self.run.uncounted.read_bytes())["step"] if self.run.uncounted.exists() else None
        if found is None or found > step or any(line["step"] == found for line in self.run.evaluations()):
            self.close_books()
        else:
            self._start(found)

    def collect(self) -> dict[str, Any] | None:
        """Return the line for metrics.jsonl if it is there; `close_books` when it is written.

        Raises:
            ChildProcessError: the process died.
            Exception: whatever it raised.
        """
        if self.step is None or not self._connection.poll():
            return None
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            lost = f"lost the process that counts the evaluation of step {self.step}"
            code = self._process.exitcode
            raise ChildProcessError(f"{lost} (exit code {code}). Was memory short? Try --eval-overlap 0") from None
        if isinstance(answer, dict):
            return answer
        error, trace = answer
        raise error from RuntimeError(f"in the process that counts:\n{trace}")

    def wait(self, between: Callable[[], None]) -> dict[str, Any] | None:
        """Return the line as `collect` does, when it is there; None if nothing is being counted.

        Args:
            between: is called now and then and may raise.
        """
        while self.step is not None and not self._connection.poll(PATIENCE):
            between()
        return self.collect()

    def close_books(self) -> None:
        """Forget the evaluation: its numbers are written, or its steps will be taken again."""
        self.stop()
        self.run.uncounted.unlink(missing_ok=True)
        self.candidate.unlink(missing_ok=True)

    def stop(self) -> None:
        """End the process; what it was counting can be taken up by the next start."""
        if self.step is not None:
            self._process.kill()  # it does not listen to other signals
            self._process.join()
            self._connection.close()
            self.step = None

    def _start(self, step: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe(duplex=False)
        arguments = (there, self.dataset, self.run, self.evaluator)
        self._process = context.Process(target=_work, args=arguments, name="counting", daemon=True)
        self._process.start()
        there.close()  # the process then has the only one, and its death is seen
        self.step = step


def _work(connection: Connection, dataset: CocoDetection, run: RunFolder, evaluator: str) -> None:
    """Be the process: count OUT/uncounted.json and send the line, or an error and its trace."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the training process decides when this one ends
        signal.signal(number, signal.SIG_IGN)
    try:
        content = json.loads(run.uncounted.read_bytes())
        line = count(content["rows"], content["seconds"], dataset, run, evaluator)
        answer = {"step": content["step"], "epoch": content["epoch"], **line}
    except Exception as error:
        answer = error, traceback.format_exc()
    with contextlib.suppress(BrokenPipeError):  # the training process was killed
        connection.send(answer)
