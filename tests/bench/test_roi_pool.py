"""The benchmark of RoI pooling runs, compares before it measures, and writes its rows."""

import pytest
import torch

from bench import roi_pool
from bench.rows import read_csv

TINY = ["--size", "12", "14", "--channels", "4", "--rois", "6", "--seconds", "0", "--device", "cpu"]


def test_rows_of_every_provider_and_mode(tmp_path, capsys):
    path = tmp_path / "roi_pool.csv"
    assert roi_pool.main([*TINY, "--channels-last", "--csv", str(path)]) == 0
    rows = read_csv(path)
    measured = {(row["provider"], row["case"], row["mode"]) for row in rows}
    for name in ("roi_align", "deform_roi_pool"):
        for case in ("roi-pool adaptive", "roi-pool 2"):
            assert {(name, case, "fwd"), (name, case, "both")} <= measured
    assert {row["shape"] for row in rows} == {"4x12x14 r6 nhwc"}
    assert "| float32 | adaptive | fwd | roi_align |" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["value", "error"])
def test_a_provider_that_disagrees_is_not_timed(wrong, monkeypatch, capsys):
    providers = roi_pool.load_providers()

    def call(inputs, ratio):
        if wrong == "error":
            raise RuntimeError("not compiled")
        return 1.5 * providers["roi_align"].call(inputs, ratio)

    monkeypatch.setattr(
        roi_pool, "load_providers", lambda: providers | {"deform_roi_pool": roi_pool.Provider(call, False)}
    )
    assert roi_pool.main([*TINY, "--sampling-ratios", "1"]) == 1
    printed = capsys.readouterr()
    assert "deform_roi_pool" not in printed.out
    assert ("cannot: not compiled" if wrong == "error" else "disagrees by") in printed.err


def test_boxes_lie_in_the_image():
    inputs = roi_pool.make_inputs(2, (12, 14), 50, torch.float32, torch.device("cpu"))
    boxes = inputs.rois[:, 1:]
    assert boxes.min() >= 0
    assert (boxes[:, 2:] <= torch.tensor([56, 48])).all()
    assert (boxes[:, 2:] >= boxes[:, :2]).all()
