"""What loading costs: images per second of a worker and its processor time, memory of the annotations and of a worker.

    python -m bench.data [--images 118287] [--boxes 860001] [--size 480 640] [--rounds 5]

Writes a JSON of COCO's size and JPEG files of COCO's shape and weight into a temporary folder, and compares
`train.data.loader` with the plain loop: pycocotools, cv2, one Python dict per box, one contiguous tensor per image,
`pad` and `stack`. Both go through PyTorch's loader with the same batches and make the same tensors, which is checked
first. Their passes alternate; processor time is what counts where the machine is shared.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader

from train.data.coco_dataset import CocoDetection
from train.data.loader import training_loader
from train.data.samplers import AspectRatioBatchSampler
from train.data.transforms import Transform

FILES = 32  # different pictures; every image of the JSON is one of them
QUALITY = 85  # of the files: about 160 KB each at 480 x 640, the mean of train2017
SCALE = (1333, 800)
FLIP = 0.5
BATCH = 2
WARM = 8  # batches before the clock starts
GPUS, NEEDED = 8, 60  # images per second of each GPU


class PlainLoop:
    """The usual data set: pycocotools' dicts, cv2, tensors of (3, H, W)."""

    def __init__(self, annotations: Path, images: Path):
        self.coco, self.images = COCO(str(annotations)), images
        self.ids = [image_id for image_id in sorted(self.coco.imgs) if self.coco.imgToAnns[image_id]]

    def __len__(self) -> int:
        return len(self.ids)

    def annotations(self, index: int) -> list[list[float]]:
        return [annotation["bbox"] for annotation in self.coco.imgToAnns[self.ids[index]]]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        info = self.coco.imgs[self.ids[key[1]]]
        image = cv2.cvtColor(cv2.imread(str(self.images / info["file_name"])), cv2.COLOR_BGR2RGB)
        height, width = image.shape[:2]
        factor = min(max(SCALE) / max(height, width), min(SCALE) / min(height, width))
        image = cv2.resize(image, (int(width * factor + 0.5), int(height * factor + 0.5)))
        boxes = np.array(self.annotations(key[1]), np.float32).reshape(-1, 4) * np.float32(factor)
        boxes[:, 2:] += boxes[:, :2]
        if np.random.default_rng((0, *key)).random() < FLIP:
            image = cv2.flip(image, 1)
            boxes[:, 0], boxes[:, 2] = image.shape[1] - boxes[:, 2], image.shape[1] - boxes[:, 0]
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(boxes)


def plain_collate(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Pad images (3, H, W) to the largest, sides to multiples of 32, and stack them; boxes stay a list."""
    height, width = (-(-max(image.shape[axis] for image, _ in samples) // 32) * 32 for axis in (1, 2))
    padded = [pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image, _ in samples]
    return torch.stack(padded), [boxes for _, boxes in samples]


def plain_loader(dataset: PlainLoop, batches: AspectRatioBatchSampler, workers: int) -> DataLoader:
    """Load the same batches the plain way, cv2 with one thread as well."""
    options = {"worker_init_fn": _one_thread, "multiprocessing_context": "fork"} if workers else {}
    return DataLoader(dataset, batch_sampler=batches, collate_fn=plain_collate, num_workers=workers, **options)


def _one_thread(_: int) -> None:
    cv2.setNumThreads(0)


def make_picture(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Return (H, W, 3) uint8 with the spectrum of photographs, 1 / f, and little color."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    waves = np.exp(2j * np.pi * random.random((3, *frequency.shape))) / frequency
    gray, blue, red = np.fft.irfft2(waves, s=(height, width))
    picture = np.stack([gray + blue / 4, gray, gray + red / 4], 2)
    return np.clip((picture - picture.mean()) / picture.std() * 55 + 118, 0, 255).astype(np.uint8)


def make_coco(root: Path, images: int, boxes: int, size: tuple[int, int]) -> Path:
    """Write pictures and a JSON of `images` images and `boxes` boxes below `root`; return the JSON."""
    random = np.random.default_rng(0)
    height, width = size
    for number in range(FILES):
        picture = make_picture(height, width, random)
        cv2.imwrite(str(root / f"{number:012d}.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
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


def open_measured(name: str, make: Callable[[], Sequence]) -> Sequence:
    """Open a data set and print what that costs: time, memory, and growth of a forked worker that reads all of it."""
    gc.collect()
    before, begin = private_mib(), time.perf_counter()
    dataset = make()
    opened = time.perf_counter() - begin
    gc.collect()
    held = private_mib() - before
    here, there = multiprocessing.get_context("fork").Pipe()
    worker = multiprocessing.get_context("fork").Process(target=touch_all, args=(dataset, there))
    worker.start()
    grown = here.recv()
    worker.join()
    print(f"{name:<12} open {opened:5.1f} s, {held:6.1f} MiB; each worker +{grown:6.1f} MiB")
    return dataset


def touch_all(dataset: Sequence, pipe: multiprocessing.connection.Connection) -> None:
    """Be a worker: touch every annotation as an epoch would and report the MiB that this took."""
    touch = dataset.ground_truth if isinstance(dataset, CocoDetection) else dataset.annotations
    order = np.random.default_rng(0).permutation(len(dataset))
    before = private_mib()
    for index in order:
        touch(int(index))
    pipe.send(private_mib() - before)


@dataclass(frozen=True)
class Cost:
    """Of one pass: images per second, all workers together; milliseconds of processor time per image."""

    rate: float
    workers: float
    training: float  # of the process that trains; with no workers, everything


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return the processor time of other processes, all threads."""
    rows = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(row[11]) + int(row[12]) for row in rows) / os.sysconf("SC_CLK_TCK")


