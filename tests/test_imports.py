"""Imports go one way: train -> detector -> triton_dcn -> torch, and inside the packages as listed here."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"triton_dcn": set(), "detector": {"triton_dcn"}, "train": {"triton_dcn", "detector"}}
PEERS = {"torchvision", "mmcv", "mmdet", "mmengine", "detectron2", "deformops", "tvdcn"}


def imports(path: Path):
    """Yield (module, line) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module, node.lineno


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_between_packages(package):
    allowed = PACKAGES[package] | {package}
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        for module, line in imports(path):
            top = module.split(".")[0]
            where = f"{path.relative_to(ROOT)}:{line} imports {module}"
            assert top not in PEERS, where
            assert top not in {"bench", "tests"}, where
            if top in PACKAGES:
                assert top in allowed, where


def test_operator_needs_only_torch():
    """Everything but the Triton side imports without triton and numpy."""
    triton_side = {"triton_backend.py", "launchers.py"}
    for path in sorted((ROOT / "triton_dcn").rglob("*.py")):
        tops = {module.split(".")[0] for module, _ in imports(path)}
        if path.name not in triton_side and path.parent.name != "kernels":
            assert "triton" not in tops, path
        assert not tops & {"numpy", "cv2", "pycocotools", "tyro"}, path


def test_files_of_train_hide_nothing():
    """`train/` is first on sys.path when main.py runs as a script: its files must not hide the standard library."""
    names = {path.stem for path in (ROOT / "train").glob("*.py")}
    assert not names & (sys.stdlib_module_names | {"torch", "numpy", "cv2", "tensorboard", "datasets", "evaluate"})
