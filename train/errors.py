"""How a run ends when it cannot go on: one line for people, the details in a file, a status for scripts."""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from train.distributed import LOST, Interrupted, World, leave_word, words_of_others

# What users cause or can mend, and the machine's own faults: these get one line. All else is a bug and shows its trace.
EXPECTED = (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError)


def explain(error: BaseException) -> str | None:
    """Return one line about an error, or None if it is a bug of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text):
        return LOST
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return f"lost a process that loads images: {text}. Was memory short? Try fewer --data.workers"
    if isinstance(error, torch.OutOfMemoryError):
        return f"{text.split('. ')[0]}. Try a lower --data.batch with --optim.accumulate, or --amp bf16"
    if isinstance(error, EXPECTED):
        return text or type(error).__name__
    return None


def report(error: BaseException, world: World | None, folder: Path | None) -> int:
    """Print why the run ends and return the exit status.

    Args:
        error: what was raised.
        world: the processes, if they had met; each of the others is told, and those that fell silent are named.
        folder: of the run; the trace goes into error-rankN.txt there, if it exists.
    """
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, Interrupted):
        number, text = error.args
        word = f"stopped by {signal.Signals(number).name} {text}. The same command goes on from there"
        if world is None or world.first:
            print(word, file=sys.stderr, flush=True)
        else:
            leave_word(world, word)
        return 128 + number
    line, rank = explain(error), world.rank if world else 0
    trace = "".join(traceback.format_exception(error))
    if line is None:
        print(trace, file=sys.stderr)
        line = f"{type(error).__name__}, see above; this is a fault of the program"
    if world and world.size > 1:
        leave_word(world, line)
        others = words_of_others(world) if line == LOST else ""
        line = f"rank {rank}: {line}" + (f"; {others}" if others else "")
    print(f"error: {line}", file=sys.stderr, flush=True)
    if folder and folder.is_dir():
        with contextlib.suppress(OSError):
            (folder / f"error-rank{rank}.txt").write_text(trace)
    return 1
