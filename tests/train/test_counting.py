"""Evaluations that are counted beside training: the numbers of those that are not, whatever stops the run."""

import json
import signal
import subprocess
import time

import pytest

import train.loop
from tests.train.conftest import command, environment, lines, make_split, run
from tests.train.data.test_coco_dataset import open_coco
from train.checkpoint import load
from train.counting import Counting
from train.distributed import Interrupted
from train.run_folder import RunFolder

COMMON = ("--pictures", 0, "--epochs", 2, "--checkpoint.every", 1, "--checkpoint.keep", 1)  # epochs of 4 steps


def evaluations(out):
    """Return the evaluations of a run without their times."""
    found = [line for line in lines(out) if "AP" in line]
    assert all(line.pop("evaluation_seconds") > 0 for line in found)
    return found


def assert_finished(out, numbers):
    """Check evaluations and losses, and that only the best and the newest checkpoint are left."""
    assert evaluations(out) == numbers
    assert [line["step"] for line in lines(out) if "loss" in line] == list(range(1, 9))
    assert load(out / "checkpoints" / "best.pt")["step"] == 4
    best, newest = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert (best, newest[:13]) == ("best.pt", "step-00000008")
    assert not (out / "uncounted.json").exists()


def assert_left(out):
    """Check that a stopped run has gone on after epoch 1 and left what is missing of its evaluation."""
    assert evaluations(out) == []
    assert json.loads((out / "uncounted.json").read_text())["step"] == 4
    assert load(out / "checkpoints" / "candidate.pt")["step"] == 4
    assert not list((out / "checkpoints").glob("step-00000004-*"))


@pytest.fixture(scope="module")
def at_once(tmp_path_factory):
    """A data set, and the evaluations of a run on it that counts at once. The better one is the first."""
    root = tmp_path_factory.mktemp("counting")
    make_split(root / "coco", "train2017", 8, 100)
    make_split(root / "coco", "val2017", 3, 500)
    result = run("--data.root", root / "coco", *COMMON, "--eval-overlap", 0, "--out", root / "run")
    assert result.returncode == 0, result.stderr
    numbers = evaluations(root / "run")
    assert [line["step"] for line in numbers] == [4, 8]
    assert numbers[0]["AP"] > numbers[1]["AP"]
    assert_finished(root / "run", numbers)
    return root / "coco", numbers


@pytest.fixture
def after_step(monkeypatch):
    """Function: have something done once, in this process, when a step has been taken."""

    def plan(number, action):
        update, done = train.loop._update, []

        def update_and_act(state, *rest):
            update(state, *rest)
            if state.step == number and not done:
                done.append(number)
                action()

        monkeypatch.setattr(train.loop, "_update", update_and_act)

    return plan


def test_same_numbers_and_best_weights(at_once, start, tmp_path):
    coco, numbers = at_once
    status, _, stderr = start("--data.root", coco, *COMMON, "--eval-overlap", 1, "--out", tmp_path / "run")
    assert status == 0
    assert "epoch 1: AP" in stderr
    assert "epoch 2: AP" in stderr
    assert_finished(tmp_path / "run", numbers)
    rows = json.loads((tmp_path / "run" / "detections.json").read_text())
    assert {row["image_id"] for row in rows} <= {500, 501, 502}


def test_signal_before_the_numbers_are_there(at_once, start, after_step, tmp_path):
    coco, numbers = at_once
    arguments = ("--data.root", coco, *COMMON, "--eval-overlap", 1, "--out", tmp_path / "run")
    after_step(5, lambda: signal.raise_signal(signal.SIGTERM))
    assert start(*arguments)[0] == 128 + signal.SIGTERM
    assert_left(tmp_path / "run")
    status, stdout, _ = start(*arguments)
    assert status == 0
    assert "going on after step 5" in " ".join(stdout.split())
    assert_finished(tmp_path / "run", numbers)


def test_kill_before_the_numbers_are_there(at_once, tmp_path):
    coco, numbers = at_once
    arguments = ("--data.root", coco, *COMMON, "--eval-overlap", 1, "--out", tmp_path / "run")
    process = subprocess.Popen(command(*arguments), env=environment(), stderr=subprocess.DEVNULL)
    out, end = tmp_path / "run", time.monotonic() + 100
    while time.monotonic() < end:  # until training goes on and the checkpoint of step 4 is gone
        if (out / "uncounted.json").exists() and not list(out.glob("checkpoints/step-00000004-*")):
            break
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert_left(tmp_path / "run")
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    assert_finished(tmp_path / "run", numbers)


def test_error_of_the_process_ends_the_run(at_once, start, after_step, tmp_path, monkeypatch):
    coco, numbers = at_once
    arguments = ("--data.root", coco, *COMMON, "--eval-overlap", 1, "--out", tmp_path / "run")
    begin = Counting.begin

    def begin_without_file(self, *detected):
        self.dataset.annotation_file = tmp_path / "gone.json"
        begin(self, *detected)

    with monkeypatch.context() as patch:
        patch.setattr(Counting, "begin", begin_without_file)
        status, _, stderr = start(*arguments)
    assert status == 1
    assert stderr.splitlines()[-1].startswith("error: [Errno 2] No such file")
    assert "gone.json" in stderr.splitlines()[-1]
    assert "in the process that counts" in (tmp_path / "run" / "error-rank0.txt").read_text()
    assert evaluations(tmp_path / "run") == []
    assert start(*arguments)[0] == 0
    assert_finished(tmp_path / "run", numbers)


@pytest.fixture
def counting(coco, tmp_path):
    """Counting in a folder with a checkpoint, ended afterwards."""
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / f"step-00000004-{'0' * 16}.pt").touch()
    counting = Counting(run, open_coco(coco, "val2017"), "pycocotools")
    yield counting
    counting.stop()


def test_dead_process_is_named(counting):
    counting.begin(4, 1, [], 0.0)
    counting._process.kill()
    with pytest.raises(ChildProcessError, match=r"counts the evaluation of step 4 \(exit code -9\).*--eval-overlap 0"):
        counting.wait(lambda: None)


def test_waiting_can_be_interrupted(counting):
    def interrupt():
        raise Interrupted(signal.SIGTERM, "")

    counting.begin(4, 1, [], 0.0)
    with pytest.raises(Interrupted):
        counting.wait(interrupt)
    counting.stop()
    assert counting.step is None
    assert counting.run.uncounted.exists()


@pytest.mark.parametrize(
    ("step", "line"),
    [
        pytest.param(3, None, id="checkpoint-lost"),
        pytest.param(4, {"step": 4, "epoch": 1, "AP": 0.5}, id="already-written"),
    ],
)
def test_what_is_not_missing_is_forgotten(counting, step, line):
    counting.begin(4, 1, [], 0.0)
    counting.stop()
    if line:
        counting.run.append(line)
    counting.take_up(step)
    assert counting.step is None
    assert not counting.run.uncounted.exists()
    assert not counting.candidate.exists()


def test_nothing_to_count(counting):
    counting.take_up(4)
    assert (counting.step, counting.collect(), counting.wait(lambda: None)) == (None, None, None)
