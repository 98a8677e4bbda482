"""The embedded data set: generated photographs in COCO 2017 layout, made once and the same every time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from numpy import ndarray
from tqdm import tqdm

from train.synthetic.scene import Thing, photograph
from train.synthetic.shapes import KINDS

STAMP = "generated.json"
JPEG_QUALITY = 95
FIRST_ID = {"train": 1, "val": 500_001}  # image ids of the splits never meet
OUTLINE_SCALE = 4  # polygons follow the mask to 1 / (2 * OUTLINE_SCALE) pixel


def ensure_generated(
    root: Path, *, train_images: int = 600, val_images: int = 100, seed: int = 0, progress: bool = True
) -> Path:
    """Make the generated data set at `root`, unless it is there already.

    The set is built beside `root` and renamed into place when complete; a lock keeps processes that start together
    from building it twice. A set of other arguments, or of an older version of the code, is replaced.

    Args:
        root: folder of the set; its parents are made.
        train_images, val_images: pictures in each split, 1 or more.
        seed: picture `id` is drawn from the pair (seed, id), so it does not depend on how many there are.
        progress: show a bar.

    Returns:
        `root`, with annotations/instances_{train,val}2017.json, train2017/ and val2017/.

    Raises:
        ValueError: a count is not positive, or `root` holds something that was not generated.
    """
    counts = {"train": train_images, "val": val_images}
    for split, count in counts.items():
        if not 0 < count < FIRST_ID["val"]:
            raise ValueError(f"{split}_images must be in [1, {FIRST_ID['val'] - 1}], got {count}")
    root = Path(root)
    stamp = {"code": _code_digest(), "seed": seed, **counts}
    if _read_stamp(root) == stamp:
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with _lock(root.parent / f".{root.name}.lock"):
        if _read_stamp(root) == stamp:  # another process made it while this one waited
            return root
        if root.exists() and _read_stamp(root) is None and (not root.is_dir() or any(root.iterdir())):
            raise ValueError(f"root {root} holds files that were not generated; give an empty or a new folder")
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
    return hashlib.sha256(b"".join(module.read_bytes() for module in modules)).hexdigest()[:16]


def _read_stamp(root: Path) -> dict | None:
    """Return what the set at `root` was made from, or None if there is no complete one."""
    try:
        return json.loads((root / STAMP).read_text())
    except (OSError, ValueError):
        return None


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
        tqdm(total=sum(counts.values()), desc="generating pictures", unit="img", disable=not progress) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for split, count in counts.items():
            pictures = folder / f"{split}2017"
            pictures.mkdir()
            images, annotations = [], []
            ids = range(FIRST_ID[split], FIRST_ID[split] + count)
            for image, things in pool.map(lambda image_id, into=pictures: _write_picture(into, image_id, seed), ids):
                images.append(image)
                annotations += [{"id": len(annotations) + n, **thing} for n, thing in enumerate(things, 1)]
                bar.update()
            coco = {
                "info": {"description": "generated photographs", "version": "1.0"},
                "licenses": [],
                "images": images,
                "annotations": annotations,
                "categories": [{"id": n, "name": name} for n, name in enumerate(KINDS, 1)],
            }
            (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(coco))


def _write_picture(folder: Path, image_id: int, seed: int) -> tuple[dict, list[dict]]:
    """Draw and write one picture; return its COCO `images` entry and its annotations without their ids."""
    image, things = photograph(np.random.default_rng([seed, image_id]))
    name = f"{image_id:012d}.jpg"
    path = folder / name
    if not cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]):
        raise OSError(f"could not write {path}")
    height, width = image.shape[:2]
    entry = {"id": image_id, "file_name": name, "width": width, "height": height}
    return entry, [{"image_id": image_id, **annotation(thing)} for thing in things]


def annotation(thing: Thing) -> dict:
    """Describe what is seen of a thing as COCO does: polygons for an object, run lengths for a crowd.

    Returns:
        category_id (from 1), iscrowd, area in pixels, bbox [x, y, width, height] of the mask, and segmentation.
    """
    x, y, width, height = cv2.boundingRect(thing.mask.view(np.uint8))
    return {
        "category_id": thing.label + 1,
        "iscrowd": int(thing.crowd),
        "area": int(np.count_nonzero(thing.mask)),
        "bbox": [x, y, width, height],
        "segmentation": run_lengths(thing.mask) if thing.crowd else outlines(thing.mask),
    }


def outlines(mask: ndarray) -> list[list[float]]:
    """Return the outer contours of a (H, W) bool mask as COCO polygons [x1, y1, x2, y2, ...]; holes are filled."""
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    cut = mask[y : y + height, x : x + width].view(np.uint8).repeat(OUTLINE_SCALE, 0).repeat(OUTLINE_SCALE, 1)
    contours, _ = cv2.findContours(cut, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = []
    for contour in contours:
        corners = cv2.approxPolyDP(contour, 0.5 * OUTLINE_SCALE, True)[:, 0]
        polygons.append(np.round((corners + 0.5) / OUTLINE_SCALE + (x, y), 2).ravel().tolist())
    return polygons


def run_lengths(mask: ndarray) -> dict:
    """Return a (H, W) bool mask as uncompressed COCO RLE: lengths of runs down the columns, the first of zeros."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(changes, prepend=0, append=flat.size).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}
