"""What loading costs: images per second of one worker, memory of the annotations and of each further worker.

    python -m bench.data [--images 118287] [--boxes 860001] [--size 480 640]

Writes a JSON of COCO's size and a few photographs of COCO's shape into a temporary folder, and compares
`train.coco_data` with the plain loop: pycocotools, cv2, one Python dict per box.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from pycocotools.coco import COCO

from train.coco_data import CocoDetection
from train.transforms import Transform

FILES = 64  # different pictures; every image of the JSON is one of them
SCALE = (1333, 800)


class PlainLoop:
    """The usual data set: pycocotools' dicts, cv2."""

    def __init__(self, annotations: Path, images: Path):
        self.coco, self.images = COCO(str(annotations)), images
        self.ids = sorted(self.coco.imgs)

    def __len__(self) -> int:
        return len(self.ids)

    def annotations(self, index: int) -> list[list[float]]:
        return [annotation["bbox"] for annotation in self.coco.imgToAnns[self.ids[index]]]

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        info = self.coco.imgs[self.ids[key[1]]]
        image = cv2.cvtColor(cv2.imread(str(self.images / info["file_name"])), cv2.COLOR_BGR2RGB)
        factor = min(max(SCALE) / max(image.shape[:2]), min(SCALE) / min(image.shape[:2]))
        boxes = np.array(self.annotations(key[1]), np.float32).reshape(-1, 4)
        image, boxes = cv2.resize(image, None, fx=factor, fy=factor), boxes * factor
        return (cv2.flip(image, 1) if key[1] % 2 else image), boxes


def make_coco(root: Path, images: int, boxes: int, size: tuple[int, int]) -> Path:
    """Write photographs and a JSON of `images` images and `boxes` boxes below `root`; return the JSON."""
    random = np.random.default_rng(0)
    height, width = size
    for number in range(FILES):
        small = random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        picture = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(root / f"{number:012d}.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 92])
    owner = random.integers(1, images + 1, boxes).tolist()
    corner, extent = random.random((boxes, 2)) * 300, random.random((boxes, 2)) * 150 + 2
    content = {
        "images": [
            {"id": i, "file_name": f"{i % FILES:012d}.jpg", "height": height, "width": width}
            for i in range(1, images + 1)
        ],
        "annotations": [
            {"id": i + 1, "image_id": owner[i], "category_id": i % 80 + 1, "iscrowd": 0,
             "bbox": [*corner[i].tolist(), *extent[i].tolist()], "area": float(extent[i].prod())}
            for i in range(boxes)
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, 81)],
    }  # fmt: skip
    (root / "instances.json").write_text(json.dumps(content))
    return root / "instances.json"


def private_mib() -> float:
    """Return the memory of this process that no other process shares, in MiB."""
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith("Private_")) / 1024


def measure(name: str, make: Callable[[], Sequence], seconds: float) -> None:
    """Print what a data set costs: time and memory to open it, then speed and growth of a forked worker."""
    gc.collect()
    before, begin = private_mib(), time.perf_counter()
    dataset = make()
    opened = time.perf_counter() - begin
    gc.collect()
    held = private_mib() - before
    here, there = multiprocessing.get_context("fork").Pipe()
    worker = multiprocessing.get_context("fork").Process(target=work, args=(dataset, there, seconds))
    worker.start()
    rate, grown = here.recv()
    worker.join()
    print(f"{name:<12} open {opened:5.1f} s, {held:6.1f} MiB; worker {rate:6.1f} images/s, +{grown:6.1f} MiB")


def work(dataset: Sequence, pipe: multiprocessing.connection.Connection, seconds: float) -> None:
    """Be a worker: read images for some time, then touch every annotation as an epoch would, and report."""
    cv2.setNumThreads(0)
    order = np.random.default_rng(0).permutation(len(dataset))
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        dataset[0, int(order[count])]
        count += 1
    rate = count / (time.perf_counter() - begin)
    touch = dataset.truth if isinstance(dataset, CocoDetection) else dataset.annotations
    before = private_mib()
    for index in order:
        touch(int(index))
    pipe.send((rate, private_mib() - before))


def main() -> None:
    """Make the data, measure both."""
    parser = argparse.ArgumentParser(description="Images per second and memory of a worker.")
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--boxes", type=int, default=860_001)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--seconds", type=float, default=10.0, help="of reading, per data set")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        annotations = make_coco(root, options.images, options.boxes, tuple(options.size))
        print(f"{options.images} images, {options.boxes} boxes, JSON of {os.path.getsize(annotations) / 2**20:.0f} MiB")
        transform = Transform(SCALE, flip=0.5)
        measure("ours", lambda: CocoDetection(annotations, root, transform, training=True), options.seconds)
        measure("plain loop", lambda: PlainLoop(annotations, root), options.seconds)


if __name__ == "__main__":
    main()
