"""Mask R-CNN: what is found, counted, drawn and written where the model has masks, from start to end."""

import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import nn

import detector
from detector import Batch, Detections
from detector.ops.paste_masks import paste_masks
from detector.ops.rle import decode_mask, encode_mask
from detector.predict import main as predict
from detector.results import coco_rows
from tests.train.conftest import free_port, lines, rank_variables
from tests.train.data.datasets import edit, open_coco
from tests.train.evaluation.test_coco_metrics import (
    coco_metrics,
    crowded,
    crowded_in_all_sizes,
    needs_both_evaluators,
)
from train.data.collate import LoadedBatch
from train.evaluation.coco_metrics import EVALUATORS, METRIC_NAMES, run_coco_eval
from train.evaluation.evaluate import detect
from train.evaluation.pictures import draw_pictures
from train.plot import main as plot

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools.mask")


def rows_with(dataset, change=lambda mask: mask):
    """Return the ground truth of a data set as rows of COCO's results format, their masks changed."""
    masks = []
    for index in range(len(dataset)):
        masks += [encode_mask(change(mask.astype(bool))) for mask in dataset.masks(index)]
    image_ids = np.repeat(dataset.image_ids, np.diff(dataset.box_starts))
    scores = np.linspace(1, 0.5, len(image_ids), dtype=np.float32)
    return coco_rows(image_ids, dataset.category_ids[dataset.labels], dataset.boxes, scores, masks)


def test_perfect_masks_score_one(coco):
    dataset = open_coco(coco, "val2017", masks=True)
    metrics = coco_metrics(rows_with(dataset), dataset)
    assert metrics["segm_AP"] == pytest.approx(1)
    assert metrics["AP"] == pytest.approx(1)
    assert coco_metrics([], dataset)["segm_AP"] == 0


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_annotation_with_the_id_0_is_found(coco, evaluator):
    """The evaluators take a match with the id 0 for none: boxes and masks that are right would not count."""

    def count_from_zero(content):
        for number, annotation in enumerate(content["annotations"]):
            annotation["id"] = number

    edit(coco, count_from_zero, "val2017")
    dataset = open_coco(coco, "val2017", masks=True)
    metrics = coco_metrics(rows_with(dataset), dataset, evaluator)
    assert [metrics[name] for name in ("AP", "AR100", "segm_AP", "segm_AR100")] == pytest.approx([1] * 4)


def test_masks_count_not_boxes(coco):
    dataset = open_coco(coco, "val2017", masks=True)

    def upper_half(mask):
        lines_with_mask = np.flatnonzero(mask.any(1))
        return mask & (np.arange(len(mask)) < lines_with_mask.mean())[:, None]

    rows = rows_with(dataset, upper_half)
    metrics = coco_metrics(rows, dataset)
    assert metrics["AP"] == pytest.approx(1)
    assert metrics["segm_AP75"] == 0
    boxes = [row.pop("bbox") for row in rows]
    assert run_coco_eval(rows, dataset, "segm").stats[METRIC_NAMES.index("AP75")] == 0
    assert len(boxes) == len(rows)


@needs_both_evaluators
@pytest.mark.parametrize("change", [crowded, crowded_in_all_sizes])
def test_evaluators_agree_on_masks(coco, change):
    edit(coco, change, "val2017")
    dataset = open_coco(coco, "val2017", masks=True)
    random = np.random.default_rng(0)

    def shift(mask):
        return np.roll(mask, random.integers(-6, 7, 2), (0, 1))

    rows = rows_with(dataset, shift)
    slow = run_coco_eval(rows, dataset, "segm", "pycocotools")
    fast = run_coco_eval(rows, dataset, "segm", "faster-coco-eval")
    assert 0 < slow.stats[0] < 1
    assert fast.stats.tolist() == pytest.approx(slow.stats.tolist(), rel=0, abs=1e-15)
    nothing_slow = run_coco_eval([], dataset, "segm", "pycocotools")
    nothing_fast = run_coco_eval([], dataset, "segm", "faster-coco-eval")
    assert nothing_fast.stats.tolist() == nothing_slow.stats.tolist()


