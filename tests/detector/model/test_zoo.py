"""All models of MMDetection's folders dcn and dcnv2: names, shapes, parameters, features, losses and gradients."""

import hashlib

import numpy as np
import pytest
import torch

from detector import Batch, FasterRCNN, FasterRCNNConfig, Target
from tests.detector.golden_model import assert_summary, golden_detector, make_batch

V1 = {"dcn": "v1"}
R101 = {"depth": 101}
X101 = {"depth": 101, "groups": 32, "width_per_group": 4}
MASK = {"mask": True}
CASCADE = {"cascade": True}

ZOO = {
    "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py": V1,
    "dcn/faster-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py": V1 | R101,
    "dcn/faster-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco.py": V1 | X101,
    "dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py": {"dcn": None, "roi_layer": "dpool"},
    "dcn/mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py": V1 | MASK,
    "dcn/mask-rcnn_r50-dconv-c3-c5_fpn_amp-1x_coco.py": V1 | MASK,
    "dcn/mask-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py": V1 | R101 | MASK,
    "dcn/cascade-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py": V1 | CASCADE,
    "dcn/cascade-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py": V1 | R101 | CASCADE,
    "dcn/cascade-mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py": V1 | CASCADE | MASK,
    "dcn/cascade-mask-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py": V1 | R101 | CASCADE | MASK,
    "dcn/cascade-mask-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco.py": V1 | X101 | CASCADE | MASK,
    "dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py": {},
    "dcnv2/faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco.py": {"deform_groups": 4},
    "dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco.py": {"dcn": None, "roi_layer": "mdpool"},
    "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py": MASK,
    "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_amp-1x_coco.py": MASK,
}
"""File of MMDetection -> fields of our configuration."""

IN_EVERY_RUN = (
    "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
    "dcn/faster-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco.py",
    "dcn/cascade-mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
)
"""With the golden groups model, mask and mdpool they have every part; the slow tests train the others as well."""

MODELS = [  # the two amp files train the same model in float16
    name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.slow) for name in ZOO if "amp" not in name
]


def test_zoo_is_complete(golden):
    variants = golden("variants")[1]["variants"]
    assert set(ZOO) == set(variants)
    assert {name: entry["same_model_as"] for name, entry in variants.items() if "same_model_as" in entry} == {
        name: name.replace("amp-", "") for name in ZOO if "amp" in name
    }


@pytest.mark.parametrize("name", ZOO)
def test_state_dict_is_mmdetections(golden, name):
    _, params = golden("variants")
    entry = params["variants"][name]
    with torch.device("meta"):
        model = FasterRCNN(FasterRCNNConfig(**ZOO[name]))

    expected = []
    for first, stop in params["state_dicts"][entry["state_dict_sha256"]]:
        expected += params["entries"][first:stop]
    state = model.state_dict()
    got = [f"{key} {'x'.join(str(side) for side in value.shape)}" for key, value in state.items()]
    assert sorted(got) == sorted(expected)

    lines = []
    for line in expected:  # in MMDetection's order, with the dtypes of its model in float64
        key = line.split(" ")[0]
        dtype = "float64" if state[key].is_floating_point() else "int64"
        lines.append(f"{key} {tuple(state[key].shape)} {dtype}\n")
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == entry["state_dict_sha256"]

    parameters = list(model.parameters())
    assert sum(parameter.numel() for parameter in parameters) == entry["parameters"]
    trained = [parameter.numel() for parameter in parameters if parameter.requires_grad]
    assert sum(trained) == entry["trainable_parameters"]


def zoo_batch(arrays, with_masks, dtype):
    batch = make_batch(
        [arrays[f"img{i}.image_bgr"] for i in range(2)],
        [arrays[f"img{i}.gt_bboxes"] for i in range(2)],
        [arrays[f"img{i}.gt_labels"] for i in range(2)],
        dtype,
    )
    if not with_masks:
        return batch
    targets = []
    for i, target in enumerate(batch.targets):
        targets.append(Target(target.boxes, target.labels, torch.from_numpy(arrays[f"img{i}.gt_masks"])))
    return Batch(batch.images, batch.sizes, targets)


@pytest.mark.parametrize("name", MODELS)
def test_training_step(golden, name):
    """Features, losses of all stages and the gradient of every part in float64."""
    arrays, params = golden("variants")
    entry = params["variants"][name]
    model = golden_detector(FasterRCNNConfig(**ZOO[name], sampler="deterministic"), params["spec"]["salt"])
    model.double().train()
    features = {}
    model.backbone.register_forward_hook(lambda module, args, output: features.update(C=output))
    model.neck.register_forward_hook(lambda module, args, output: features.update(P=output))
    losses = model(zoo_batch(arrays, model.config.mask, torch.float64))
    for kind, maps in features.items():
        for level, feature in enumerate(maps, start=2):
            assert_summary(arrays, f"{name}.{kind}{level}", feature, 64, 1e-9)

    expected = {key: value for key, value in entry["losses"].items() if not key.endswith("acc")}
    total = expected.pop("total")
    assert set(losses) == set(expected)
    for key, value in expected.items():
        reference = float(np.sum(value))
        assert abs(losses[key].item() - reference) <= 1e-9 * max(reference, 1), key
    assert abs(sum(losses.values()).item() - total) <= 1e-9 * total

    sum(losses.values()).backward()
    for part, norm in entry["grad_norms"].items():
        squares = [p.grad.square().sum() for key, p in model.named_parameters() if _is_trained_part(key, part, p)]
        assert abs(sum(squares).sqrt().item() - norm) <= 1e-9 * norm, part
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def _is_trained_part(key, part, parameter):
    return key.startswith(f"{part}.") and parameter.requires_grad
