"""Resize, flip and masks: MMDetection's pixels and boxes, and choices that follow from a key."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from detector import FasterRCNN, FasterRCNNConfig
from detector.image import read_image
from detector.ops.rle import encode_mask
from tests.conftest import GOLDEN
from train.config import PRESETS
from train.data.collate import collate
from train.data.segmentation import read_segmentations
from train.data.transforms import Sample, Transform, horizontal_flip, resize, resize_masks

sys.path.insert(0, str(GOLDEN))
from fill import summary


def prepare(spec):
    """Return image, boxes, ignored boxes and scale factor of a golden entry."""
    image = read_image(GOLDEN / spec["file"])
    boxes = np.array([box["bbox"] for box in spec["instances"]], np.float32)
    ignored = np.array([bool(box["ignore_flag"]) for box in spec["instances"]])
    image, boxes, factor = resize(image, boxes, tuple(spec["scale"]))
    if spec["flip"]:
        image, boxes = horizontal_flip(image, boxes)
    return image, boxes[~ignored], boxes[ignored], factor


@pytest.mark.parametrize("name", [f"{group}.{i}" for group in ("full", "small") for i in range(4)])
def test_resize_and_flip_equal_mmdetection(golden, name):
    arrays, parameters = golden("preprocess")
    spec = parameters[name]
    image, boxes, ignored, factor = prepare(spec)
    assert list(image.shape[:2]) == spec["img_shape"]
    assert factor == pytest.approx(spec["scale_factor"], abs=0)
    actual = summary(image[:, :, ::-1].transpose(2, 0, 1), 1024)
    for key in ("shape", "stats", "samples"):
        assert (actual[key] == arrays[f"{name}.resized_chw_uint8.{key}"]).all()
    np.testing.assert_allclose(boxes, arrays[f"{name}.gt_bboxes"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(ignored, arrays[f"{name}.ignored_bboxes"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["full.batch0", "full.batch1", "small.batch0"])
def test_batch_equals_mmdetection(golden, name):
    arrays, parameters = golden("preprocess")
    spec = parameters[name]
    group, _ = name.split(".")
    samples = []
    for index in spec["images"]:
        image, boxes, _, _ = prepare(parameters[f"{group}.{index}"])
        labels = np.zeros(len(boxes), np.int64)
        samples.append(Sample(image, boxes, labels, index, (1.0, 1.0), seed=0, original_size=(8, 8)))
    loaded = collate(samples)
    assert list(loaded.batch.images.shape) == spec["shape"]
    model = FasterRCNN(FasterRCNNConfig(depth=18, fpn_channels=8, fc_channels=8, num_classes=1))
    actual = summary(model.normalize(loaded.batch).numpy(), 4096)
    for key in ("stats", "samples"):
        np.testing.assert_allclose(actual[key], arrays[f"{name}.inputs.{key}"], rtol=1e-6, atol=1e-6)


def read_golden_masks(spec):
    """Return segmentations, (n,) bool which can be drawn, and (n,) bool which are ignored, of a golden entry."""
    instances = spec["instances"]
    count = len(instances)
    entries = [{"segmentation": instance["mask"]} for instance in instances]
    sizes = np.tile(spec["ori_shape"], (count, 1))
    segmentations, drawable, _ = read_segmentations(
        entries, np.arange(count), np.zeros(count, int), sizes, training=True
    )
    crowd = np.array([bool(instance["ignore_flag"]) for instance in instances])
    return segmentations, drawable, crowd | ~drawable


@pytest.mark.parametrize("index", range(4))
def test_masks_are_loaded_as_by_mmdetection(golden, index):
    spec = golden("mask_preprocess")[1][f"full.{index}"]
    segmentations, drawable, ignored = read_golden_masks(spec)
    assert ignored.tolist() == spec["loaded_ignore"]
    empty = np.zeros(spec["ori_shape"], np.uint8)
    masks = [segmentations.draw(n, *spec["ori_shape"]) if drawable[n] else empty for n in range(len(segmentations))]
    assert [mask.sum() for mask in masks] == spec["loaded_pixels"]
    assert [encode_mask(mask.astype(bool)) for mask in masks] == spec["loaded"]


def golden_sample(parameters, name):
    """Return the sample of a golden entry, and its ignored masks (k, H, W) uint8, the empty ones as well."""
    index = name.split(".")[1]
    spec = parameters[name]
    full = parameters[f"full.{index}"]
    segmentations, drawable, ignored = read_golden_masks(full)
    boxes = np.array([instance["bbox"] for instance in full["instances"]], np.float32)
    labels = np.array([instance["bbox_label"] for instance in full["instances"]])

    def draw(numbers):
        empty = np.zeros(spec["ori_shape"], np.uint8)
        return (segmentations.draw(n, *spec["ori_shape"]) if drawable[n] else empty for n in numbers)

    image = read_image(GOLDEN / spec["file"])
    kept = np.flatnonzero(~ignored)
    transform = Transform(tuple(spec["scale"]), flip=float(spec["flip"]))
    sample = transform(image, boxes[kept], labels[kept], int(index), 0, 0, draw(kept))
    ignored_masks = resize_masks(draw(np.flatnonzero(ignored)), int(ignored.sum()), tuple(spec["img_shape"]))
    return sample, ignored_masks[:, :, ::-1] if spec["flip"] else ignored_masks


@pytest.mark.parametrize("name", [f"{group}.{i}" for group in ("full", "small") for i in range(4)])
def test_masks_are_resized_and_flipped_as_by_mmdetection(golden, name):
    parameters = golden("mask_preprocess")[1]
    spec = parameters[name]
    sample, ignored_masks = golden_sample(parameters, name)
    assert list(sample.image.shape[:2]) == spec["img_shape"]
    assert list(sample.original_size) == spec["ori_shape"]
    assert list(sample.scale_factor) == spec["scale_factor"]
    assert sample.labels.tolist() == spec["gt_labels"]
    np.testing.assert_array_equal(sample.boxes, np.array(spec["gt_bboxes"], np.float32).reshape(-1, 4))
    assert [encode_mask(mask.astype(bool)) for mask in sample.masks] == spec["gt_masks"]
    assert [encode_mask(mask.astype(bool)) for mask in ignored_masks] == spec["ignored_masks"]


@pytest.mark.parametrize("name", ["full.batch0", "full.batch1", "small.batch0"])
def test_masks_of_a_batch_stand_in_its_images(golden, name):
    """MMDetection pads the masks with zeros to the size of the batch; here they keep the size of their image."""
    parameters = golden("mask_preprocess")[1]
    spec = parameters[name]
    group, _ = name.split(".")
    batch = collate([golden_sample(parameters, f"{group}.{index}")[0] for index in spec["images"]]).batch
    for index, target, padded in zip(spec["images"], batch.targets, spec["padded"], strict=True):
        assert [len(target.masks), *batch.images.shape[2:]] == padded
        assert list(target.masks.shape[1:]) == parameters[f"{group}.{index}"]["img_shape"]


def sample_of(transform, epoch, index):
    image = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
    return transform(image, np.array([[5, 5, 20, 30]], np.float32), np.array([1]), 9, epoch, index)


def test_choices_follow_seed_epoch_and_index():
    transform = Transform((60, 40), flip=0.5, seed=3)
    samples = {(epoch, index): sample_of(transform, epoch, index) for epoch in range(4) for index in range(40)}
    assert len({sample.seed for sample in samples.values()}) == 160
    flipped = [sample.boxes[0, 0] == 40 for sample in samples.values()]
    assert 50 < sum(flipped) < 110
    again = sample_of(transform, 2, 7)
    assert again.seed == samples[2, 7].seed
    assert (again.image == samples[2, 7].image).all()
    assert sample_of(Transform((60, 40), seed=4), 2, 7).seed != again.seed


def test_flip_never_and_always():
    plain = sample_of(Transform((60, 40)), 0, 0)
    assert (plain.boxes == [[5, 5, 20, 30]]).all()
    mirrored = sample_of(Transform((60, 40), flip=1.0), 0, 0)
    assert (mirrored.boxes == [[40, 5, 55, 30]]).all()
    assert (mirrored.image == plain.image[:, ::-1]).all()


def test_multi_scale_draws_the_short_side():
    transform = Transform((120, 40), short_sides=(32, 64))
    heights = {sample_of(transform, 0, index).image.shape[0] for index in range(20)}
    assert heights == {32, 64}


def test_first_epochs_see_half_the_size():
    transform = Transform((60, 41), half_size_epochs=2)
    sizes = [sample_of(transform, epoch, 0).image.shape[:2] for epoch in range(4)]
    assert sizes == [(20, 30), (20, 30), (40, 60), (40, 60)]
    half = sample_of(transform, 1, 0)
    assert half.scale_factor == (0.5, 0.5)
    assert (half.boxes == [[2.5, 2.5, 10, 15]]).all()
    assert half.seed == sample_of(Transform((60, 41)), 1, 0).seed
    multi_scale = Transform((120, 40), short_sides=(32, 64), half_size_epochs=1)
    assert {sample_of(multi_scale, 0, index).image.shape[0] for index in range(20)} == {16, 32}


def test_boxes_are_clipped_not_dropped():
    image = np.zeros((10, 20, 3), np.uint8)
    boxes = np.array([[-5, -5, 10, 30], [25, 0, 30, 5]], np.float32)
    _, clipped, _ = resize(image, boxes, (20, 10))
    assert (clipped == [[0, 0, 10, 10], [20, 0, 20, 5]]).all()
    assert torch.from_numpy(clipped).dtype == torch.float32


LOST_BOXES = {
    "begins at the border after rounding": [159.999999, 20, 189.999999, 60],
    "no width": [30, 20, 30, 60],
    "no height": [30, 20, 50, 20],
    "width rounded away": [1e9, 20, 1e9 + 1, 60],
    "right of the image": [160, 20, 190, 60],
    "above the image": [30, -40, 50, 0],
    "left of the image": [-30, 20, -1, 60],
    "denormal width": [0, 20, 1e-44, 60],
    "nothing left after mirroring": [1e-9, 20, 2e-9, 60],
    "turned around": [50, 20, 30, 60],
    "not a number": [np.nan, 20, 30, 60],
}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("scale", [(160, 120), (320, 240), (100, 75)])
@pytest.mark.parametrize("name", LOST_BOXES)
def test_boxes_of_which_nothing_is_left_are_dropped(name, scale, flip):
    image = np.zeros((120, 160, 3), np.uint8)
    boxes = np.array([[10, 10, 40, 40], LOST_BOXES[name], [0, 0, 160, 120]], np.float32)
    masks = [np.full((120, 160), value, np.uint8) for value in (1, 2, 3)]
    labels = np.arange(3)
    sample = Transform(scale, flip)(image, boxes, labels, 9, 0, 0, masks)
    if name == "nothing left after mirroring" and not flip:
        assert len(sample.boxes) == 3  # still wider than 0
        return
    assert sample.labels.tolist() == [0, 2]
    assert sample.masks[:, 0, 0].tolist() == [1, 3]
    np.testing.assert_array_equal(sample.lost_boxes, boxes[1:2])

    without = Transform(scale, flip)(image, boxes[[0, 2]], labels[[0, 2]], 9, 0, 0, [masks[0], masks[2]])
    assert len(without.lost_boxes) == 0
    np.testing.assert_array_equal(sample.boxes, without.boxes)
    np.testing.assert_array_equal(sample.masks, without.masks)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_no_box_makes_a_loss_that_is_not_finite(dtype):
    """What is left of any box, however thin, gives finite losses and gradients; so does an image without boxes."""
    torch.manual_seed(0)
    model = FasterRCNN(replace(PRESETS["tiny"].model, num_classes=1)).train()
    last = np.nextafter(np.float32(160), np.float32(0))
    thin = [[last, 20, 200, 60], [0, 20, 1e-30, 60], [0, 0, 1e-30, 1e-30], [5, 5, 5.0001, 90], [30, 119.99999, 60, 130]]
    image = np.zeros((120, 160, 3), np.uint8)
    for boxes, flip, count in ((thin, 0.0, len(thin)), (list(LOST_BOXES.values()), 1.0, 0)):
        labels = np.zeros(len(boxes), np.int64)
        sample = Transform((160, 120), flip)(image.copy(), np.array(boxes, np.float32), labels, 9, 0, 0)
        assert len(sample.boxes) == count
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            losses = model(collate([sample]).batch)
        assert all(loss.isfinite() for loss in losses.values())
        model.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_masks_follow_the_image():
    image = np.zeros((40, 60, 3), np.uint8)
    masks = np.random.default_rng(0).integers(0, 2, (2, 40, 60)).astype(np.uint8)
    image[..., 0] = 255 * masks[0]
    boxes = np.array([[0, 0, 60, 40]] * 2, np.float32)
    labels = np.zeros(2, np.int64)
    plain = Transform((120, 80), flip=0.0)(image, boxes, labels, 9, 0, 0, iter(masks))
    mirrored = Transform((120, 80), flip=1.0)(image, boxes, labels, 9, 0, 0, iter(masks))
    assert plain.masks.dtype == np.uint8
    assert (plain.masks == masks.repeat(2, 1).repeat(2, 2)).all()
    assert (mirrored.masks == plain.masks[:, :, ::-1]).all()
    assert mirrored.masks.flags.c_contiguous
    same = Transform((60, 40))(image, boxes, labels, 9, 0, 0, iter(masks))
    assert (same.masks == masks).all()
    assert same.original_size == plain.original_size == (40, 60)


def test_masks_shrink_to_the_nearest_pixel():
    masks = np.random.default_rng(0).integers(0, 2, (3, 41, 67)).astype(np.uint8)
    small = resize_masks(iter(masks), 3, (20, 31))
    rows = np.floor(np.arange(20) * (41 / 20)).astype(int)
    columns = np.floor(np.arange(31) * (67 / 31)).astype(int)
    assert (small == masks[:, rows][:, :, columns]).all()
    assert resize_masks(iter(()), 0, (20, 31)).shape == (0, 20, 31)
