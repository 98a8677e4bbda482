"""Mask R-CNN against MMDetection's numbers: samples, targets, losses, gradients, detections, pasted masks."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from detector import Batch, FasterRCNNConfig, Target
from detector.model.mask_head import mask_targets
from detector.model.sampler import SamplingResult
from detector.ops.paste_masks import paste_masks
from detector.results import full_masks, undo_resize
from detector.structures import Detections
from tests.detector.golden_model import assert_summary, golden_detector, make_batch

LOSSES = ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask")


def golden_batch(arrays, dtype):
    """The two images with the objects that are not crowds."""
    counted = [arrays[f"img{i}.gt_ignore"] == 0 for i in range(2)]
    batch = make_batch(
        [arrays[f"img{i}.image_bgr"] for i in range(2)],
        [arrays[f"img{i}.gt_bboxes"][counted[i]] for i in range(2)],
        [arrays[f"img{i}.gt_labels"][counted[i]] for i in range(2)],
        dtype,
    )
    targets = []
    for i, target in enumerate(batch.targets):
        masks = torch.from_numpy(arrays[f"img{i}.gt_masks"][counted[i]])
        targets.append(Target(target.boxes, target.labels, masks))
    return Batch(batch.images, batch.sizes, targets)


class Run:
    """A training step and an evaluation of the golden model, with the tensors in between."""

    def __init__(self, golden, dtype, device="cpu"):
        self.arrays, self.params = golden("mask")
        config = FasterRCNNConfig(mask=True, sampler="deterministic")
        self.model = golden_detector(config, self.params["spec"]["salt"])
        self.model.to(device, dtype).train()
        self.batch = golden_batch(self.arrays, dtype).to(device)
        self.seen = {}
        for name, module in (
            ("neck", self.model.neck),
            ("pooled", self.model.roi_head.mask_roi_extractor),
            ("logits", self.model.roi_head.mask_head),
        ):
            module.register_forward_hook(lambda module, args, output, name=name: self.seen.update({name: output}))
        self.copies = []
        self.model.roi_head.mask_roi_extractor.register_forward_pre_hook(self._copy_features)
        self._watch(self.model.rpn_head, "propose")
        self._watch(self.model.roi_head, "sample")

        self.losses = self.model(self.batch)
        self.trained = dict(self.seen)
        sum(self.losses.values()).backward()
        head = self.model.roi_head.mask_head.named_parameters(prefix="roi_head.mask_head")
        self.mask_gradients = {name: parameter.grad for name, parameter in head}
        for level, copy in enumerate(self.copies[:4], start=2):
            self.mask_gradients[f"P{level}"] = copy.grad

        self.model.eval()
        self.detections = self.model(self.batch)

    def _copy_features(self, module, arguments):
        """Give the mask head copies of the features: their gradients come from the loss of the masks alone."""
        features, rois = arguments
        self.copies = [feature.view_as(feature) for feature in features]
        for copy in self.copies:
            if copy.requires_grad:
                copy.retain_grad()
        return self.copies, rois

    def _watch(self, part, name):
        method = getattr(part, name)

        def call(*args):
            self.seen[name] = method(*args)
            return self.seen[name]

        setattr(part, name, call)


@pytest.fixture(scope="module")
def float64(golden):
    return Run(golden, torch.float64)


@pytest.fixture(scope="module")
def float32(golden):
    return Run(golden, torch.float32)


def test_names_are_mmdetections(float64):
    state = [(name, list(value.shape)) for name, value in float64.model.state_dict().items()]
    expected = [(entry["name"], entry["shape"]) for entry in float64.params["state_dict"]]
    assert sorted(state) == sorted(expected)
    trained = {name for name, parameter in float64.model.named_parameters() if parameter.requires_grad}
    assert trained == set(float64.params["trainable"])


def test_proposals_and_samples(float64):
    """A ground truth also takes the regions that overlap it most, which changes two of each image."""
    arrays = float64.arrays
    boxes, scores, valid = float64.trained["propose"]
    _, samples = float64.trained["sample"]
    counts = [len(target.labels) for target in float64.batch.targets]
    is_target = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    among_valid = torch.cat([is_target, valid], 1).cumsum(1) - 1
    for i in range(2):
        name = f"train.img{i}"
        expected = torch.from_numpy(arrays[f"{name}.proposals"])
        torch.testing.assert_close(boxes[i][valid[i]], expected, rtol=1e-10, atol=1e-8)
        expected = torch.from_numpy(arrays[f"{name}.proposal_scores"])
        torch.testing.assert_close(scores[i][valid[i]], expected, rtol=1e-10, atol=1e-10)

        positive = samples.positive[i]
        negative = samples.valid[i] & ~positive
        assert among_valid[i][samples.index[i][positive]].tolist() == arrays[f"{name}.rcnn_pos_inds"].tolist()
        assert among_valid[i][samples.index[i][negative]].tolist() == arrays[f"{name}.rcnn_neg_inds"].tolist()
        assert samples.target[i][positive].tolist() == arrays[f"{name}.rcnn_pos_gt"].tolist()


def test_mask_targets_and_predictions(float64):
    arrays = float64.arrays
    regions, samples = float64.trained["sample"]
    positive = samples.positive
    expected = torch.from_numpy(arrays["train.mask_rois"])[:, 1:]
    torch.testing.assert_close(regions[positive], expected, rtol=1e-10, atol=1e-8)
    labels = torch.cat([t.labels[samples.target[i][positive[i]]] for i, t in enumerate(float64.batch.targets)])
    assert labels.tolist() == arrays["train.mask_labels"].tolist()

    size = tuple(float64.batch.images.shape[2:])
    bitmaps = torch.zeros(2, max(len(t.labels) for t in float64.batch.targets), *size, dtype=torch.float64)
    for bitmap, target in zip(bitmaps, float64.batch.targets, strict=True):
        count, height, width = target.masks.shape
        bitmap[:count, :height, :width] = target.masks
    targets = mask_targets(bitmaps, regions, samples)[positive]
    assert np.array_equal(targets.numpy(), arrays["train.mask_targets"] == 1)

    assert_summary(arrays, "train.mask_feats", float64.trained["pooled"], 2048, 1e-10)
    assert_summary(arrays, "train.mask_logits", float64.trained["logits"], 4096, 1e-10)
    for level, feature in enumerate(float64.trained["neck"][:4], start=2):
        assert_summary(arrays, f"train.P{level}", feature, 256, 1e-10)


def assert_losses_and_gradients(run, loss_limit, gradient_limit):
    for name in LOSSES:
        expected = float(np.sum(run.params["losses"][name]))
        assert abs(run.losses[name].item() - expected) < loss_limit, name
    for name, gradient in run.mask_gradients.items():
        num_samples = 1024 if name in ("P2", "P3", "P4", "P5") else 512
        assert_summary(run.arrays, f"train.grad_mask.{name}", gradient, num_samples, gradient_limit, 1e-6)
    gradients = {name: parameter.grad for name, parameter in run.model.named_parameters()}
    keys = [key for key in run.arrays if key.startswith("train.grad.") and key.endswith(".samples")]
    assert keys
    for key in keys:
        name = key.removeprefix("train.grad.").removesuffix(".samples")
        assert_summary(run.arrays, f"train.grad.{name}", gradients[name], 256, gradient_limit, 1e-6)


def test_losses_and_gradients(float64):
    assert_losses_and_gradients(float64, 1e-10, 1e-10)


def test_detections(float64):
    arrays = float64.arrays
    for i, detected in enumerate(float64.detections):
        name = f"test.img{i}"
        assert detected.labels.tolist() == arrays[f"{name}.det_labels"].tolist()
        scale = torch.from_numpy(arrays[f"img{i}.scale_factor"]).double().repeat(2)
        expected = torch.from_numpy(arrays[f"{name}.det_bboxes"])
        torch.testing.assert_close(detected.boxes / scale, expected, rtol=1e-10, atol=1e-7)
        expected = torch.from_numpy(arrays[f"{name}.det_scores"])
        torch.testing.assert_close(detected.scores, expected, rtol=1e-10, atol=1e-10)
        assert_summary(arrays, f"{name}.mask_probs", detected.masks, 4096, 1e-10)
        expected = torch.from_numpy(arrays[f"{name}.mask_probs_first"])
        torch.testing.assert_close(detected.masks[:4], expected, rtol=1e-10, atol=1e-10)


def pasted_masks(run, index):
    """Return the masks of an image as results have them, and MMDetection's."""
    arrays = run.arrays
    golden = run.params["detections"][f"test.img{index}"]
    detections = undo_resize(run.detections[index], tuple(arrays[f"img{index}.scale_factor"].tolist()))
    masks = np.stack(list(full_masks(detections, *golden["ori_shape"])))
    expected = np.stack([coco_mask.decode(mask) for mask in golden["masks"]]) == 1
    return masks, expected


