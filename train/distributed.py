"""The processes of a run: how they meet, exchange values and tell each other why they end.

With one process every function here works without communication, so the training loop has no second path.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import ipaddress
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from detector.text import show_message

T = TypeVar("T")

END_REASON_SECONDS = 5.0  # how long a process waits for the others to tell why they end
CONNECTION_LOST = "lost the connection to the other processes"


class SharedError(ValueError):
    """An error of the whole run, which all processes raise with the same text; rank 0 alone prints it."""


@dataclass
class World:
    """This process among all processes of the run.

    Attributes:
        rank: number of this process.
        size: number of processes.
        local_rank: number of this process on its machine.
        device: where it computes.
        store: small dictionary that the processes share; None for a single one.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over the processes."""
        if self.size == 1:
            return values
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

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes on rank 0, an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[T] | None = [value] * self.size if self.is_main else None
        dist.gather_object(value, values)
        return values or []

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on all processes."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.sum(0)


def world_size_from_environment() -> int:
    """Return how many processes were started, as WORLD_SIZE tells.

    Raises:
        ValueError: it is not a number.
    """
    return _read_number("WORLD_SIZE", 1) or 1


def join_processes(device: str, timeout: float) -> World:
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
    rank_or_none = _read_number("RANK", 0)
    size_or_none = _read_number("WORLD_SIZE", 1)
    local_rank_or_none = _read_number("LOCAL_RANK", 0)
    if (rank_or_none is None) != (size_or_none is None):
        raise ValueError("RANK, WORLD_SIZE: expected both or neither, got one; start several processes with torchrun")

    rank = rank_or_none or 0
    size = size_or_none or 1
    local_rank = rank if local_rank_or_none is None else local_rank_or_none
    if rank >= size:
        raise ValueError(f"RANK: expected less than WORLD_SIZE = {size}, got {rank}")

    own_device = _choose_device(device, local_rank)
    if size == 1:
        return World(0, 1, 0, own_device)

    store = _init_process_group(rank, size, own_device, timeout)
    return World(rank, size, local_rank, own_device, store)


def _init_process_group(rank: int, size: int, device: torch.device, timeout: float) -> dist.Store:
    """Start PyTorch's process group; return a store for the reasons of `tell_end_reason`.

    Raises:
        ValueError: MASTER_PORT is missing.
        ConnectionError: see `join_processes`.
    """
    host = os.environ.get("MASTER_ADDR", "localhost")
    port = _read_number("MASTER_PORT", 1)
    if port is None:
        raise ValueError("MASTER_PORT: expected a port, as WORLD_SIZE is set, got none; use torchrun")
    address = f"{host}:{port}"
    torchrun_has_server = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_server = rank == 0 and not torchrun_has_server
    limit = timedelta(seconds=timeout)

    # A foreign server behind the port never answers, and TCPStore would wait for it without end.
    message = f"rank {rank} of {size} got no answer at {address}"
    watchdog = threading.Timer(timeout + END_REASON_SECONDS, _exit_with_error, (message,))
    watchdog.daemon = True
    watchdog.start()
    try:
        server = _connect(host, port, is_server, limit)
        group_name = _rendezvous(server, rank, size, timeout)
        store = dist.PrefixStore(group_name, server)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        group_store = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group_store, rank=rank, world_size=size, timeout=limit)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"rank {rank} of {size} cannot meet the others at {address}: {reason}") from error
    finally:
        watchdog.cancel()
    return dist.PrefixStore("end-reasons", store)


def _connect(host: str, port: int, is_server: bool, timeout: timedelta) -> dist.TCPStore:
    """Connect to the store of rank 0; with `is_server` start it.

    Raises:
        OSError, RuntimeError: see `_bind`, or nobody answered in time.
    """
    listener = _bind(host, port) if is_server else None
    connect = functools.partial(
        dist.TCPStore,
        host,
        port,
        is_master=is_server,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener,
    )
    try:
        return connect()
    except NotImplementedError:  # libuv's server takes no socket in torch 2.7
        return connect(use_libuv=False)


def _bind(host: str, port: int) -> int | None:
    """Return a socket for the store of rank 0, bound to the first address of this machine that `host` stands for.

    Other machines must reach `host`. So if it stands for an address in front of this machine (a Kubernetes service, a
    router), or is a name that stands for 127.0.1.1 here and for another address elsewhere (as Debian names a machine to
    itself), rank 0 listens at every address, and says so.

    Returns:
        The file descriptor, which PyTorch's store will close; None to listen at every address.

    Raises:
        OSError: `host` is unknown, or the port is taken at one of its addresses.
    """
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(info[4][0]) for info in infos]
    is_name = host != "localhost" and host not in addresses
    if is_name and all(ipaddress.ip_address(address).is_loopback for address in addresses):
        infos = []

    listener = None
    for family, kind, protocol, _, address in infos:
        try:
            with socket.socket(family, kind, protocol) as candidate:
                candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections may still end
                candidate.bind(address)
                if listener is None:
                    listener = candidate.detach()
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # not of this machine
                reason = os.strerror(error.errno or 0).lower()
                raise OSError(f"{address[0]}: {reason}") from error

    if listener is None:
        places = ", ".join(addresses)
        show_message(f"rank 0 listens at every address of this machine, as MASTER_ADDR {host} stands for {places} here")
    return listener


def _exit_with_error(message: str) -> None:
    show_message(f"error: {message}")
    os._exit(1)


def _rendezvous(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """Agree on a name that no earlier group of processes had, and find out who is missing.

    The store outlives the processes that torchrun restarts, and what they wrote must not be read again. So every
    process registers with a random token of its own, and rank 0 answers exactly that token with the name of the group.

    Raises:
        RuntimeError: a process did not come in time.
    """
    token = uuid.uuid4().hex
    if rank != 0:
        store.set(f"hello/{rank}", token)
        group_name: str = store.get(f"name/{token}").decode()
        store.set(f"here/{group_name}/{rank}", "")
        return group_name

    group_name = token
    missing = set(range(1, size))
    deadline = time.monotonic() + timeout
    while missing:
        if time.monotonic() > deadline:
            ranks = ", ".join(map(str, sorted(missing)))
            raise RuntimeError(f"rank {ranks} did not come within {timeout:g} s")
        for other_rank in sorted(missing):
            if store.check([f"hello/{other_rank}"]):
                other_token = store.get(f"hello/{other_rank}").decode()
                store.set(f"name/{other_token}", group_name)
            if store.check([f"here/{group_name}/{other_rank}"]):
                missing.remove(other_rank)
        time.sleep(0.02)
    return group_name


def leave_processes(world: World) -> None:
    """Close the process group at the end of a run that went well."""
    if world.size > 1:
        world.barrier()
        dist.destroy_process_group()


def raise_together(world: World, problem: str) -> None:
    """Raise an error on all processes if one of them has a problem; all of them call this.

    Args:
        world: the processes.
        problem: what this one has; "" if nothing.

    Raises:
        SharedError: the problems, each with the ranks that have it.
    """
    ranks: dict[str, list[str]] = {}
    for rank, problem_of_rank in enumerate(world.gather(problem)):
        if problem_of_rank:
            ranks.setdefault(problem_of_rank, []).append(str(rank))
    text = "; ".join(f"rank {', '.join(ranks[problem])}: {problem}" for problem in ranks)
    if world.size == 1:
        text = problem
    text = world.broadcast(text)
    if text:
        raise SharedError(text)


def tell_end_reason(world: World, reason: str) -> None:
    """Tell the other processes why this one ends."""
    if world.store is not None:
        with contextlib.suppress(RuntimeError):  # the server of the store was in a process that is gone
            world.store.set(str(world.rank), reason)


def end_reasons_of_others(world: World) -> str:
    """Return why the other processes ended, and which of them did not tell; "" if all only lost the connection.

    A process that loses its connection knows only that another one is gone. Every process that still can tells its
    reason. One that does not tell within a few seconds was killed, or its machine is lost.
    """
    if world.store is None:
        return ""
    other_ranks = [rank for rank in range(world.size) if rank != world.rank]
    reasons: dict[int, str] = {}
    deadline = time.monotonic() + END_REASON_SECONDS
    try:
        while len(reasons) < len(other_ranks) and time.monotonic() < deadline:
            for rank in other_ranks:
                if rank not in reasons and world.store.check([str(rank)]):
                    reasons[rank] = world.store.get(str(rank)).decode()
            time.sleep(0.05)
    except RuntimeError:
        return "rank 0 is gone: killed, or its machine is lost"

    parts = [f"rank {rank}: {reason}" for rank, reason in sorted(reasons.items()) if reason != CONNECTION_LOST]
    silent_ranks = [str(rank) for rank in other_ranks if rank not in reasons]
    if silent_ranks:
        parts.append(f"no word from rank {', '.join(silent_ranks)}: killed, or its machine is lost")
    return "; ".join(parts)


def _read_number(name: str, minimum: int) -> int | None:
    """Return the number in an environment variable, or None if it is not set.

    Raises:
        ValueError: it holds something else.
    """
    text = os.environ.get(name)
    if text is None or text == "":
        return None
    if not text.isdigit() or int(text) < minimum:
        raise ValueError(f"environment variable {name}: expected a number from {minimum}, got {text!r}")
    return int(text)


def _choose_device(name: str, local_rank: int) -> torch.device:
    """Return the device of this process: the GPU with its number on this machine, or the CPU.

    Raises:
        ValueError: there is no such GPU.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError("--device cuda: expected a GPU on this machine, got none that PyTorch can use")
    if local_rank >= count:
        raise ValueError(f"LOCAL_RANK: expected less than the number of GPUs, {count}, got {local_rank}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
