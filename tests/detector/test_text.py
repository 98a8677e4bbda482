"""What is printed: no control characters of a file reach the terminal, and no output ends a program."""

import ast
import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detector.text import (
    command_name,
    lasting_output,
    message_line,
    one_line,
    printable,
    printable_lines,
    short_name,
    shorten,
    show,
    shown,
)

ROOT = Path(__file__).parents[2]
CONTROLS = [*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0))]
DIRECTIONS = ["\u061c", "\u200e", "\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))]
OTHERS = ["\u2028", "\u2029", "\u200b", "\ufeff", "\u00ad", "\ud800", "\udcff", "\U000e0041"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\nb", r"'a\nb'"),
        (list(range(100)), "[0, 1, 2, 3, 4, 5, ...]"),
        (int("9" * 4000) ** 2, "a value of type int"),
        (torch.zeros(3, 3), "tensor([[0., 0., 0.], [0., 0., 0.], [0., 0., 0.]])"),
    ],
    ids=["text", "list", "int", "tensor"],
)
def test_values_of_any_type_are_shown_in_one_short_line(value, text):
    assert shown(value) == text
    assert len(shown("a" * 10**6)) < 100
    assert len(shown([["a" * 10**6] * 10] * 10)) < 10_000


def test_errors_of_other_programs_are_one_line():
    assert one_line(ValueError("first\n  second\n")) == "first second"
    assert one_line(MemoryError()) == "MemoryError"


@pytest.mark.parametrize("character", CONTROLS + DIRECTIONS + OTHERS, ids=ascii)
def test_controls_are_escaped(character):
    text = printable(f"a{character}b")
    assert character not in text
    assert text.isprintable()
    assert text == "a" + repr(character)[1:-1] + "b"
    assert printable(text) == text


@pytest.mark.parametrize(
    "name", ["cat", "traffic light", "Größe", "猫", "кот", "قط", "🐈", "a\\b", "{x} %s $y$", "'\"", ""]
)
def test_names_stay_as_they_are(name):
    assert printable(name) == name
    assert short_name(name) == name


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a\nb", "a\nb"),
        ("a\r\nb\t", "a\\r\nb\\t"),
        ("\x1b[31mred\x1b[0m\n", "\\x1b[31mred\\x1b[0m\n"),
        ("a\u2028b\x85c\x0cd", "a\\u2028b\\x85c\\x0cd"),
    ],
)
def test_tables_keep_their_lines(text, lines):
    assert printable_lines(text) == lines


@pytest.mark.parametrize("length", [5, 6, 7, 40])
@pytest.mark.parametrize("count", [0, 1, 5, 6, 40, 41, 10_000])
def test_long_texts_are_shortened_in_the_middle(length, count):
    text = "".join(chr(ord("a") + index % 26) for index in range(count))
    short = shorten(text, length)
    if count <= length:
        assert short == text
    else:
        head, tail = short.split("...")
        assert len(short) == length
        assert text.startswith(head)
        assert text.endswith(tail)
        assert min(len(head), len(tail)) > 0


def test_names_are_shortened_after_their_escapes_are_written():
    assert len(short_name("\x1b" * 10_000)) == 40
    assert len(short_name("a" * 10_000)) == 40
    assert message_line("x" * 20_000 + ": no such file").endswith("x: no such file")


class FailingStream(io.StringIO):
    """A stream that cannot be written."""

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def write(self, *_):
        raise self.error

    flush = fileno = write


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "Input/output error"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        ValueError("I/O operation on closed file."),
    ],
    ids=lambda error: type(error).__name__ + str(getattr(error, "errno", "")),
)
def test_output_that_cannot_be_written_is_dropped(monkeypatch, error):
    monkeypatch.setattr(sys, "stdout", FailingStream(error))
    monkeypatch.setattr(sys, "stderr", FailingStream(error))
    with lasting_output():
        show("text")
        show("text", to_stderr=True)
    assert isinstance(sys.stdout, FailingStream)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
@pytest.mark.parametrize("text", ["Größe", "猫 🐈", "\udcff", "▏ 5/9"])
def test_letters_that_cannot_be_encoded_are_escaped(monkeypatch, encoding, text):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding=encoding))
    with lasting_output():
        show(text)
        sys.stdout.write(text)
    written = content.getvalue().decode(encoding)
    expected = printable(text).encode(encoding, "backslashreplace").decode(encoding)
    assert written == f"{expected}\n{expected}"


def test_streams_that_are_missing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with lasting_output():
        show("text")
        show("text", to_stderr=True)
        assert not sys.stderr.isatty()
    assert sys.stdout is None


PROGRAM = """if True:
    import contextlib, os, sys
    from text import lasting_output, show
    @lasting_output()
    def main():
        file = open(sys.argv[1], "w")
        for _ in range(1000):
            show("text \\u732b " * 20)
            show("text \\u732b " * 20, to_stderr=True)
            with contextlib.suppress(OSError):
                os.write(2, b"text of native code")
        file.write("content")
        file.close()
        return 7
    sys.exit(main())
"""


@pytest.mark.parametrize(
    "shell",
    [
        '"$@" 2>/dev/null | true; exit ${PIPESTATUS[0]}',
        '"$@" 2>&1 | head -n 1 >/dev/null; exit ${PIPESTATUS[0]}',
        '"$@" >&- 2>&-',
        '"$@" <&- >&- 2>&-',
        '"$@" >/dev/full 2>/dev/full',
        'PYTHONIOENCODING=ascii "$@" >/dev/null 2>&1',
        'LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 "$@" >/dev/null 2>&1',
    ],
)
def test_the_program_goes_on_without_output(tmp_path, shell):
    file = tmp_path / "file"
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", PROGRAM, str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "detector")}  # without importing PyTorch
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (7, "", "")
    assert file.read_text() == "content"


def test_every_outlet_is_known():
    """Everything that is printed passes through `detector.text`; progress lines are in one module, too."""
    outlets = []
    for package in ("triton_dcn", "detector", "train"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                is_print = isinstance(node, ast.Name) and node.id == "print"
                is_stream = isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr", "warn", "echo")
                is_write = isinstance(node, ast.Attribute) and ast.unparse(node) in ("tqdm.write", "os.write")
                if is_print or is_write or (is_stream and isinstance(node.value, ast.Name)):
                    outlets.append(f"{path.relative_to(ROOT)}: {ast.unparse(node)}")
    assert sorted(set(outlets)) == [
        "detector/text.py: print",
        "detector/text.py: sys.stderr",
        "detector/text.py: sys.stdout",
        "train/main.py: sys.stdout",  # flushes
        "train/progress.py: sys.stderr",
        "train/progress.py: tqdm.write",
        "train/signals.py: os.write",  # where the main thread hangs; the message has no names
        "triton_dcn/compat/swap.py: warnings.warn",  # of a library, with names of the program's own classes and layers
    ]


@pytest.mark.parametrize(
    ("program", "name"),
    [("/usr/bin/dcn-predict", "dcn-predict"), ("detector/predict.py", "python -m detector.predict")],
)
def test_commands_have_the_name_they_were_called_by(monkeypatch, program, name):
    monkeypatch.setattr(sys, "argv", [program])
    assert command_name("detector.predict") == name
