"""metrics.jsonl in every state that kills, power cuts and editors leave."""

import json
import os

import pytest

from train.metrics_file import append_lines, parse_lines, read_lines, rewind

STEPS = [json.dumps({"step": step, "loss": 1.0 / step}).encode() for step in range(1, 6)]
AP = b'{"step": 4, "epoch": 1, "AP": 0.5, "classes": {"cat": [0.5, 0.6, 7]}, "evaluator": "pycocotools"}'

DAMAGED_LINES = {
    "cut": STEPS[1][:9],
    "cut in a string": b'{"st',
    "utf-8": b'{"step": 2, "lo\xff\xfess": 1.0}',
    "half a character": b'{"step": 2, "evaluator": "\xc3"}',
    "nul": b"\0" * 4096,
    "nul inside": STEPS[1][:9] + b"\0\0" + STEPS[1][9:],
    "list": b"[1, 2]",
    "number": b"5",
    "string": b'"step"',
    "null": b"null",
    "step is a string": b'{"step": "2", "loss": 0.5}',
    "step is a bool": b'{"step": true, "loss": 0.5}',
    "step is negative": b'{"step": -2, "loss": 0.5}',
    "step is a fraction": b'{"step": 2.5, "loss": 0.5}',
    "step is a list": b'{"step": [2], "loss": 0.5}',
    "step is huge": b'{"step": 1' + b"0" * 30 + b', "loss": 0.5}',
    "step has too many digits": b'{"step": 1' + b"0" * 9999 + b', "loss": 0.5}',
    "loss is nan": b'{"step": 2, "loss": NaN}',
    "loss is infinite": b'{"step": 2, "loss": 1e999}',
    "AP is a string": b'{"step": 2, "AP": "0.9"}',
    "AP is null": b'{"step": 2, "AP": null}',
    "AP is a bool": b'{"step": 2, "AP": true}',
    "AP is nan": b'{"step": 2, "AP": NaN}',
    "classes are a list": b'{"step": 2, "AP": 0.9, "classes": [1]}',
    "classes are short": b'{"step": 2, "AP": 0.9, "classes": {"cat": [1]}}',
    "thresholds are short": b'{"step": 2, "AP": 0.9, "classes_F1": {"cat": [1, 1, 1]}}',
    "evaluator is a number": b'{"step": 2, "AP": 0.9, "evaluator": 1}',
    "nested": b'{"step": 2, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "two objects": STEPS[0] + b" {}",
    "other program": b"Traceback (most recent call last):",
}


def steps(path):
    return [line["step"] for line in read_lines(path)]


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("name", DAMAGED_LINES)
def test_a_damaged_line_costs_no_other(tmp_path, name, place):
    path = tmp_path / "metrics.jsonl"
    index = {"first": 0, "middle": 2, "last": 5}[place]
    content = [*STEPS[:index], DAMAGED_LINES[name], *STEPS[index:]]
    path.write_bytes(b"\n".join(content) + b"\n")
    assert steps(path) == [1, 2, 3, 4, 5]
    (damaged,) = parse_lines(path)[1]
    assert damaged.number == index + 1

    (note,) = rewind(path, 4)
    assert note.startswith(f"{path}: damaged lines: 1 (line {index + 1}: ")
    assert "expected" in note
    assert "\n" not in note
    assert len(note) < 400
    assert path.read_bytes() == b"\n".join(STEPS[:4]) + b"\n"
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == DAMAGED_LINES[name] + b"\n"
    assert rewind(path, 4) == []


@pytest.mark.parametrize("half", [STEPS[3][:1], STEPS[3][:-1], AP[:40], b"\0\0\0", b'{"step": 4, "lo\xff'])
def test_a_half_last_line_does_not_swallow_the_next(tmp_path, half):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*STEPS[:3], half]))
    append_lines(path, [json.loads(STEPS[3])])
    append_lines(path, [json.loads(AP), json.loads(STEPS[4])])
    assert path.read_bytes().split(b"\n") == [*STEPS[:3], half, STEPS[3], AP, STEPS[4], b""]
    assert steps(path) == [1, 2, 3, 4, 4, 5]


