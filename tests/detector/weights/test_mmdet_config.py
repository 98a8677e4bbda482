"""Configs of MMDetection: every value is taken where there is a field, and is otherwise compared."""

from dataclasses import replace

import pytest

from detector.model.config import FasterRCNNConfig
from detector.weights.config_text import read_config_text
from detector.weights.mmdet_config import MODELS, find_class_names, read_mmdet_config, takes_bgr
from tests.detector.weights.mmdet_texts import (
    CAFFE,
    CAFFE_IMAGES,
    OLD_FILES,
    OLDER,
    VARIANTS,
    VERSION_2,
    older_text,
    variant_model,
    version_3,
)

MDCONV = "dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py"
MASK = "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py"
CASCADE = "dcn/cascade-mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py"
DPOOL = "dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py"


def read(text):
    return read_mmdet_config(read_config_text(text))


def fields_of(text):
    """Return the configuration that a text stands for, which has to be one without problems."""
    config = read(text)
    assert config.network_problems == config.other_problems == ()
    return replace(FasterRCNNConfig(), **config.network, **config.others)


def problems_of(text):
    config = read(text)
    return [*config.network_problems, *config.other_problems]


@pytest.mark.parametrize("text", [VERSION_2, OLD_FILES, version_3(variant_model(MDCONV))])
def test_texts_of_all_versions_stand_for_the_same_model(text):
    assert fields_of(text) == FasterRCNNConfig()


@pytest.mark.parametrize("file", VARIANTS["variants"])
def test_dcn_configs(file):
    variant = VARIANTS["variants"][file]
    config = fields_of(version_3(variant_model(file)))
    assert config.mask == variant["with_mask"]
    assert config.cascade == (variant["type"] == "CascadeRCNN")
    assert config.depth == (50 if "r50" in file else 101)
    assert (config.groups, config.width_per_group) == ((32, 4) if "x101" in file else (1, 64))
    assert config.dcn == ("v2" if "mdconv" in file else "v1" if "dconv" in file else None)
    assert config.deform_groups == (4 if "group4" in file else 1)
    assert config.roi_layer == ("mdpool" if "mdpool" in file else "dpool" if "dpool" in file else "align")
    if config.dcn:
        assert config.dcn_stages == (False, True, True, True)


@pytest.mark.parametrize("version", OLDER)
@pytest.mark.parametrize("file", VARIANTS["variants"])
def test_older_forms_stand_for_the_same_model(file, version):
    expected = fields_of(version_3(variant_model(file)))
    text = older_text(variant_model(file), version)
    if version.startswith("1"):
        ratio = 2 if expected.roi_layer == "align" else 0
        expected = replace(expected, num_classes=81, roi_sampling_ratio=ratio)
    assert fields_of(text) == expected
    is_from_1 = version.startswith("1")
    is_known = not expected.cascade or expected.mask
    may_count_background = is_from_1 or (version == "2020-01" and is_known)
    assert read(text).may_count_background == may_count_background
    assert not read(version_3(variant_model(file))).may_count_background


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("type='FasterRCNN'", "type='CascadeRCNN'", "model.num_stages: expected a value, got none"),
        ("num_fcs=2", "num_fcs=3", "model.bbox_head.num_fcs: expected 2, got 3"),
        ("out_size=7", "out_size=14", "model.bbox_roi_extractor.roi_layer.out_size: expected 7, got 14"),
        ("sample_num=2", "sample_num=2, aligned=False", "model.bbox_roi_extractor.roi_layer.aligned: expected True, "),
        ("sample_num=2", "sample_num=2, use_mask=1", "roi_layer.use_mask: expected no such setting, got 1"),
        ("modulated=False", "modulated=False, groups=2", "model.backbone.dcn.groups: expected 1, got 2"),
        ("rpn_head=dict(", "shared_head=dict(), rpn_head=dict(", "model.shared_head: expected no such setting, got {}"),
        ("rpn_head=dict(", "rpn_head=dict(use_sigmoid_cls=False, ", "rpn_head.use_sigmoid_cls: expected True, got F"),
        ("size_divisor=32", "size_divisor=None", "data.test.size_divisor: expected 32, got None"),
        ("flip_ratio=0", "flip_ratio=0.5", "data.test.flip_ratio: expected 0, got 0.5"),
        ("flip_ratio=0", "resize_keep_ratio=False", "data.test.resize_keep_ratio: expected True, got False"),
    ],
)
def test_settings_of_version_1_are_named(old, new, message):
    text = older_text(variant_model("dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py"), "1.0rc0")
    assert old in text
    assert any(message in problem for problem in problems_of(text.replace(old, new)))


