"""The extras of the distribution: which packages `detector` and `train` need, and an error that names a missing one."""

from __future__ import annotations

import importlib.util

# extra -> module that is imported -> package that pip installs; pyproject.toml has their versions
DETECTOR_PACKAGES = {
    "cv2": "opencv-python-headless",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
    "tyro": "tyro",
}
TRAIN_PACKAGES = DETECTOR_PACKAGES | {
    "pycocotools": "pycocotools",
    "tensorboard": "tensorboard",
}
EXTRAS = {"detector": DETECTOR_PACKAGES, "train": TRAIN_PACKAGES}


def require_extra(extra: str) -> None:
    """Check that the packages of an extra are installed, without importing them.

    Args:
        extra: a key of `EXTRAS`; the package that needs it has the same name.

    Raises:
        ImportError: packages are missing; the message names all of them and the command that installs them.
    """
    missing = []
    for module, package in EXTRAS[extra].items():
        if importlib.util.find_spec(module) is None:
            missing.append(package if package == module else f"{package} ({module})")
    if missing:
        raise ImportError(f"{extra} needs {', '.join(missing)}: pip install 'triton-dcn[{extra}]'")
