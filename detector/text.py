"""What commands print: names from files cannot control the terminal, and no output ends a program.

Class names, file names and messages with them come from other people's files. A class may be named "cat\\x1b[2J", which
clears the screen, hold a line break, or have 10 000 letters.
"""

from __future__ import annotations

import contextlib
import os
import reprlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

NAME_LENGTH = 40  # letters of a name in tables and pictures
MESSAGE_LENGTH = 2000  # letters of a message


def printable(text: object) -> str:
    r"""Return a text as one line in which control characters are escapes.

    Escaped is what `repr` escapes: controls such as \n, \r and \x1b; what cannot be seen, such as \u202e, which turns
    the direction of the text behind it; halves of characters such as \udcff, which file names may have.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(map(_escape, text))


def _escape(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


def printable_lines(text: str) -> str:
    """Return a text of several lines, each of them `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def shorten(text: str, length: int) -> str:
    """Return a text of at most `length` letters: the first and the last ones with dots between them."""
    if len(text) <= length:
        return text
    head = (length - 2) // 2
    tail = length - 3 - head
    return f"{text[:head]}...{text[-tail:]}"


def short_name(name: object, length: int = NAME_LENGTH) -> str:
    """Return a name as tables and pictures show it: `printable`, with at most `length` letters."""
    return shorten(printable(name), length)


def command_name(module: str) -> str:
    """Return what the running command is called: its script, `dcn-predict`, say, or `python -m MODULE`."""
    script = Path(sys.argv[0]).name if sys.argv else ""
    return script if script.startswith("dcn-") else f"python -m {module}"


def plural(count: int, noun: str, nouns: str = "") -> str:
    """Return a count with its noun, "1 image" or "8 images".

    Args:
        count: how many.
        noun: for one.
        nouns: for any other number; `noun` with an s if it is not given.
    """
    return f"{count} {noun if count == 1 else nouns or noun + 's'}"


def short_list(names: Sequence[object], limit: int = 10, length: int = NAME_LENGTH) -> str:
    """Return the first `limit` names of a list, each as a `short_name`, and how many more there are."""
    text = ", ".join(short_name(name, length) for name in names[:limit])
    if len(names) > limit:
        text += f" and {len(names) - limit} more"
    return text


def shown(value: object) -> str:
    """Return any value of a file for a message: its `repr` in one line, abbreviated."""
    representation = reprlib.Repr()
    representation.maxstring = 80
    representation.maxother = 80
    try:
        text = representation.repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        text = f"a value of type {type(value).__name__}"
    return " ".join(text.split())


def one_line(error: BaseException) -> str:
    """Return the text of an error, which may come from another program, in one line."""
    text = " ".join(str(error).split())
    return shorten(text, 300) or type(error).__name__


def message_line(message: object) -> str:
    """Return a message as it is shown: one line, `printable`, of at most `MESSAGE_LENGTH` letters."""
    return shorten(printable(message), MESSAGE_LENGTH)


def show(text: str, *, to_stderr: bool = False) -> None:
    """Print a text of one or several lines; nothing else in the packages prints, but for progress lines.

    Whoever puts a name into a table makes it `printable` there, as line breaks in `text` are kept.
    """
    stream = sys.stderr if to_stderr else sys.stdout
    print(printable_lines(text), file=stream, flush=True)


def show_message(message: object) -> None:
    """Print a message to stderr, as one line."""
    show(message_line(message), to_stderr=True)


class _LastingStream:
    """A text stream that drops what it cannot write, where others raise an error.

    Args:
        stream: receives the text; what is not defined here is its own.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text; letters that the encoding of the stream does not have become escapes."""
        encoding = self._stream.encoding or "utf-8"
        encodable = text.encode(encoding, "backslashreplace").decode(encoding)
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, its disk is full, or it is closed
            self._stream.write(encodable)
        return len(text)

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def finish(self) -> None:
        """Flush; throw away what cannot be written, or Python complains about it when it ends."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Keep output from ending the program, in a `with` block or, as a decorator, in a function.

    Letters that stdout and stderr cannot encode become escapes. Where nobody reads them any more, as in
    `python train/main.py | head`, where their disk is full or where they are closed, the program goes on silently.
    """
    _open_closed_descriptors()
    with open(os.devnull, "w") as nowhere:
        stdout = _LastingStream(sys.stdout or nowhere)
        stderr = _LastingStream(sys.stderr or nowhere)
        with contextlib.redirect_stdout(cast(TextIO, stdout)), contextlib.redirect_stderr(cast(TextIO, stderr)):
            try:
                yield
            finally:
                stdout.finish()
                stderr.finish()


def _open_closed_descriptors() -> None:
    """Open stdin, stdout and stderr where they are closed: the next file would get their number and what C code prints.

    Source: OpenSSH's `sanitise_stdfd`.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