def test_masks_of_version_1():
    text = older_text(variant_model(MASK), "1.1")
    same = text.replace("num_convs=4", "num_convs=4, upsample_method='deconv', upsample_ratio=2")
    assert fields_of(same) == fields_of(text)
    for new in ("upsample_method='nearest'", "upsample_ratio=4"):
        name = new.partition("=")[0]
        (problem,) = problems_of(text.replace("num_convs=4", f"num_convs=4, {new}"))
        assert problem.startswith(f"model.mask_head.{name}: expected ")


def test_size_of_images_without_pipelines():
    text = older_text(variant_model(MDCONV), "1.0rc0").replace("img_scale=(1333, 800)", "img_scale=(600, 1000)")
    assert fields_of(text).image_scale == (1000, 600)


@pytest.mark.parametrize("file", [MASK, CASCADE, DPOOL])
def test_sampling_ratio(file):
    model = variant_model(file)
    for name in ("bbox_roi_extractor", "mask_roi_extractor"):
        if name in model["roi_head"]:
            model["roi_head"][name]["roi_layer"]["sampling_ratio"] = 2
    assert fields_of(version_3(model)).roi_sampling_ratio == 2


@pytest.mark.parametrize("file", [MASK, CASCADE])
def test_masks_have_the_sampling_ratio_of_boxes(file):
    model = variant_model(file)
    model["roi_head"]["mask_roi_extractor"]["roi_layer"]["sampling_ratio"] = 2
    expected = "model.roi_head.mask_roi_extractor.roi_layer.sampling_ratio: expected 0, got 2"
    assert problems_of(version_3(model)) == [expected]
    for name, ratio in (("bbox_roi_extractor", 2), ("mask_roi_extractor", 0)):
        model["roi_head"][name]["roi_layer"]["sampling_ratio"] = ratio
    assert problems_of(version_3(model)) == [expected.replace("0, got 2", "2, got 0")]


def test_stages_have_the_same_roi_layer():
    model = variant_model(CASCADE)
    extractor = model["roi_head"]["bbox_roi_extractor"]
    model["roi_head"]["bbox_roi_extractor"] = [extractor] * 3
    assert problems_of(version_3(model)) == []
    others = {
        "type: expected 'RoIAlign', got 'Def": {"type": "DeformRoIPoolPack", "output_size": 7},
        "sampling_ratio: expected 0, got 2": extractor["roi_layer"] | {"sampling_ratio": 2},
    }
    for message, layer in others.items():
        model["roi_head"]["bbox_roi_extractor"] = [extractor, extractor | {"roi_layer": layer}, extractor]
        (problem,) = problems_of(version_3(model))
        assert problem.startswith(f"model.roi_head.bbox_roi_extractor[1].roi_layer.{message}")


def test_settings_of_dumps_that_change_nothing():
    model = variant_model(MASK)
    model["_scope_"] = model["backbone"]["_scope_"] = "mmdet"
    model["data_preprocessor"] |= {"batch_augments": [{"type": "BatchFixedSizePad"}], "non_blocking": False}
    model["roi_head"]["bbox_head"]["loss_cls"] |= {"avg_non_ignore": False, "class_weight": None}
    model["roi_head"]["mask_head"]["init_cfg"] = {"type": "Normal"}
    model["roi_head"]["bbox_roi_extractor"]["roi_layer"] |= {"_delete_": True, "pool_mode": "avg"}
    model["train_cfg"]["rpn"]["assigner"] |= {"gpu_assign_thr": -1, "iou_calculator": {"type": "BboxOverlaps2D"}}
    model["test_cfg"]["rpn"]["nms_across_levels"] = False
    text = (
        version_3(model)
        + """
custom_imports = dict(allow_failed_imports=False, imports=['projects.model'])
default_hooks = dict(checkpoint=dict(interval=1, type='CheckpointHook'))
gpu_ids = range(0, 8)
tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(name='visualizer', type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
"""
    )
    assert fields_of(text) == FasterRCNNConfig(mask=True)


