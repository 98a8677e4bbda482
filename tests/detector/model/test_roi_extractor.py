"""Deformable RoI pooling inside the detector, against MMDetection's numbers, and the layers of the levels."""

import numpy as np
import pytest
import torch

from detector import FasterRCNN, FasterRCNNConfig
from detector.model.roi_extractor import RoIExtractor
from detector.ops.roi_align import roi_levels
from tests.detector.golden_model import assert_summary, golden_detector, make_batch
from tests.detector.test_export import run_graph
from triton_dcn import DeformRoIPoolPack, ModulatedDeformRoIPoolPack

LOSSES = ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox")


class Run:
    """One training step, and for `mdpool` in float64 an evaluation, of a golden model with deformable RoI layers."""

    def __init__(self, golden, layer, dtype):
        self.layer = layer
        self.arrays, params = golden("mdpool")
        self.params = params[layer]
        self.all_names = params["all_names"]
        # No gradient of the stages c2 to c4 is golden.
        config = FasterRCNNConfig(dcn=None, roi_layer=layer, sampler="deterministic", frozen_stages=3)
        self.model = golden_detector(config, params["spec"]["salt"])
        self.model.to(dtype).train()
        self.batch = make_batch(
            [self.arrays[f"img{i}.image_bgr"] for i in range(2)],
            [self.arrays[f"img{i}.gt_bboxes"] for i in range(2)],
            [self.arrays[f"img{i}.gt_labels"] for i in range(2)],
            dtype,
        )
        self.seen = {}
        self.copies = []
        extractor = self.model.roi_head.bbox_roi_extractor
        self.model.neck.register_forward_hook(self._note("neck"))
        extractor.register_forward_pre_hook(self._copy_features)
        extractor.register_forward_hook(self._note("pooled"))
        for level, roi_layer in enumerate(extractor.roi_layers):
            roi_layer.offset_fc[4].register_forward_hook(self._note(f"offset_fc{level}"))
            roi_layer.offset_fc[0].register_forward_pre_hook(self._note(f"offset_fc{level}_in"))
            if layer == "mdpool":
                roi_layer.mask_fc.register_forward_hook(self._note(f"mask_fc{level}"))
        for part, name in ((self.model.rpn_head, "propose"), (self.model.roi_head, "sample")):
            self._watch(part, name)

        self.losses = self.model(self.batch)
        self.trained = dict(self.seen)
        sum(self.losses.values()).backward()
        self.feature_gradients = [copy.grad for copy in self.copies[:4]]

    def _copy_features(self, module, arguments):
        """Give the extractor copies of the features: their gradients come from the losses of the RoI head alone."""
        features, rois = arguments
        self.copies = [feature.view_as(feature) for feature in features]
        for copy in self.copies:
            if copy.requires_grad:
                copy.retain_grad()
        return self.copies, rois

    def _note(self, name):
        def hook(module, arguments, output=None):
            self.seen[name] = arguments[0] if output is None else output

        return hook

    def _watch(self, part, name):
        method = getattr(part, name)

        def call(*arguments):
            self.seen[name] = method(*arguments)
            return self.seen[name]

        setattr(part, name, call)


@pytest.fixture(scope="module")
def mdpool(golden):
    return Run(golden, "mdpool", torch.float64)


DPOOL = pytest.param("dpool", marks=pytest.mark.slow)  # a part of mdpool; test_zoo.py has it in every run


@pytest.fixture(scope="module", params=["mdpool", DPOOL])
def float64(request, golden):
    return request.getfixturevalue("mdpool") if request.param == "mdpool" else Run(golden, "dpool", torch.float64)


def test_names_are_mmdetections(float64):
    state = {name: list(value.shape) for name, value in float64.model.state_dict().items()}
    expected = {entry["name"]: entry["shape"] for entry in float64.params["state_dict"]}
    assert {name: shape for name, shape in state.items() if "roi_layers" in name} == expected
    assert sorted(name for name in state if "roi_layers" not in name) == sorted(float64.all_names)
    assert sum(parameter.numel() for parameter in float64.model.parameters()) == float64.params["parameters"]


def test_proposals_and_samples(mdpool):
    boxes, _, valid = mdpool.trained["propose"]
    regions, samples = mdpool.trained["sample"]
    counts = torch.tensor([len(target.labels) for target in mdpool.batch.targets])
    is_target = torch.arange(int(counts.max())) < counts[:, None]
    among_valid = torch.cat([is_target, valid], 1).cumsum(1) - 1
    for i in range(2):
        name = f"mdpool.img{i}"
        expected = torch.from_numpy(mdpool.arrays[f"{name}.proposals"])
        torch.testing.assert_close(boxes[i][valid[i]], expected, rtol=1e-10, atol=1e-8)
        positive = samples.positive[i]
        negative = samples.valid[i] & ~positive
        for kind, chosen in (("pos", positive), ("neg", negative)):
            indices = among_valid[i][samples.index[i][chosen]].tolist()
            assert indices == mdpool.arrays[f"{name}.rcnn_{kind}_inds"].tolist()
        assert samples.target[i][positive].tolist() == mdpool.arrays[f"{name}.rcnn_pos_gt"].tolist()
    expected = torch.from_numpy(mdpool.arrays["mdpool.rois"])[:, 1:]
    torch.testing.assert_close(regions.flatten(0, 1), expected, rtol=1e-10, atol=1e-8)
    levels = roi_levels(regions.flatten(0, 1))
    assert levels.bincount(minlength=4).tolist() == mdpool.params["rois_per_level"]


