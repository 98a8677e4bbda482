"""One training step and one evaluation of every DCN model of MMDetection, at the sizes of the preset tiny."""

import json

import pytest

from tests.train.conftest import lines
from train.checkpoint import list_checkpoints, load_checkpoint

MODELS = {
    "dcn/faster-rcnn_r50-dconv": "--model.depth 50 --model.dcn v1",
    "dcn/faster-rcnn_r101-dconv": "--model.depth 101 --model.dcn v1",
    "dcn/faster-rcnn_x101-32x4d-dconv": "--model.depth 101 --model.groups 32 --model.width-per-group 4 --model.dcn v1",
    "dcn/faster-rcnn_r50-dpool": "--model.depth 50 --model.dcn None --model.roi-layer dpool",
    "dcn/mask-rcnn_r50-dconv": "--model.depth 50 --model.dcn v1 --model.mask",
    "dcn/mask-rcnn_r50-dconv-amp": "--model.depth 50 --model.dcn v1 --model.mask --precision fp16",
    "dcn/mask-rcnn_r101-dconv": "--model.depth 101 --model.dcn v1 --model.mask",
    "dcn/cascade-rcnn_r50-dconv": "--model.depth 50 --model.dcn v1 --model.cascade",
    "dcn/cascade-rcnn_r101-dconv": "--model.depth 101 --model.dcn v1 --model.cascade",
    "dcn/cascade-mask-rcnn_r50-dconv": "--model.depth 50 --model.dcn v1 --model.cascade --model.mask",
    "dcn/cascade-mask-rcnn_r101-dconv": "--model.depth 101 --model.dcn v1 --model.cascade --model.mask",
    "dcn/cascade-mask-rcnn_x101-32x4d-dconv": "--model.depth 101 --model.groups 32 --model.width-per-group 4 "
    "--model.dcn v1 --model.cascade --model.mask",
    "dcnv2/faster-rcnn_r50-mdconv": "--model.depth 50",
    "dcnv2/faster-rcnn_r50-mdconv-group4": "--model.depth 50 --model.deform-groups 4",
    "dcnv2/faster-rcnn_r50-mdpool": "--model.depth 50 --model.dcn None --model.roi-layer mdpool",
    "dcnv2/mask-rcnn_r50-mdconv": "--model.depth 50 --model.mask",
    "dcnv2/mask-rcnn_r50-mdconv-amp": "--model.depth 50 --model.mask --precision fp16",
}


@pytest.mark.parametrize("name", MODELS)
def test_one_step(start, coco, tmp_path, name):
    flags = MODELS[name].split()
    out = tmp_path / "run"
    status, _, stderr = start(
        "--data.root", coco, "--out", out, "--max-steps", 1, "--pictures", 0, "--data.limit", 2, *flags
    )
    assert status == 0, stderr
    step, evaluation = lines(out)
    assert step["step"] == 1
    losses = [key for key in step if "loss_" in key]
    stages = 3 if "cascade" in name else 1
    assert len(losses) == 2 + stages * (3 if "mask" in name else 2)
    assert all(step[key] >= 0 for key in losses)
    assert step["loss"] > 0
    assert ("segm_AP" in evaluation) == ("mask" in name)
    assert isinstance(json.loads((out / "detections.json").read_text()), list)

    model = load_checkpoint(list_checkpoints(out / "checkpoints")[0])["model"]
    assert all(value.isfinite().all() for value in model.values())
    assert any(key.startswith("roi_head.bbox_head.2.") for key in model) == ("cascade" in name)
    assert any(".offset_fc." in key for key in model) == ("dpool" in name)
