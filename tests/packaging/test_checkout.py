"""Makefile and .gitignore: targets explain themselves, nobody's work is deleted, results do not end up in commits."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKEFILE = ROOT / "Makefile"


def make(folder, *arguments):
    if shutil.which("make") is None:
        pytest.skip("no make")
    result = subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_make_alone_lists_all_targets(tmp_path):
    shutil.copy(MAKEFILE, tmp_path)
    (targets,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE.read_text(), re.MULTILINE)
    printed = make(tmp_path)
    assert re.findall(r"^    make (\S+) +\w", printed, re.MULTILINE) == targets.split()
    assert make(tmp_path, "help") == printed
    assert [entry.name for entry in tmp_path.iterdir()] == ["Makefile"]


def test_clean_keeps_what_somebody_has_made(tmp_path):
    shutil.copy(MAKEFILE, tmp_path)
    kept = [
        "runs/birds/checkpoints/best.pt",
        "data/coco/a.jpg",
        "data/generated/a.jpg",
        "best.onnx",
        "detector/text.py",
    ]
    built = [".venv/bin/python", ".gpu/wheel", "dist/a.whl", ".mypy_cache/a", "detector/__pycache__/text.pyc"]
    for package in ("triton_dcn", "train", "bench", "tests", "examples"):
        (tmp_path / package).mkdir()
    for name in kept + built:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    make(tmp_path, "clean")
    assert [name for name in kept if not (tmp_path / name).exists()] == []
    assert [name for name in built if (tmp_path / name).parent.exists()] == []


def documented_results():
    """Return what the documented commands write into the checkout."""
    names = set()
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")]:
        text = page.read_text()
        names |= set(re.findall(r"--out (?:DIR|FILE|([a-z][\w./$-]*))", text))
        names |= set(re.findall(r"save(?:_weights)?\(.*\"([\w-]+\.\w+)\"", text))
    return {name.replace("$seed", "0") for name in names if name}


def is_ignored(folder, name):
    command = ["git", "-C", folder, "check-ignore", "--quiet", name if Path(name).suffix else f"{name}/file"]
    return subprocess.run(command).returncode == 0


def test_git_ignores_what_documented_commands_leave(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("no git")
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)

    results = documented_results()
    assert {"best.onnx", "best.pt2", "curves.png", "dcn-0", "found", "plain-0", "runs/coco"} <= results
    assert [name for name in sorted(results) if not is_ignored(tmp_path, name)] == []

    sources = [*(ROOT / "docs").rglob("*"), *(ROOT / "tests").rglob("*.json"), *ROOT.glob("*.md"), *ROOT.glob("*.txt")]
    sources = [str(path.relative_to(ROOT)) for path in sources if path.is_file()]
    assert [name for name in sources if is_ignored(tmp_path, name)] == []
