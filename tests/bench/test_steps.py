"""Steps are stopped when their time is up, and the others still run."""

import signal
import subprocess
import sys
import tarfile
import time

import pytest

from bench.steps import TIMED_OUT, Step, run_step, run_steps, write_archive


def python(name, code, seconds=30.0, shown=""):
    return Step(name, (sys.executable, "-c", code), seconds, shown)


def run(steps, folder, seconds=60.0):
    statuses = run_steps(steps, folder, "x", time.monotonic() + seconds)
    return {step.name: status for step, status in statuses}


def test_a_step_that_hangs_is_stopped_with_what_it_started(tmp_path, capfd):
    child = "import time; time.sleep(60)"
    hangs = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()

    statuses = run([python("hangs", hangs, 1.5), python("fails", "1 / 0"), python("works", "print(1)")], tmp_path)

    assert statuses == {"hangs": TIMED_OUT, "fails": 1, "works": 0}
    assert time.monotonic() - start < 30
    assert (tmp_path / "x-hangs.txt").read_text() == "begun\n"
    out, _ = capfd.readouterr()
    assert "-- hangs: stopped" in out
    assert "ZeroDivisionError" in out


def test_shown_lines_are_a_part_of_the_output(tmp_path, capfd):
    statuses = run([python("prints", "print('quiet'); print('= loud')", shown="^=")], tmp_path)
    assert statuses == {"prints": 0}
    assert (tmp_path / "x-prints.txt").read_text() == "quiet\n= loud\n"
    out, _ = capfd.readouterr()
    assert "= loud\n" in out
    assert "quiet" not in out


def test_without_time_and_without_the_tool(tmp_path, capfd):
    missing = Step("missing", ("surely-not-installed",), 5.0)
    assert run([missing], tmp_path) == {"missing": 127}
    assert run([python("late", "print(1)")], tmp_path, seconds=-1) == {"late": None}
    _, err = capfd.readouterr()
    assert "missing failed" in err
    assert "no time left for late" in err


def test_an_interrupted_step_is_stopped(tmp_path, monkeypatch):
    """Ctrl-C while it prints."""
    processes = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **kwargs: processes.append(popen(*args, **kwargs)) or processes[0]
    )

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_step(python("prints", "import time; print(1, flush=True); time.sleep(60)"), tmp_path / "x.txt", 30)
    assert processes[0].poll() == -signal.SIGKILL


@pytest.mark.parametrize("name", ["results.tar.gz", "not/yet/there.tar.gz", "results/inside.tar.gz"])
def test_archive(tmp_path, name):
    folder = tmp_path / "results"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "deeper" / "b.txt").write_text("b")
    for _ in range(2):
        write_archive(folder, tmp_path / name)
    with tarfile.open(tmp_path / name) as tar:
        assert tar.getnames() == ["./a.txt", "./deeper/b.txt"]
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"results/a.txt", "results/deeper/b.txt", name}