@pytest.mark.parametrize("index", [0, 1])
def test_pasted_masks(float64, index):
    masks, expected = pasted_masks(float64, index)
    assert np.array_equal(masks, expected)


@pytest.mark.slow
def test_float32(float32):
    """The tolerances of the golden README for float32."""
    assert_losses_and_gradients(float32, 1e-5, 1e-2)
    assert_summary(float32.arrays, "train.mask_logits", float32.trained["logits"], 4096, 1e-5)
    for index in range(2):
        labels = float32.arrays[f"test.img{index}.det_labels"].tolist()
        assert float32.detections[index].labels.tolist() == labels
        masks, expected = pasted_masks(float32, index)
        assert (masks != expected).sum() <= 5
        name = f"test.img{index}.mask_probs"
        assert_summary(float32.arrays, name, float32.detections[index].masks, 4096, 5e-5)


@pytest.mark.gpu
def test_float32_on_gpu(golden):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    assert_losses_and_gradients(Run(golden, torch.float32, "cuda"), 1e-5, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_targets_of_all_kinds_of_boxes(golden, dtype):
    arrays, _ = golden("mask")
    bitmaps = torch.from_numpy(arrays["tgt.bitmaps"]).to(dtype)[None]
    boxes = torch.from_numpy(arrays["tgt.boxes"]).to(dtype)[None]
    index = torch.from_numpy(arrays["tgt.inds"]).long()[None]
    positive = torch.ones_like(index, dtype=torch.bool)
    targets = mask_targets(bitmaps, boxes, SamplingResult(index, index, positive, positive))[0]
    name = "tgt.target_f64" if dtype == torch.float64 else "tgt.target_f32"
    assert np.array_equal(targets.numpy(), arrays[name] == 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_paste_of_all_kinds_of_boxes(golden, dtype):
    arrays, params = golden("mask")
    masks = torch.from_numpy(arrays["paste.masks"]).to(dtype)
    boxes = torch.from_numpy(arrays["paste.boxes"]).to(dtype)
    height, width = params["paste"]["size"]
    expected = arrays["paste.inside"] == 1
    assert np.array_equal(paste_masks(masks, boxes, height, width).numpy(), expected)
    detections = Detections(boxes, torch.ones(len(boxes)), torch.zeros(len(boxes)).long(), masks)
    assert np.array_equal(np.stack(list(full_masks(detections, height, width))), expected)
