"""One run at a time in a folder."""

import errno
import fcntl
import multiprocessing
import os
import signal
import socket

import pytest

from train.folder_lock import locked
from train.run_folder import RunFolder


def lock(path):
    with RunFolder(path).lock() as notes:
        return notes


def hold(path, is_held):
    with locked(path):
        is_held.set()
        signal.pause()


def test_the_holder_is_named_and_its_end_frees_the_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    is_held = context.Event()
    holder = context.Process(target=hold, args=(tmp_path, is_held))
    holder.start()
    assert is_held.wait(60)
    with pytest.raises(ValueError, match="expected a folder that no other run uses") as caught:
        lock(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"--out {tmp_path}: ")
    assert f"in use by process {holder.pid} on {socket.gethostname()}" in message
    holder.kill()
    holder.join()
    assert lock(tmp_path) == []


def live_on(is_running):
    is_running.set()
    signal.pause()


def test_a_forked_process_that_lives_on_does_not_keep_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    is_running = context.Event()
    with locked(tmp_path):
        child = context.Process(target=live_on, args=(is_running,))
        child.start()
    try:
        assert is_running.wait(60)
        with locked(tmp_path):
            assert child.is_alive()
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, number):
    def flock(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    (note,) = lock(tmp_path)
    assert note == f"{tmp_path} is on a file system without locks: let no other run use it"


@pytest.mark.parametrize("content", [b"", b"\xff\0\xff", b"process 1\x1b[2J on x", b"x" * 10_000])
def test_whatever_the_file_of_the_lock_holds(tmp_path, content):
    with locked(tmp_path):
        (tmp_path / ".lock").write_bytes(content)
        with pytest.raises(ValueError, match="in use by another process: wait"):
            lock(tmp_path)
    assert lock(tmp_path) == []


@pytest.mark.parametrize("kind", ["link", "folder", "file as --out"])
def test_errors_are_one_line(tmp_path, kind):
    out = tmp_path / "run"
    if kind == "file as --out":
        out.touch()
    else:
        out.mkdir()
    if kind == "link":
        (out / ".lock").symlink_to(tmp_path / "precious")
    elif kind == "folder":
        (out / ".lock").mkdir()
    with pytest.raises(OSError, match=f"cannot write into --out {out}: ") as caught:
        lock(out)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "precious").exists()


def test_leftovers_are_removed_once_the_lock_is_held(tmp_path):
    run = RunFolder(tmp_path)
    for folder in (run.path, run.checkpoints, run.pictures):
        folder.mkdir(exist_ok=True)
        for name in (".4711.step-00000001-0123456789abcdef.pt", ".partial-0123456789abcdef.pt", ".partial-4711"):
            (folder / name).write_bytes(b"half")
    kept = run.checkpoints / "step-00000001-0123456789abcdef.pt"
    kept.touch()
    with locked(tmp_path), pytest.raises(ValueError, match="no other run uses"):
        lock(tmp_path)
    assert (tmp_path / ".partial-4711").exists()
    assert lock(tmp_path) == ["files removed that a killed run had begun to write: 9"]
    assert list(run.checkpoints.iterdir()) == [kept]


def replace_folder(run):
    run.path.rename(run.path.with_name("away"))
    run.path.mkdir()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda run: run.path.rename(run.path.with_name("away")), id="moved"),
        pytest.param(replace_folder, id="replaced by a folder"),
        pytest.param(
            lambda run: (run.path.rename(run.path.with_name("away")), run.path.touch()), id="replaced by a file"
        ),
    ],
)
def test_a_folder_that_is_gone_is_noticed(tmp_path, change):
    run = RunFolder(tmp_path / "run")
    with run.lock():
        run.append_metrics({"step": 1})
        change(run)
        with pytest.raises(FileNotFoundError, match="deleted, moved or replaced") as caught:
            run.append_metrics({"step": 2})
    assert str(caught.value).startswith(f"--out {tmp_path / 'run'}: ")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