def test_polygon_of_two_corners_is_no_box(coco):
    """pycocotools takes four numbers for a box, and then all other polygons too."""
    edit(coco, lambda c: [a["segmentation"].insert(0, [1, 1, 3, 3]) for a in c["annotations"]], "val2017")
    dataset = open_coco(coco, "val2017", masks=True)
    assert coco_metrics(rows_with(dataset), dataset)["segm_AP"] == pytest.approx(1)


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize(
    ("rle", "message"),
    [
        pytest.param({"size": [96, 128], "counts": "1" * 5000 + "o"}, "counts: expected lengths", id="cut off"),
        pytest.param({"size": [96, 128], "counts": "0?O"}, "counts: expected lengths", id="negative"),
        pytest.param({"size": [96, 128], "counts": ""}, "counts: expected lengths", id="empty"),
        pytest.param({"size": [96, 128], "counts": "\udc80"}, "counts: expected lengths", id="half a character"),
        pytest.param({"size": [96, 128], "counts": [12288]}, "expected compressed run lengths", id="list"),
        pytest.param({"size": [96, 128]}, "expected compressed run lengths, got None", id="no counts"),
        pytest.param({"size": [0, 0], "counts": "11"}, "expected the size of its image, 96 x 128", id="no pixels"),
        pytest.param({"size": [10**9, 10**9], "counts": "11"}, "size: expected", id="huge"),
        pytest.param([[1, 1, 9, 1, 9, 9]], "size: expected", id="polygon"),
    ],
)
def test_malformed_masks_of_detections_do_not_reach_the_evaluators(coco, evaluator, rle, message):
    dataset = open_coco(coco, "val2017", masks=True)
    rows = rows_with(dataset)
    rows[1]["segmentation"] = rle
    with pytest.raises(ValueError, match=rf"rows\[1\]: 'segmentation': {message}"):
        run_coco_eval(rows, dataset, "segm", evaluator)


class OneImage(nn.Module):
    """A stand-in for the detector: returns given detections."""

    def __init__(self, detections):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.detections = detections

    def detect(self, batch):
        found = self.detections
        valid = torch.ones_like(found.labels, dtype=torch.bool)
        return tuple(tensor[None] for tensor in (found.boxes, found.scores, found.labels, valid, found.masks))


def detect_one(detections, scale_factors, original_size):
    """Return the rows of an image in which a model detects `detections`."""
    batch = Batch(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.tensor([[32, 32]]))
    loaded = LoadedBatch(batch, [42], [scale_factors], [original_size], {})
    rows, _ = detect(OneImage(detections), [loaded], np.array([7, 3]))
    return rows


def test_masks_are_pasted_at_the_size_of_the_file():
    small = torch.rand(3, 28, 28)
    boxes = torch.tensor([[2.0, 4.0, 22.0, 30.0], [0.0, 0.0, 40.0, 32.0], [30.0, 10.0, 39.0, 31.0]])
    detections = Detections(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 0, 1]), small)
    rows = json.loads(json.dumps(detect_one(detections, (0.5, 0.25), (128, 80))))
    expected = paste_masks(small, boxes / torch.tensor([0.5, 0.25, 0.5, 0.25]), 128, 80)
    for row, mask in zip(rows, expected.numpy(), strict=True):
        assert row["segmentation"]["size"] == [128, 80]
        np.testing.assert_array_equal(coco_mask.decode(row["segmentation"]), mask)


def test_no_detection_gives_no_row():
    empty = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), torch.zeros(0, 28, 28))
    assert detect_one(empty, (1.0, 1.0), (9, 9)) == []


