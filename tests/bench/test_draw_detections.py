import json

import pytest

from bench.draw_detections import draw, main
from detector.image import read_image
from tests.train.conftest import make_split


@pytest.fixture
def run(tmp_path):
    """A run that has found something in the first image of two, and a data set `birds`."""
    make_split(tmp_path / "birds", "val2017", 2, first_id=5)
    (tmp_path / "run").mkdir()
    row = {"image_id": 5, "category_id": 7, "bbox": [10, 10, 30, 30]}
    rows = [{**row, "score": 0.9}, {**row, "category_id": 3, "score": 0.4}]
    (tmp_path / "run" / "detections.json").write_text(json.dumps(rows))
    return tmp_path / "run"


def test_the_first_images_are_below_each_other(run):
    one = draw(run, run.parent / "birds", count=1, score=0.5)
    two = draw(run, run.parent / "birds", count=2, score=0.5)
    with_all = draw(run, run.parent / "birds", count=1, score=0.3)
    assert two.shape[0] > 1.9 * one.shape[0]
    assert (two[: len(one)] == one).all()
    assert (with_all != one).any()


def test_command_line(run, capsys):
    out = run.parent / "picture.png"
    main([str(run), str(out), "--data", str(run.parent / "birds")])
    assert read_image(out).shape[1] > 1200
    assert capsys.readouterr().out.strip() == str(out)
    with pytest.raises(SystemExit, match="bench: annotations: expected a file"):
        main([str(run), str(out), "--data", str(run.parent / "nowhere")])
