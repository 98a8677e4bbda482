"""The command for a GPU works the first time: its dry run, and what it says without a GPU."""

import sys

import pytest
import torch

from bench import deform_conv, gpu


def test_dry_run_writes_tables_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--only", "stages-n16", "accuracy", "train-step"]) == 0
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        "dry-run-stages-n16.csv", "dry-run-stages-n16.png", "dry-run-stages-n16-roofline.png", "dry-run-train-step.csv",
        "dry-run-accuracy.csv",
    }  # fmt: skip
    assert "| dry both" in capsys.readouterr().out


def test_benchmarks_without_time_left_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--minutes", "-1", "--only", "stages-n2"]) == 1
    assert "no time left for stages-n2" in capsys.readouterr().err


def test_a_failure_leaves_the_other_benchmarks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(deform_conv, "main", lambda arguments: 0)  # writes nothing, so that the picture fails
    monkeypatch.setitem(sys.modules, "bench.train_step", None)  # as where a package that it imports is missing
    folder = tmp_path / "not" / "there"
    only = ["stages-n2", "train-step", "inference"]
    assert gpu.main(["--dry-run", "--out", str(folder), "--only", *only]) == 1
    assert [path.name for path in folder.iterdir()] == ["dry-run-inference.csv"]
    out, err = capsys.readouterr()
    assert "not, or not all, of stages-n2, train-step\n" in out
    assert "bench: stages-n2 failed" in err
    assert "bench: train-step failed" in err
    assert err.count("Traceback") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        gpu.main([])