def test_pictures_show_masks_of_both(coco, tmp_path):
    dataset = open_coco(coco, "val2017", masks=True, limit=1)
    rows = rows_with(dataset)
    rows_without = [{key: value for key, value in row.items() if key != "segmentation"} for row in rows]
    shown = next(draw_pictures(dataset, rows, tmp_path, 1, 0.3))[1].astype(int)
    without = next(draw_pictures(dataset, rows_without, tmp_path, 1, 0.3))[1].astype(int)
    half = shown.shape[1] // 2
    assert (shown[:, :half] != without[:, :half]).any()
    assert (shown[:, half + 9 :] == without[:, half + 9 :]).all()
    boxes_only = next(draw_pictures(open_coco(coco, "val2017", limit=1), rows_without, tmp_path, 1, 0.3))[1]
    assert (without[:, half + 9 :] != boxes_only[:, half + 9 :]).any()


def test_run_from_start_to_end(start, coco, tmp_path, capsys):
    out = tmp_path / "run"
    common = ("--data.root", coco, "--out", out, "--model.mask")
    status, stdout, stderr = start(*common, "--max-steps", 2, "--eval-every", 9)
    assert status == 0
    status, stdout, stderr = start(*common)  # goes on
    assert status == 0
    assert "Mask R-CNN R18-FPN" in stdout
    assert "\nclass, masks " in stdout
    assert "masks AP" in stderr
    assert all(len(line) <= 80 or str(tmp_path) in line for line in stdout.splitlines())
    losses = [line["loss_mask"] for line in lines(out) if "loss" in line]
    assert len(losses) == 4
    assert 0 < losses[0] < 10
    evaluation = lines(out)[-1]
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
    tables = {"classes", "segm_classes", "classes_F1", "segm_classes_F1"}
    assert {f"segm_{name}" for name in names} | set(names) | tables <= set(evaluation)
    for row in json.loads((out / "detections.json").read_text()):
        assert decode_mask(row["segmentation"]).shape == (96, 128)
    model, _ = detector.load(out / "checkpoints" / "best.pt", "cpu")
    assert model.config.mask

    status, stdout, _ = start("--data.root", coco, "--out", out, "--eval-only")  # the checkpoint says that it has masks
    assert status == 0
    assert lines(out)[-1]["segm_AP"] == evaluation["segm_AP"]
    assert "masks" in stdout
    assert plot([str(out), "--out", str(tmp_path / "curves.png")]) == 0
    files = [str(coco / "val2017"), "--weights", str(out / "checkpoints" / "best.pt"), "--out", str(tmp_path / "found")]
    assert predict([*files, "--score", "0", "--device", "cpu"]) == 0
    rows = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert rows
    assert all(row["segmentation"]["size"] == [96, 128] for row in rows)
    capsys.readouterr()


def test_missing_masks_are_one_line(start, coco, tmp_path):
    edit(coco, lambda content: [annotation.pop("segmentation") for annotation in content["annotations"]])
    status, _, stderr = start("--data.root", coco, "--out", tmp_path / "run", "--model.mask")
    assert status == 1
    (line,) = stderr.strip().splitlines()
    assert "instances_train2017.json: annotations[0] (id 1): 'segmentation': expected one" in line
    assert "--model.mask" in line


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_two_processes_find_what_one_finds(start, coco, tmp_path, launch):
    assert start("--data.root", coco, "--out", tmp_path / "train", "--model.mask", "--max-steps", 1)[0] == 0
    common = ("--data.root", coco, "--eval-only", "--weights", tmp_path / "train" / "checkpoints" / "best.pt")
    port = free_port()
    ranks = [launch(*common, "--out", tmp_path / "two", **rank_variables(port, rank, 2)) for rank in range(2)]
    assert start(*common, "--out", tmp_path / "one")[0] == 0
    (status, printed), other = [rank.finish() for rank in ranks]
    assert status == other[0] == 0, (printed, other)
    assert "masks" in printed
    one, two = (json.loads((tmp_path / name / "detections.json").read_text()) for name in ("one", "two"))
    assert len(one) == len(two) > 0
    for row, other in zip(one, two, strict=True):
        assert row["image_id"] == other["image_id"]
    (mine,), (theirs,) = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert all(mine[name] == pytest.approx(theirs[name], abs=1e-9) for name in mine if name.startswith("segm_A"))
