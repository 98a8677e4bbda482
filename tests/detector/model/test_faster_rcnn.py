"""The whole detector against MMDetection's numbers, and its behavior at the edges."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from detector import Batch, FasterRCNN, FasterRCNNConfig, Target
from detector.results import split_detections
from tests.detector.golden_model import FULL_GRADS, assert_summary, golden_detector, make_batch

SMALL = FasterRCNNConfig(
    depth=18,
    num_classes=3,
    norm="gn",
    frozen_stages=-1,
    base_channels=16,
    fpn_channels=32,
    fc_channels=32,
    rpn_batch_size=32,
    rpn_pre_nms_top_n=(100, 50),
    rpn_post_nms_top_n=50,
    roi_batch_size=32,
)


def golden_batch(arrays, dtype):
    images = []
    boxes = []
    labels = []
    for i in range(2):
        is_counted = arrays[f"img{i}.gt_ignore"] == 0
        images.append(arrays[f"img{i}.image_bgr"])
        boxes.append(arrays[f"img{i}.gt_bboxes"][is_counted])
        labels.append(arrays[f"img{i}.gt_labels"][is_counted])
    return make_batch(images, boxes, labels, dtype)


class Run:
    """One training step of the golden model, and one evaluation if asked for, with the tensors in between."""

    def __init__(self, golden, deform_groups, dtype, device="cpu"):
        self.arrays, self.params = golden("model")
        config = FasterRCNNConfig(deform_groups=deform_groups, sampler="deterministic")
        self.model = golden_detector(config, self.params["spec"]["salt"])
        self.model.to(device, dtype).train()
        self.batch = golden_batch(self.arrays, dtype).to(device)
        self.seen = {}
        self._watch(self.model.backbone, "backbone")
        self._watch(self.model.neck, "neck")
        self._watch(self.model.rpn_head, "rpn")
        self._watch(self.model.roi_head, "roi")
        self._watch(self.model.roi_head.bbox_head, "head")
        for name, module in self.model.backbone.named_modules():
            if name.endswith("conv_offset"):
                self._watch(module, name)
        self._watch_method(self.model.rpn_head, "propose")
        self._watch_method(self.model.rpn_head, "sample")
        self._watch_method(self.model.roi_head, "sample")

        self.losses = self.model(self.batch)
        self.train_seen = dict(self.seen)
        sum(self.losses.values()).backward()

    def evaluate(self):
        """Detect; and detect once more in the same predictions with the golden threshold of the scores."""
        head = self.model.roi_head
        self._watch_method(head, "detect")
        self.model.eval()
        self.detections = self.model(self.batch)
        self.test_seen = dict(self.seen)

        head.score_threshold = self.params["spec"]["det_thr"]
        self.confident = split_detections(head.detect(*self.test_seen["RoIHead.detect.args"]))

    def _watch(self, module, name):
        def hook(module, args, output):
            self.seen[name] = output
            self.seen[f"{name}.args"] = args

        module.register_forward_hook(hook)

    def _watch_method(self, part, name):
        method = getattr(part, name)

        def call(*args):
            result = method(*args)
            self.seen[f"{type(part).__name__}.{name}"] = result
            self.seen[f"{type(part).__name__}.{name}.args"] = args
            return result

        setattr(part, name, call)


@pytest.fixture(scope="module")
def float64(golden, golden_features):
    run = Run(golden, 1, torch.float64)
    golden_features.keep("dg1", run.seen["backbone"], run.seen["neck"])
    run.evaluate()
    return run


@pytest.fixture(scope="module")
def float32(golden):
    return Run(golden, 1, torch.float32)


def test_state_dict_is_mmdetections(golden):
    for key, groups in (("dg1", 1), ("dg4", 4)):
        expected = golden("model")[1][key]
        with torch.device("meta"):
            model = FasterRCNN(FasterRCNNConfig(deform_groups=groups))
        state = {name: list(value.shape) for name, value in model.state_dict().items()}
        assert state == {entry["name"]: entry["shape"] for entry in expected["state_dict"]}
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(expected["trainable"])
    with torch.device("meta"):
        model = FasterRCNN()
    assert sum(p.numel() for p in model.parameters()) == 42_624_319


def test_float64_features(float64):
    run = float64
    assert_summary(run.arrays, "batch.input", run.train_seen["backbone.args"][0], 2048, 1e-10)
    for i, feature in enumerate(run.train_seen["backbone"]):
        assert_summary(run.arrays, f"train.C{i + 2}", feature, 1024, 1e-10)
    for i, feature in enumerate(run.train_seen["neck"]):
        assert_summary(run.arrays, f"train.P{i + 2}", feature, 1024, 1e-10)
    names = [name for name in run.train_seen if name.endswith("conv_offset")]
    assert len(names) == 13
    for name in names:
        golden_name = f"train.conv_offset_out.{name.removesuffix('.conv_offset')}"
        assert_summary(run.arrays, golden_name, run.train_seen[name], 128, 1e-10)


def test_float64_first_stage(float64):
    run = float64
    logits, deltas = run.train_seen["rpn"]
    for level, feature in enumerate(run.train_seen["neck"]):
        height, width = feature.shape[2:]
        logit = logits[level].view(2, height, width, 3).permute(0, 3, 1, 2)
        delta = deltas[level].view(2, height, width, 12).permute(0, 3, 1, 2)
        assert_summary(run.arrays, f"train.rpn_cls_P{level + 2}", logit, 512, 1e-10)
        assert_summary(run.arrays, f"train.rpn_reg_P{level + 2}", delta, 512, 1e-10)
    for mode, seen in (("train", run.train_seen), ("test", run.test_seen)):
        boxes, scores, valid = seen["RPN.propose"]
        for i in range(2):
            expected = torch.from_numpy(run.arrays[f"{mode}.img{i}.proposals"])
            torch.testing.assert_close(boxes[i][valid[i]], expected, rtol=1e-10, atol=1e-8)
            expected = torch.from_numpy(run.arrays[f"{mode}.img{i}.proposal_scores"])
            torch.testing.assert_close(scores[i][valid[i]], expected, rtol=1e-10, atol=1e-10)


def test_float64_samples(float64):
    run = float64
    shapes = [tuple(feature.shape[2:]) for feature in run.train_seen["neck"]]
    valid_anchors = run.model.rpn_head.anchor_generator.valid_flags(shapes, (run.batch.sizes + 31) // 32 * 32)
    assert_samples(run, "rpn", run.train_seen["RPN.sample"], valid_anchors)

    _, samples = run.train_seen["RoIHead.sample"]
    valid_targets = torch.tensor([[i < len(t.labels) for i in range(5)] for t in run.batch.targets])
    _, _, valid_proposals = run.train_seen["RPN.propose"]
    assert_samples(run, "rcnn", samples, torch.cat([valid_targets, valid_proposals], 1))


def assert_samples(run, stage, samples, valid):
    """Compare samples with the golden ones, whose indices count only boxes that are no padding."""
    among_valid = valid.cumsum(1) - 1
    for i in range(2):
        name = f"train.img{i}.{stage}"
        positive = samples.positive[i]
        negative = samples.valid[i] & ~positive
        assert among_valid[i][samples.index[i][positive]].tolist() == run.arrays[f"{name}_pos_inds"].tolist()
        assert among_valid[i][samples.index[i][negative]].tolist() == run.arrays[f"{name}_neg_inds"].tolist()
        assert samples.target[i][positive].tolist() == run.arrays[f"{name}_pos_gt"].tolist()


def test_float64_second_stage(float64):
    run = float64
    logits, deltas = run.train_seen["head"]
    (pooled,) = run.train_seen["head.args"]
    assert_summary(run.arrays, "train.roi_feats", pooled, 2048, 1e-10)
    assert_summary(run.arrays, "train.rcnn_cls", logits, 2048, 1e-10)
    assert_summary(run.arrays, "train.rcnn_reg", deltas.flatten(1), 2048, 1e-10)
    boxes, _ = run.train_seen["RoIHead.sample"]
    expected = torch.from_numpy(run.arrays["train.rois"])[:, 1:]
    torch.testing.assert_close(boxes.flatten(0, 1), expected, rtol=1e-10, atol=1e-8)


def golden_losses(losses):
    return {name: float(np.sum(losses[name])) for name in ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox")}


def test_float64_losses_and_gradients(float64):
    run = float64
    for name, expected in golden_losses(run.params["dg1"]["losses"]).items():
        assert abs(run.losses[name].item() - expected) < 1e-10, name
    checked = 0
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            num_samples = 1024 if name in FULL_GRADS else 48
            assert_summary(run.arrays, f"train.grad.{name}", parameter.grad, num_samples, 1e-10, 1e-6)
            checked += 1
        else:
            assert parameter.grad is None
    assert checked == 182


def assert_detections(run, detections, prefix):
    for i, detected in enumerate(detections):
        labels = run.arrays[f"{prefix}.img{i}.det_labels"]
        assert detected.labels.tolist() == labels.tolist()
        scale = torch.from_numpy(run.arrays[f"img{i}.scale_factor"]).double().repeat(2)
        expected = torch.from_numpy(run.arrays[f"{prefix}.img{i}.det_bboxes"])
        torch.testing.assert_close(detected.boxes / scale, expected, rtol=1e-10, atol=1e-7)
        expected = torch.from_numpy(run.arrays[f"{prefix}.img{i}.det_scores"])
        torch.testing.assert_close(detected.scores, expected, rtol=1e-10, atol=1e-10)


def test_float64_detections(float64):
    assert_detections(float64, float64.detections, "test")
    assert_detections(float64, float64.confident, "test_thr")


def assert_float32(run):
    """The tolerances of the golden README for float32."""
    for i, feature in enumerate(run.train_seen["backbone"]):
        assert_summary(run.arrays, f"train.C{i + 2}", feature, 1024, 1e-5)
    for i, feature in enumerate(run.train_seen["neck"]):
        assert_summary(run.arrays, f"train.P{i + 2}", feature, 1024, 1e-5)
    for name, expected in golden_losses(run.params["dg1"]["losses"]).items():
        assert abs(run.losses[name].item() - expected) < 1e-5, name
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            num_samples = 1024 if name in FULL_GRADS else 48
            assert_summary(run.arrays, f"train.grad.{name}", parameter.grad, num_samples, 1e-2, 1e-6)


def test_float32(float32):
    assert_float32(float32)


@pytest.mark.gpu
def test_float32_on_gpu(golden):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    assert_float32(Run(golden, 1, torch.float32, "cuda"))


def test_float64_four_deform_groups(golden, golden_features):
    arrays, params = golden("model")
    config = FasterRCNNConfig(deform_groups=4, sampler="deterministic")
    model = golden_detector(config, params["spec"]["salt"])
    model.double().train()
    features = {}
    model.backbone.register_forward_hook(lambda module, args, output: features.update(backbone=output))
    model.neck.register_forward_hook(lambda module, args, output: features.update(neck=output))
    losses = model(golden_batch(arrays, torch.float64))
    golden_features.keep("dg4", features["backbone"], features["neck"])
    for i, feature in enumerate(features["backbone"]):
        assert_summary(arrays, f"dg4.C{i + 2}", feature, 512, 1e-10)
    for i, feature in enumerate(features["neck"]):
        assert_summary(arrays, f"dg4.P{i + 2}", feature, 512, 1e-10)
    for name, expected in golden_losses(params["dg4"]["losses"]).items():
        assert abs(losses[name].item() - expected) < 1e-10, name
    sum(losses.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, norm in params["dg4"]["grad_norms"].items():
        assert abs(grads[name].norm().item() - norm) <= 1e-10 * (norm + 1e-6), name
    names = [
        key.removeprefix("dg4.grad.").removesuffix(".samples")
        for key in arrays
        if key.startswith("dg4.grad.") and key.endswith(".samples")
    ]
    assert names
    for name in names:
        num_samples = 256 if name in FULL_GRADS else 16
        assert_summary(arrays, f"dg4.grad.{name}", grads[name], num_samples, 1e-10, 1e-6)


def small_batch(count=2, seed=0, with_targets=True):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 96, 128), dtype=torch.uint8, generator=draw)
    boxes = torch.tensor([[8.0, 8.0, 60.0, 50.0], [40.0, 30.0, 100.0, 90.0]])
    target = Target(boxes, torch.tensor([0, 2]))
    return Batch(
        images=images,
        sizes=torch.tensor([[90, 128]] * count),
        targets=[target] * count if with_targets else None,
        seeds=torch.arange(count) * 1000,
    )


def test_batch_is_its_images_one_by_one():
    """Equal counts of samples: the losses of a batch are the means over its images."""
    torch.manual_seed(0)
    model = FasterRCNN(SMALL)
    batch = small_batch(2)
    together = model(batch)
    alone = []
    for i in range(2):
        image = slice(i, i + 1)
        single = Batch(batch.images[image], batch.sizes[image], batch.targets[image], batch.seeds[image])
        alone.append(model(single))
    for name, loss in together.items():
        torch.testing.assert_close(loss, (alone[0][name] + alone[1][name]) / 2, rtol=1e-5, atol=1e-6)


def test_images_without_targets_train():
    torch.manual_seed(0)
    model = FasterRCNN(SMALL)
    batch = small_batch(2)
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    for targets in ([nothing, batch.targets[1]], [nothing, nothing]):
        model.zero_grad()
        losses = model(replace(batch, targets=targets))
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert losses["loss_bbox"] == losses["loss_rpn_bbox"] == 0


def test_training_step_has_no_data_dependent_shape():
    """The step traces as one graph: no tensor is read back, no shape follows from values."""
    torch.manual_seed(0)
    model = FasterRCNN(replace(SMALL, dcn_stages=(False, False, False, True)))  # one stage is traced as the others
    batch = small_batch(2)
    expected = model(batch)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(images, sizes, boxes, labels, seeds):
        targets = [Target(box, label) for box, label in zip(boxes, labels, strict=True)]
        return model.losses(Batch(images, sizes, targets, seeds))

    boxes = [target.boxes for target in batch.targets]
    labels = [target.labels for target in batch.targets]
    losses = step(batch.images, batch.sizes, boxes, labels, batch.seeds)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_training_step_never_waits_for_the_gpu():
    model = FasterRCNN(SMALL).cuda()
    batch = small_batch(2).to("cuda")
    sum(model(batch).values()).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(model(batch).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_detections_are_sorted_and_inside():
    torch.manual_seed(0)
    model = FasterRCNN(replace(SMALL, score_threshold=0.0)).eval()
    for detected in model(small_batch(2, with_targets=False)):
        assert len(detected.boxes) == len(detected.scores) == len(detected.labels) > 0
        assert (detected.scores[:-1] >= detected.scores[1:]).all()
        assert (detected.boxes[:, 2:] <= torch.tensor([128.0, 90.0])).all()
        assert detected.boxes.min() >= 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.zeros(1, 3, 64, 64)}, ["images", "float32"]),
        ({"images": torch.zeros(2, 3, 60, 64, dtype=torch.uint8)}, ["images", "divide by 32", "60"]),
        ({"sizes": torch.zeros(1, 2, dtype=torch.int64)}, ["sizes", "(1, 2)", "(2, 2)"]),
        ({"targets": None}, ["target", "2 images"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(change, words):
    model = FasterRCNN(SMALL)
    with pytest.raises(ValueError) as error:  # noqa: PT011 the words are checked below
        model(replace(small_batch(2), **change))
    for word in words:
        assert word in str(error.value)


def test_config_errors():
    with pytest.raises(ValueError, match="sampler.*'deterministic'.*'first'"):
        FasterRCNN(replace(SMALL, sampler="first"))
    with pytest.raises(ValueError, match="num_classes.*0"):
        FasterRCNN(replace(SMALL, num_classes=0))