@pytest.mark.parametrize("half", [STEPS[3][:1], STEPS[3][:-1], AP[:40], b"\0\0\0"])
def test_a_half_last_line_is_dropped(tmp_path, half):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*STEPS[:3], half]))
    assert rewind(path, 9) == [f"{path}: its last line was cut off and is dropped"]
    assert path.read_bytes() == b"\n".join(STEPS[:3]) + b"\n"
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("before", [b"\0\0\0\0", STEPS[1][:12], STEPS[1][:-1]])
def test_what_was_written_behind_a_half_line_is_found(tmp_path, before):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([STEPS[0], before + STEPS[2], STEPS[3]]) + b"\n")
    assert steps(path) == [1, 3, 4]
    rewind(path, 9)
    assert path.read_bytes() == b"\n".join([STEPS[0], STEPS[2], STEPS[3]]) + b"\n"


@pytest.mark.parametrize("change", ["no line break", "CRLF", "BOM", "blank lines"])
def test_what_editors_do_is_no_damage(tmp_path, change):
    path = tmp_path / "metrics.jsonl"
    content = {
        "no line break": b"\n".join(STEPS),
        "CRLF": b"\r\n".join([*STEPS, b""]),
        "BOM": b"\xef\xbb\xbf" + b"\n".join([*STEPS, b""]),
        "blank lines": b"\n\n" + b"\n \n".join([*STEPS, b""]),
    }
    path.write_bytes(content[change])
    assert rewind(path, 9) == []
    assert path.read_bytes() == b"\n".join(STEPS) + b"\n"


def test_of_a_step_that_comes_twice_the_later_line_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    weights = {"weights": "x.pt", "AP": 0.1}
    written = [{"step": 1, "loss": 3.0}, {"step": 1, "AP": 0.2}, {"step": 1, "loss": 1.0}, weights]
    append_lines(path, [*written, {"step": 1, "AP": 0.3}, weights])
    assert rewind(path, 1) == [f"{path}: lines of steps that come twice: 2; the later ones stay"]
    assert read_lines(path) == [written[2], weights, {"step": 1, "AP": 0.3}, weights]


def test_many_damaged_lines_are_told_in_one_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"x\n" * 1000 + STEPS[0] + b"\n")
    (note,) = rewind(path, 1)
    assert "damaged lines: 1000 (line 1: expected JSON, got 'x'; line 2: " in note
    assert "; ...) moved to metrics.jsonl.damaged" in note
    assert len(note) < 400


@pytest.mark.parametrize("content", [b"", b"\n", STEPS[4] + b"\n", b'{"ste'])
def test_nothing_is_left(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    rewind(path, 0)
    assert read_lines(path) == []
    append_lines(path, [{"step": 1}])
    assert steps(path) == [1]


def test_a_link_is_replaced_and_never_written_through(tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"\n".join(STEPS) + b"\n")
    path = tmp_path / "metrics.jsonl"
    path.symlink_to(precious)
    with pytest.raises(OSError, match="cannot write .*metrics.jsonl: Too many levels of symbolic links"):
        append_lines(path, [{"step": 6}])
    rewind(path, 9)
    assert not path.is_symlink()
    append_lines(path, [{"step": 6}])
    assert precious.read_bytes() == b"\n".join(STEPS) + b"\n"
    assert steps(path) == [1, 2, 3, 4, 5, 6]


def test_errors_name_the_file(tmp_path):
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        read_lines(tmp_path)
    with pytest.raises(OSError, match=f"cannot write {tmp_path}: Is a directory"):
        append_lines(tmp_path, [])
    with pytest.raises(
        OSError, match="cannot write /dev/full: No space left on device; 12 bytes needed, .* bytes free"
    ):
        append_lines("/dev/full", [{"step": 1}])
