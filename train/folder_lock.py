"""A lock on a folder: one run at a time writes into it. The kernel releases it however the process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

NAME = ".lock"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems that have none

_held: set[int] = set()  # open locks of this process


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder; give the block whether the file system has locks at all.

    Without them, as on some network file systems, nothing keeps a second run out. Processes that are forked inside the
    block do not hold the lock.

    Raises:
        BlockingIOError: another process holds the lock; the message is its number and its host.
        OSError: the file of the lock cannot be written, or is a symbolic link.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(folder / NAME, flags, 0o666)
    _held.add(handle)
    try:
        has_locks = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(_read_holder(handle)) from error
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            has_locks = False
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield has_locks
    finally:
        _held.discard(handle)
        with contextlib.suppress(OSError):
            os.close(handle)


def _read_holder(handle: int) -> str:
    """Return what the holder of a lock has written about itself."""
    text = os.pread(handle, 300, 0).decode("ascii", "replace").strip()
    return text if text.startswith("process ") and text.isprintable() else "another process"


def _forget() -> None:
    """Close the locks in a forked process, so that they end with the process that took them."""
    for handle in _held:
        with contextlib.suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
