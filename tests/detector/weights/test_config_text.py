"""Texts of configs: literals are read, nothing is run, and no text does harm."""

import contextlib
import re
import time

import pytest

from detector.weights.config_text import MAX_LETTERS, Expression, read_config_text


def test_literals():
    text = """
'''A text at the beginning is no statement.'''
import os
number = -1.5e-3
big = 1_000
names = ('a', "b" 'c')
nothing = None
flags = [True, False]
one = (1,)
inner = {'a-b': 1, 2: [3]}
nested = dict(type='A', part=dict(x=1.0 / 8, y=2 * 3 - 1), empty=dict())
typed: int = 3
first = second = dict(a=1)
"""
    values = read_config_text(text)
    assert values.pop("os") == Expression(3)
    assert values == {
        "number": -0.0015,
        "big": 1000,
        "names": ("a", "bc"),
        "nothing": None,
        "flags": [True, False],
        "one": (1,),
        "inner": {"a-b": 1, 2: [3]},
        "nested": {"type": "A", "part": {"x": 0.125, "y": 5}, "empty": {}},
        "typed": 3,
        "first": {"a": 1},
        "second": {"a": 1},
    }
    assert read_config_text("") == {}
    assert read_config_text("# nothing\r\n") == {}


def test_names_stand_for_what_was_assigned_before():
    text = """
norm = dict(mean=[1, 2], std=[3])
path = 'data/' + 'images/'
pipeline = [dict(type='N', **norm), dict(type='P', **{'size': 3})]
data = dict(dict(a=1), pipeline=pipeline, path=path)
more = [*pipeline, dict(type='Q')] + [4]
copies = list(('a', 'b')), tuple([1])
norm = dict(mean=[9])
del path
"""
    values = read_config_text(text)
    pipeline = [{"type": "N", "mean": [1, 2], "std": [3]}, {"type": "P", "size": 3}]
    assert values["data"] == {"a": 1, "pipeline": pipeline, "path": "data/images/"}
    assert values["more"] == [*pipeline, {"type": "Q"}, 4]
    assert values["copies"] == (["a", "b"], (1,))
    assert values["norm"] == {"mean": [9]}
    assert "path" not in values


@pytest.mark.parametrize(
    "value",
    [
        "float('inf')",
        "unknown",
        "a.b",
        "a[0]",
        "f'{a}'",
        "lambda: 1",
        "[x for x in a]",
        "a if a else 1",
        "not a",
        "...",
        "1j",
        "b'bytes'",
        "-'text'",
        "'a' * 10 ** 9",
        "2 ** 10",
        "1 / 0",
        "1e300 * 1e300",
        "9999999999999999999 + 1",
        "'%s' % a",
        "1 + 'a'",
        "[*unknown]",
        "dict(**unknown)",
        "{**unknown}",
        "{unknown: 1}",
        "dict([('a', 1)])",
        "list(unknown)",
        "__import__('os').system('touch evil')",
        "open('evil', 'w')",
        "[].__class__.__base__.__subclasses__()",
        "(lambda: open('evil', 'w'))()",
        "(x := 3)",
    ],
)
def test_what_is_no_literal_is_kept_as_an_expression(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = read_config_text(f"a = dict(x=1)\nb = dict(y={value}, z=2)\n")
    assert values["b"] in ({"y": Expression(2), "z": 2}, Expression(2))
    assert repr(Expression(2)) == "an expression that is not evaluated (line 2)"
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_hides_dict_is_not_called():
    assert read_config_text("dict = 3\na = dict(b=1)")["a"] == Expression(2)


FILES = """/home/me/my configs/base.py
model = dict(type='A', part=dict(x=1, y=2), other=dict(z=3))
names = [1]
../other/base2.py
img = dict(mean=1)
C:\\work\\run.py
_base_ = ['base.py']
model = dict(part=dict(y=dict(deep=4)), other=dict(_delete_=True, w=5))
pipeline = names
"""


def test_files_one_after_the_other_are_merged():
    values = read_config_text(FILES)
    assert values["model"] == {
        "type": "A",
        "part": {"x": 1, "y": {"deep": 4}},
        "other": {"_delete_": True, "w": 5},
    }
    assert values["img"] == {"mean": 1}
    assert values["pipeline"] == Expression(9)  # names are those of one file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = (1", "line 1: not Python: '(' was never closed"),
        ("a = 1\nb = = 2", "line 2: not Python: invalid syntax"),
        ("base.py\na = 1\nb = = 2", "line 3: not Python: invalid syntax"),
        ("a = 1\0", "not "),
        ("a = 1\nif a:\n    b = 2", "line 2: expected name = value, got a statement of type If"),
        ("for a in [1]: b = a", "line 1: expected name = value, got a statement of type For"),
        ("a = []\na.append(1)", "line 2: expected name = value, got a statement of type Expr"),
        ("a = dict()\na['b'] = 1", "line 2: expected name = value, got a statement of type Subscript"),
        ("a = 1\na += 1", "line 2: expected name = value, got a statement of type AugAssign"),
        ("def f(): pass", "line 1: expected name = value, got a statement of type FunctionDef"),
        ("with open('x') as f: a = 1", "line 1: expected name = value, got a statement of type With"),
        ("del a[0]", "line 1: expected name = value, got a statement of type Subscript"),
        ("a = dict(x=1, **dict(x=2))", "line 1: expected every key once, got x twice"),
        ("print('hello')", "line 1: expected name = value, got a statement of type Expr"),
    ],
)
def test_texts_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_config_text(text)
    assert len(str(error.value).splitlines()) == 1


