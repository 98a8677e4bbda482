"""The generated data set: the same every time, made once, and valid COCO."""

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from torch.utils.data import get_worker_info

from train.errors import explain
from train.synthetic import generate
from train.synthetic.canvas import MIN_PIXELS
from train.synthetic.generate import ensure_generated
from train.synthetic.shapes import CLASSES

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools.mask")
COUNTS = {"train_images": 24, "val_images": 6}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return ensure_generated(tmp_path_factory.mktemp("data") / "set", **COUNTS, progress=False)


def read_files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def load(root: Path, split: str) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(root / "annotations" / f"instances_{split}2017.json"))


@pytest.mark.parametrize(("split", "count"), [("train", 24), ("val", 6)])
def test_layout(root, split, count):
    coco = load(root, split)
    images = coco.dataset["images"]
    assert [category["name"] for category in coco.dataset["categories"]] == list(CLASSES)
    assert len(coco.imgs) == len(images) == count
    assert len(coco.anns) == len(coco.dataset["annotations"]), "annotation ids repeat"

    folder = root / f"{split}2017"
    for entry in images:
        image = cv2.imread(str(folder / entry["file_name"]))
        assert image.shape == (entry["height"], entry["width"], 3)
        assert entry["width"] >= entry["height"]
        assert image.std() > 5
    assert {path.name for path in folder.iterdir()} == {entry["file_name"] for entry in images}


def test_splits_share_no_image(root):
    train = load(root, "train")
    val = load(root, "val")
    assert not set(train.imgs) & set(val.imgs)
    pictures = [path.read_bytes() for path in root.rglob("*.jpg")]
    assert len(set(pictures)) == len(pictures)


def test_annotations_agree_with_their_masks(root):
    coco = load(root, "train")
    for entry in coco.dataset["annotations"]:
        x, y, width, height = entry["bbox"]
        image = coco.imgs[entry["image_id"]]
        assert 0 <= x < x + width <= image["width"]
        assert 0 <= y < y + height <= image["height"]
        assert 1 <= entry["category_id"] <= len(CLASSES)
        assert MIN_PIXELS <= entry["area"] <= width * height

        mask = coco.annToMask(entry)
        if entry["iscrowd"]:
            assert mask.sum() == entry["area"]
            assert cv2.boundingRect(mask) == (x, y, width, height)
        else:  # polygons fill holes and cut corners
            assert mask.sum() >= 0.9 * entry["area"]
            points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in entry["segmentation"]])
            corners = [*points.min(0), *points.max(0)]
            assert np.allclose(corners, [x, y, x + width, y + height], atol=0.5)


def test_same_files_whatever_the_number_of_pictures(root, tmp_path):
    fewer = read_files(ensure_generated(tmp_path / "fewer", train_images=8, val_images=2, progress=False))
    more = read_files(root)
    pictures = [name for name in fewer if name.endswith(".jpg")]
    assert len(pictures) == 10
    assert all(fewer[name] == more[name] for name in pictures)


def test_made_once_and_again_when_something_changes(tmp_path, monkeypatch):
    root = tmp_path / "deep" / "set"
    arguments = {"train_images": 2, "val_images": 1, "progress": False}
    assert ensure_generated(root, **arguments) == root
    before = read_files(root)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "_build", lambda *_: pytest.fail("made a second time"))
        ensure_generated(root, **arguments)

    ensure_generated(root, **arguments, seed=1)
    assert read_files(root).keys() == before.keys()
    assert read_files(root) != before

    ensure_generated(root, **arguments)
    assert read_files(root) == before

    monkeypatch.setattr(generate, "_code_digest", lambda: "another version")
    ensure_generated(root, **arguments)
    assert json.loads((root / generate.STAMP).read_text())["code"] == "another version"


def test_goes_on_after_a_kill(tmp_path):
    unfinished = tmp_path / ".set.building" / "train2017"
    unfinished.mkdir(parents=True)
    (unfinished / "half.jpg").write_bytes(b"half")
    root = ensure_generated(tmp_path / "set", train_images=1, val_images=1, progress=False)
    assert len(list(root.rglob("*.jpg"))) == 2
    assert not (tmp_path / ".set.building").exists()


def test_failure_leaves_nothing_half_done(tmp_path, monkeypatch):
    def fill_disk(path: Path, _: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    with pytest.raises(OSError, match=r"No space left on device: .*000000000001\.jpg"):
        ensure_generated(tmp_path / "set", train_images=2, val_images=1, progress=False)
    assert not (tmp_path / "set").exists()


def test_lost_process_ends_the_generation(tmp_path, monkeypatch):
    def die(_: Any) -> None:
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(generate, "photograph", die)
    with pytest.raises(RuntimeError, match="DataLoader worker") as caught:
        ensure_generated(tmp_path / "set", train_images=2, val_images=1, progress=False)
    message = explain(caught.value)
    assert message is not None
    assert message.startswith("lost a process that loads images")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (3, 3), (64, 16)])
def test_the_same_on_any_number_of_cores(root, tmp_path, monkeypatch, cores, processes):
    def start_worker(number: int) -> None:
        (tmp_path / f"worker{number}").touch()

    monkeypatch.setattr(generate, "_start_worker", start_worker)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    again = ensure_generated(tmp_path / "set", **COUNTS, progress=False)
    assert len(list(tmp_path.glob("worker*"))) == processes
    assert read_files(again) == read_files(root)


def test_ctrl_c_ends_the_generation_at_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; import train.build; from train.main import main;"
        "train.build.GENERATED_DATA = Path(sys.argv.pop()); sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "--out", str(tmp_path / "run"), str(tmp_path / "set")]
    repository = Path(generate.__file__).parents[2]
    process = subprocess.Popen(
        command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while not list(tmp_path.rglob("*.jpg")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C on a terminal does
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT
    assert "generating pictures: 0/1300" in output
    assert "Traceback" not in output
    assert not (tmp_path / "set").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def test_two_processes_make_one_set(tmp_path):
    code = (
        "import sys; from pathlib import Path; from train.synthetic.generate import ensure_generated;"
        "print('begins', flush=True);"
        "ensure_generated(Path(sys.argv[1]), train_images=6, val_images=2, progress=False)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "set")]
    repository = Path(generate.__file__).parents[2]
    other = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "begins\n"
    ensure_generated(tmp_path / "set", train_images=6, val_images=2, progress=False)
    _, errors = other.communicate(timeout=120)
    assert other.returncode == 0, errors
    expected = ensure_generated(tmp_path / "alone", train_images=6, val_images=2, progress=False)
    assert read_files(tmp_path / "set") == read_files(expected)


def test_never_replaces_files_that_were_not_generated(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="root: expected a new or empty folder or a generated data set"):
        ensure_generated(tmp_path, **COUNTS, progress=False)
    assert (tmp_path / "holiday.jpg").read_bytes() == b"mine"


def test_a_damaged_stamp_counts_as_not_generated(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "set")
    (copy / generate.STAMP).write_text("{")
    with pytest.raises(ValueError, match="root: expected a new or empty folder or a generated data set"):
        ensure_generated(copy, **COUNTS, progress=False)


@pytest.mark.parametrize("counts", [{"train_images": 0}, {"val_images": -1}, {"train_images": 500_001}])
def test_bad_counts(tmp_path, counts):
    (name,) = counts
    with pytest.raises(ValueError, match=f"{name}: expected 1 to 500000, got {counts[name]}"):
        ensure_generated(tmp_path / "set", **counts)
    assert not (tmp_path / "set").exists()
