"""An evaluation that an interruption left out is made at the next start, wherever the run was stopped."""

import signal
import sys
import time

import pytest

import train.main
from tests.train.conftest import lines, make_split, one_thread, tiny
from tests.train.processes import MAIN
from train.checkpoint import list_checkpoints, load_checkpoint

COMMON = ("--pictures", 0, "--epochs", 2, "--checkpoint.every", 1, "--checkpoint.keep", 1)  # epochs of 4 steps


def evaluations(out):
    """Return the evaluations of a run without their times."""
    found = [line for line in lines(out) if "AP" in line]
    for line in found:
        assert line.pop("evaluation_seconds") > 0
    return found


def assert_finished(out, numbers):
    """Check evaluations and losses, and that only the best and the newest checkpoint are left."""
    assert evaluations(out) == numbers
    assert [line["step"] for line in lines(out) if "loss" in line] == list(range(1, 9))
    assert load_checkpoint(out / "checkpoints" / "best.pt")["step"] == 4
    best, newest = sorted(path.name for path in (out / "checkpoints").iterdir() if not path.name.startswith("."))
    assert (best, newest[:13]) == ("best.pt", "step-00000008")


def assert_evaluation_is_missing(out):
    """Check that a run was stopped after epoch 1, before its numbers were written."""
    assert evaluations(out) == []
    assert load_checkpoint(list_checkpoints(out / "checkpoints")[0])["step"] == 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A data set, and the evaluations of a run on it that nothing stops. The better one is the first."""
    root = tmp_path_factory.mktemp("whole")
    make_split(root / "coco", "train2017", 8, 100)
    make_split(root / "coco", "val2017", 3, 500)
    arguments = tiny("--data.root", root / "coco", *COMMON, "--out", root / "run")
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setattr(sys, "argv", [str(MAIN), *arguments])
        assert train.main.main() == 0
    numbers = evaluations(root / "run")
    assert [line["step"] for line in numbers] == [4, 8]
    assert numbers[0]["AP"] > numbers[1]["AP"]
    assert_finished(root / "run", numbers)
    return root / "coco", numbers


def test_signal_during_the_evaluation(whole, start, tmp_path, monkeypatch):
    coco, numbers = whole
    arguments = ("--data.root", coco, *COMMON, "--out", tmp_path / "run")
    evaluate = train.main.evaluate

    def evaluate_after_signal(*positional, **named):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*positional, **named)

    with monkeypatch.context() as patch:
        patch.setattr(train.main, "evaluate", evaluate_after_signal)
        status, _, stderr = start(*arguments)
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM during the evaluation" in stderr
    assert_evaluation_is_missing(tmp_path / "run")

    status, stdout, _ = start(*arguments)
    assert status == 0
    assert "going on after step 4, epoch 1" in " ".join(stdout.split())
    assert_finished(tmp_path / "run", numbers)


def test_kill_before_the_numbers_are_written(whole, start, tmp_path, launch):
    coco, numbers = whole
    out = tmp_path / "run"
    arguments = ("--data.root", coco, *COMMON, "--out", out)
    process = launch(*arguments)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not list(out.glob("checkpoints/step-00000004-*")):
        time.sleep(0.002)
    process.kill()
    assert_evaluation_is_missing(out)
    assert start(*arguments)[0] == 0
    assert_finished(out, numbers)


@pytest.mark.parametrize("place", ["mark_best", "append_metrics"])
def test_end_between_evaluation_and_numbers(whole, start, tmp_path, monkeypatch, place):
    coco, numbers = whole
    arguments = ("--data.root", coco, *COMMON, "--out", tmp_path / "run")
    owner = train.main if place == "mark_best" else train.main.RunFolder
    original = getattr(owner, place)

    def fail(*positional):
        if place == "mark_best" or "AP" in positional[1]:
            raise OSError("pulled the plug")
        return original(*positional)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, fail)
        status, _, stderr = start(*arguments)
    assert status == 1
    assert stderr.splitlines()[-1] == "error: pulled the plug"
    assert_evaluation_is_missing(tmp_path / "run")
    assert start(*arguments)[0] == 0
    assert_finished(tmp_path / "run", numbers)
