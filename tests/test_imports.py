"""Imports go one way: train -> detector -> triton_dcn -> torch, and inside a package from its last layer to its first.

A module may import from its own layer and from those above it in these lists. A folder stands for all of its modules.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"triton_dcn": set(), "detector": {"triton_dcn"}, "train": {"triton_dcn", "detector"}}
PEERS = {"torchvision", "mmcv", "mmdet", "mmengine", "detectron2", "deformops", "tvdcn"}

LAYERS = {
    "triton_dcn": [
        {"extras", "forward_mode", "geometry", "joined_groups", "matmul", "offset_mask", "tf32", "vmapping", "kernels"},
        {"tile_table", "workspace"},
        {"launchers", "torch_samples"},
        {"torch_planes"},
        {"triton_backend", "torch_backend", "reference"},
        {"operator"},
        {"functional", "flops"},
        {"nn", "roi_pool"},
        {"compat", "onnx"},
    ],
    "detector": [
        {"ctrl_c", "files", "graph", "image", "image_header", "picture", "precision", "structures", "text"},
        {"ops", "draw"},
        {"results"},
        {"detect"},
        {"model"},
        {"weights"},
        {"onnx"},
        {"inference", "results_folder"},
        {"predict", "export", "visualize_offsets"},
    ],
    "train": [
        {
            "average",
            "command_line",
            "config",
            "distributed",
            "errors",
            "events",
            "fine_tuning",
            "folder_lock",
            "going_on",
            "metrics_file",
            "precision",
            "pretrained",
            "progress",
            "run_folder",
            "schedule",
            "signals",
        },
        {"data", "synthetic"},
        {"evaluation"},
        {"build", "checkpoint", "compiled", "log", "loop", "mosaic", "report", "step", "step_graphs"},
        {"main", "plot"},
    ],
}


def source_files(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


def module_name(path: Path) -> str:
    """Return the dotted name of a source file; that of its folder for an `__init__.py`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield (module, line) of every import in a file; `from package import module` gives package.module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if is_module(submodule) else node.module, node.lineno


def layer_of(module: str) -> int:
    """Return the place in `LAYERS` of a module inside a package."""
    package, name = module.split(".")[:2]
    for index, layer in enumerate(LAYERS[package]):
        if name in layer:
            return index
    raise AssertionError(f"{module} is in no layer: add it to LAYERS of {Path(__file__).name}")


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_between_packages(package):
    allowed = PACKAGES[package] | {package}
    for path in source_files(package):
        for module, line in imports(path):
            top = module.split(".")[0]
            where = f"{path.relative_to(ROOT)}:{line} imports {module}"
            assert top not in PEERS, where
            assert top not in {"bench", "tests", "examples"}, where
            if top in PACKAGES:
                assert top in allowed, where


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_inside_packages(package):
    for path in source_files(package):
        importer = module_name(path)
        if importer == package:  # the package's own __init__.py gathers what is public
            continue
        for module, line in imports(path):
            if module.split(".")[0] != package:
                continue
            where = f"{path.relative_to(ROOT)}:{line} imports {module}"
            assert module != package, f"{where}, which imports everything: name the module that has it"
            assert layer_of(module) <= layer_of(importer), f"{where}, which is in a later layer"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_layer_exists(package):
    names = {name for layer in LAYERS[package] for name in layer}
    assert {name for name in names if not is_module(f"{package}.{name}")} == set()


def test_no_circles():
    graph = {}
    for package in PACKAGES:
        for path in source_files(package):
            graph[module_name(path)] = {module for module, _ in imports(path) if module.split(".")[0] in PACKAGES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        pytest.fail(f"imports go in a circle: {circle}")


def test_operator_needs_only_torch():
    """Everything but the Triton side imports without triton and numpy."""
    triton_side = {"triton_backend.py", "launchers.py"}
    for path in source_files("triton_dcn"):
        tops = {module.split(".")[0] for module, _ in imports(path)}
        if path.name not in triton_side and path.parent.name != "kernels":
            assert "triton" not in tops, path
        assert not tops & {"numpy", "cv2", "pycocotools", "tyro"}, path


def test_files_of_train_hide_nothing():
    """`train/` is first on sys.path when main.py runs as a script: what is in it must not hide other modules."""
    names = {path.stem for path in (ROOT / "train").iterdir()}
    assert not names & (sys.stdlib_module_names | {"torch", "numpy", "cv2", "tensorboard", "datasets", "evaluate"})