def test_every_value_with_a_field_is_taken():
    model = variant_model(MASK)
    preprocessor = model["data_preprocessor"]
    preprocessor["mean"] = [1, 2, 3]
    preprocessor["std"] = [4, 5.5, 6]
    model["backbone"] |= {"frozen_stages": 2, "norm_eval": False, "norm_cfg": {"type": "SyncBN"}}
    anchors = model["rpn_head"]["anchor_generator"]
    del anchors["scales"]
    anchors |= {"octave_base_scale": 4, "scales_per_octave": 1, "ratios": [1, 2.0]}
    model["roi_head"]["bbox_head"]["num_classes"] = model["roi_head"]["mask_head"]["num_classes"] = 7
    training = model["train_cfg"]
    training["rpn"]["assigner"] |= {"pos_iou_thr": 0.6, "neg_iou_thr": 0.2}
    training["rpn"]["sampler"] |= {"num": 128, "pos_fraction": 0.4}
    training["rpn_proposal"]["nms_pre"] = 1500
    training["rcnn"]["assigner"]["pos_iou_thr"] = 0.55
    training["rcnn"]["sampler"] |= {"num": 256, "pos_fraction": 0.3}
    model["test_cfg"]["rpn"] |= {"nms_pre": 500, "max_per_img": 400, "nms": {"type": "nms", "iou_threshold": 0.65}}
    nms = {"type": "nms", "iou_threshold": 0.45}
    model["test_cfg"]["rcnn"] |= {"score_thr": 0.01, "max_per_img": 300, "nms": nms}
    text = version_3(model).replace("scale=(1333, 800)", "scale=(600, 1000)")
    assert fields_of(text) == FasterRCNNConfig(
        num_classes=7,
        mask=True,
        frozen_stages=2,
        norm="syncbn",
        norm_eval=False,
        anchor_scale=4,
        anchor_ratios=(1.0, 2.0),
        rpn_positive_iou=0.6,
        rpn_negative_iou=0.2,
        rpn_batch_size=128,
        rpn_positive_fraction=0.4,
        rpn_pre_nms_top_n=(1500, 500),
        rpn_nms_iou=0.65,
        rpn_post_nms_top_n=400,
        roi_positive_iou=0.55,
        roi_batch_size=256,
        roi_positive_fraction=0.3,
        score_threshold=0.01,
        nms_iou=0.45,
        max_detections=300,
        image_scale=(1000, 600),
        pixel_mean=(1.0, 2.0, 3.0),
        pixel_std=(4.0, 5.5, 6.0),
    )


def test_norms_that_keep_their_statistics_need_no_other_processes():
    text = version_3(variant_model(MDCONV)).replace("type='BN'", "type='SyncBN'")
    assert fields_of(text).norm == "bn"


def test_caffe():
    (problem,) = problems_of(CAFFE)
    assert problem == "model.backbone.style: expected 'pytorch', got 'caffe'"
    config = fields_of(CAFFE_IMAGES)
    assert config.pixel_mean == (123.675, 116.28, 103.53)
    assert config.pixel_std == (1.0, 1.0, 1.0)
    assert takes_bgr(read_config_text(CAFFE_IMAGES))
    assert not takes_bgr(read_config_text(VERSION_2))
    blocks_without_choice = CAFFE.replace("depth=50", "depth=18")
    assert fields_of(blocks_without_choice).depth == 18


