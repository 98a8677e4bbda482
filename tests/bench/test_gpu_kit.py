"""The kit for a bare GPU machine follows the code: its scripts run dry, in the interpreter or on a pretended GPU."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu
from bench.gpu_kit import build, one_step, plan, smoke
from bench.gpu_kit.smoke import LAYERS, NOTHING_RIGHT, Smoke

ROOT = Path(__file__).parents[2]
NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
ENVIRONMENT = Path(os.environ.get("GPU_KIT_ENVIRONMENT", build.DEFAULT_ENVIRONMENT)) / "bin" / "python"


@pytest.fixture
def _interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def run_inventory(python, cache, *arguments):
    """Run the inventory in a process of its own, where nothing is interpreted; return what it printed."""
    variables = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    variables.pop("TRITON_INTERPRET", None)
    command = [str(python), "-m", "bench.gpu_kit.inventory", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_launch_works_on_the_pretended_gpu(tmp_path):
    """With any Triton, and nothing compiled; a quarter of the items, which has every layer in one dtype."""
    assert len(smoke.LIMITS) == 4
    out = run_inventory(sys.executable, tmp_path, "--dry-run", "--share", "0", "4")
    assert "not launched" not in out
    assert int(re.search(r"(\d+) launches", out)[1]) > 250


@pytest.mark.skipif(not ENVIRONMENT.exists(), reason="needs the environment of `make gpu-kit`")
def test_kernels_are_compiled_and_packed(tmp_path):
    cache = tmp_path / "cache"
    (cache / "stale").mkdir(parents=True)
    (cache / "stale" / "old.json").touch()
    used = tmp_path / "used"
    arguments = ["--share", "1", "400", "--used", str(used)]
    first = run_inventory(ENVIRONMENT, cache, *arguments)
    assert int(re.search(r"variants, (\d+) compilations", first)[1]) > 0

    there = tmp_path / "there"
    build.pack_cache(cache, set(used.read_text().split()), tmp_path / "triton.tar.xz", there)
    with tarfile.open(tmp_path / "triton.tar.xz") as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {".cubin", ".json", ".so"}
        assert not any("stale" in name for name in tar.getnames())
        tar.extractall(there, filter="data")
    shutil.rmtree(cache)
    libraries = set(there.rglob("*.so"))
    again = run_inventory(ENVIRONMENT, there, *arguments)
    assert " 0 compilations" in again
    assert set(there.rglob("*.so")) == libraries, "launchers are not compiled again, either"


def test_an_interrupted_installation_is_made_again(tmp_path, monkeypatch):
    commands = []

    def run(command, check):
        assert check
        commands.append(command)
        (tmp_path / "kit" / "bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / "kit" / "bin" / "python").touch()
        if "install" in command and len(commands) == 2:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    with pytest.raises(subprocess.CalledProcessError):
        build.make_environment(tmp_path / "kit")
    assert build.make_environment(tmp_path / "kit") == tmp_path / "kit" / "bin" / "python"
    assert len(commands) == 4
    build.make_environment(tmp_path / "kit")
    assert len(commands) == 4, "it is there"


def test_without_network_the_wheels_of_an_earlier_time_stay(tmp_path):
    (tmp_path / "old.whl").touch()
    with pytest.raises(subprocess.CalledProcessError):
        build.download_wheels(Path("false"), tmp_path)
    assert (tmp_path / "old.whl").exists()


@NEEDS_NO_GPU
@pytest.mark.usefixtures("_interpreted")
def test_smoke(capsys):
    assert smoke.main(["--dry-run", "--dtypes", "float32"]) == 0
    out = capsys.readouterr().out
    assert "smoke: all right" in out
    for name in ("float32 C 128", "float32 stable sort", "nms", "float32 RoIAlign"):
        assert re.search(rf"ok +{name}", out), name


def test_smoke_tells_wrong_from_right(capsys):
    checks = Smoke()
    checks.check("large", lambda: [0.5, 2.0], 1.0)
    checks.check("not a number", lambda: [float("nan")], 1.0)
    checks.check("raises", lambda: [1 / 0], 1.0)
    assert checks.status() == NOTHING_RIGHT
    checks.check("small", lambda: [0.5], 1.0)
    assert checks.status() == 1
    out = capsys.readouterr().out
    assert "smoke: 3 wrong: large, not a number, raises" in out
    assert "ZeroDivisionError" in out


def test_kernels_that_the_device_refuses_are_no_error(monkeypatch, capsys):
    """A compiled kernel that needs too much shared memory is not loaded: Triton knows no registers of it."""

    def kernel(name, *variants):
        device_caches = {0: (dict(enumerate(variants)),)}
        return SimpleNamespace(fn=SimpleNamespace(__name__=name), device_caches=device_caches)

    loaded = SimpleNamespace(module=1, n_regs=64, n_spills=0)
    refused = SimpleNamespace(module=None)
    kernels = [kernel("a_kernel", loaded, refused), kernel("b_kernel", refused), kernel("c_kernel")]
    monkeypatch.setattr(smoke, "imported_kernels", lambda: kernels)

    smoke.print_kernels()

    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [
        "a_kernel: 1 of 2 variants ran, at most 64 registers and 0 spills",
        "b_kernel: did not run",
        "c_kernel: did not run",
    ]


def test_layers_in_other_sizes():
    assert {layer.tiny().case.height for layer in LAYERS} == {smoke.TINY_SIZE[0]}
    assert 0 < len(smoke.tiny_layers()) < len(LAYERS)
    for layer in LAYERS:
        few = layer.few_pixels().case
        assert few.width == layer.case.width, "decides about strips, so about the compiled code"
        assert (few.channels, few.kernel) == (layer.case.channels, layer.case.kernel)


@NEEDS_NO_GPU
@pytest.mark.usefixtures("_interpreted")
def test_one_step():
    assert one_step.main(["dry", "--batch-size", "1", "--dry-run"]) == 0


def test_the_two_calls_have_every_benchmark_once(tmp_path):
    steps = [step for call in plan.CALLS.values() for step in call(tmp_path)]
    names = [step.name for step in steps]
    assert len(names) == len(set(names))
    assert {benchmark.name for benchmark in gpu.PLAN} == set(names) - {"tests", "ncu", "memcheck"}
    assert names[0] == "smoke"
    modules = {step.command[step.command.index("-m") + 1] for step in steps} - {"pytest"}
    for module in modules:
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
    for path in plan.GPU_TESTS:
        assert (ROOT / path).exists(), path


def test_a_call_stops_where_nothing_is_right(tmp_path, monkeypatch, capfd):
    """Without a GPU the smoke run ends at once."""
    wrong = (sys.executable, "-c", f"raise SystemExit({NOTHING_RIGHT})")
    steps = [plan.Step("smoke", wrong, 30), plan.Step("tests", wrong, 30)]
    monkeypatch.setitem(plan.CALLS, "first", lambda out: steps)
    archive = tmp_path / "first.tar.gz"

    assert plan.main(["first", "--out", str(tmp_path / "out"), "--archive", str(archive)]) == 1

    out, err = capfd.readouterr()
    assert "## smoke" in out
    assert "## tests" not in out
    assert "nothing is measured" in err
    with tarfile.open(archive) as tar:
        assert "./gpu-smoke.txt" in tar.getnames()


def test_scripts_name_what_is_there(tmp_path):
    for name in build.SCRIPTS:
        script = (build.FOLDER / name).read_text()
        assert subprocess.run(["bash", "-n", str(build.FOLDER / name)], check=False).returncode == 0
        for module in re.findall(r"-m (bench[\w.]*)", script):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
    assert f"TRITON_CACHE_DIR={build.CACHE_THERE}" in (build.FOLDER / "unpack.sh").read_text()
    calls = [re.search(r"plan (\w+)", (build.FOLDER / name).read_text())[1] for name in ("run1.sh", "run2.sh")]
    assert calls == list(plan.CALLS)
    wheels = {wheel.split("==")[0] for wheel in build.WHEELS}
    constraints = (ROOT / "constraints.txt").read_text()
    for wheel in build.WHEELS:
        assert f"\n{wheel}\n" in constraints, "the version that the tests are run with"
    assert wheels >= {"tyro", "pycocotools"}
