"""Values of files as messages show them: short, in one line, control characters escaped."""

from __future__ import annotations

import reprlib


def shown(value: object) -> str:
    """Return the representation of a value for a message, abbreviated in its middle or at its end."""
    short = reprlib.Repr()
    short.maxstring = 80
    short.maxother = 80
    try:
        text = short.repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        text = f"a value of type {type(value).__name__}"
    return " ".join(text.split())