@pytest.mark.parametrize(
    ("flags", "is_bgr"),
    [
        ({"bgr_to_rgb": True}, False),
        ({"rgb_to_bgr": True}, False),
        ({"bgr_to_rgb": False}, True),
        ({"bgr_to_rgb": False, "rgb_to_bgr": False}, True),
        ({}, True),
    ],
)
def test_colors_of_version_3(flags, is_bgr):
    model = variant_model(MDCONV)
    preprocessor = model["data_preprocessor"]
    del preprocessor["bgr_to_rgb"]
    preprocessor |= flags | {"mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0]}
    config = fields_of(version_3(model))
    assert takes_bgr(read_config_text(version_3(model))) == is_bgr
    assert config.pixel_mean == ((3.0, 2.0, 1.0) if is_bgr else (1.0, 2.0, 3.0))
    assert config.pixel_std == ((6.0, 5.0, 4.0) if is_bgr else (4.0, 5.0, 6.0))


def test_normalization_may_be_beside_the_model_or_none():
    model = variant_model(MDCONV)
    preprocessor = model.pop("data_preprocessor")
    text = version_3(model)
    assert "model.data_preprocessor: expected mean and std" in problems_of(text)[0]
    assert fields_of(f"{text}data_preprocessor = dict(**{preprocessor})\n") == FasterRCNNConfig()
    del preprocessor["mean"], preprocessor["std"]
    config = fields_of(f"{text}data_preprocessor = dict(**{preprocessor})\n")
    assert (config.pixel_mean, config.pixel_std) == ((0.0,) * 3, (1.0,) * 3)


def test_without_a_pipeline_the_size_of_images_is_the_default():
    text = version_3(variant_model(MDCONV))
    model_alone = text[text.index("model = dict(") :]
    assert fields_of(model_alone) == FasterRCNNConfig()


def test_types_may_have_a_scope_or_modules():
    text = version_3(variant_model(MDCONV))
    for kind, name in (
        ("FasterRCNN", "mmdet.models.detectors.faster_rcnn.FasterRCNN"),
        ("FPN", "mmdet.FPN"),
        ("RoIAlign", "mmcv.ops.RoIAlign"),
        ("Resize", "mmdet.Resize"),
    ):
        text = text.replace(f"type='{kind}'", f"type='{name}'")
    assert fields_of(text) == FasterRCNNConfig()


def changed(file, path, value):
    """Return the text of a DCN config with another value at a path such as "roi_head.bbox_head.2.num_classes"."""
    model = variant_model(file)
    *parents, last = path.split(".")
    place = model
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[int(last) if isinstance(place, list) else last] = value
    return version_3(model)


SOFT_NMS = {"type": "soft_nms", "iou_threshold": 0.5, "min_score": 0.05}


@pytest.mark.parametrize(
    ("file", "path", "value", "message"),
    [
        (MDCONV, "backbone.style", "caffe", "model.backbone.style: expected 'pytorch', got 'caffe'"),
        (MDCONV, "backbone.type", "ResNetV1d", "model.backbone.type: expected one of ('ResNet', 'ResNeXt'), got 'Res"),
        (MDCONV, "backbone.strides", [1, 2, 2, 1], "model.backbone.strides: expected (1, 2, 2, 2), got [1, 2, 2, 1]"),
        (
            MDCONV,
            "backbone.dilations",
            [1, 1, 1, 2],
            "model.backbone.dilations: expected (1, 1, 1, 1), got [1, 1, 1, 2]",
        ),
        (MDCONV, "backbone.norm_cfg.type", "GN", "model.backbone.norm_cfg.type: expected one of ('BN', "),
        (MDCONV, "backbone.conv_cfg", {"type": "ConvWS"}, "model.backbone.conv_cfg: expected no such setting, got {'t"),
        (MDCONV, "backbone.plugins", [{}], "model.backbone.plugins: expected no such setting, got [{}]"),
        (
            MDCONV,
            "backbone.dcn.fallback_on_stride",
            True,
            "model.backbone.dcn.fallback_on_stride: expected False, got T",
        ),
        (MDCONV, "backbone.with_new_thing", 1, "model.backbone.with_new_thing: expected no such setting, got 1"),
        (
            MDCONV,
            "data_preprocessor.pad_size_divisor",
            64,
            "model.data_preprocessor.pad_size_divisor: expected 32, got",
        ),
        (MDCONV, "data_preprocessor.pad_value", 114, "model.data_preprocessor.pad_value: expected 0, got 114"),
        (
            MDCONV,
            "data_preprocessor.bgr_to_rgb",
            2,
            "model.data_preprocessor.bgr_to_rgb: expected True or False, got 2",
        ),
        (MDCONV, "neck.type", "PAFPN", "model.neck.type: expected 'FPN', got 'PAFPN'"),
        (MDCONV, "neck.add_extra_convs", "on_input", "model.neck.add_extra_convs: expected False, got 'on_input'"),
        (MDCONV, "neck.start_level", 1, "model.neck.start_level: expected 0, got 1"),
        (MDCONV, "neck.num_outs", 4, "model.neck.num_outs: expected 5, got 4"),
        (MDCONV, "neck.norm_cfg", {"type": "BN"}, "model.neck.norm_cfg: expected no such setting, got {'type': 'BN'}"),
        (MDCONV, "rpn_head.type", "GARPNHead", "model.rpn_head.type: expected 'RPNHead', got 'GARPNHead'"),
        (MDCONV, "rpn_head.num_convs", 2, "model.rpn_head.num_convs: expected 1, got 2"),
        (
            MDCONV,
            "rpn_head.anchor_generator.scales",
            [4, 8],
            "model.rpn_head.anchor_generator.scales: expected one num",
        ),
        (
            MDCONV,
            "rpn_head.anchor_generator.strides",
            [8, 16, 32, 64, 128],
            "model.rpn_head.anchor_generator.strides: ",
        ),
        (
            MDCONV,
            "rpn_head.anchor_generator.center_offset",
            0.5,
            "model.rpn_head.anchor_generator.center_offset: expec",
        ),
        (
            MDCONV,
            "rpn_head.bbox_coder.target_stds",
            [0.1] * 4,
            "model.rpn_head.bbox_coder.target_stds: expected (1.0, ",
        ),
        (
            MDCONV,
            "rpn_head.loss_cls.use_sigmoid",
            False,
            "model.rpn_head.loss_cls.use_sigmoid: expected True, got False",
        ),
        (
            MDCONV,
            "roi_head.type",
            "DoubleHeadRoIHead",
            "model.roi_head.type: expected one of ('StandardRoIHead', 'Base",
        ),
        (MDCONV, "roi_head.shared_head", {}, "model.roi_head.shared_head: expected no such setting, got {}"),
        (
            MDCONV,
            "roi_head.bbox_roi_extractor.type",
            "GenericRoIExtractor",
            "model.roi_head.bbox_roi_extractor.type: e",
        ),
        (MDCONV, "roi_head.bbox_roi_extractor.finest_scale", 28, "model.roi_head.bbox_roi_extractor.finest_scale: exp"),
        (
            MDCONV,
            "roi_head.bbox_roi_extractor.roi_layer.type",
            "RoIPool",
            ".roi_layer.type: expected one of ('RoIAlign', ",
        ),
        (
            MDCONV,
            "roi_head.bbox_roi_extractor.roi_layer.aligned",
            False,
            ".roi_layer.aligned: expected True, got False",
        ),
        (DPOOL, "roi_head.bbox_roi_extractor.roi_layer.gamma", 0.2, ".roi_layer.gamma: expected 0.1, got 0.2"),
        (MDCONV, "roi_head.bbox_head.type", "SABLHead", ".bbox_head.type: expected one of ('Shared2FCBBoxHead', 'Shar"),
        (
            MDCONV,
            "roi_head.bbox_head.reg_class_agnostic",
            True,
            "bbox_head.reg_class_agnostic: expected False, got True",
        ),
        (
            MDCONV,
            "roi_head.bbox_head.bbox_coder.target_stds",
            [1, 1, 1, 1],
            "bbox_head.bbox_coder.target_stds: expecte",
        ),
        (
            MDCONV,
            "roi_head.bbox_head.bbox_coder.type",
            "LegacyDeltaXYWHBBoxCoder",
            ".bbox_coder.type: expected 'DeltaX",
        ),
        (
            MDCONV,
            "roi_head.bbox_head.loss_cls.type",
            "SeesawLoss",
            ".loss_cls.type: expected 'CrossEntropyLoss', got 'S",
        ),
        (MDCONV, "roi_head.bbox_head.loss_cls.use_sigmoid", True, ".loss_cls.use_sigmoid: expected False, got True"),
        (
            MDCONV,
            "roi_head.bbox_head.cls_predictor_cfg",
            {"type": "NormedLinear"},
            ".cls_predictor_cfg: expected {'typ",
        ),
        (CASCADE, "roi_head.num_stages", 2, "model.roi_head.num_stages: expected 3, got 2"),
        (
            CASCADE,
            "roi_head.bbox_head.1.reg_class_agnostic",
            False,
            "bbox_head[1].reg_class_agnostic: expected True, go",
        ),
        (
            CASCADE,
            "roi_head.bbox_head.2.bbox_coder.target_stds",
            [0.1, 0.1, 0.2, 0.2],
            "bbox_head[2].bbox_coder.target",
        ),
        (CASCADE, "roi_head.bbox_head.2.num_classes", 3, "model.roi_head.bbox_head[2].num_classes: expected 80, got 3"),
        (CASCADE, "roi_head.bbox_head", [], "model.roi_head.bbox_head: expected 3 stages, got 0"),
        (
            MASK,
            "roi_head.mask_head.type",
            "MaskPointHead",
            "model.roi_head.mask_head.type: expected 'FCNMaskHead', got",
        ),
        (MASK, "roi_head.mask_head.num_classes", 3, "model.roi_head.mask_head.num_classes: expected 80, got 3"),
        (
            MASK,
            "roi_head.mask_head.class_agnostic",
            True,
            "model.roi_head.mask_head.class_agnostic: expected False, go",
        ),
        (MASK, "roi_head.mask_head.upsample_cfg", {"type": "carafe"}, "mask_head.upsample_cfg.type: expected 'deconv'"),
        (MASK, "roi_head.mask_roi_extractor.roi_layer.output_size", 7, "roi_layer.output_size: expected 14, got 7"),
        (MASK, "test_cfg.rcnn.mask_thr_binary", 0.4, "model.test_cfg.rcnn.mask_thr_binary: expected 0.5, got 0.4"),
        (MDCONV, "test_cfg.rcnn.nms", SOFT_NMS, "model.test_cfg.rcnn.nms.type: expected 'nms', got 'soft_nms'"),
        (
            MDCONV,
            "test_cfg.rcnn.nms.class_agnostic",
            True,
            "test_cfg.rcnn.nms.class_agnostic: expected False, got True",
        ),
        (MDCONV, "test_cfg.rpn.min_bbox_size", 16, "model.test_cfg.rpn.min_bbox_size: expected 0, got 16"),
        (MDCONV, "test_cfg.rcnn", {}, "model.test_cfg.rcnn.score_thr: expected a value, got none"),
        (MDCONV, "test_cfg", {}, "model.test_cfg.rpn: expected a value, got none"),
        (MDCONV, "neck", None, "model.neck: expected a dict, got None"),
        (
            MDCONV,
            "bbox_head",
            {"type": "BBoxHead"},
            "model.bbox_head: expected no such setting, got {'type': 'BBoxHead'}",
        ),
    ],
)
def test_settings_that_this_package_does_not_have_are_named(file, path, value, message):
    assert any(message in problem for problem in problems_of(changed(file, path, value)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("flip=False", "flip=True", "data.test.pipeline[1].flip: expected False, got True"),
        (
            "dict(type='Resize', keep_ratio=True)",
            "dict(type='Resize', keep_ratio=False)",
            "keep_ratio: expected True, got",
        ),
        (
            "dict(type='RandomFlip'),",
            "dict(type='CLAHE'),",
            "data.test.pipeline[1].transforms[1].type: expected one of (",
        ),
        (
            "dict(type='Pad', size_divisor=32)",
            "dict(type='Pad', size=(800, 800))",
            "transforms[3].size_divisor: expected",
        ),
        (
            "            dict(type='Pad', size_divisor=32),\n",
            "",
            "pipeline: expected a transform Pad with size_divisor 32",
        ),
        (
            "nms_post=1000",
            "nms_post=300",
            "test_cfg.rpn.nms_post: expected at least 1000, as many as of all levels, got",
        ),
        (
            "nms_across_levels=False",
            "nms_across_levels=True",
            "test_cfg.rpn.nms_across_levels: expected False, got True",
        ),
        (
            "to_rgb=True",
            "to_rgb='yes'",
            "data.test.pipeline[1].transforms[2].to_rgb: expected True or False, got 'yes'",
        ),
        (
            "dict(type='LoadImageFromFile')",
            "dict(type='LoadImageFromFile', to_float32=True)",
            "to_float32: expected Fa",
        ),
        ("num_classes=80", "num_classes=NUMBER", None),
    ],
)
def test_settings_of_version_2_are_named(old, new, message):
    problems = problems_of(VERSION_2.replace(old, new))
    assert (message is None and not problems) or any(message in problem for problem in problems)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "keep_ratio=True",
            "keep_ratio=False",
            "test_dataloader.dataset.pipeline[1].keep_ratio: expected True, got False",
        ),
        (", keep_ratio=True", "", "test_dataloader.dataset.pipeline[1].keep_ratio: expected True, got False"),
        ("type='Resize'", "type='FixScaleResize'", "test_dataloader.dataset.pipeline[1].type: expected one of ("),
        (
            "type='LoadAnnotations'",
            "type='Normalize', mean=[0], std=[1]",
            "to normalize images alone, got a transform No",
        ),
    ],
)
def test_settings_of_version_3_are_named(old, new, message):
    text = version_3(variant_model(MDCONV)).replace(old, new)
    assert any(message in problem for problem in problems_of(text))


