"""How a run ends when it cannot go on: one line for people, the details in a file, a status for scripts."""

from __future__ import annotations

import contextlib
import signal
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from detector.files import replacing
from detector.text import message_line, printable_lines, show, show_message
from train.distributed import CONNECTION_LOST, SharedError, World, end_reasons_of_others, tell_end_reason
from train.signals import Interrupted

# Errors that users cause or can fix, and those of the machine, get one line. All others are bugs and show their trace.
EXPECTED = (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError)


def explain(error: BaseException, *, eval_only: bool = False) -> str | None:
    """Return one line about an error, or None if it is a bug of this program.

    An evaluation (`eval_only`) has one image in a batch, so that smaller batches are no cure.
    """
    text = " ".join(str(error).split())
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text):
        return CONNECTION_LOST
    if isinstance(error, RuntimeError) and "DataLoader timed out" in text:
        return f"no images within --timeout: {text}. Does the disk of the images answer?"
    if isinstance(error, RuntimeError) and "DataLoader worker" in text and _is_lost_loader(text):
        reason = str(error).strip().splitlines()[-1]  # above is the trace of the process, if it could send one
        return f"lost a process that loads images: {message_line(reason)}. Was memory short? Try fewer --data.workers"
    if isinstance(error, torch.OutOfMemoryError):
        first_sentence = text.split(". ")[0]
        if eval_only:
            return f"{first_sentence}. Try --precision bf16"
        return f"{first_sentence}. Try a lower --data.batch-size with --optim.accumulate, or --precision bf16"
    if isinstance(error, EXPECTED):
        return message_line(error) or type(error).__name__  # a line break can be part of a file's name
    return None


def _is_lost_loader(text: str) -> bool:
    """Tell whether a process that loads images was killed or had no memory, rather than that its code has a bug."""
    return any(sign in text for sign in ("killed by signal", "exited unexpectedly", "shared memory", "ancdata"))


def report_error(error: BaseException, world: World | None, folder: Path | None, *, eval_only: bool = False) -> int:
    """Print why the run ends and return the exit status.

    Args:
        error: what was raised.
        world: the processes, if they have met; each of the others is told, and those that do not answer are named.
        folder: of the run; the trace goes into error-rankN.txt there, if it exists.
        eval_only: whether nothing was to be trained.
    """
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, Interrupted):
        return _report_interruption(error, world)
    if isinstance(error, SharedError):
        return _report_shared_error(error, world)

    rank = world.rank if world else 0
    trace = "".join(traceback.format_exception(error))
    message = explain(error, eval_only=eval_only)
    if message is None:
        show(trace, to_stderr=True)
        message = f"{type(error).__name__}, see above; this is a fault of the program"

    if world and world.size > 1:
        tell_end_reason(world, message)
        others = end_reasons_of_others(world) if message == CONNECTION_LOST else ""
        message = f"rank {rank}: {message}"
        if others:
            message += f"; {others}"
    show_message(f"error: {message}")

    if folder and folder.is_dir():
        with contextlib.suppress(OSError), replacing(folder / f"error-rank{rank}.txt") as partial:
            partial.write_text(printable_lines(trace), encoding="utf-8")
    return 1


def _report_shared_error(error: SharedError, world: World | None) -> int:
    if world is None or world.is_main:
        show_message(f"error: {message_line(error)}")
    if world is not None:
        with contextlib.suppress(RuntimeError):  # a process is gone
            world.barrier()  # a launcher ends all processes with the first one, and the line has to be out before
    return 1


def _report_interruption(error: Interrupted, world: World | None) -> int:
    name = signal.Signals(error.signal_number).name
    message = f"stopped by {name} {error.position}. The same command goes on from there"
    if world is None or world.is_main:
        show_message(message)
    else:
        tell_end_reason(world, message)
    return 128 + error.signal_number
