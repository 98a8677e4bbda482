"""Detection without waits: prepared models, results that are read later, graphs."""

import copy

import pytest
import torch

import detector.inference
from detector import Batch, FasterRCNN, FasterRCNNConfig, Target
from detector.inference import Inference, for_inference, start_copy
from detector.predict import PredictOptions, _prepare, predict_images
from tests.replay import OperatorRecorder

SIZES = {"depth": 18, "num_classes": 3, "base_channels": 16, "fpn_channels": 16, "fc_channels": 32}


def make_model(**options):
    """Return a small detector that finds something everywhere."""
    torch.manual_seed(0)
    model = FasterRCNN(FasterRCNNConfig(**SIZES, rpn_post_nms_top_n=50, max_detections=10, **options)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    torch.nn.init.normal_(model.roi_head.bbox_head.fc_cls.weight, std=0.1)
    return model


def make_batch(seed, height=64, width=96):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (2, 3, height, width), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.tensor([[height, width], [height - 9, width - 5]]))


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert len(other.labels)
        for name in ("boxes", "scores", "labels"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@torch.no_grad()
@pytest.mark.parametrize("norm", ["bn", "syncbn"])
def test_norms_are_folded_and_numbers_change_by_rounding(norm):
    model = make_model(norm=norm)
    if norm == "syncbn":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    names = set(model.state_dict())
    fast = for_inference(model)
    assert set(model.state_dict()) == names
    assert not any("bn" in name for name in fast.state_dict())
    assert fast.neck.fpn_convs[0].conv.weight.is_contiguous(memory_format=torch.channels_last)
    batch = make_batch(1)
    images = model.normalize(batch)
    for feature, expected in zip(fast.features(images), model.features(images), strict=True):
        torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_a_model_with_group_norms_stays_as_it_is():
    model = make_model(norm="gn", norm_eval=False, frozen_stages=-1).train()
    assert for_inference(model) is model
    assert not model.training


def test_detections_from_graphs_equal_those_without():
    model = make_model(dcn=None)
    recorder = OperatorRecorder()
    inference = Inference(model, recorder)
    started = []
    batches = [make_batch(seed, *size) for seed, size in enumerate([(64, 96), (64, 96), (32, 64), (64, 96), (32, 64)])]
    for batch in batches:
        started.append(copy.deepcopy(inference.start(batch)()))
    for batch, detections in zip(batches, started, strict=True):
        assert_equal(detections, model(batch))
    assert (recorder.runs, recorder.recordings, recorder.replays) == (2, 2, 1)


def test_predictions_from_graphs_equal_those_without():
    model = make_model(dcn=None, image_scale=(96, 64))
    images = [torch.randint(256, (40, 60, 3), dtype=torch.uint8).numpy() for _ in range(3)]
    recorder = OperatorRecorder()
    inference = Inference(model, recorder)
    expected = list(predict_images(model, images, score=0.0))
    assert_equal([next(predict_images(inference, [image], score=0.0)) for image in images], expected)
    assert (recorder.runs, recorder.recordings, recorder.replays) == (1, 1, 1)

    # Tensors of torch.inference_mode could not be written to from here.
    inference.start(Batch(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), torch.tensor([[64, 96]])))()
    assert recorder.replays == 2


def test_shapes_beyond_the_limit_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(detector.inference, "MAX_GRAPHS", 1)
    model = make_model(dcn=None)
    inference = Inference(model, OperatorRecorder())
    for width in (32, 32, 64, 96, 64):
        batch = make_batch(1, 32, width)
        assert_equal(inference.start(batch)(), model(batch))
    assert len(inference._batches) == 1


@pytest.mark.parametrize("mask", [False, True])
def test_no_value_is_read_from_the_device(mask, monkeypatch):
    """On the meta device there are no values to read: the lists of detections are the one wait of a batch."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # masks take the way of a GPU
    with torch.device("meta"):
        model = for_inference(FasterRCNN(FasterRCNNConfig(**SIZES, mask=mask)))
        batch = Batch(torch.empty(2, 3, 64, 96, dtype=torch.uint8), torch.empty(2, 2, dtype=torch.int64))
        wait = Inference(model).start(batch)
        with pytest.raises(NotImplementedError, match="no data"):
            wait()

        masks = torch.empty(3, 64, 96, dtype=torch.uint8) if mask else None
        target = Target(torch.empty(3, 4), torch.empty(3, dtype=torch.int64), masks)
        seeds = torch.empty(2, dtype=torch.int64)
        model = FasterRCNN(model.config).train()
        losses = model(Batch(batch.images, batch.sizes, [target, target], seeds))
        sum(losses.values()).backward()


def test_results_are_copied_together(monkeypatch):
    """What happens with a GPU: copies that nobody waits for, into page-locked memory, and one wait for all."""
    calls = []

    class OnGpu:
        device = torch.device("cuda")
        shape = (2, 3)
        dtype = torch.float32

    class PageLocked:
        def copy_(self, source, non_blocking):
            assert isinstance(source, OnGpu)
            calls.append(f"copy, non_blocking={non_blocking}")
            return self

    class Event:
        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("wait")

    def empty(shape, dtype, pin_memory):
        assert (shape, dtype, pin_memory) == ((2, 3), torch.float32, True)
        return PageLocked()

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    wait = start_copy([OnGpu(), OnGpu()])
    assert calls == ["copy, non_blocking=True"] * 2 + ["record"]
    assert all(isinstance(copied, PageLocked) for copied in wait())
    assert calls[3:] == ["wait"]


def test_a_prediction_waits_once_for_each_batch(monkeypatch):
    waits = []

    def count(tensors):
        wait = start_copy(tensors)
        return lambda: waits.append(len(waits)) or wait()

    monkeypatch.setattr(detector.inference, "start_copy", count)
    images = [torch.randint(256, (40, 60, 3), dtype=torch.uint8).numpy() for _ in range(5)]
    assert len(list(predict_images(make_model(dcn=None, image_scale=(96, 64)), images, batch_size=2))) == 5
    assert len(waits) == 3


def options(**values):
    return PredictOptions(("a.jpg",), weights="w.pt", out="out", **values)


def test_precision_of_predictions(monkeypatch):
    model = make_model(dcn=None)
    assert _prepare(model, options())[1] == "float32"
    assert _prepare(model, options(precision="bf16"))[1] == "bf16"
    with pytest.raises(ValueError, match="--precision tf32: expected a GPU, got a CPU"):
        _prepare(model, options(precision="tf32"))
    with pytest.raises(ValueError, match="--graph: expected a GPU, got a CPU"):
        _prepare(model, options(graph=True))

    monkeypatch.setattr("detector.predict._device_of", lambda model: torch.device("cuda"))
    for capability, expected in [((9, 0), "tf32"), ((7, 0), "float32")]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, value=capability: value)
        assert _prepare(model, options())[1] == expected