def test_what_only_training_reads_and_has_no_field_is_not_looked_at():
    model = variant_model(MASK)
    model["rpn_head"]["loss_bbox"] = {"type": "GIoULoss", "loss_weight": 10.0}
    model["roi_head"]["bbox_head"] |= {"loss_bbox": {"type": "GIoULoss"}, "reg_decoded_bbox": True}
    model["train_cfg"]["rpn"]["allowed_border"] = 0
    model["train_cfg"]["rpn_proposal"]["max_per_img"] = 2000
    model["train_cfg"]["rcnn"] |= {"mask_size": 28, "pos_weight": 2, "debug": True}
    model["train_cfg"]["rcnn"]["sampler"] |= {"type": "OHEMSampler", "add_gt_as_proposals": False}
    model["backbone"] |= {"with_cp": True, "init_cfg": {"type": "Pretrained", "checkpoint": "torchvision://resnet50"}}
    model["init_cfg"] = None
    assert fields_of(version_3(model)) == FasterRCNNConfig(mask=True)


def test_another_model_is_one_problem():
    text = version_3(variant_model(MDCONV)).replace("type='FasterRCNN'", "type='RetinaNet'")
    assert problems_of(text) == [f"model.type: expected one of {MODELS}, got 'RetinaNet'"]
    assert problems_of("a = 1") == ["model: expected a dict, got None", "model.type: expected a value, got none"]
    assert len(problems_of("model = unknown")) == 2


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("metainfo = dict(classes=('cat', 'dog'))", ("cat", "dog")),
        ("metainfo = dict(CLASSES=['cat'])", ("cat",)),
        (
            "test_dataloader = dict(dataset=dict(metainfo=dict(classes=('a',))))\nmetainfo = dict(classes=('b',))",
            ("a",),
        ),
        ("train_dataloader = dict(dataset=dict(dataset=dict(metainfo=dict(classes=('a',)))))", ("a",)),
        ("classes = ('a', 'b')\ndata = dict(test=dict(classes=classes))", ("a", "b")),
        ("classes = ('a', 'b')", ("a", "b")),
        ("metainfo = dict(classes=load('names.txt'))", None),
        ("data = dict(test=dict(classes='names.txt'))", None),
        ("metainfo = dict(classes=(1, 2))", None),
        ("metainfo = dict(classes=())", None),
        ("a = 1", None),
    ],
)
def test_class_names(text, names):
    assert find_class_names(read_config_text(text)) == names
