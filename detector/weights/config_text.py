"""Reads the text of an MMDetection config into plain values, without running it.

A checkpoint has one of two texts. Newer versions write the whole config once, `name = dict(...)` after `name = ...`.
Until May 2020 MMDetection wrote the files that the config was made from, one after the other, each behind a line with
its path; they are merged here as mmcv did it.

Understood are assignments of literals, of `dict(...)`, and of names that were assigned before. What else a value may
be becomes an `Expression`, which is an error only where the value is needed; any other statement is an error.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from detector.text import one_line, printable, short_name

MAX_LETTERS = 1 << 20  # of a text; those of MMDetection have some ten thousand
MAX_VALUES = 300_000  # in all values together, and letters in sums of texts
MAX_WHOLE = 1 << 53  # larger results of arithmetic with whole numbers stay expressions
DELETE = "_delete_"  # key of a dict that replaces the one in the files before, and is not merged into it

_PATH_LINE = re.compile(r"[^\s'\"(){}\[\]=,#][^'\"(){}\[\]=,#]*\.py\s*")
_NUMBERS = (int, float)


@dataclass(frozen=True)
class Expression:
    """Stands for a value that is not a literal.

    Attributes:
        line: where it is in the text.
    """

    line: int

    def __repr__(self) -> str:
        return f"an expression that is not evaluated (line {self.line})"


def read_config_text(text: str) -> dict[str, Any]:
    """Return name -> value of the assignments in a text.

    Values are dicts, lists, tuples, strings, numbers, True, False, None and `Expression`.

    Raises:
        ValueError: the text is not Python, is too long, or has other statements than assignments; the message has the
            line.
    """
    if len(text) > MAX_LETTERS:
        raise ValueError(f"expected at most {MAX_LETTERS} letters, got {len(text)}")
    budget = _Budget()
    values: dict[str, Any] = {}
    for first_line, source in _split_files(text):
        values = _merge(values, _read_file(source, first_line, budget))
    return values


@dataclass
class _Budget:
    """Counts the values that are made, so that a short text cannot stand for more than the memory holds."""

    spent: int = 0

    def spend(self, count: int = 1) -> None:
        self.spent += count
        if self.spent > MAX_VALUES:
            raise ValueError(f"expected at most {MAX_VALUES} values, got more")

    def spend_copy(self, value: Any) -> None:
        """Count a value, and all values inside it, as if they were written out."""
        self.spend()
        if isinstance(value, Mapping):
            for element in value.values():
                self.spend_copy(element)
        elif isinstance(value, list | tuple):
            for element in value:
                self.spend_copy(element)


def _split_files(text: str) -> Iterator[tuple[int, str]]:
    """Yield the number of the first line and the text of every file in a text, without the lines that are its path."""
    first_line = 1
    lines: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if _PATH_LINE.fullmatch(line):
            yield first_line, "\n".join(lines)
            first_line = number + 1
            lines = []
        else:
            lines.append(line)
    yield first_line, "\n".join(lines)


def _read_file(source: str, first_line: int, budget: _Budget) -> dict[str, Any]:
    """Return the assignments of one file; names are those of this file only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as backslashes in strings
            module = ast.parse(source)
    except SyntaxError as error:
        line = first_line - 1 + (error.lineno or 1)
        raise ValueError(f"line {line}: not Python: {printable(error.msg)}") from error
    except (ValueError, RecursionError, MemoryError) as error:  # nested too deep, for example
        raise ValueError(f"from line {first_line} on: not readable: {one_line(error)}") from error

    reader = _Reader(first_line - 1, budget)
    try:
        for statement in module.body:
            reader.execute(statement)
    except RecursionError as error:
        raise ValueError(f"from line {first_line} on: nested too deep") from error
    return reader.names


