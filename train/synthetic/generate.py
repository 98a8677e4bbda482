"""The generated data set: photographs in COCO 2017 layout, made once and the same every time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from train.progress import CountProgress
from train.synthetic.annotate import annotate
from train.synthetic.scene import photograph
from train.synthetic.shapes import CLASSES

STAMP = "generated.json"
JPEG_QUALITY = 95
MAX_IMAGES = 500_000  # of a split
FIRST_ID = {"train": 1, "val": MAX_IMAGES + 1}  # the splits have no image id in common


def ensure_generated(
    root: Path, *, train_images: int = 1200, val_images: int = 100, seed: int = 0, progress: bool = True
) -> Path:
    """Make the generated data set at `root`, unless it is there already.

    The set is built beside `root` and renamed into place when complete; a lock keeps processes that start together
    from building it twice. A set made with other arguments, or by another version of the code, is replaced.

    Args:
        root: folder of the set; its parents are made.
        train_images: pictures in the training split, 1 or more.
        val_images: pictures in the validation split, 1 or more.
        seed: picture number i is drawn from the pair (seed, i), so it does not depend on the number of pictures.
        progress: show how far it is.

    Returns:
        `root`, with annotations/instances_{train,val}2017.json, train2017/ and val2017/.

    Raises:
        ValueError: a count is out of range, or `root` holds something that was not generated.
    """
    counts = {"train": train_images, "val": val_images}
    for split, count in counts.items():
        if not 1 <= count <= MAX_IMAGES:
            raise ValueError(f"{split}_images: expected 1 to {MAX_IMAGES}, got {count}")

    root = Path(root)
    stamp = {"code": _code_digest(), "seed": seed, **counts}
    if _read_stamp(root) == stamp:
        return root

    root.parent.mkdir(parents=True, exist_ok=True)
    with _lock(root.parent / f".{root.name}.lock"):
        if _read_stamp(root) == stamp:  # another process made it while this one waited
            return root
        _check_replaceable(root)

        building = root.parent / f".{root.name}.building"
        shutil.rmtree(building, ignore_errors=True)  # left by a run that was killed
        _build(building, counts, seed, progress)
        (building / STAMP).write_text(json.dumps(stamp))
        if root.exists():
            shutil.rmtree(root)
        building.rename(root)
    return root


def _code_digest() -> str:
    """Return a digest of the code that decides the pictures, so that a change of it makes a new set."""
    modules = sorted(Path(__file__).parent.glob("*.py"))
    code = b"".join(module.read_bytes() for module in modules)
    return hashlib.sha256(code).hexdigest()[:16]


def _read_stamp(root: Path) -> Any:
    """Return what the set at `root` was made from, or None if there is no complete one."""
    try:
        return json.loads((root / STAMP).read_text())
    except (OSError, ValueError):
        return None


def _check_replaceable(root: Path) -> None:
    """Raise ValueError if `root` holds something else than a generated set."""
    is_empty_folder = root.is_dir() and not any(root.iterdir())
    if root.exists() and not is_empty_folder and _read_stamp(root) is None:
        raise ValueError(f"root: expected a new or empty folder or a generated data set, got {root} with other files")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Wait for and hold a lock between processes; the system frees it if the holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(folder: Path, counts: dict[str, int], seed: int, progress: bool) -> None:
    """Write the pictures and the annotations of both splits under `folder`."""
    (folder / "annotations").mkdir(parents=True)
    with (
        CountProgress("generating pictures", sum(counts.values()), enabled=progress, announced=True) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for split, count in counts.items():
            image_folder = folder / f"{split}2017"
            image_folder.mkdir()
            image_ids = range(FIRST_ID[split], FIRST_ID[split] + count)
            images: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            for image, objects in pool.map(partial(_write_picture, image_folder, seed), image_ids):
                images.append(image)
                for annotation in objects:
                    annotations.append({"id": len(annotations) + 1, **annotation})
                bar.update()
            content = _coco_content(images, annotations)
            (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def _coco_content(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of an annotation file."""
    return {
        "info": {"description": "generated photographs", "version": "1.0"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category_id, "name": name} for category_id, name in enumerate(CLASSES, 1)],
    }


def _write_picture(folder: Path, seed: int, image_id: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Draw and write one picture; return its COCO `images` entry and its annotations without their ids."""
    image, objects = photograph(np.random.default_rng([seed, image_id]))
    name = f"{image_id:012d}.jpg"
    path = folder / name
    if not cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]):
        raise OSError(f"could not write {path}")

    height, width = image.shape[:2]
    entry = {"id": image_id, "file_name": name, "width": width, "height": height}
    annotations = [{"image_id": image_id, **annotate(scene_object)} for scene_object in objects]
    return entry, annotations