def measure(loader: DataLoader, seconds: float) -> Cost:
    """Load for some time, doing nothing with the batches."""
    iterator = iter(loader)
    for _ in range(WARM):
        next(iterator)
    pids = [process.pid for process in multiprocessing.active_children()]
    begin, own, others, batches = time.perf_counter(), time.process_time(), cpu_seconds(pids), 0
    while time.perf_counter() - begin < seconds:
        next(iterator)
        batches += 1
    took, images = time.perf_counter() - begin, batches * BATCH
    others, own = cpu_seconds(pids) - others, time.process_time() - own
    return Cost(images / took, others / images * 1e3, own / images * 1e3)


def compare(loaders: dict[str, Callable[[int], DataLoader]], workers: int, rounds: int, seconds: float) -> Cost:
    """Print the medians of alternating passes and the ratio of the first to the second; return the first."""
    passes: dict[str, list[Cost]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, make in loaders.items():
            passes[name].append(measure(make(workers), seconds))
    medians = {
        name: Cost(*(statistics.median(getattr(cost, field) for cost in costs) for field in Cost.__annotations__))
        for name, costs in passes.items()
    }
    for name, cost in medians.items():
        print(
            f"workers {workers}: {name:<12} {cost.rate / max(workers, 1):6.1f} images/s per worker, processor time per "
            f"image {cost.workers:5.2f} ms in workers, {cost.training:5.2f} ms in the training process"
        )
    ours, plain = medians.values()
    used, plain_used = ours.workers or ours.training, plain.workers or plain.training
    ratios = f"{ours.rate / plain.rate:.2f} images/s, {used / plain_used:.2f} processor time"
    print(f"workers {workers}: ours to plain: {ratios}")
    return ours


def check_equal(ours: DataLoader, plain: DataLoader) -> None:
    """Compare the first batches, all pixels.

    Raises:
        RuntimeError: the two loops do not do the same work.
    """
    for number, (loaded, (images, boxes)) in enumerate(zip(ours, plain, strict=False)):
        same_boxes = [len(one) == len(other.boxes) for one, other in zip(boxes, loaded.batch.targets, strict=True)]
        if not torch.equal(loaded.batch.images, images) or not all(same_boxes):
            raise RuntimeError(f"batch {number} of the two loops differs")
        if number == WARM:
            break


def needed_workers(cost: Cost, workers: int) -> str:
    """Say how many workers feed the GPUs, at the rate measured and at that of a worker with a core to itself."""
    measured, alone = cost.rate / workers, 1e3 / cost.workers
    per_gpu = [math.ceil(NEEDED / rate) for rate in (measured, alone)]
    return (
        f"{GPUS} GPUs at {NEEDED} images/s each: {per_gpu[0]} workers per GPU at the measured {measured:.0f} images/s, "
        f"{per_gpu[1]} at {alone:.0f}, a core for each ({GPUS * NEEDED / alone:.1f} cores in all)"
    )


def main() -> None:
    """Make the data, measure both loops."""
    parser = argparse.ArgumentParser(description="Images per second, processor time and memory of a worker.")
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--boxes", type=int, default=860_001)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--workers", type=int, nargs="+", default=(0, 1, 2), help="numbers of workers to measure")
    parser.add_argument("--rounds", type=int, default=5, help="passes per loop and number of workers")
    parser.add_argument("--seconds", type=float, default=3.0, help="per pass")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        annotations = make_coco(root, options.images, options.boxes, tuple(options.size))
        weight = statistics.mean(file.stat().st_size for file in root.glob("*.jpg")) / 1e3
        print(f"{options.images} images of {weight:.0f} KB, {options.boxes} boxes; batches of {BATCH} at most {SCALE}")
        transform = Transform(SCALE, flip=FLIP)
        ours = open_measured("ours", lambda: CocoDetection(annotations, root, transform, training=True))
        plain = open_measured("plain loop", lambda: PlainLoop(annotations, root))
        batches = AspectRatioBatchSampler(ours.heights > ours.widths, BATCH)
        loaders = {
            "ours": lambda workers: training_loader(ours, batches, workers, False),
            "plain loop": lambda workers: plain_loader(plain, batches, workers),
        }
        check_equal(*(make(0) for make in loaders.values()))
        for workers in options.workers:
            cost = compare(loaders, workers, options.rounds, options.seconds)
            if workers:
                print(f"workers {workers}: {needed_workers(cost, workers)}")


if __name__ == "__main__":
    main()