def doubled(value: str) -> str:
    """Return a text whose last name stands for 2 ** 60 values."""
    lines = [f"a0 = {value}"]
    for index in range(60):
        lines.append(f"a{index + 1} = [a{index}, a{index}]")
    return "\n".join(lines)


HOSTILE = {
    "too long": "#" * (MAX_LETTERS + 1),
    "sum": "a = 1" + "+1" * 100_000,
    "signs": "a = " + "-" * 100_000 + "1",
    "power": "a = 1" + "**1" * 100_000,
    "not": "a = " + "not " * 100_000 + "1",
    "brackets": "a = " + "(" * 100_000,
    "lists": "a = " + "[" * 100_000 + "]" * 100_000,
    "dicts": "a = " + "dict(a=" * 10_000 + "1" + ")" * 10_000,
    "lambdas": "a = " + "lambda: " * 50_000 + "1",
    "choices": "a = " + "1 if 1 else " * 50_000 + "1",
    "digits": "a = " + "9" * 500_000,
    "elements": "a = [" + "1," * 300_000 + "]",
    "statements": "a=1\n" * 250_000,
    "targets": "a=" * 500_000 + "1",
    "copies": doubled("[1]"),
    "copied dicts": doubled("dict(a=1)").replace("[", "dict(b=").replace(", ", ", c=").replace("]", ")"),
    "texts": "a = 'aaaaaaaaaa'\n" + "a = a + a\n" * 60,
    "sums of lists": "a = [1]\n" + "a = a + a\n" * 60,
    "unpacked": "a = [1]\n" + "a = [*a, *a]\n" * 60,
    "unpacked at once": "a = [" + "1," * 20_000 + "]\nb = [" + "*a," * 200_000 + "]",
    "merged": "\n".join(["base.py\n" + doubled("1")] * 3),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_an_error_and_take_no_time(name):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="line|at most") as error:
        read_config_text(HOSTILE[name])
    assert time.perf_counter() - start < 20
    assert len(str(error.value)) < 500


CHAINS = {
    "attributes": "a = b" + ".c" * 100_000,
    "calls": "a = b" + "()" * 100_000,
    "index": "a = b" + "[0]" * 100_000,
}


@pytest.mark.parametrize("name", CHAINS)
def test_long_chains_are_an_expression_or_too_deep(name):
    """Python 3.10 reads them, newer versions do not."""
    values = None
    with contextlib.suppress(ValueError):
        values = read_config_text(CHAINS[name])
    assert values in (None, {"a": Expression(1)})


def test_deep_but_possible():
    value = read_config_text("a = " + "dict(a=" * 60 + "1" + ")" * 60)
    for _ in range(61):
        value = value["a"]
    assert value == 1
