"""A data set of a few noisy rectangles in COCO layout, and runs of the training script on it."""

import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data._utils.signal_handling import _set_SIGCHLD_handler

import train.main
from tests.train.processes import MAIN, ScriptProcess

CATEGORIES = [{"id": 7, "name": "red"}, {"id": 3, "name": "blue"}]  # ids with holes, not in order
COLORS = {"red": (200, 40, 40), "blue": (40, 40, 200)}


def make_split(root: Path, split: str, count: int, first_id: int, size: tuple[int, int] = (96, 128)) -> dict:
    """Write `count` images of `size` (height, width) with one or two rectangles each; return the JSON content."""
    random = np.random.default_rng(first_id)
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    content = {"images": [], "annotations": [], "categories": CATEGORIES}
    for image_id in range(first_id, first_id + count):
        height, width = size
        pixels = random.integers(90, 130, (height, width, 3)).astype(np.uint8)
        for _ in range(1 + image_id % 2):
            category = CATEGORIES[int(random.integers(2))]
            w, h = random.integers(24, 60, 2).tolist()
            x = int(random.integers(0, width - w))
            y = int(random.integers(0, height - h))
            pixels[y : y + h, x : x + w] = COLORS[category["name"]]
            annotation = {
                "id": len(content["annotations"]) + 1,
                "image_id": image_id,
                "category_id": category["id"],
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            }
            content["annotations"].append(annotation)
        name = f"{image_id:06d}.png"
        cv2.imwrite(str(root / split / name), pixels[..., ::-1])
        content["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
    write_annotations(root, split, content)
    return content


def write_annotations(root: Path, split: str, content: dict) -> None:
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.fixture
def coco(tmp_path) -> Path:
    """A fresh data set with 8 training and 3 validation images, to be damaged at will."""
    make_split(tmp_path / "coco", "train2017", 8, 100)
    make_split(tmp_path / "coco", "val2017", 3, 500)
    return tmp_path / "coco"


@contextmanager
def one_thread():
    """Compute as the processes of `launch` do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def start(monkeypatch, capsys):
    """Function: command line -> (exit status, stdout, stderr) of the script, run in this process."""
    _set_SIGCHLD_handler()  # PyTorch's, once a process; the script takes it away after an error
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
    handlers = {number: signal.getsignal(number) for number in numbers}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments):
        fixed = [str(MAIN), "--preset", "tiny", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [*fixed, *map(str, arguments)])
        status = train.main.main()
        return status, *capsys.readouterr()

    with one_thread():
        yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def tiny(*arguments: object) -> list[str]:
    """Return the arguments of a tiny training run."""
    return ["--preset", "tiny", "--device", "cpu", "--pictures", "0", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a run: one thread per process, nothing of a launcher around the tests."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in launcher} | {"OMP_NUM_THREADS": "1", **more}


@pytest.fixture
def launch(tmp_path):
    """Function: arguments of a tiny training run -> its process, under torchrun if asked for; killed at the end."""
    started = []

    def start(*arguments: object, torchrun: Sequence[str] | None = None, **variables: str) -> ScriptProcess:
        printed = tmp_path / f"printed{len(started)}.txt"
        started.append(ScriptProcess(tiny(*arguments), torchrun, environment(**variables), printed))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def rank_variables(port: int, rank: int, size: int) -> dict[str, str]:
    """Return the environment variables of one of several processes on this machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "localhost"} | {name: str(number) for name, number in numbers.items()}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def lines(out: Path) -> list[dict]:
    """Return metrics.jsonl of a run."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
