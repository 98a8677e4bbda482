"""The processes of a run: how they find each other, agree and compute means, and how they fail in words.

With one process every function here is free of communication, so the training loop has no second path.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = 5.0  # seconds that a process waits for the last words of the others
LOST = "lost the connection to the other processes"


@dataclass
class World:
    """This process among all of them.

    Attributes:
        rank, size: number of this process, and of how many.
        local_rank: number on its machine.
        device: where it computes.
        store: small shared dictionary of the processes; None for a single one.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: dist.Store | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over the processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    def sum(self, value: int) -> int:
        """Return the sum of an integer over the processes."""
        if self.size == 1:
            return value
        total = torch.tensor([value])
        dist.all_reduce(total)
        return int(total)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes to the first one, an empty list to the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.first else None
        dist.gather_object(value, values)
        return values or []

    def broadcast(self, value: Any) -> Any:
        """Return the first process's value to all of them."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.sum(0)


def announced() -> int:
    """Return how many processes were started, as WORLD_SIZE tells.

    Raises:
        ValueError: it is no number.
    """
    return _number("WORLD_SIZE", 1) or 1


def join(device: str, timeout: float) -> World:
    """Join the processes that torchrun, Slurm or a shell script started; alone if there are none.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Tensors on a GPU travel by NCCL, everything else by
    gloo.

    Args:
        device: "auto", "cpu" or "cuda".
        timeout: seconds to wait for the others, here and in every exchange.

    Raises:
        ValueError: the variables contradict each other or the machine.
        ConnectionError: the others did not come in time, or the port is taken.
    """
    rank, size, local = (_number(name, low) for name, low in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if (rank is None) != (size is None):
        raise ValueError("of RANK and WORLD_SIZE only one is set; start several processes with torchrun")
    rank, size = rank or 0, size or 1
    local = rank if local is None else local
    if rank >= size:
        raise ValueError(f"RANK is {rank} but WORLD_SIZE only {size}")
    where = _device(device, local)
    if size == 1:
        return World(0, 1, 0, where)
    limit = timedelta(seconds=timeout)
    address, port = os.environ.get("MASTER_ADDR", "localhost"), _number("MASTER_PORT", 1)
    if port is None:
        raise ValueError("WORLD_SIZE is set but MASTER_PORT is not; start several processes with torchrun")
    server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun has one
    place = f"{address}:{port}"
    # A foreign server behind the port never answers, and the store would wait for it for ever.
    alarm = threading.Timer(timeout + PATIENCE, _give_up, (f"rank {rank} of {size} got no answer at {place}",))
    alarm.daemon = True
    alarm.start()
    try:
        store = dist.TCPStore(address, port, is_master=server, timeout=limit, wait_for_workers=False)
        store = dist.PrefixStore(_meet(store, rank, size, timeout), store)
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        group = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=limit)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"rank {rank} of {size} cannot meet the others at {place}: {reason}") from error
    finally:
        alarm.cancel()
    return World(rank, size, local, where, dist.PrefixStore("words", store))


def _give_up(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _meet(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """Agree on a name that no group of processes had before, and find out who is missing.

    The store outlives the processes that torchrun restarts, and what they wrote must not be read again. So every
    process says hello with a word of its own, and the first one answers exactly that word with the name.
    """
    word = uuid.uuid4().hex
    if rank:
        store.set(f"hello/{rank}", word)
        name = store.get(f"name/{word}").decode()
        store.set(f"here/{name}/{rank}", "")
        return name
    missing, end = set(range(1, size)), time.monotonic() + timeout
    while missing:
        if time.monotonic() > end:
            raise RuntimeError(f"rank {', '.join(map(str, sorted(missing)))} did not come within {timeout:g} s")
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):
                store.set(f"name/{store.get(f'hello/{other}').decode()}", word)
            if store.check([f"here/{word}/{other}"]):
                missing.remove(other)
        time.sleep(0.02)
    return word


def leave(world: World) -> None:
    """Say good-bye to the other processes after a run that went well."""
    if world.size > 1:
        world.barrier()
        dist.destroy_process_group()


def leave_word(world: World, reason: str) -> None:
    """Tell the other processes why this one ends."""
    if world.store is not None:
        with contextlib.suppress(RuntimeError):  # the store was in a process that is gone
            world.store.set(str(world.rank), reason)


def words_of_others(world: World) -> str:
    """Return why the other processes ended, naming those that said nothing; an empty string if all only lost touch.

    A process that loses its connection knows only that somebody is gone. Every process that still can leaves a word;
    who leaves none within a few seconds was killed or lost its machine.
    """
    others = [rank for rank in range(world.size) if rank != world.rank]
    end, words = time.monotonic() + PATIENCE, {}
    try:
        while len(words) < len(others) and time.monotonic() < end:
            for rank in others:
                if rank not in words and world.store.check([str(rank)]):
                    words[rank] = world.store.get(str(rank)).decode()
            time.sleep(0.05)
    except RuntimeError:
        return "rank 0 is gone: killed, or its machine is lost"
    silent = [str(rank) for rank in others if rank not in words]
    told = [f"rank {rank}: {word}" for rank, word in sorted(words.items()) if word != LOST]
    if silent:
        told.append(f"no word from rank {', '.join(silent)}: killed, or its machine is lost")
    return "; ".join(told)


class Interrupted(Exception):
    """A signal asked the run to stop; `args` are its number and what to say."""


class StopRequest:
    """SIGINT, SIGTERM and SIGUSR1 as a wish that the processes grant together, between two steps.

    A second signal of the same kind has its usual effect.

    Args:
        world: the processes that must agree.
    """

    def __init__(self, world: World):
        self.world, self.received, self._pending = world, 0, None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)

    def check(self) -> None:
        """Raise Interrupted if this process was asked to stop: where nothing is lost and nobody needs to agree."""
        if self.received:
            raise Interrupted(self.received, "during the evaluation; the checkpoint of this epoch is written")

    def agreed(self) -> int:
        """Return the signal on which all processes stop after this step, or 0; every process gets the same answer.

        The question is asked one step ahead, so that nobody waits for the answer.
        """
        if self.world.size == 1:
            return self.received
        answer = 0
        if self._pending is not None:
            wish, work = self._pending
            work.wait()
            answer = int(wish)
        wish = torch.tensor([self.received])
        self._pending = wish, dist.all_reduce(wish, dist.ReduceOp.MAX, async_op=True)
        return answer


def _number(name: str, low: int) -> int | None:
    text = os.environ.get(name)
    if text is None or text == "":
        return None
    if not text.isdigit() or int(text) < low:
        raise ValueError(f"the environment variable {name} must be a number from {low}, got {text!r}")
    return int(text)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError("--device cuda: PyTorch finds no GPU on this machine")
    if local_rank >= count:
        raise ValueError(f"process {local_rank} of this machine needs a GPU of its own, but there are {count}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
