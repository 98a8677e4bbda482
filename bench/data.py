"""What loading costs: images per second and processor time of a worker, memory of the annotations and of a worker.

    python -m bench.data [--images 118287] [--boxes 860001] [--size 480 640] [--rounds 5]

Writes a JSON of COCO's size and JPEG files of COCO's dimensions and file sizes into a temporary folder, and compares
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
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader

from bench.arguments import not_negative, positive
from train.data.coco_dataset import CocoDetection
from train.data.loader import training_loader
from train.data.samplers import AspectRatioBatchSampler
from train.data.transforms import Transform

FILES = 32
"""Different pictures; every image of the JSON is one of them."""
QUALITY = 85
"""JPEG quality of the files: about 160 KB each at 480 x 640, the mean of train2017."""
SCALE = (1333, 800)
FLIP = 0.5
BATCH_SIZE = 2
WARM_UP_BATCHES = 8
MIN_BATCHES = 2 * WARM_UP_BATCHES
"""Of a pass; with fewer there is nothing left to measure after the warm-up."""
GPUS = 8
IMAGES_PER_GPU_SECOND = 60
"""Images per second that one GPU trains on, as assumed in the advice about workers."""


class PlainLoop:
    """The usual data set: pycocotools' dicts, cv2, tensors of (3, H, W)."""

    def __init__(self, annotations: Path, image_folder: Path) -> None:
        self.coco = COCO(str(annotations))
        self.image_folder = image_folder
        self.ids = [image_id for image_id in sorted(self.coco.imgs) if self.coco.imgToAnns[image_id]]

    def __len__(self) -> int:
        return len(self.ids)

    def annotations(self, index: int) -> list[list[float]]:
        return [annotation["bbox"] for annotation in self.coco.imgToAnns[self.ids[index]]]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        _, index = key
        info = self.coco.imgs[self.ids[index]]
        image = cv2.imread(str(self.image_folder / info["file_name"]))
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        height, width = image.shape[:2]
        factor = min(max(SCALE) / max(height, width), min(SCALE) / min(height, width))
        image = cv2.resize(image, (int(width * factor + 0.5), int(height * factor + 0.5)))
        boxes = np.array(self.annotations(index), np.float32).reshape(-1, 4) * np.float32(factor)
        boxes[:, 2:] += boxes[:, :2]

        if np.random.default_rng((0, *key)).random() < FLIP:
            image = cv2.flip(image, 1)
            left = boxes[:, 0].copy()
            boxes[:, 0] = image.shape[1] - boxes[:, 2]
            boxes[:, 2] = image.shape[1] - left
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(boxes)


