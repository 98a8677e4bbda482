"""The command for a GPU works the first time: its dry run, and what it says without a GPU."""

import sys

import pytest
import torch

from bench import deform_conv, gpu


@pytest.fixture
def _interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
def test_dry_run_writes_tables_and_pictures(tmp_path, capsys):
    names = ["stages-n16", "accuracy", "train-step"]

    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--only", *names]) == 0

    assert {path.name for path in tmp_path.iterdir()} == {
        "dry-run-stages-n16.csv",
        "dry-run-stages-n16.png",
        "dry-run-stages-n16-roofline.png",
        "dry-run-train-step.csv",
        "dry-run-accuracy.csv",
    }
    assert "| dry both" in capsys.readouterr().out


@pytest.mark.usefixtures("_interpreted")
def test_benchmarks_without_time_left_are_named(tmp_path, capsys):
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--minutes", "-1", "--only", "stages-n2"]) == 1
    assert "no time left for stages-n2" in capsys.readouterr().err


@pytest.mark.usefixtures("_interpreted")
def test_a_failure_leaves_the_other_benchmarks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(deform_conv, "main", lambda arguments: 0)  # writes nothing, so that the picture fails
    monkeypatch.setitem(sys.modules, "bench.train_step", None)  # as where a package that it imports is missing
    folder = tmp_path / "not" / "there"
    names = ["stages-n2", "train-step", "inference"]

    assert gpu.main(["--dry-run", "--out", str(folder), "--only", *names]) == 1

    assert [path.name for path in folder.iterdir()] == ["dry-run-inference.csv"]
    out, err = capsys.readouterr()
    assert "not, or not all, of stages-n2, train-step\n" in out
    assert "bench: stages-n2 failed" in err
    assert "bench: train-step failed" in err
    assert err.count("Traceback") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    with pytest.raises(SystemExit, match="expected a CUDA GPU, got none"):
        gpu.main([])