def assert_numbers(run, feature_limit, loss_limit, gradient_limit):
    name = run.layer
    many = name == "mdpool"
    arrays = run.arrays
    for level, (feature, gradient) in enumerate(zip(run.trained["neck"][:4], run.feature_gradients, strict=True)):
        assert_summary(arrays, f"{name}.P{level + 2}", feature, 256, feature_limit)
        assert_summary(arrays, f"{name}.grad_P{level + 2}", gradient, 1024 if many else 256, gradient_limit, 1e-6)
    assert_summary(arrays, f"{name}.roi_feats", run.trained["pooled"], 4096 if many else 1024, feature_limit)
    for key in LOSSES:
        assert abs(run.losses[key].item() - float(np.sum(run.params["losses"][key]))) < loss_limit, key

    gradients = {key: parameter.grad for key, parameter in run.model.named_parameters()}
    keys = [key for key in arrays if key.startswith(f"{name}.grad.") and key.endswith(".samples")]
    assert len(keys) > 20
    for key in keys:
        key = key.removeprefix(f"{name}.grad.").removesuffix(".samples")
        num_samples = 256 if many or "roi_layers" not in key else 64
        assert_summary(arrays, f"{name}.grad.{key}", gradients[key], num_samples, gradient_limit, 1e-6)
    for key, norm in run.params["grad_norms"].items():
        assert abs(gradients[key].norm().item() - norm) <= gradient_limit * (norm + 1e-6), key


def test_numbers(float64):
    assert_numbers(float64, 1e-10, 1e-10, 1e-10)


def test_offsets_and_masks(float64):
    """Each layer has the regions of its level, in their order."""
    name = float64.layer
    for level, count in enumerate(float64.params["rois_per_level"]):
        if count == 0:
            continue
        offset = float64.trained[f"offset_fc{level}"]
        assert len(offset) == count
        assert_summary(float64.arrays, f"{name}.offset_fc{level}", offset, 512, 1e-10)
        assert_summary(
            float64.arrays, f"{name}.offset_fc{level}_in", float64.trained[f"offset_fc{level}_in"], 512, 1e-10
        )
        if name == "mdpool":
            assert_summary(float64.arrays, f"{name}.mask_fc{level}", float64.trained[f"mask_fc{level}"], 512, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["mdpool", "dpool"])
def test_float32(golden, layer):
    assert_numbers(Run(golden, layer, torch.float32), 1e-5, 1e-5, 1e-2)


@pytest.mark.slow
def test_detections(mdpool):
    mdpool.model.eval()
    with torch.no_grad():
        detections = mdpool.model(mdpool.batch)
    mdpool.model.train()
    for i, detected in enumerate(detections):
        name = f"mdpool.test.img{i}"
        assert detected.labels.tolist() == mdpool.arrays[f"{name}.det_labels"].tolist()
        scale = torch.from_numpy(mdpool.arrays[f"img{i}.scale_factor"]).double().repeat(2)
        expected = torch.from_numpy(mdpool.arrays[f"{name}.det_bboxes"])
        torch.testing.assert_close(detected.boxes / scale, expected, rtol=1e-10, atol=1e-7)
        expected = torch.from_numpy(mdpool.arrays[f"{name}.det_scores"])
        torch.testing.assert_close(detected.scores, expected, rtol=1e-10, atol=1e-10)


ROIS = torch.tensor(
    [[0.0, 2, 3, 50, 40], [1, 10, 5, 300, 200], [-1, 0, 0, 0, 0], [0, 7, 9, 120, 130], [1, 4, 4, 30, 30]]
)


