"""metrics.jsonl: an object a line, which is read whatever a killed writer, a power cut or an editor has made of it.

A line that is damaged is left out, and told; it costs no other line. New lines never join a half one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detector.files import open_regular, replacing, writing_error
from detector.text import shown

Line = dict[str, Any]

MAX_NUMBER = 2**63
MAX_TOLD = 3  # damaged lines that a message describes


@dataclass(frozen=True)
class DamagedLine:
    """A line that is not used.

    Attributes:
        number: of the line, from 1.
        content: of the line.
        reason: what was expected.
        cut_off: whether it is the end of a file that a killed writer left without a line break.
    """

    number: int
    content: bytes
    reason: str
    cut_off: bool


def read_lines(path: Path) -> list[Line]:
    """Return the undamaged lines of metrics.jsonl, none where there is no file.

    Raises:
        OSError: the file cannot be read.
    """
    return parse_lines(path)[0]


def parse_lines(path: Path) -> tuple[list[Line], list[DamagedLine]]:
    """Return the undamaged lines of metrics.jsonl and the damaged ones, see `read_lines`."""
    try:
        with open_regular(path) as file:
            content = file.read()
    except FileNotFoundError:
        return [], []
    lines = []
    damaged = []
    raw_lines = content.split(b"\n")
    for number, raw in enumerate(raw_lines, 1):
        if not raw.strip():
            continue
        before, line = _parse(raw)
        if line is not None:
            lines.append(line)
        if before:
            cut_off = number == len(raw_lines) and before == raw
            damaged.append(DamagedLine(number, before, _what_is_wrong(before), cut_off))
    return lines, damaged


def describe_damage(path: Path, damaged: Sequence[DamagedLine]) -> str:
    """Return a sentence about damaged lines: the file, how many there are, and the first ones."""
    told = "; ".join(f"line {line.number}: {line.reason}" for line in damaged[:MAX_TOLD])
    more = "; ..." if len(damaged) > MAX_TOLD else ""
    return f"{path}: damaged lines: {len(damaged)} ({told}{more})"


def append_lines(path: Path, lines: Sequence[Line]) -> None:
    """Add lines to metrics.jsonl. They begin on a line of their own, whatever stands at the end of the file.

    Raises:
        OSError: the file cannot be written, or is a symbolic link, which is not followed; the message names it.
    """
    content = "".join(json.dumps(line) + "\n" for line in lines).encode("ascii")
    _append(path, content)


def rewind(path: Path, step: int) -> list[str]:
    """Drop the lines after a step, which the resumed run writes again, and damaged lines; return notes about them.

    Of two lines of one step the later one stays. Damaged lines are moved to metrics.jsonl.damaged, but for a last line
    that was cut off: the run is about to write it again.

    Raises:
        OSError: a file cannot be read or written.
    """
    lines, damaged = parse_lines(path)
    if not lines and not damaged:
        return []

    notes = []
    moved = [line for line in damaged if not line.cut_off]
    if moved:
        side_file = path.with_name(f"{path.name}.damaged")
        _append(side_file, b"".join(line.content + b"\n" for line in moved))
        notes.append(f"{describe_damage(path, moved)} moved to {side_file.name}")

    if len(moved) < len(damaged):
        notes.append(f"{path}: its last line was cut off and is dropped")

    kept = [line for line in lines if line.get("step", 0) <= step]
    last_of_step = {(line["step"], "loss" in line): line for line in kept if "step" in line}
    unique = [line for line in kept if "step" not in line or last_of_step[line["step"], "loss" in line] is line]
    if len(unique) < len(kept):
        notes.append(f"{path}: lines of steps that come twice: {len(kept) - len(unique)}; the later ones stay")

    text = "".join(json.dumps(line) + "\n" for line in unique)
    if not text:
        path.unlink()
    elif path.is_symlink() or path.read_bytes() != text.encode():
        with replacing(path, durable=True, size=len(text)) as partial:
            partial.write_text(text, encoding="ascii")
    return notes


def _parse(raw: bytes) -> tuple[bytes, Line | None]:
    """Return what of a line is damaged, b"" if nothing is, and the object that it holds, or None.

    A power cut leaves NUL bytes, and earlier versions appended an object right behind a half line.
    """
    stripped = raw.strip(b"\0")
    line = _load(stripped)
    if line is not None:
        return b"", line
    start = stripped.rfind(b'{"step":')
    line = _load(stripped[start:]) if start > 0 else None
    if line is not None:
        return stripped[:start], line
    return raw, None


def _load(raw: bytes) -> Line | None:
    """Return the object in a line, or None if it is damaged."""
    try:
        line = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and _wrong_value(line) is None else None


def _what_is_wrong(raw: bytes) -> str:
    """Return why a line is damaged."""
    if b"\0" in raw:
        return "expected JSON, got NUL bytes"
    try:
        line = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return f"expected UTF-8, got {shown(raw)}"
    except (ValueError, RecursionError):
        return f"expected JSON, got {shown(raw.decode('utf-8-sig'))}"
    if not isinstance(line, dict):
        return f"expected an object, got {shown(line)}"
    return _wrong_value(line) or "expected an object"


def _wrong_value(line: Line) -> str | None:
    """Return what is wrong with the first value of a line that has another type than its key says, or None."""
    for key, value in line.items():
        description, fits = KINDS.get(key, ("a finite number", _is_number))
        if not fits(value):
            return f"{key!r}: expected {description}, got {shown(value)}"
    return None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_NUMBER


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    if type(value) is int:
        return abs(value) < MAX_NUMBER
    return isinstance(value, float) and math.isfinite(value)


def _is_table_of(columns: int) -> Callable[[object], bool]:
    """Return a function that recognizes a dict of lists of so many numbers."""

    def is_table(value: object) -> bool:
        if not isinstance(value, dict):
            return False
        rows = list(value.values())
        return all(isinstance(row, list) and len(row) == columns and all(map(_is_number, row)) for row in rows)

    return is_table


# Keys whose values are no finite numbers -> what messages call the value, and how it is recognized.
KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "step": ("a whole number from 0", _is_count),
    "epoch": ("a whole number from 0", _is_count),
    "evaluator": ("a text", _is_text),
    "weights": ("a text", _is_text),
    "classes": ("lists of three numbers by class", _is_table_of(3)),
    "segm_classes": ("lists of three numbers by class", _is_table_of(3)),
    "classes_F1": ("lists of four numbers by class", _is_table_of(4)),
    "segm_classes_F1": ("lists of four numbers by class", _is_table_of(4)),
}


def _append(path: Path, content: bytes) -> None:
    try:
        with open(path, "ab+", opener=_open_without_links) as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    content = b"\n" + content
            file.write(content)
    except OSError as error:
        raise writing_error(error, path, len(content)) from error


def _open_without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
