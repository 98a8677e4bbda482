"""Files: the old content or the whole new one, and nothing temporary left behind."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from detector.files import open_regular, remove_leftovers, replacing, write_json


@pytest.fixture(params=[False, True], ids=["", "durable"])
def durable(request):
    return request.param


def test_the_name_appears_when_the_block_ends(tmp_path, durable):
    path = tmp_path / "weights.onnx"
    with replacing(path, durable=durable) as partial:
        assert partial.parent == tmp_path
        assert partial.suffix == ".onnx"  # writers choose their format by it
        partial.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["weights.onnx"]


def test_an_error_leaves_the_old_file(tmp_path, durable):
    path = tmp_path / "results.json"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path, durable=durable) as partial:
            partial.write_text("ne")
            raise RuntimeError("half written")

    with pytest.raises(RuntimeError, match="half"):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old"


def test_json(tmp_path, durable):
    content = {"AP": 0.5, "classes": ["leaf", "fish"]}
    write_json(tmp_path / "compact.json", content, durable=durable)
    assert (tmp_path / "compact.json").read_text() == json.dumps(content)
    write_json(str(tmp_path / "indented.json"), content, indent=2, durable=durable)
    assert (tmp_path / "indented.json").read_text() == json.dumps(content, indent=2) + "\n"


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_json(path, {"set": {1}})
    assert path.read_text() == "old"


@pytest.mark.parametrize("target", ["file", "absent"])
def test_a_link_is_replaced_and_not_followed(tmp_path, durable, target):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    path = tmp_path / "results.json"
    path.symlink_to(outside / target)
    write_json(path, [1], durable=durable)
    assert not path.is_symlink()
    assert path.read_text() == "[1]"
    assert (outside / "file").read_text() == "precious"
    assert os.listdir(outside) == ["file"]


def test_temporary_names_differ_and_are_created_anew(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    with replacing(path) as one, replacing(path) as two:
        assert one != two
        assert str(os.getpid()) not in one.name.replace(one.suffix, "").split(".")
        one.write_text("1")
        two.write_text("2")
    assert path.read_text() == "1"

    monkeypatch.setattr("secrets.token_hex", lambda length: "0" * 2 * length)  # a stranger who guessed the name
    (tmp_path / f".partial-{'0' * 16}.json").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError, match="cannot write .*results.json: File exists"):
        write_json(path, [1])
    assert not (tmp_path / "precious").exists()
    assert (tmp_path / f".partial-{'0' * 16}.json").is_symlink()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "results.json", [])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "results.json").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("name", ["x" * 250 + ".json", "x." + "y" * 250, "\u00e4" * 120 + ".json", "a b\n.json"])
def test_every_name_that_the_file_system_takes(tmp_path, name):
    write_json(tmp_path / name, [1])
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_with_the_space(tmp_path, durable, number):
    path = tmp_path / "results.json"
    path.write_text("old")

    def fill() -> None:
        with replacing(path, durable=durable, size=3_000_000):
            raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=r"3,000,000 bytes needed, [\d,]+ bytes free") as caught:
        fill()
    assert str(caught.value).startswith(f"cannot write {path}: {os.strerror(number)}; ")
    assert caught.value.errno == number
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_errors_name_the_file_and_keep_their_class(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot write .*absent/a.json: No such file"):
        write_json(tmp_path / "absent" / "a.json", [])
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="cannot write .*folder: Is a directory"):
        write_json(tmp_path / "folder", [])
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="cannot write .*file/a.json: Not a directory"):
        write_json(tmp_path / "file" / "a.json", [])
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def read_another(path):
    with replacing(path):
        path.with_name("absent").read_bytes()


def test_the_error_of_another_file_stays_its_own(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        read_another(tmp_path / "a.json")
    assert caught.value.filename == str(tmp_path / "absent")


@pytest.mark.parametrize("text", ["\ud800", "caf\u00e9 \udce9", "\u202e\x00\x1b[2J"])
def test_json_takes_every_string(tmp_path, text):
    write_json(tmp_path / "a.json", {text: text})
    content = (tmp_path / "a.json").read_bytes()
    assert content.isascii()
    assert json.loads(content) == {text: text}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [-float("inf")]])
def test_json_has_no_nan(tmp_path, value):
    with pytest.raises(ValueError, match="a.json: expected finite numbers"):
        write_json(tmp_path / "a.json", value)
    assert os.listdir(tmp_path) == []


def test_leftovers_are_those_of_killed_writers(tmp_path):
    leftovers = [".partial-0123456789abcdef.json", ".partial-0123456789abcdef", ".17.metrics.jsonl", ".partial-4711"]
    others = [".lock", "step-00000001.pt", ".partial-notes", ".17", "partial-0123456789abcdef", ".git"]
    for name in [*leftovers, *others]:
        (tmp_path / name).write_text("half")
    (tmp_path / ".18.folder").mkdir()
    (tmp_path / ".19.link").symlink_to(tmp_path / "step-00000001.pt")
    assert remove_leftovers(tmp_path) == 5
    assert sorted(os.listdir(tmp_path)) == sorted([*others, ".18.folder"])
    assert remove_leftovers(tmp_path / "absent") == 0
    assert remove_leftovers(tmp_path / ".lock") == 0


def test_the_leftover_of_a_kill_is_recognized(tmp_path):
    with replacing(tmp_path / "step-00000001-0123456789abcdef.pt") as partial:
        partial.write_bytes(b"half")
        os.link(partial, tmp_path / "kept")
        name = partial.name
    (tmp_path / "kept").rename(tmp_path / name)
    assert remove_leftovers(tmp_path) == 1
    assert os.listdir(tmp_path) == ["step-00000001-0123456789abcdef.pt"]


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "device"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, kind):
    path = Path("/dev/zero")
    if kind != "device":
        path = tmp_path / "pipe"
        os.mkfifo(path)
    if kind == "link to a pipe":
        path = tmp_path / "link"
        path.symlink_to("pipe")
    with pytest.raises(OSError, match=rf"{path}: expected a regular file, got a pipe or a device"):
        open_regular(path)
