"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """Give the block a temporary path beside `path`; rename it to `path` when the block ends well.

        with replacing("results.json") as partial:
            partial.write_text(text)

    Whatever happens, `path` holds its old content or the whole new one, and nothing temporary is left behind.

    Args:
        path: the file to write; its folder must exist.
        durable: wait until the disk has the bytes and the new name, so that a power cut cannot lose them.

    Raises:
        OSError: the file cannot be renamed or, with `durable`, cannot be forced to the disk.
    """
    path = Path(path)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        if durable:
            _sync(partial)
        partial.replace(path)
        if durable:
            _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any, *, indent: int | None = None, durable: bool = False) -> None:
    """Write a JSON file.

    Args:
        path: the file to write; its folder must exist.
        content: what `json.dumps` takes.
        indent: spaces of each level, and a line break at the end; None writes everything in one line without one.
        durable: as in `replacing`.

    Raises:
        OSError: the file cannot be written.
    """
    text = json.dumps(content, indent=indent)
    if indent is not None:
        text += "\n"
    with replacing(path, durable=durable) as partial:
        partial.write_text(text)


def _sync(path: Path) -> None:
    """Wait until the disk has the content of a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
