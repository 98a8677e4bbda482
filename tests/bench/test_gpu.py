"""The command for a GPU works the first time: its dry run, and what it says without a GPU."""

import sys
import tarfile
from dataclasses import replace

import pytest
import torch

from bench import gpu
from bench.gpu_kit.smoke import NOTHING_RIGHT


@pytest.fixture
def _interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
def test_dry_run_writes_tables_and_pictures(tmp_path, capfd):
    names = ["stages-n16", "accuracy", "train-step"]
    folder = tmp_path / "results"
    archive = tmp_path / "results.tar.gz"

    assert (
        gpu.main(["--dry-run", "--out", str(folder), "--archive", str(archive), "--minutes", "60", "--only", *names])
        == 0
    )

    expected = {
        "dry-run-stages-n16.csv",
        "dry-run-stages-n16.txt",
        "dry-run-stages-n16.png",
        "dry-run-stages-n16-roofline.png",
        "dry-run-train-step.csv",
        "dry-run-train-step.txt",
        "dry-run-accuracy.csv",
        "dry-run-accuracy.txt",
    }
    assert {path.name for path in folder.iterdir()} == expected
    with tarfile.open(archive) as tar:
        assert set(tar.getnames()) == {f"./{name}" for name in expected}
    assert "| dry both" in capfd.readouterr().out


@pytest.mark.usefixtures("_interpreted")
def test_benchmarks_without_time_left_are_named(tmp_path, capsys):
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--minutes", "-1", "--only", "stages-n2"]) == 1
    assert "no time left for stages-n2" in capsys.readouterr().err


def planned(name, **changes):
    return replace(next(benchmark for benchmark in gpu.PLAN if benchmark.name == name), **changes)


@pytest.mark.usefixtures("_interpreted")
def test_a_failure_leaves_the_other_benchmarks(tmp_path, monkeypatch, capfd):
    plan = (
        planned("stages-n2", dry_arguments=("--help",)),  # writes nothing, so that the picture fails
        planned("train-step", module="nowhere"),
        planned("inference"),
    )
    monkeypatch.setattr(gpu, "PLAN", plan)
    folder = tmp_path / "not" / "there"

    assert gpu.main(["--dry-run", "--out", str(folder), "--minutes", "60"]) == 1

    assert [path.name for path in folder.glob("*.csv")] == ["dry-run-inference.csv"]
    out, err = capfd.readouterr()
    assert "not, or not all, of pictures of stages-n2, train-step\n" in out
    assert "bench: pictures of stages-n2 failed" in err
    assert "No module named bench.nowhere" in out


@pytest.mark.usefixtures("_interpreted")
def test_nothing_is_measured_where_nothing_is_right(tmp_path, monkeypatch, capfd):
    exits = tmp_path / "exits.py"
    exits.write_text(f"raise SystemExit({NOTHING_RIGHT})")
    monkeypatch.setattr(gpu, "python_step", lambda name, *others: gpu.Step(name, (sys.executable, str(exits)), 30))

    assert gpu.main(["--dry-run", "--out", str(tmp_path / "out"), "--only", "smoke", "accuracy"]) == 1

    out, err = capfd.readouterr()
    assert "## accuracy" not in out
    assert "no kernel is right" in err


def test_the_plan_is_complete_in_its_time():
    """What is expected to take half of each limit fits; every name is that of one set of files."""
    assert sum(benchmark.seconds for benchmark in gpu.PLAN) / 2 <= 60 * gpu.MINUTES
    assert len({benchmark.name for benchmark in gpu.PLAN}) == len(gpu.PLAN)
    assert gpu.PLAN[0].name == "smoke"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    with pytest.raises(SystemExit, match="expected a CUDA GPU, got none"):
        gpu.main([])
