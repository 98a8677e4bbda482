"""Reads a COCO annotation file: its lists of objects become columns, and every field that is used is checked.

A column is checked as a whole, by the types and the range of its values. Only where that fails are the values looked at
one by one, to name those that are wrong.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from detector.text import shown

Entry = dict[str, Any]  # one object of a list of the file

LIST_NAMES = ("images", "annotations", "categories")
ENTRY_FIELDS = (
    *("id", "file_name", "width", "height", "name"),
    *("image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "segmentation"),
)
MAX_ID = 2**63 - 1  # ids become int64
MAX_IMAGE_SIDE = 2**20  # pixels; OpenCV reads no larger images
MAX_COORDINATE = 1e9  # pixels; a box that reaches farther is a mistake
MAX_TEXT_LENGTH = 4095  # characters; Linux has no longer paths
NAMED_OFFENDERS = 3  # a message names so many entries, and counts them all

# An empty list is 3 characters of JSON and takes 64 bytes of memory, an object with one key is 7 and takes 230. Even a
# file whose polygons are lists of short points has less than one list in 5 characters, and objects are three times as
# long as that.
FREE_BRACKETS = 100_000
CHARACTERS_PER_LIST = 5
LISTS_PER_OBJECT = 3


@dataclass(frozen=True)
class FieldType:
    """What a field of an entry holds in a well-formed file.

    Attributes:
        description: for messages: "expected DESCRIPTION".
        accepts: tells whether a value is of this type.
        to_column: makes an array of the values of all entries, fast; None if some may not be of this type.
        dtype: of the array.
    """

    description: str
    accepts: Callable[[Any], bool]
    to_column: Callable[[list[Any]], np.ndarray | None]
    dtype: type[np.generic]


def whole_numbers(low: int, high: int, description: str) -> FieldType:
    """Return the type of whole numbers from `low` to `high`; 7.0 is one, true is none."""

    def accepts(value: Any) -> bool:
        is_whole = type(value) is int or (type(value) is float and value.is_integer())
        return is_whole and low <= value <= high

    def to_column(values: list[Any]) -> np.ndarray | None:
        return _number_column(values, {int}, np.int64, low, high)

    return FieldType(description, accepts, to_column, np.int64)


def _is_number(value: Any, limit: float) -> bool:
    """Tell whether a value is a number of at most `limit` in size; NaN is not."""
    return type(value) in (int, float) and abs(value) <= limit


def _is_finite_number(value: Any) -> bool:
    return _is_number(value, sys.float_info.max)


def _finite_number_column(values: list[Any]) -> np.ndarray | None:
    return _number_column(values, {int, float}, np.float64, -sys.float_info.max, sys.float_info.max)


def _is_box(value: Any) -> bool:
    return type(value) is list and len(value) == 4 and all(_is_number(number, MAX_COORDINATE) for number in value)


def _box_column(values: list[Any]) -> np.ndarray | None:
    if not set(map(type, values)) <= {list} or not set(map(len, values)) <= {4}:
        return None
    numbers = list(chain.from_iterable(values))
    column = _number_column(numbers, {int, float}, np.float64, -MAX_COORDINATE, MAX_COORDINATE)
    return None if column is None else column.reshape(-1, 4)


def _is_flag(value: Any) -> bool:
    return type(value) in (int, float, bool) and value in (0, 1)


def _flag_column(values: list[Any]) -> np.ndarray | None:
    column = _number_column(values, {int, bool}, np.int64, 0, 1)
    return None if column is None else column.astype(np.bool_)


def _is_text(value: Any) -> bool:
    """Tell whether a value is text that can be shown and written: not blank, no character 0, no half characters."""
    if type(value) is not str or len(value) > MAX_TEXT_LENGTH or not value.strip() or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_name(value: Any) -> bool:
    return (type(value) is int and abs(value) <= MAX_ID) or _is_text(value)


def _is_file_name(value: Any) -> bool:
    """Tell whether a value can be the name of a file; Python writes bytes that are not UTF-8 as half characters."""
    if type(value) is not str or not 1 <= len(value) <= MAX_TEXT_LENGTH or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def _file_name_column(values: list[Any]) -> np.ndarray | None:
    if not set(map(type, values)) <= {str} or not values:
        return None
    if min(map(len, values)) < 1 or max(map(len, values)) > MAX_TEXT_LENGTH or not _is_ascii_text("".join(values)):
        return None
    return np.array(values, np.str_)


def _is_ascii_text(text: str) -> bool:
    return text.isascii() and "\0" not in text


def _number_column(
    values: list[Any], types: set[type], dtype: type[np.generic], low: float, high: float
) -> np.ndarray | None:
    """Return numbers as an array if all have one of the types and are from `low` to `high`."""
    if not set(map(type, values)) <= types:
        return None
    try:
        column = np.array(values, dtype)
    except OverflowError:
        return None
    is_in_range = (column >= low) & (column <= high)
    return column if is_in_range.all() else None


def _no_column(values: list[Any]) -> None:
    """Leave the values of a short list to be looked at one by one."""


ID = whole_numbers(-MAX_ID - 1, MAX_ID, "a whole number of 64 bits")
IMAGE_SIDE = whole_numbers(1, MAX_IMAGE_SIDE, f"a whole number from 1 to {MAX_IMAGE_SIDE}")
NUMBER = FieldType("a finite number", _is_finite_number, _finite_number_column, np.float64)
BOX = FieldType("4 finite numbers, none beyond 1e9", _is_box, _box_column, np.float64)
FLAG = FieldType("0, 1, true or false", _is_flag, _flag_column, np.bool_)
NAME = FieldType("a name", _is_name, _no_column, np.str_)
FILE_NAME = FieldType("the name of a file", _is_file_name, _file_name_column, np.str_)


def load_coco_json(path: Path) -> dict[str, Any]:
    """Parse an annotation file.

    Returns:
        The content: "images" is a list, "annotations" and "categories" are lists or missing.

    Raises:
        OSError: the file cannot be read, or needs too much memory.
        ValueError: it is not JSON, or not in COCO format; the message names the file.
    """
    try:
        content = _parse(_read_text(path))
    except MemoryError:
        size = path.stat().st_size >> 20
        raise OSError(f"{path}: expected a file that fits into memory, got {size} MiB of JSON") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

    if "images" not in content:
        raise ValueError(f"{path}: expected a COCO file with a list 'images', got none")
    for name in LIST_NAMES:
        if not isinstance(content.get(name, []), list):
            raise ValueError(f"{path}: expected a COCO file with a list {name!r}, got {shown(content[name])}")
    return content


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep Python's garbage collector from searching millions of new objects, again and again, while a file is parsed.

    Reference counts free all of them. To save the time, drop the content of the file inside the context.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_column(
    entries: Sequence[Any], list_name: str, field: str, field_type: FieldType, default: Any = None
) -> np.ndarray:
    """Return one field of all entries of a list of the file as an array.

    Args:
        entries: the list.
        list_name: its name in the file, for messages.
        field: key of the field.
        field_type: of the values of the field.
        default: stands for a missing field; None if every entry needs the field.

    Raises:
        ValueError: an entry is no object, lacks the field, or the field holds something else; the message counts such
            entries and names the first of them.
    """
    if not set(map(type, entries)) <= {dict}:
        offenders = [index for index, entry in enumerate(entries) if type(entry) is not dict]
        found = [shown(entries[index]) for index in offenders[:NAMED_OFFENDERS]]
        raise ValueError(_describe_offenders(entries, list_name, "", "an object with fields", offenders, found))

    values = [entry.get(field, default) for entry in entries]
    column = field_type.to_column(values)
    if column is not None:
        return column

    offenders = [index for index, value in enumerate(values) if not field_type.accepts(value)]
    if offenders:
        found = []
        for index in offenders[:NAMED_OFFENDERS]:
            found.append(shown(values[index]) if field in entries[index] else "no such field")
        place = f": {field!r}"
        raise ValueError(_describe_offenders(entries, list_name, place, field_type.description, offenders, found))
    return np.array(values, field_type.dtype)


def check_unique(entries: Sequence[Entry], list_name: str, field: str, values: Sequence[Any]) -> None:
    """Raise ValueError, which names the first entries, if a value of a field appears twice.

    Args:
        entries: a list of the file.
        list_name: its name in the file.
        field: key of the field.
        values: of the field, of all entries.
    """
    repeated = {value: count for value, count in Counter(values).items() if count > 1}
    if not repeated:
        return
    named = []
    for value in list(repeated)[:NAMED_OFFENDERS]:
        indices = [index for index, other in enumerate(values) if other == value][:2]
        first, second = (describe_entry(list_name, index, entries[index]) for index in indices)
        named.append(f"{shown(value)} at {first} and {second}")
    total = f"; {len(repeated)} in all" if len(repeated) > 1 else ""
    raise ValueError(f"{list_name}: {field!r}: expected every value once, got {', '.join(named)}{total}")


def describe_entry(list_name: str, index: int, entry: Any) -> str:
    """Return how messages name an entry of a list of the file: by its index, and by its id if it has one."""
    description = f"{list_name}[{index}]"
    if isinstance(entry, dict) and "id" in entry:
        description += f" (id {shown(entry['id'])})"
    return description


def _describe_offenders(
    entries: Sequence[Any], list_name: str, place: str, description: str, offenders: list[int], found: list[str]
) -> str:
    """Return one line: what was expected, what each of the first offenders has, and how many there are.

    Args:
        entries: a list of the file.
        list_name: its name in the file.
        place: of the value in an entry.
        description: of what was expected.
        offenders: indices of the entries.
        found: what each of the first ones has.
    """
    first, *others = [describe_entry(list_name, index, entries[index]) for index in offenders[: len(found)]]
    first += place
    message = f"{first}: expected {description}, got {found[0]}"
    for name, value in zip(others, found[1:], strict=True):
        message += f"; {name}: got {value}"
    if len(offenders) > len(found):
        message += f"; {len(offenders)} in all"
    return message


def _read_text(path: Path) -> str:
    """Return the text of a JSON file; refuse at once what cannot be one with an object at its top.

    Raises:
        OSError, MemoryError: the file cannot be read.
        ValueError: it is empty, is in another format, or consists of brackets.
    """
    with path.open("rb") as file:
        head = file.read(64)
        if not head:
            raise ValueError("expected valid JSON, got an empty file")
        encoding = json.detect_encoding(head)
        start = head.decode(encoding, errors="ignore").lstrip("\ufeff \t\r\n")
        if start and not start.startswith("{"):
            raise ValueError(
                f"expected a COCO file with a list 'images', which begins with '{{', got one that begins with "
                f"{start[:20]!r}"
            )
        file.seek(0)
        data = file.read()

    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"expected valid JSON, got a file that is not in {encoding.upper()}: {error}") from error

    lists = text.count("[")
    objects = text.count("{")
    if lists + LISTS_PER_OBJECT * objects > FREE_BRACKETS + len(text) / CHARACTERS_PER_LIST:
        raise ValueError(
            f"expected images and annotations, got little else than brackets: {lists} '[' and {objects} '{{' "
            f"in {len(text)} characters"
        )
    return text


def _parse(text: str) -> dict[str, Any]:
    """Parse a file whose top is an object.

    Raises:
        ValueError: it is not JSON, is nested deeper than Python can read, or an object has a key twice.
    """
    repeated: list[str] = []

    def to_dict(pairs: list[tuple[str, Any]]) -> Entry:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            repeated.extend(_describe_repeated_keys(pairs, fields))
        return fields

    try:
        content = _parse_long_numbers(text, to_dict)
    except ValueError as error:
        raise ValueError(f"expected valid JSON, got a file that cannot be parsed: {error}") from error
    except RecursionError:
        raise ValueError("expected a COCO file, got lists or objects that are nested too deep") from None

    if repeated:
        named = ", ".join(repeated[:NAMED_OFFENDERS])
        total = f"; {len(repeated)} in all" if len(repeated) > NAMED_OFFENDERS else ""
        raise ValueError(f"expected every key of an object once, got {named}{total}")
    return content


def _parse_long_numbers(text: str, to_dict: Callable[[list[tuple[str, Any]]], Entry]) -> Entry:
    """Parse JSON; whole numbers of more digits than Python converts become infinity, as 1e400 does."""

    def to_number(digits: str) -> float:
        return int(digits) if len(digits) <= sys.get_int_max_str_digits() else math.inf

    content: Entry
    try:
        content = json.loads(text, object_pairs_hook=to_dict)
    except json.JSONDecodeError:
        raise
    except ValueError:
        content = json.loads(text, object_pairs_hook=to_dict, parse_int=to_number)
    return content


def _describe_repeated_keys(pairs: list[tuple[str, Any]], fields: Entry) -> list[str]:
    """Return which keys that are read stand more than once in an object, and the id of the object."""
    counts = Counter(key for key, _ in pairs)
    owner = f" in the object with the id {shown(fields['id'])}" if "id" in fields else ""
    is_read = (*LIST_NAMES, *ENTRY_FIELDS)
    return [f"{key!r} {count} times{owner}" for key, count in counts.items() if count > 1 and key in is_read]
