"""The generated data set: the same every time, made once, valid COCO, and not to be solved by color."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from train.synthetic import generate
from train.synthetic.generate import ensure_generated, outlines, run_lengths
from train.synthetic.paint import Painting
from train.synthetic.scene import MIN_PIXELS, NOTHING, Canvas, Light, Sprite, bend, overlap, photograph
from train.synthetic.shapes import KINDS, litter

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools.mask")
COUNTS = {"train_images": 24, "val_images": 6}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return ensure_generated(tmp_path_factory.mktemp("data") / "set", **COUNTS, progress=False)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def load(root: Path, split: str) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(root / "annotations" / f"instances_{split}2017.json"))


@pytest.mark.parametrize(("split", "count"), [("train", 24), ("val", 6)])
def test_layout(root, split, count):
    coco = load(root, split)
    assert [category["name"] for category in coco.dataset["categories"]] == list(KINDS)
    assert len(coco.imgs) == len(coco.dataset["images"]) == count
    assert len(coco.anns) == len(coco.dataset["annotations"]), "annotation ids repeat"
    for entry in coco.dataset["images"]:
        image = cv2.imread(str(root / f"{split}2017" / entry["file_name"]))
        assert image.shape == (entry["height"], entry["width"], 3)
        assert entry["width"] >= entry["height"]
        assert image.std() > 5
    assert {path.name for path in (root / f"{split}2017").iterdir()} == {e["file_name"] for e in coco.dataset["images"]}


def test_splits_share_no_image(root):
    train, val = load(root, "train"), load(root, "val")
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
        assert 1 <= entry["category_id"] <= len(KINDS)
        assert MIN_PIXELS <= entry["area"] <= width * height
        mask = coco.annToMask(entry)
        if entry["iscrowd"]:
            assert mask.sum() == entry["area"]
            assert cv2.boundingRect(mask) == (x, y, width, height)
        else:  # polygons fill holes and cut corners
            assert mask.sum() >= 0.9 * entry["area"]
            points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in entry["segmentation"]])
            assert np.allclose([*points.min(0), *points.max(0)], [x, y, x + width, y + height], atol=0.5)


def test_photographs_vary():
    things = [photograph(np.random.default_rng([0, n]))[1] for n in range(150)]
    found = [thing for picture in things for thing in picture]
    areas = np.array([thing.mask.sum() for thing in found])
    assert {thing.label for thing in found} == set(range(len(KINDS)))
    assert any(thing.crowd for thing in found)
    assert [] in things, "no picture without objects"
    assert areas.min() < 200
    assert areas.max() > 64**2


def test_same_seed_same_picture():
    first, again, other = (photograph(np.random.default_rng([0, seed])) for seed in (5, 5, 6))
    assert np.array_equal(first[0], again[0])
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(first[1], again[1], strict=True))
    assert first[0].shape != other[0].shape or not np.array_equal(first[0], other[0])


def test_same_files_whatever_the_number_of_pictures(root, tmp_path):
    less = files(ensure_generated(tmp_path / "less", train_images=8, val_images=2, progress=False))
    more = files(root)
    pictures = [name for name in less if name.endswith(".jpg")]
    assert len(pictures) == 10
    assert all(less[name] == more[name] for name in pictures)


def test_made_once_and_again_when_something_changes(tmp_path, monkeypatch):
    root = tmp_path / "deep" / "set"
    arguments = {"train_images": 2, "val_images": 1, "progress": False}
    assert ensure_generated(root, **arguments) == root
    before = files(root)
    with monkeypatch.context() as patch:
        patch.setattr(generate, "_build", lambda *_: pytest.fail("made a second time"))
        ensure_generated(root, **arguments)
    assert files(ensure_generated(root, **arguments, seed=1)).keys() == before.keys()
    assert files(root) != before
    ensure_generated(root, **arguments)
    assert files(root) == before
    monkeypatch.setattr(generate, "_code_digest", lambda: "another version")
    ensure_generated(root, **arguments)
    assert json.loads((root / generate.STAMP).read_text())["code"] == "another version"


def test_goes_on_after_a_kill(tmp_path):
    (tmp_path / ".set.building" / "train2017").mkdir(parents=True)
    (tmp_path / ".set.building" / "train2017" / "half.jpg").write_bytes(b"half")
    root = ensure_generated(tmp_path / "set", train_images=1, val_images=1, progress=False)
    assert len(list(root.rglob("*.jpg"))) == 2
    assert not (tmp_path / ".set.building").exists()


def test_failure_leaves_nothing_half_done(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "imwrite", lambda *_: False)
    with pytest.raises(OSError, match="could not write"):
        ensure_generated(tmp_path / "set", train_images=2, val_images=1, progress=False)
    assert not (tmp_path / "set").exists()


def test_two_processes_make_one_set(tmp_path):
    code = (
        "import sys; from pathlib import Path; from train.synthetic.generate import ensure_generated;"
        "ensure_generated(Path(sys.argv[1]), train_images=6, val_images=2, progress=False)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "set")]
    repository = Path(generate.__file__).parents[2]
    processes = [subprocess.Popen(command, cwd=repository, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    expected = ensure_generated(tmp_path / "alone", train_images=6, val_images=2, progress=False)
    assert files(tmp_path / "set") == files(expected)


def test_never_replaces_files_of_others(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="not generated"):
        ensure_generated(tmp_path, **COUNTS, progress=False)
    assert (tmp_path / "holiday.jpg").read_bytes() == b"mine"


@pytest.mark.parametrize("counts", [{"train_images": 0}, {"val_images": -1}, {"train_images": 500_001}])
def test_bad_counts(tmp_path, counts):
    with pytest.raises(ValueError, match=f"{next(iter(counts))} must be in"):
        ensure_generated(tmp_path / "set", **counts)
    assert not (tmp_path / "set").exists()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**81 - 1))
@settings(max_examples=60, deadline=None)
def test_run_lengths_are_those_of_coco(height, width, bits):
    mask = np.array([bits >> n & 1 for n in range(height * width)], bool).reshape(height, width)
    ours = run_lengths(mask)
    assert sum(ours["counts"]) == mask.size
    assert np.array_equal(coco_mask.decode(coco_mask.frPyObjects(ours, height, width)), mask)


def test_outlines_follow_the_mask():
    mask = np.zeros((60, 80), bool)
    mask[10:30, 20:50] = True
    mask[40:50, 60:75] = True
    polygons = outlines(mask)
    assert len(polygons) == 2
    drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 60, 80)))
    assert (drawn.astype(bool) & mask).sum() / (drawn.astype(bool) | mask).sum() > 0.9


@pytest.mark.parametrize("painter", [*(painter for painter, _ in KINDS.values()), litter])
@pytest.mark.parametrize("size", [64, 150])
def test_paintings_are_well_formed(painter, size):
    for seed in range(8):
        painting = painter(np.random.default_rng(seed), size)
        assert painting.color.shape == (3, size, size)
        assert painting.alpha.shape == painting.relief.shape == (size, size)
        for layer in (painting.color, painting.alpha, painting.relief):
            assert layer.dtype == np.float32
            assert np.isfinite(layer).all()
        assert 0 <= painting.alpha.min() <= painting.alpha.max() <= 1
        assert 0.03 < painting.alpha.mean() < 0.7


def test_color_alone_does_not_tell_the_kinds_apart():
    """The nearest mean color, fitted on the same paintings it is asked about, is often wrong."""
    colors, labels = [], []
    for label, (painter, _) in enumerate(KINDS.values()):
        for seed in range(80):
            painting = painter(np.random.default_rng([label, seed]), 48)
            colors.append((painting.color * painting.alpha).sum((1, 2)) / painting.alpha.sum())
            labels.append(label)
    colors, labels = np.array(colors), np.array(labels)
    means = np.stack([colors[labels == label].mean(0) for label in range(len(KINDS))])
    guesses = ((colors[:, None] - means) ** 2).sum(2).argmin(1)
    assert (guesses == labels).mean() < 0.75


def test_bending_is_smooth_and_keeps_the_object():
    plate = Painting(
        np.ones((3, 96, 96), np.float32), np.zeros((96, 96), np.float32), np.zeros((96, 96), np.float32), 0
    )
    cv2.circle(plate.alpha, (48, 48), 36, 1.0, -1)
    for seed in range(20):
        color, alpha, relief = bend(np.random.default_rng(seed), plate, 96.0, 180.0)
        assert color.shape == (3, *alpha.shape)
        assert relief.shape == alpha.shape
        assert 0.6 < alpha.sum() / plate.alpha.sum() < 1.6
        assert cv2.connectedComponents((alpha > 0.5).astype(np.uint8))[0] == 2, "torn apart"
        assert max(alpha[0].max(), alpha[-1].max(), alpha[:, 0].max(), alpha[:, -1].max()) < 1, "cut off"


def square(side: int) -> Sprite:
    return Sprite(np.ones((3, side, side), np.float32), np.ones((side, side), np.float32))


def test_canvas_hides_no_object_too_far():
    canvas = Canvas(np.zeros((3, 100, 120), np.float32), Light(np.float32([0, 0, 1]), 0.5))
    under, over, outside = canvas.add(0), canvas.add(1), canvas.add(2)
    assert canvas.place(square(20), 50, 50, under)
    assert not canvas.place(square(20), 53, 53, over), "hides more than half"
    assert canvas.place(square(20), 65, 50, over)
    assert not canvas.place(square(20), 0, 0, outside), "three quarters out of the frame"
    assert not canvas.place(square(60), 55, 50, NOTHING), "litter hides two objects"
    things = canvas.things()
    assert [thing.label for thing in things] == [0, 1]
    assert [int(thing.mask.sum()) for thing in things] == [300, 400]


@given(st.integers(-30, 40), st.integers(-30, 40))
@settings(max_examples=40, deadline=None)
def test_overlap_pairs_the_same_pixels(left, top):
    small, large = np.zeros((7, 5)), np.zeros((20, 30))
    inner, outer = overlap(left, top, small.shape, large.shape)
    assert small[inner].shape == large[outer].shape
    small[inner] = 1
    expected = sum(0 <= top + y < 20 and 0 <= left + x < 30 for y in range(7) for x in range(5))
    assert small.sum() == expected


def test_ruined_stamp_is_not_ours(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "set")
    (copy / generate.STAMP).write_text("{")
    with pytest.raises(ValueError, match="not generated"):
        ensure_generated(copy, **COUNTS, progress=False)
