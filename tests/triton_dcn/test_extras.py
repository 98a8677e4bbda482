"""Extras: the error names what is missing and how to get it, and pyproject.toml installs what is looked for."""

import importlib.util
import re
from pathlib import Path

import pytest

from triton_dcn.extras import DETECTOR_PACKAGES, TRAIN_PACKAGES, require_extra

ROOT = Path(__file__).parents[2]


def hide(monkeypatch, *modules):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in modules else find_spec(name))


def test_nothing_is_missing_here():
    require_extra("detector")
    require_extra("train")


def test_missing_packages_are_named(monkeypatch):
    hide(monkeypatch, "cv2", "tyro")
    message = r"^detector needs opencv-python-headless \(cv2\), tyro: pip install 'triton-dcn\[detector\]'$"
    with pytest.raises(ImportError, match=message):
        require_extra("detector")


def test_training_names_its_own_extra(monkeypatch):
    hide(monkeypatch, "cv2", "pycocotools")
    message = r"^train needs opencv-python-headless \(cv2\), pycocotools: pip install 'triton-dcn\[train\]'$"
    with pytest.raises(ImportError, match=message):
        require_extra("train")


@pytest.fixture(scope="module")
def extras():
    """Extra -> requirements, as pyproject.toml has them."""
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_the_extras_install_what_is_looked_for(extras):
    def packages(extra):
        return {re.split(r"[<>=; ]", requirement)[0] for requirement in extras[extra]}

    assert packages("detector") == set(DETECTOR_PACKAGES.values())
    assert "triton-dcn[detector]" in packages("train")
    assert packages("train") >= set(TRAIN_PACKAGES.values()) - set(DETECTOR_PACKAGES.values())


def test_extras_that_are_named_exist(extras):
    """In documentation, messages, examples and workflows, and README.md says what each is for."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.py"), ROOT / "Makefile"]
    sources = [
        path for package in ("triton_dcn", "detector", "train", "bench") for path in ROOT.glob(f"{package}/**/*.py")
    ]
    named = set()
    for path in [*pages, *sources, *ROOT.glob(".github/**/*.yml")]:
        for names in re.findall(r"(?:triton-dcn|[\"']\.)\[([a-z,-]+)\]", path.read_text()):
            named |= set(names.split(","))
    assert named >= {"detector", "train", "export", "triton", "dev"}
    assert named <= set(extras)

    table = (ROOT / "README.md").read_text().split("| extra |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE) == list(extras)
