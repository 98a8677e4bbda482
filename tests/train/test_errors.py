import signal

import pytest
import torch

from train.distributed import SharedError, World
from train.errors import explain, report_error
from train.signals import Interrupted

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("a\nb.jpg: broken"), r"a\nb.jpg: broken"),
        (OSError("a\x1b[2J\u202e\udcff"), r"a\x1b[2J\u202e\udcff"),
        (RuntimeError("gloo:\n  timed out"), "lost the connection"),
        (FileNotFoundError("x.json"), "x.json"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"), "lost the connection"),
        (RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. "), "loads images: DataLoader worker"),
        (RuntimeError("DataLoader timed out after 600 seconds"), "within --timeout: DataLoader timed out after 600"),
        (
            RuntimeError(
                "Caught RuntimeError in DataLoader worker process 0.\nTrace:\nno shared memory: No space left"
            ),
            "loads images: no shared memory: No space left. Was memory short?",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "Try a lower --data.batch-size"),
    ],
)
def test_what_users_can_mend_is_one_line(error, text):
    line = explain(error)
    assert text in line
    assert "\n" not in line


def test_an_evaluation_is_told_only_what_helps_it():
    line = explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), eval_only=True)
    assert line == "CUDA out of memory. Try --precision bf16"


def test_a_fault_of_the_program_shows_its_trace(capsys):
    assert explain(TypeError("x")) is None
    with pytest.raises(TypeError) as caught:
        len(5)
    assert report_error(caught.value, ALONE, None) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert "this is a fault of the program" in text


def test_trace_of_a_user_error_goes_into_the_folder(tmp_path, capsys):
    assert report_error(ValueError("wrong"), None, tmp_path) == 1
    assert capsys.readouterr().err == "error: wrong\n"
    assert "ValueError: wrong" in (tmp_path / "error-rank0.txt").read_text()
    assert report_error(ValueError("wrong"), None, tmp_path / "absent") == 1


@pytest.mark.parametrize(
    ("name", "shown"),
    [("\udcff", r"\udcff"), ("\x1b[2J", r"\x1b[2J"), ("a\u2028b", r"a\u2028b"), ("猫", "猫")],
)
def test_trace_with_any_name(tmp_path, capsys, name, shown):
    assert report_error(ValueError(f"{name}: wrong"), None, tmp_path) == 1
    assert capsys.readouterr().err == f"error: {shown}: wrong\n"
    assert f"ValueError: {shown}: wrong" in (tmp_path / "error-rank0.txt").read_text(encoding="utf-8")


def test_signals_have_their_status(capsys):
    assert report_error(Interrupted(signal.SIGUSR1, "after step 3"), ALONE, None) == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1 after step 3. The same command goes on" in capsys.readouterr().err
    assert report_error(KeyboardInterrupt(), ALONE, None) == 130


@pytest.mark.parametrize("rank", [0, 1])
def test_error_that_all_processes_know_is_printed_once(tmp_path, capsys, monkeypatch, rank):
    shown_before_the_barrier = []
    monkeypatch.setattr(World, "barrier", lambda _: shown_before_the_barrier.append(capsys.readouterr().err))
    world = World(rank, 2, rank, torch.device("cpu"))
    assert report_error(SharedError("rank 1: no\nnetwork"), world, None) == 1
    assert shown_before_the_barrier == ["error: rank 1: no\\nnetwork\n" if rank == 0 else ""]
    assert capsys.readouterr() == ("", "")
