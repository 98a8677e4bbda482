"""The wheel in empty environments: the operator with torch alone, the detector with its extra.

Builds and installs, so it needs minutes and a package index: `make test-wheel`. The variable WHEEL names a wheel
that is built already.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TORCH = f"torch=={torch.__version__.partition('+')[0]}"  # the version of this environment, of any build

FORWARD_AND_BACKWARD = """
import torch
from triton_dcn import ModulatedDeformConv2dPack, deform_conv2d

x = torch.randn(2, 4, 9, 8, requires_grad=True)
offset = torch.randn(2, 18, 9, 8, requires_grad=True)
mask = torch.rand(2, 9, 9, 8, requires_grad=True)
weight = torch.randn(6, 4, 3, 3, requires_grad=True)
y = deform_conv2d(x, offset, weight, padding=1, mask=mask)
y.sum().backward()
for tensor in (x, offset, mask, weight):
    assert tensor.grad.isfinite().all() and tensor.grad.any()

layer = ModulatedDeformConv2dPack(4, 6, 3, padding=1)
layer(x.detach()).sum().backward()
assert layer.weight.grad.any()
print(tuple(y.shape))
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


class Environment:
    """A virtual environment outside of the repository, without the variables that would let it see the sources."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"
        self._run(sys.executable, "-m", "venv", folder / "venv").check_returncode()

    def install(self, *requirements: str) -> None:
        """Install requirements with pip, and check that what is installed fits together."""
        install = self._run(self.python, "-m", "pip", "install", "--quiet", *requirements)
        assert install.returncode == 0, install.stderr
        check = self._run(self.python, "-m", "pip", "check")
        assert check.returncode == 0, check.stdout

    def packages(self) -> set[str]:
        """Return the names of the installed packages."""
        listing = self._run(self.python, "-m", "pip", "list", "--format=freeze").stdout
        return {line.partition("==")[0].lower() for line in listing.splitlines()}

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python."""
        return self._run(self.python, *arguments)

    def run_command(self, name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command that was installed."""
        return self._run(self.python.with_name(name), *arguments)

    def _run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:  # pytest would keep gigabytes of its own temporary folders
        yield Path(name)


@pytest.fixture(scope="module")
def wheel(folder: Path) -> Path:
    if "WHEEL" in os.environ:
        return ROOT / os.environ["WHEEL"]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def torch_only(folder: Path, wheel: Path) -> Environment:
    (folder / "torch-only").mkdir()
    environment = Environment(folder / "torch-only")
    environment.install(TORCH, str(wheel))
    return environment


@pytest.fixture(scope="module")
def with_detector(folder: Path, wheel: Path) -> Environment:
    (folder / "with-detector").mkdir()
    environment = Environment(folder / "with-detector")
    environment.install(TORCH, f"{wheel}[detector]")
    return environment


def test_content(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata_file,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(metadata_file).decode()
        entry_points = archive.read(metadata_file.replace("METADATA", "entry_points.txt")).decode()
    tops = {name.partition("/")[0] for name in names}
    version = wheel.name.split("-")[1]
    assert tops == {"triton_dcn", "detector", f"triton_dcn-{version}.dist-info"}
    assert f"\nVersion: {version}\n" in metadata

    missing = []
    for package in ("triton_dcn", "detector"):
        for source in (ROOT / package).rglob("*"):
            if source.suffix in {".py", ".typed"} and str(source.relative_to(ROOT)) not in names:
                missing.append(source)
    assert missing == []

    required = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    assert [requirement for requirement in required if "extra ==" not in requirement] == ["torch>=2.7"]
    assert re.findall(r"^(dcn-\w+) = ", entry_points, re.MULTILINE) == ["dcn-export", "dcn-predict"]


def test_the_operator_needs_torch_alone(torch_only):
    assert not torch_only.packages() & {"numpy", "opencv-python-headless", "safetensors", "tqdm", "tyro"}
    result = torch_only.run("-c", FORWARD_AND_BACKWARD)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "(2, 6, 9, 8)\n"


def test_the_detector_names_its_extra(torch_only):
    result = torch_only.run("-c", "import detector")
    packages = "opencv-python-headless (cv2), numpy, safetensors, tqdm, tyro"
    assert result.returncode == 1
    assert result.stderr.endswith(f"ImportError: detector needs {packages}: pip install 'triton-dcn[detector]'\n")


@pytest.mark.parametrize("command", ["dcn-predict", "dcn-export"])
def test_commands_name_the_extra(torch_only, command):
    result = torch_only.run_command(command, "--help")
    assert result.returncode == 1
    assert result.stderr.endswith("pip install 'triton-dcn[detector]'\n")


def test_the_command_of_the_message_installs_the_extra(torch_only):
    """pip takes the version that is installed, also where no index has the distribution."""
    result = torch_only.run("-m", "pip", "install", "--dry-run", "--no-deps", "triton-dcn[detector]")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("extra", ["triton", "detector", "train", "fast-eval", "export", "bench", "dev"])
def test_every_extra_can_be_installed(with_detector, wheel, extra):
    result = with_detector.run("-m", "pip", "install", "--dry-run", "--quiet", TORCH, f"{wheel}[{extra}]")
    assert result.returncode == 0, result.stderr
    assert "does not provide the extra" not in result.stderr


@pytest.mark.parametrize("environment", ["torch_only", "with_detector"])
def test_training_names_its_extra(environment, request):
    """`train` is not in the wheel: it runs from the repository, with the packages of the environment."""
    result = request.getfixturevalue(environment).run(ROOT / "train" / "main.py", "--help")
    last_line = result.stderr.splitlines()[-1]
    assert result.returncode == 1
    assert last_line.startswith("ImportError: train needs ")
    assert last_line.endswith("pycocotools, tensorboard: pip install 'triton-dcn[train]'")


def test_the_detector_with_its_extra(with_detector):
    result = with_detector.run("-m", "detector.predict", "--help")
    assert result.returncode == 0, result.stderr
    assert "Detect objects in images." in result.stdout
    assert with_detector.run_command("dcn-predict", "--help").stdout == result.stdout

    result = with_detector.run_command("dcn-export", "--help")
    assert result.returncode == 0, result.stderr
    assert "Write a detector as an ONNX file" in result.stdout

    program = (
        "import detector, torch; print(len(detector.FasterRCNN(detector.FasterRCNNConfig(depth=18)).state_dict()))"
    )
    result = with_detector.run("-c", program)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 100
