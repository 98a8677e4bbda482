"""Files that are read without waiting, and appear under their name only when they are complete."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

MAX_SUFFIX_LENGTH = 16  # characters of a suffix that a temporary name keeps

# The name of a temporary file that a killed writer left; the other two forms are those of earlier versions.
_LEFTOVER = re.compile(r"\.partial-[0-9a-f]{16}(\.[^.]*)?|\.\d+\..+|\.partial-\d+", re.DOTALL)
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, a quota, a limit on the size of files


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading, without waiting: a pipe might never have a writer, and a device might never end.

    Raises:
        OSError: the file cannot be opened, or is a pipe, a device or a folder; the message names it.
    """
    file = open(path, "rb", opener=open_without_waiting)  # noqa: SIM115  # the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path}: expected a regular file, got a pipe or a device")
    return file


def open_without_waiting(path: str, flags: int) -> int:
    """Open a file, as an `opener` of `open`; a pipe without a writer opens at once."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has neither the flag nor such pipes


@contextlib.contextmanager
def replacing(path: str | Path, *, durable: bool = False, size: int | None = None) -> Iterator[Path]:
    """Give the block a temporary file beside `path`; rename it to `path` when the block ends well.

        with replacing("results.json") as partial:
            partial.write_text(text)

    Whatever happens, `path` holds its old content or the whole new one, and nothing temporary is left behind. The
    temporary file has a name that nobody can predict, and is created anew with the permissions of any other file. If
    `path` is a symbolic link, the link itself is replaced, and what it leads to stays as it is: nothing is written
    through a link that somebody else has put there. Links to the folder of `path` are followed.

    Args:
        path: the file to write; its folder must exist.
        durable: wait until the disk has the bytes and the new name, so that a power cut cannot lose them.
        size: bytes that will be written, if they are known, for the message about a full disk.

    Raises:
        FileNotFoundError: the folder does not exist, or the block has written nothing.
        OSError: the file cannot be written, renamed or, with `durable`, forced to the disk; the message names `path`.
    """
    path = Path(path)
    suffix = path.suffix if len(path.suffix) <= MAX_SUFFIX_LENGTH else ""  # writers choose their format by it
    partial = path.with_name(f".partial-{secrets.token_hex(8)}{suffix}")
    try:
        partial.open("xb").close()
    except OSError as error:
        raise writing_error(error, path, size) from error
    try:
        yield partial
        if partial.stat().st_size == 0:
            raise FileNotFoundError(errno.ENOENT, "nothing was written", str(partial))
        if durable:
            _sync(partial)
        partial.replace(path)
        if durable:
            _sync(path.parent)
    except OSError as error:
        if error.filename not in (None, str(partial)):
            raise  # the error of another file, which it names
        raise writing_error(error, path, size) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def check_is_no_input(out: Path, inputs: Mapping[str, Path | None]) -> None:
    """Raise ValueError if a file that a command will write is one of those that it reads.

    Args:
        out: the file of `--out`.
        inputs: flag or name of an argument -> the file, or None if it was not given.
    """
    for name, path in inputs.items():
        if path is not None and out.exists() and path.exists() and out.samefile(path):
            raise ValueError(f"--out: expected another file than {name}, got {out}")


def writing_error(error: OSError, path: str | Path, size: int | None = None) -> OSError:
    """Return an error of the same class and number that names the file; for a full disk also the space.

    Args:
        error: what happened when the file was written.
        path: the file.
        size: bytes that it needs, if they are known.
    """
    message = f"cannot write {path}: {error.strerror or error}{describe_space(error, path, size)}"
    named = type(error)(message)
    named.errno = error.errno
    return named


def describe_space(error: OSError, path: str | Path, size: int | None = None) -> str:
    """Return "; N bytes needed, M bytes free" if `error` means that the disk of `path` is full, else ""."""
    if error.errno not in _FULL_DISK:
        return ""
    needed = "" if size is None else f"{size:,} bytes needed, "
    free = shutil.disk_usage(Path(path).parent).free
    return f"; {needed}{free:,} bytes free"


def remove_leftovers(folder: Path) -> int:
    """Remove the temporary files that killed writers left in a folder; only while nobody else writes there.

    Returns:
        How many files were removed. Those that cannot be removed stay.
    """
    count = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if _LEFTOVER.fullmatch(entry.name) and not entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    os.unlink(entry)
                    count += 1
    return count


def write_json(path: str | Path, content: Any, *, indent: int | None = None, durable: bool = False) -> None:
    """Write a JSON file. It is plain ASCII: all other characters, lone surrogates too, are written as escapes.

    Args:
        path: the file to write; its folder must exist.
        content: what `json.dumps` takes.
        indent: spaces of each level, and a line break at the end; None writes everything in one line without one.
        durable: as in `replacing`.

    Raises:
        OSError: the file cannot be written.
        ValueError: a number is NaN or infinite, which JSON does not have.
    """
    try:
        text = json.dumps(content, indent=indent, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: expected finite numbers, which JSON has, got others: {error}") from error
    if indent is not None:
        text += "\n"
    with replacing(path, durable=durable, size=len(text)) as partial:
        partial.write_text(text, encoding="ascii")


def _sync(path: Path) -> None:
    """Wait until the disk has the content of a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