def make_extractor(layer, sampling_ratio=0):
    torch.manual_seed(0)
    extractor = RoIExtractor(
        (4, 8, 16, 32), 3, layer, channels=2, fc_channels=8, sampling_ratio=sampling_ratio
    ).double()
    for parameter in extractor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features = [torch.randn(2, 2, 256 // stride, 320 // stride, dtype=torch.float64) for stride in (4, 8, 16, 32)]
    return extractor, [feature.requires_grad_() for feature in features]


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("layer", ["dpool", "mdpool"])
def test_a_region_has_the_layer_of_its_level(layer, sampling_ratio):
    """The same as every region by itself through the layer of its level; 0 for padding."""
    extractor, features = make_extractor(layer, sampling_ratio)
    rois = ROIS.double()
    pooled = extractor(features, rois)
    assert isinstance(extractor.roi_layers[0], ModulatedDeformRoIPoolPack if layer == "mdpool" else DeformRoIPoolPack)
    for roi, level, got in zip(rois, roi_levels(rois[:, 1:]), pooled, strict=True):
        expected = extractor.roi_layers[level](features[level], roi[None])[0]
        torch.testing.assert_close(got, expected if roi[0] >= 0 else torch.zeros_like(expected))


@pytest.mark.parametrize("layer", ["dpool", "mdpool"])
def test_layers_of_levels_without_regions_have_zero_gradients(layer):
    extractor, features = make_extractor(layer)
    rois = ROIS.double()[:1]
    extractor(features, rois).square().sum().backward()
    for index, roi_layer in enumerate(extractor.roi_layers):
        assert all((parameter.grad != 0).any() == (index == 0) for parameter in roi_layer.parameters())
    assert all((feature.grad == 0).all() for feature in features[1:])

    assert extractor(features, rois[:0]).shape == (0, 2, 3, 3)
    for nothing in (rois[:0], ROIS.double()[2:3].expand(4, 5)):  # the second one is padding
        extractor, features = make_extractor(layer)
        extractor(features, nothing).sum().backward()
        assert all((parameter.grad == 0).all() for parameter in [*extractor.parameters(), *features])


@pytest.mark.parametrize("layer", ["dpool", "mdpool"])
def test_fixed_shapes_give_the_same_numbers(layer, monkeypatch):
    """What a GPU computes, all regions through all layers, traces as one graph and equals what a CPU computes."""
    extractor, features = make_extractor(layer)
    rois = ROIS.double()
    expected = extractor(features, rois)
    traced = torch.compile(extractor, fullgraph=True, backend="aot_eager")(features, rois)
    torch.testing.assert_close(traced, expected)
    inputs = [*extractor.parameters(), *features]
    expected_gradients = torch.autograd.grad(expected.square().sum(), inputs)
    gradients = torch.autograd.grad(traced.square().sum(), inputs)
    torch.testing.assert_close(gradients, expected_gradients)


def test_under_autocast():
    extractor, features = make_extractor("mdpool")
    extractor.float()
    with torch.autocast("cpu", torch.bfloat16):
        pooled = extractor([feature.detach().bfloat16() for feature in features], ROIS)
    expected = extractor([feature.detach().float() for feature in features], ROIS)
    torch.testing.assert_close(pooled.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("cascade", [False, True])
def test_sampling_ratio_reaches_boxes_and_masks(cascade):
    """With another ratio the pooled features differ, and are those of an extractor with this ratio."""
    small = {"depth": 18, "base_channels": 16, "fpn_channels": 4, "fc_channels": 8, "num_classes": 2, "dcn": None}
    model = FasterRCNN(FasterRCNNConfig(**small, mask=True, cascade=cascade, roi_sampling_ratio=2)).double()
    features = [torch.randn(2, 4, 256 // stride, 320 // stride, dtype=torch.float64) for stride in (4, 8, 16, 32)]
    rois = ROIS.double()
    boxes = model.roi_head.bbox_roi_extractor
    extractors = [*boxes] if cascade else [boxes]
    for extractor in [*extractors, model.roi_head.mask_roi_extractor]:
        expected = RoIExtractor((4, 8, 16, 32), extractor.output_size, sampling_ratio=2)(features, rois)
        adaptive = RoIExtractor((4, 8, 16, 32), extractor.output_size)(features, rois)
        assert torch.equal(extractor(features, rois), expected)
        assert (expected - adaptive).abs().max() > 0.1


class Extract(torch.nn.Module):
    """An extractor whose levels are arguments by themselves, as graphs take them."""

    def __init__(self, extractor):
        super().__init__()
        self.extractor = extractor

    def forward(self, *tensors):
        return self.extractor(tensors[:4], tensors[4])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", ["align", "mdpool"])
def test_sampling_ratio_is_exported(layer):
    pytest.importorskip("onnxscript")
    extractor, features = make_extractor(layer, sampling_ratio=2)
    extract = Extract(extractor.float())
    tensors = (*(feature.detach().float() for feature in features), ROIS)
    with torch.no_grad():
        expected = extract(*tensors)
        program = torch.export.export(extract, tensors)
        torch.testing.assert_close(program.module()(*tensors), expected)
        torch.testing.assert_close(run_graph(extract, tensors)[0][0], expected, rtol=0, atol=2e-6)
        extractor.sampling_ratio = 0
        assert (extract(*tensors) - expected).abs().max() > 0.1