@dataclass
class _Reader:
    """Follows the assignments of one file.

    Attributes:
        line_offset: lines of the text before this file.
        budget: of the whole text.
        names: name -> value.
    """

    line_offset: int
    budget: _Budget
    names: dict[str, Any] = field(default_factory=dict)

    def execute(self, statement: ast.stmt) -> None:
        """Follow one statement."""
        if isinstance(statement, ast.Assign):
            value = self.evaluate(statement.value)
            for target in statement.targets:
                self._assign(target, value)
        elif isinstance(statement, ast.AnnAssign):
            if statement.value is not None:
                self._assign(statement.target, self.evaluate(statement.value))
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            for alias in statement.names:
                self.names[alias.asname or alias.name.split(".")[0]] = self._expression(statement)
        elif isinstance(statement, ast.Delete):
            for target in statement.targets:
                if not isinstance(target, ast.Name):
                    raise self._refusal(target)
                self.names.pop(target.id, None)
        elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):  # or a text alone
            raise self._refusal(statement)

    def _assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.budget.spend_copy(value)
            self.names[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            for element in target.elts:
                self._assign(element, self._expression(element))
        else:
            raise self._refusal(target)

    def _refusal(self, node: ast.stmt | ast.expr) -> ValueError:
        line = self.line_offset + node.lineno
        return ValueError(f"line {line}: expected name = value, got a statement of type {type(node).__name__}")

    def _expression(self, node: ast.stmt | ast.expr) -> Expression:
        return Expression(self.line_offset + node.lineno)

    def evaluate(self, node: ast.expr) -> Any:
        """Return the value of a literal or of a known name, else an `Expression`."""
        self.budget.spend()
        if isinstance(node, ast.Constant):
            is_known = node.value is None or isinstance(node.value, str | bool | int | float)
            return node.value if is_known else self._expression(node)
        if isinstance(node, ast.Name):
            value = self.names.get(node.id, self._expression(node))
            self.budget.spend_copy(value)
            return value
        if isinstance(node, ast.List | ast.Tuple):
            return self._sequence(node)
        if isinstance(node, ast.Dict):
            return self._dict_display(node)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.UnaryOp):
            return self._unary(node)
        if isinstance(node, ast.BinOp):
            return self._binary(node)
        return self._expression(node)

    def _sequence(self, node: ast.List | ast.Tuple) -> Any:
        elements: list[Any] = []
        for element in node.elts:
            if isinstance(element, ast.Starred):
                unpacked = self.evaluate(element.value)
                if not isinstance(unpacked, list | tuple):
                    return self._expression(node)
                elements += unpacked
            else:
                elements.append(self.evaluate(element))
        return elements if isinstance(node, ast.List) else tuple(elements)

    def _dict_display(self, node: ast.Dict) -> Any:
        values: dict[Any, Any] = {}
        for key_node, value_node in zip(node.keys, node.values, strict=True):
            value = self.evaluate(value_node)
            if key_node is None:  # {**value}
                if not isinstance(value, dict):
                    return self._expression(node)
                values |= value
                continue
            key = self.evaluate(key_node)
            if not isinstance(key, str | int | float):
                return self._expression(node)
            values[key] = value
        return values

    def _call(self, node: ast.Call) -> Any:
        """Return the dict, list or tuple that a call of their types makes."""
        if not isinstance(node.func, ast.Name) or node.func.id in self.names:
            return self._expression(node)
        arguments = [self.evaluate(argument) for argument in node.args]
        if node.func.id == "dict":
            return self._dict(node, arguments)
        is_sequence = len(arguments) == 1 and isinstance(arguments[0], list | tuple) and not node.keywords
        if node.func.id == "list" and is_sequence:
            return list(arguments[0])
        if node.func.id == "tuple" and is_sequence:
            return tuple(arguments[0])
        return self._expression(node)

    def _dict(self, node: ast.Call, arguments: Sequence[Any]) -> Any:
        if len(arguments) > 1 or not all(isinstance(argument, dict) for argument in arguments):
            return self._expression(node)
        values: dict[Any, Any] = dict(*arguments)
        names: set[str] = set()
        for keyword in node.keywords:
            value = self.evaluate(keyword.value)
            if keyword.arg is None and not isinstance(value, dict):  # dict(**value)
                return self._expression(node)
            new = value if keyword.arg is None else {keyword.arg: value}
            twice = names.intersection(new)
            if twice:
                line = self.line_offset + node.lineno
                raise ValueError(f"line {line}: expected every key once, got {short_name(min(twice))} twice")
            names.update(new)
            values |= new
        return values

    def _unary(self, node: ast.UnaryOp) -> Any:
        value = self.evaluate(node.operand)
        is_number = isinstance(value, _NUMBERS) and not isinstance(value, bool)
        if is_number and isinstance(node.op, ast.USub):
            return -value
        if is_number and isinstance(node.op, ast.UAdd):
            return value
        return self._expression(node)

    def _binary(self, node: ast.BinOp) -> Any:
        """Return the sum of texts, lists or tuples, or the result of arithmetic with two numbers."""
        left = self.evaluate(node.left)
        right = self.evaluate(node.right)
        are_sequences = isinstance(left, str | list | tuple) and type(left) is type(right)
        if isinstance(node.op, ast.Add) and are_sequences:
            self.budget.spend(len(left) + len(right))
            return left + right
        result = _arithmetic(node.op, left, right)
        return self._expression(node) if result is None else result


def _arithmetic(operation: ast.operator, left: Any, right: Any) -> int | float | None:
    """Return the result of + - * / with two numbers, None if it is another operation or no usual number."""
    if not isinstance(left, _NUMBERS) or not isinstance(right, _NUMBERS):
        return None
    if max(abs(left), abs(right)) > MAX_WHOLE:
        return None
    if isinstance(operation, ast.Add):
        return left + right
    if isinstance(operation, ast.Sub):
        return left - right
    if isinstance(operation, ast.Mult):
        return left * right
    if isinstance(operation, ast.Div) and right:
        quotient = left / right
        return quotient if math.isfinite(quotient) else None
    return None


def _merge(before: Mapping[Any, Any], new: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the values of a file over those of the files before it: dicts are merged, other values replaced."""
    merged = dict(before)
    for key, value in new.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and not value.get(DELETE):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged
