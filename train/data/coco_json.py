"""Reads a COCO annotation file: its lists of objects become columns, and every field that is used is checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Entry = dict[str, Any]  # one object of a list of the file


@dataclass(frozen=True)
class FieldType:
    """What a field of an entry holds in a well-formed file.

    Attributes:
        description: for messages: "expected DESCRIPTION".
        accepts: tells whether a value is of this type.
    """

    description: str
    accepts: Callable[[Any], bool]


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _is_name(value: object) -> bool:
    return isinstance(value, (str, int))


def _is_integer(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


STRING = FieldType("a string", _is_string)
NAME = FieldType("a name", _is_name)
INTEGER = FieldType("a whole number", _is_integer)
NUMBER = FieldType("a number", _is_number)
BOX = FieldType("4 numbers", _is_box)


def load_coco_json(path: Path) -> dict[str, Any]:
    """Parse an annotation file.

    Returns:
        The content: "images" is a list, "annotations" and "categories" are lists or missing.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or not in COCO format; the message names the file.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected valid JSON, got a file that cannot be parsed: {error}") from error

    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise ValueError(f"{path}: expected a COCO file with a list 'images', got none")

    for name in ("annotations", "categories"):
        if not isinstance(content.get(name, []), list):
            raise ValueError(f"{path}: expected a COCO file with a list {name!r}, got {content[name]!r:.60}")
    return content


def read_column(entries: list[Any], list_name: str, field: str, field_type: FieldType) -> list[Any]:
    """Return one field of all entries of a list of the file.

    Args:
        entries: the list.
        list_name: its name in the file, for messages.
        field: key of the field.
        field_type: of the values of the field.

    Raises:
        ValueError: an entry lacks the field, or the field holds something else; the message names the entry.
    """
    values = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{list_name}[{index}]: expected an object with fields, got {entry!r:.60}")

        if field not in entry:
            name = describe_entry(list_name, index, entry)
            raise ValueError(f"{name}: {field!r}: expected {field_type.description}, got no such field")

        value = entry[field]
        if not field_type.accepts(value):
            name = describe_entry(list_name, index, entry)
            raise ValueError(f"{name}: {field!r}: expected {field_type.description}, got {value!r:.60}")
        values.append(value)
    return values


def describe_entry(list_name: str, index: int, entry: Entry) -> str:
    """Return how messages name an entry of a list of the file: by its index, and by its id if it has one."""
    description = f"{list_name}[{index}]"
    if "id" in entry:
        description += f" (id {entry['id']})"
    return description
