"""The scripts of examples/ run as their first lines say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import detector
from detector.predict import predict_images
from tests.train.conftest import make_split

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: object, folder: Path) -> str:
    """Run a script in `folder`; return what it prints."""
    finished = subprocess.run(
        [sys.executable, ROOT / "examples" / script, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_deformable_resnet_block(tmp_path):
    printed = run("deformable_resnet_block.py", folder=tmp_path)
    difference = float(printed.split()[-1])
    assert difference < 1e-5


@pytest.mark.timeout(300)
def test_train_on_your_photographs_then_export(tmp_path):
    make_split(tmp_path / "photographs", "train2017", 8, first_id=100)
    make_split(tmp_path / "photographs", "val2017", 2, first_id=500)

    printed = run("train_on_your_photographs.py", "photographs", "--out", "run", "--epochs", 1, folder=tmp_path)
    assert "best checkpoint" in printed
    assert "000500.png:" in printed
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    assert best.is_file()

    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime", minversion="1.31", reason="older ones have no DeformConv")
    photograph = tmp_path / "photographs" / "val2017" / "000500.png"
    options = ("--out", "best.onnx", "--min-score", 0)
    printed, *objects = run("export_and_run_onnx.py", best, photograph, *options, folder=tmp_path).splitlines()
    assert printed.startswith("best.onnx: ")
    assert (tmp_path / "best.onnx").stat().st_size > 1_000_000

    model, class_names = detector.load(best, "cpu")
    (detections,) = predict_images(model, [photograph], score=0.0)
    assert len(objects) == len(detections.boxes) > 0
    for line, box, score, label in zip(objects, detections.boxes, detections.scores, detections.labels, strict=True):
        name, score_of_file, *_ = line.split()
        x1, x2, y1, y2 = re.findall(r"-?\d+(?= to|,|$)", line.partition("  ")[2])
        assert name == class_names[label]
        assert abs(float(score_of_file) - float(score)) < 0.006
        assert [float(x1), float(y1), float(x2), float(y2)] == pytest.approx(box.tolist(), abs=0.51)