def plain_collate(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Pad images (3, H, W) to the largest, sides to multiples of 32, and stack them; boxes stay a list."""
    images = [image for image, _ in samples]
    height = _multiple_of_32(max(image.shape[1] for image in images))
    width = _multiple_of_32(max(image.shape[2] for image in images))
    padded = [pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
    return torch.stack(padded), [boxes for _, boxes in samples]


def _multiple_of_32(size: int) -> int:
    return -(-size // 32) * 32


def plain_loader(dataset: PlainLoop, batches: AspectRatioBatchSampler, workers: int) -> DataLoader:
    """Load the same batches the plain way, cv2 with one thread as well."""
    options: dict[str, Any] = {}
    if workers:
        options = {"worker_init_fn": _use_one_thread, "multiprocessing_context": "fork"}
    return DataLoader(dataset, batch_sampler=batches, collate_fn=plain_collate, num_workers=workers, **options)


def _use_one_thread(_: int) -> None:
    cv2.setNumThreads(0)


def make_picture(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Return (H, W, 3) uint8 with the spectrum of photographs, 1 / f, and little color."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    waves = np.exp(2j * np.pi * random.random((3, *frequency.shape))) / frequency
    gray, blue, red = np.fft.irfft2(waves, s=(height, width))
    picture = np.stack([gray + blue / 4, gray, gray + red / 4], 2)
    picture = (picture - picture.mean()) / picture.std() * 55 + 118
    return np.clip(picture, 0, 255).astype(np.uint8)


def make_coco(root: Path, images: int, boxes: int, size: tuple[int, int]) -> Path:
    """Write pictures and a JSON of `images` images and `boxes` boxes below `root`; return the JSON."""
    random = np.random.default_rng(0)
    height, width = size
    for number in range(FILES):
        picture = make_picture(height, width, random)
        cv2.imwrite(str(root / f"{number:012d}.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    image_ids = random.integers(1, images + 1, boxes).tolist()
    scale = min(height / 480, width / 640)  # no box leaves the picture
    corners = random.random((boxes, 2)) * 300 * scale
    sizes = random.random((boxes, 2)) * 150 * scale + 2
    content = {
        "images": [
            {"id": number, "file_name": f"{number % FILES:012d}.jpg", "height": height, "width": width}
            for number in range(1, images + 1)
        ],
        "annotations": [
            {
                "id": index + 1,
                "image_id": image_ids[index],
                "category_id": index % 80 + 1,
                "iscrowd": 0,
                "bbox": [*corners[index].tolist(), *sizes[index].tolist()],
                "area": float(sizes[index].prod()),
            }
            for index in range(boxes)
        ],
        "categories": [{"id": number, "name": f"class {number}"} for number in range(1, 81)],
    }
    file = root / "instances.json"
    file.write_text(json.dumps(content))
    return file


def private_mib() -> float:
    """Return the memory of this process that no other process shares, in MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kib = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return kib / 1024


def open_measured(name: str, make: Callable[[], Sequence]) -> Sequence:
    """Open a data set and print what that costs: time, memory, and growth of a forked worker that reads all of it."""
    gc.collect()
    mib_before = private_mib()
    start = time.perf_counter()
    dataset = make()
    seconds = time.perf_counter() - start
    gc.collect()
    mib = private_mib() - mib_before

    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe()
    worker = fork.Process(target=read_all_annotations, args=(dataset, sender))
    worker.start()
    worker_mib = receiver.recv()
    worker.join()
    print(f"{name:<12} open {seconds:5.1f} s, {mib:6.1f} MiB; each worker +{worker_mib:6.1f} MiB")
    return dataset


def read_all_annotations(dataset: Sequence, sender: multiprocessing.connection.Connection) -> None:
    """Read every annotation in random order, as the worker of an epoch does; send the MiB that this took."""
    read_annotations = dataset.ground_truth if isinstance(dataset, CocoDetection) else dataset.annotations
    order = np.random.default_rng(0).permutation(len(dataset))
    mib_before = private_mib()
    for index in order:
        read_annotations(int(index))
    sender.send(private_mib() - mib_before)


@dataclass(frozen=True)
class LoadingCost:
    """What one pass costs.

    Attributes:
        rate: images per second, all workers together.
        worker_ms: processor time of the workers, milliseconds per image.
        training_ms: processor time of the process that trains, milliseconds per image; without workers, everything.
    """

    rate: float
    worker_ms: float
    training_ms: float

    @property
    def loading_ms(self) -> float:
        """Processor time of the processes that load, milliseconds per image."""
        return self.worker_ms or self.training_ms


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return the processor time of other processes, all threads."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # in user mode and in the kernel
    return ticks / os.sysconf("SC_CLK_TCK")


def warm_up(loader: DataLoader) -> Iterator[Any]:
    """Start the workers and take the first batches."""
    iterator = iter(loader)
    for _ in range(WARM_UP_BATCHES):
        next(iterator)
    return iterator


def measure_loader(loader: DataLoader, seconds: float) -> LoadingCost:
    """Load for some time, or to the end of the epoch, doing nothing with the batches."""
    iterator = warm_up(loader)

    pids = [process.pid for process in multiprocessing.active_children()]
    start = time.perf_counter()
    training_start = time.process_time()
    workers_start = cpu_seconds(pids)
    batches = 0
    while batches < len(loader) - WARM_UP_BATCHES:  # beyond, the workers would end
        next(iterator)
        batches += 1
        if time.perf_counter() - start >= seconds:
            break
    elapsed = time.perf_counter() - start
    workers_seconds = cpu_seconds(pids) - workers_start
    training_seconds = time.process_time() - training_start

    images = batches * BATCH_SIZE
    return LoadingCost(images / elapsed, workers_seconds / images * 1e3, training_seconds / images * 1e3)


def measure_idle_gpu(loader: DataLoader, seconds: float) -> float:
    """Take batches at the pace of a GPU and return the share of the time in which it has nothing to do.

    The GPU is a clock: it takes no processor time from the workers. As in training, the host queues a step while the
    GPU computes the one before. It stops after `seconds`, or at the end of the epoch.
    """
    step_seconds = BATCH_SIZE / IMAGES_PER_GPU_SECOND
    iterator = warm_up(loader)

    start = time.perf_counter()
    busy_until = start
    idle = 0.0
    for _ in iterator:
        now = time.perf_counter()
        begin = max(now, busy_until)
        idle += begin - busy_until
        time.sleep(begin - now)
        busy_until = begin + step_seconds
        if busy_until - start >= seconds:
            break
    return idle / (busy_until - start)


def median_cost(costs: Sequence[LoadingCost]) -> LoadingCost:
    """Return the medians of all figures."""
    return LoadingCost(
        rate=statistics.median(cost.rate for cost in costs),
        worker_ms=statistics.median(cost.worker_ms for cost in costs),
        training_ms=statistics.median(cost.training_ms for cost in costs),
    )


def compare(loaders: dict[str, Callable[[int], DataLoader]], workers: int, rounds: int, seconds: float) -> LoadingCost:
    """Print the medians of alternating passes and the ratio of the first to the second; return the first."""
    passes: dict[str, list[LoadingCost]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, make_loader in loaders.items():
            passes[name].append(measure_loader(make_loader(workers), seconds))
    medians = {name: median_cost(costs) for name, costs in passes.items()}
    for name, cost in medians.items():
        per_worker = cost.rate / max(workers, 1)
        print(
            f"workers {workers}: {name:<12} {per_worker:6.1f} images/s per worker, processor time per image "
            f"{cost.worker_ms:5.2f} ms in workers, {cost.training_ms:5.2f} ms in the training process"
        )
    ours, plain = medians.values()
    rate_ratio = ours.rate / plain.rate
    time_ratio = ours.loading_ms / plain.loading_ms
    print(f"workers {workers}: ours over plain: {rate_ratio:.2f} times the images/s, {time_ratio:.2f} times the time")
    return ours


def check_equal(ours: DataLoader, plain: DataLoader) -> None:
    """Compare the first batches, all pixels.

    Raises:
        RuntimeError: the two loops do not do the same work.
    """
    for number, (loaded, (images, boxes)) in enumerate(zip(ours, plain, strict=False)):
        counts = [len(image_boxes) for image_boxes in boxes]
        our_counts = [len(target.boxes) for target in loaded.batch.targets]
        if not torch.equal(loaded.batch.images, images) or counts != our_counts:
            raise RuntimeError(
                f"batch {number}: expected the same images and boxes from both loops, got different ones"
            )
        if number == WARM_UP_BATCHES:
            break


def needed_workers(cost: LoadingCost, workers: int) -> str:
    """Say how many workers feed the GPUs, at the rate measured and at that of a worker with a core to itself."""
    if not cost.worker_ms:
        return "too few images to measure the workers' time"
    measured_rate = cost.rate / workers
    rate_alone = 1e3 / cost.worker_ms
    workers_measured = math.ceil(IMAGES_PER_GPU_SECOND / measured_rate)
    workers_alone = math.ceil(IMAGES_PER_GPU_SECOND / rate_alone)
    cores = GPUS * IMAGES_PER_GPU_SECOND / rate_alone
    return (
        f"{GPUS} GPUs at {IMAGES_PER_GPU_SECOND} images/s each: {workers_measured} workers per GPU at the measured "
        f"{measured_rate:.0f} images/s, {workers_alone} at {rate_alone:.0f}, a core for each ({cores:.1f} cores in all)"
    )


def check_enough(images: int) -> None:
    """End the program if a pass over so many images has less than `MIN_BATCHES`."""
    least = MIN_BATCHES * BATCH_SIZE
    if images < least:
        sys.exit(f"bench: --images: expected at least {least} images with boxes, got {images}")


def main(arguments: list[str] | None = None) -> None:
    """Make the data, measure both loops."""
    description = "Images per second, processor time and memory of a worker."
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=description)
    parser.add_argument(
        "--images", type=positive, default=118_287, help="of the data set; default: as many as train2017 has"
    )
    parser.add_argument("--boxes", type=positive, default=860_001, help="of all images")
    parser.add_argument(
        "--size", type=positive, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"), help="of an image"
    )
    parser.add_argument(
        "--workers", type=not_negative, nargs="+", default=(0, 1, 2), help="numbers of workers to measure"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="passes per loop and number of workers")
    parser.add_argument("--seconds", type=float, default=3.0, help="per pass")
    options = parser.parse_args(arguments)
    check_enough(options.images)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        annotations = make_coco(root, options.images, options.boxes, tuple(options.size))
        kilobytes = statistics.mean(file.stat().st_size for file in root.glob("*.jpg")) / 1e3
        print(
            f"{options.images} images of {kilobytes:.0f} KB, {options.boxes} boxes; "
            f"batches of {BATCH_SIZE} at most {SCALE}"
        )
        transform = Transform(SCALE, flip=FLIP)
        ours = open_measured("ours", lambda: CocoDetection(annotations, root, transform, training=True))
        plain = open_measured("plain loop", lambda: PlainLoop(annotations, root))
        check_enough(len(ours))
        batches = AspectRatioBatchSampler(ours.heights > ours.widths, BATCH_SIZE)
        loaders = {
            "ours": lambda workers: training_loader(ours, batches, workers, False),
            "plain loop": lambda workers: plain_loader(plain, batches, workers),
        }
        check_equal(loaders["ours"](0), loaders["plain loop"](0))
        for workers in options.workers:
            cost = compare(loaders, workers, options.rounds, options.seconds)
            if workers:
                print(f"workers {workers}: {needed_workers(cost, workers)}")
                idle = [measure_idle_gpu(loaders["ours"](workers), options.seconds) for _ in range(options.rounds)]
                print(
                    f"workers {workers}: a GPU at {IMAGES_PER_GPU_SECOND} images/s is without data "
                    f"{statistics.median(idle):.2%} of the time, {max(idle):.2%} at most"
                )


if __name__ == "__main__":
    main()
