"""Goes through the settings of somebody else's configuration: takes some, compares others, and lists what differs."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

from detector.text import printable, shown
from detector.weights.config_text import DELETE

REQUIRED: Any = object()
"""Default of a setting that has none."""

SCOPE = "_scope_"  # key of a dict that says in which package its `type` is looked up


class Settings:
    """A dict of settings, under the path by which messages name it.

    Every setting has to be taken, compared or ignored by its name: `finish` lists those that are left, because what
    nobody knows may change results.

    Args:
        values: the settings; anything but a dict is a problem, and counts as an empty one.
        path: such as "model.backbone".
        problems: receives a line for each setting that is missing, unknown or not as expected.
    """

    def __init__(self, values: Any, path: str, problems: list[str]) -> None:
        self.path = path
        self.problems = problems
        self._known = {DELETE, SCOPE}
        if not isinstance(values, Mapping):
            problems.append(f"{path}: expected a dict, got {_got(values)}")
            self._known = set()
            values = {}
        self.values: Mapping[Any, Any] = values

    def __contains__(self, name: str) -> bool:
        """Tell whether there is such a setting, other than None."""
        return self.values.get(name) is not None

    def take(self, *names: str, default: Any = REQUIRED) -> Any:
        """Return the value of a setting.

        Args:
            names: its name, and names it had in other versions.
            default: where it is missing; without one that is a problem, and the value is None.
        """
        self._known.update(names)
        for name in names:
            if name in self.values:
                return self.values[name]
        if default is REQUIRED:
            self.problems.append(f"{self.path}.{names[0]}: expected a value, got none")
            return None
        return default

    def part(self, *names: str, default: Any = REQUIRED) -> Settings:
        """Return a dict of settings inside this one; arguments as of `take`."""
        known = [name for name in names if name in self.values]
        name = known[0] if known else names[0]
        return Settings(self.take(*names, default=default), f"{self.path}.{name}", self.problems)

    def expect(self, *names: str, value: Any, default: Any = REQUIRED) -> None:
        """Compare a setting, whose value must be `value`; other arguments as of `take`."""
        known = [name for name in names if name in self.values]
        got = self.take(*names, default=default)
        if (known or default is not REQUIRED) and not is_same(got, value):
            name = known[0] if known else names[0]
            self.problems.append(f"{self.path}.{name}: expected {shown(value)}, got {_got(got)}")

    def expect_type(self, *types: str, default: Any = REQUIRED) -> str:
        """Return the setting `type`, which must be one of `types`, or "" if it is not: then nothing else is known.

        A name may have a scope in front, as in "mmdet.FPN", or be that of the class with its modules.
        """
        got = self.take("type", default=default)
        name = got.rpartition(".")[2] if isinstance(got, str) else ""
        if name in types:
            return name
        if got is not None:
            self.problems.append(f"{self.path}.type: expected {_one_of(types)}, got {_got(got)}")
        self._known.update(self.values)
        return ""

    def ignore(self, *names: str) -> None:
        """Name settings that change nothing here."""
        self._known.update(names)

    def finish(self) -> None:
        """List the settings that nobody knows, other than None."""
        for name, value in self.values.items():
            if name not in self._known and value is not None:
                self.problems.append(f"{self.path}.{printable(name)}: expected no such setting, got {_got(value)}")


def is_same(value: Any, expected: Any) -> bool:
    """Tell whether a value is the expected one: lists are tuples, whole numbers are numbers, but flags are not.

    Args:
        value: anything; only as much of it is looked at as `expected` has.
        expected: dicts, tuples, strings, numbers, flags and None.
    """
    if isinstance(expected, Mapping):
        if not isinstance(value, Mapping) or set(value) != set(expected):
            return False
        return all(is_same(value[key], expected[key]) for key in expected)
    if isinstance(expected, tuple):
        if not isinstance(value, list | tuple) or len(value) != len(expected):
            return False
        return all(map(is_same, value, expected))
    if isinstance(expected, bool) or isinstance(value, bool) or expected is None:
        return value is expected
    if isinstance(expected, str):
        return isinstance(value, str) and value == expected
    return isinstance(value, Real) and bool(value == expected)


def to_numbers(value: Any) -> Any:
    """Return a list of numbers as a tuple of floats; another value as it is."""
    if not isinstance(value, list | tuple):
        return value
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in value):
        return tuple(value)
    try:
        return tuple(map(float, value))
    except OverflowError:
        return tuple(value)


def _one_of(values: tuple[str, ...]) -> str:
    return shown(values[0]) if len(values) == 1 else f"one of {values}"


def _got(value: Any) -> str:
    return printable(shown(value))
