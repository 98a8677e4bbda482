"""The sdist: what is in it, and that its tests can be collected. It needs a package index: `make test-wheel`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"bench", "detector", "docs", "examples", "tests", "train", "triton_dcn"}
FILES = {
    ".gitignore",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "PKG-INFO",
    "README.md",
    "constraints-oldest.txt",
    "constraints.txt",
    "pyproject.toml",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked sdist, built in an environment of its own."""
    folder = tmp_path_factory.mktemp("sdist")
    python = folder / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "hatchling"], check=True)
    subprocess.run([python, "-m", "hatchling", "build", "-t", "sdist", "-d", folder], cwd=ROOT, check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


def test_content(sdist):
    assert {entry.name for entry in sdist.iterdir()} == FOLDERS | FILES
    assert not list(sdist.rglob("__pycache__"))

    missing = []
    for folder in FOLDERS:
        for source in (ROOT / folder).rglob("*"):
            is_source = source.suffix in {".py", ".typed", ".md", ".json", ".npz", ".csv", ".png", ".jpg"}
            if is_source and not (sdist / source.relative_to(ROOT)).is_file():
                missing.append(source)
    assert missing == []


def collected(folder: Path) -> int:
    """Return how many tests pytest finds in a checkout."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    finished = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-2000:]
    count = re.search(r"^(\d+) tests collected", finished.stdout, re.MULTILINE)
    assert count is not None, finished.stdout[-2000:]
    return int(count[1])


def test_the_same_tests_are_collected(sdist):
    assert collected(sdist) == collected(ROOT)
