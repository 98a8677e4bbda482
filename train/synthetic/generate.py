"""The generated data set: photographs in COCO 2017 layout, made once and the same every time."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch.utils.data import DataLoader, Dataset

from detector.image import encode_image
from train.data.loader import from_living_workers
from train.progress import CountProgress
from train.synthetic.annotate import annotate
from train.synthetic.scene import photograph
from train.synthetic.shapes import CLASSES

STAMP = "generated.json"
MAX_IMAGES = 500_000  # of a split
MAX_PROCESSES = 16  # a container may show all cores of a machine and have little of its memory
FIRST_ID = {"train": 1, "val": MAX_IMAGES + 1}  # the splits have no image id in common


@dataclass(frozen=True)
class _Picture:
    """A picture of the set.

    Attributes:
        jpeg: content of its file.
        entry: of `images` in the annotation file.
        annotations: of its objects, without their ids.
    """

    jpeg: bytes
    entry: dict[str, Any]
    annotations: list[dict[str, Any]]


class _Pictures(Dataset[_Picture]):
    """The pictures by their image ids, drawn when they are asked for.

    Args:
        seed: of the set.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def __getitem__(self, image_id: int) -> _Picture:
        """Draw one picture."""
        image, objects = photograph(np.random.default_rng([self.seed, image_id]))
        name = f"{image_id:012d}.jpg"
        height, width = image.shape[:2]
        entry = {"id": image_id, "file_name": name, "width": width, "height": height}
        annotations = [{"image_id": image_id, **annotate(scene_object)} for scene_object in objects]
        return _Picture(encode_image(name, image), entry, annotations)


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
        OSError: a file cannot be written.
        RuntimeError: a process that draws pictures is gone.
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
    ids = {split: range(FIRST_ID[split], FIRST_ID[split] + count) for split, count in counts.items()}
    pictures = _draw_all(list(itertools.chain(*ids.values())), seed)
    with CountProgress("generating pictures", sum(counts.values()), enabled=progress, announced=True) as bar:
        for split, image_ids in ids.items():
            image_folder = folder / f"{split}2017"
            image_folder.mkdir()
            images: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            for picture in itertools.islice(pictures, len(image_ids)):
                (image_folder / picture.entry["file_name"]).write_bytes(picture.jpeg)
                images.append(picture.entry)
                for annotation in picture.annotations:
                    annotations.append({"id": len(annotations) + 1, **annotation})
                bar.update()
            content = _coco_content(images, annotations)
            (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def _draw_all(image_ids: list[int], seed: int) -> Iterator[_Picture]:
    """Return the pictures with these ids, in this order; several processes draw them."""
    loader = DataLoader(
        _Pictures(seed),
        batch_size=None,
        sampler=image_ids,
        num_workers=min(_usable_cores(), MAX_PROCESSES, len(image_ids)),
        multiprocessing_context="fork",
        worker_init_fn=_start_worker,
    )
    return from_living_workers(loader)


def _usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start_worker(_: int) -> None:
    """Leave Ctrl-C to the main process, end when that says so, and let OpenCV use one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(0)


def _coco_content(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of an annotation file."""
    return {
        "info": {"description": "generated photographs", "version": "1.0"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category_id, "name": name} for category_id, name in enumerate(CLASSES, 1)],
    }
