"""Progress where the output is no terminal: plain lines from time to time."""

import pytest

import train.progress
from train.progress import CountProgress, TrainingProgress, download_progress, evaluation_progress


@pytest.fixture
def clock(monkeypatch):
    """Function: seconds -> they have passed."""
    now = [1000.0]
    monkeypatch.setattr(train.progress.time, "monotonic", lambda: now[0])

    def pass_by(seconds):
        now[0] += seconds

    return pass_by


def test_training_has_the_first_reading_one_every_30_seconds_and_the_last(clock, capsys):
    progress = TrainingProgress(total_steps=120, first_step=20, enabled=True)
    for step in range(21, 121):
        clock(1.0)
        progress.update(1, f"epoch 1 loss {step}")
    progress.close()
    text = capsys.readouterr().err
    assert text.splitlines() == [
        "epoch 1 loss 21 21/120 00:01<01:39",
        "epoch 1 loss 51 51/120 00:31<01:09",
        "epoch 1 loss 81 81/120 01:01<00:39",
        "epoch 1 loss 111 111/120 01:31<00:09",
        "epoch 1 loss 120 120/120 01:40<00:00",
    ]
    assert not set(text) & set("\r\x1b\b\t█")


def test_an_interrupted_run_tells_its_last_reading(clock, capsys):
    progress = TrainingProgress(total_steps=9, first_step=0, enabled=True)
    for _ in range(3):
        clock(1.0)
        progress.update(1, "loss")
    progress.close()
    progress.close()
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["1/9", "3/9"]


def test_counts_are_told_every_30_seconds(clock, capsys):
    for _ in evaluation_progress(range(100), 100, enabled=True):
        clock(1.0)
    with CountProgress("generating pictures", 4, enabled=True, announced=True) as progress:
        for _ in range(4):
            clock(16.0)
            progress.update()
    for size in (4_000_000, None):
        with download_progress("x.pth", size, enabled=True) as progress:
            for _ in range(4):
                clock(16.0)
                progress.update(1_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "evaluating: 30/100",
        "evaluating: 60/100",
        "evaluating: 90/100",
        "generating pictures: 0/4",
        "generating pictures: 2/4",
        "generating pictures: 4/4",
        "fetching x.pth: 2.00M/4.00M",
        "fetching x.pth: 4.00M/4.00M",
        "fetching x.pth: 2.00M",
        "fetching x.pth: 4.00M",
    ]


def test_nothing_is_told_by_other_processes(clock, capsys):
    progress = TrainingProgress(total_steps=1, first_step=0, enabled=False)
    progress.update(1, "loss")
    progress.close()
    assert list(evaluation_progress("ab", 2, enabled=False)) == ["a", "b"]
    assert capsys.readouterr().err == ""
