"""Texts of MMDetection configs, as checkpoints have them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VARIANTS = json.loads((Path(__file__).parents[2] / "golden" / "variants.json").read_text())

VERSION_3 = """
dataset_type = 'CocoDataset'
data_root = 'data/coco/'
backend_args = None
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
]
test_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        data_root='data/coco/',
        ann_file='annotations/instances_val2017.json',
        data_prefix=dict(img='val2017/'),
        test_mode=True,
        pipeline=[
            dict(type='LoadImageFromFile', backend_args=None),
            dict(type='Resize', scale=(1333, 800), keep_ratio=True),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(
                type='PackDetInputs',
                meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
        ],
        backend_args=None))
val_dataloader = None
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1)
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=0.0001))
auto_scale_lr = dict(enable=False, base_batch_size=16)
default_scope = 'mmdet'
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))
log_level = 'INFO'
load_from = None
resume = False
launcher = 'pytorch'
work_dir = './work_dirs/model'
"""
"""What MMDetection 3 writes beside the model."""

VERSION_2_MODEL = """
model = dict(
    type='FasterRCNN',
    pretrained='torchvision://resnet50',
    backbone=dict(
        type='ResNet',
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=True,
        style='pytorch',
        dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True)),
    neck=dict(
        type='FPN',
        in_channels=[256, 512, 1024, 2048],
        out_channels=256,
        num_outs=5),
    rpn_head=dict(
        type='RPNHead',
        in_channels=256,
        feat_channels=256,
        anchor_generator=dict(
            type='AnchorGenerator',
            scales=[8],
            ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(
            type='DeltaXYWHBBoxCoder',
            target_means=[0.0, 0.0, 0.0, 0.0],
            target_stds=[1.0, 1.0, 1.0, 1.0]),
        loss_cls=dict(
            type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0)),
    roi_head=dict(
        type='StandardRoIHead',
        bbox_roi_extractor=dict(
            type='SingleRoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
            out_channels=256,
            featmap_strides=[4, 8, 16, 32]),
        bbox_head=dict(
            type='Shared2FCBBoxHead',
            in_channels=256,
            fc_out_channels=1024,
            roi_feat_size=7,
            num_classes=80,
            bbox_coder=dict(
                type='DeltaXYWHBBoxCoder',
                target_means=[0.0, 0.0, 0.0, 0.0],
                target_stds=[0.1, 0.1, 0.2, 0.2]),
            reg_class_agnostic=False,
            loss_cls=dict(
                type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0))))
train_cfg = dict(
    rpn=dict(
        assigner=dict(
            type='MaxIoUAssigner',
            pos_iou_thr=0.7,
            neg_iou_thr=0.3,
            min_pos_iou=0.3,
            match_low_quality=True,
            ignore_iof_thr=-1),
        sampler=dict(
            type='RandomSampler',
            num=256,
            pos_fraction=0.5,
            neg_pos_ub=-1,
            add_gt_as_proposals=False),
        allowed_border=-1,
        pos_weight=-1,
        debug=False),
    rpn_proposal=dict(
        nms_across_levels=False,
        nms_pre=2000,
        nms_post=1000,
        max_num=1000,
        nms_thr=0.7,
        min_bbox_size=0),
    rcnn=dict(
        assigner=dict(
            type='MaxIoUAssigner',
            pos_iou_thr=0.5,
            neg_iou_thr=0.5,
            min_pos_iou=0.5,
            match_low_quality=False,
            ignore_iof_thr=-1),
        sampler=dict(
            type='RandomSampler',
            num=512,
            pos_fraction=0.25,
            neg_pos_ub=-1,
            add_gt_as_proposals=True),
        pos_weight=-1,
        debug=False))
test_cfg = dict(
    rpn=dict(
        nms_across_levels=False,
        nms_pre=1000,
        nms_post=1000,
        max_num=1000,
        nms_thr=0.7,
        min_bbox_size=0),
    rcnn=dict(
        score_thr=0.05,
        nms=dict(type='nms', iou_threshold=0.5),
        max_per_img=100))
"""

VERSION_2_DATA = """
dataset_type = 'CocoDataset'
data_root = 'data/coco/'
img_norm_cfg = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', img_scale=(1333, 800), keep_ratio=True),
    dict(type='RandomFlip', flip_ratio=0.5),
    dict(type='Normalize', **img_norm_cfg),
    dict(type='Pad', size_divisor=32),
    dict(type='DefaultFormatBundle'),
    dict(type='Collect', keys=['img', 'gt_bboxes', 'gt_labels']),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug',
        img_scale=(1333, 800),
        flip=False,
        transforms=[
            dict(type='Resize', keep_ratio=True),
            dict(type='RandomFlip'),
            dict(type='Normalize', **img_norm_cfg),
            dict(type='Pad', size_divisor=32),
            dict(type='ImageToTensor', keys=['img']),
            dict(type='Collect', keys=['img']),
        ])
]
data = dict(
    samples_per_gpu=2,
    workers_per_gpu=2,
    train=dict(
        type=dataset_type,
        ann_file=data_root + 'annotations/instances_train2017.json',
        img_prefix=data_root + 'train2017/',
        pipeline=train_pipeline),
    val=dict(
        type=dataset_type,
        ann_file=data_root + 'annotations/instances_val2017.json',
        img_prefix=data_root + 'val2017/',
        pipeline=test_pipeline),
    test=dict(
        type=dataset_type,
        ann_file=data_root + 'annotations/instances_val2017.json',
        img_prefix=data_root + 'val2017/',
        pipeline=test_pipeline))
evaluation = dict(interval=1, metric='bbox')
optimizer = dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=0.0001)
optimizer_config = dict(grad_clip=None)
lr_config = dict(
    policy='step',
    warmup='linear',
    warmup_iters=500,
    warmup_ratio=0.001,
    step=[8, 11])
total_epochs = 12
checkpoint_config = dict(interval=1)
# yapf:disable
log_config = dict(interval=50, hooks=[dict(type='TextLoggerHook')])
# yapf:enable
dist_params = dict(backend='nccl')
log_level = 'INFO'
load_from = None
resume_from = None
workflow = [('train', 1)]
"""

VERSION_2 = VERSION_2_MODEL + VERSION_2_DATA
"""Faster R-CNN R50-FPN mdconv c3-c5 as MMDetection 2 writes it."""

OLD_MODEL = (
    VERSION_2_MODEL.replace(
        """        anchor_generator=dict(
            type='AnchorGenerator',
            scales=[8],
            ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(
            type='DeltaXYWHBBoxCoder',
            target_means=[0.0, 0.0, 0.0, 0.0],
            target_stds=[1.0, 1.0, 1.0, 1.0]),
""",
        """        anchor_scales=[8],
        anchor_ratios=[0.5, 1.0, 2.0],
        anchor_strides=[4, 8, 16, 32, 64],
        target_means=[.0, .0, .0, .0],
        target_stds=[1.0, 1.0, 1.0, 1.0],
""",
    )
    .replace(
        """            bbox_coder=dict(
                type='DeltaXYWHBBoxCoder',
                target_means=[0.0, 0.0, 0.0, 0.0],
                target_stds=[0.1, 0.1, 0.2, 0.2]),
""",
        """            target_means=[0., 0., 0., 0.],
            target_stds=[0.1, 0.1, 0.2, 0.2],
""",
    )
    .replace("output_size=7, sampling_ratio=0", "out_size=7, sample_num=0")
    .replace("iou_threshold=0.5", "iou_thr=0.5")
    .replace("loss_bbox=dict(type='L1Loss', loss_weight=1.0)", "loss_bbox=dict(type='SmoothL1Loss', beta=1.0 / 9.0)")
    .replace(
        """        dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True)),
""",
        "        ),\n",
    )
)

OLD_FILES = f"""/home/user/configs/_base_/models/faster_rcnn_r50_fpn.py
# model settings
{OLD_MODEL}
    # soft-nms is also supported for rcnn testing
/home/user/configs/_base_/datasets/coco_detection.py
{VERSION_2_DATA}
configs/_base_/default_runtime.py
checkpoint_config = dict(interval=1)
log_level = 'INFO'
configs/faster_rcnn/faster_rcnn_r50_fpn_1x_coco.py
_base_ = [
    '../_base_/models/faster_rcnn_r50_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/default_runtime.py'
]
configs/dcn/faster_rcnn_r50_fpn_mdconv_c3-c5_1x_coco.py
_base_ = '../faster_rcnn/faster_rcnn_r50_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        dcn=dict(type='DCNv2', deformable_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True)))
"""
"""The same model as MMDetection wrote it early in 2020: all files that the config was made from, with their paths."""

CAFFE = (
    VERSION_2.replace("style='pytorch'", "style='caffe'")
    .replace("norm_cfg=dict(type='BN', requires_grad=True)", "norm_cfg=dict(type='BN', requires_grad=False)")
    .replace(
        "mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True",
        "mean=[103.530, 116.280, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False",
    )
)
"""A network whose weights come from Caffe."""

CAFFE_IMAGES = CAFFE.replace("style='caffe'", "style='pytorch'")
"""Images in the order of Caffe, and a network that this package has."""


def as_text(value: Any) -> str:
    """Return a value as the text of a config has it."""
    if isinstance(value, Mapping):
        return f"dict({', '.join(f'{key}={as_text(element)}' for key, element in value.items())})"
    if isinstance(value, list):
        return f"[{', '.join(map(as_text, value))}]"
    return repr(value)


def version_3(model: Mapping[str, Any]) -> str:
    """Return the text that MMDetection 3 writes for a model."""
    return f"{VERSION_3}model = {as_text(model)}\n"


def variant_model(file: str) -> dict[str, Any]:
    """Return a fresh copy of the model of one of MMDetection's DCN configs."""
    variant = VARIANTS["variants"][file]
    variant = VARIANTS["variants"][variant.get("same_model_as", file)]
    model: dict[str, Any] = json.loads(json.dumps(variant["model"]))
    return model


WITHOUT_PIPELINES = """
img_norm_cfg = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
data = dict(
    imgs_per_gpu=2,
    workers_per_gpu=2,
    test=dict(
        type='CocoDataset',
        img_scale=(1333, 800),
        img_norm_cfg=img_norm_cfg,
        size_divisor=32,
        flip_ratio=0,
        with_mask=False,
        with_label=False,
        test_mode=True))
"""
"""The data of configs before July 2019."""

OLDER = ("2.28", "2.3", "2020-01", "1.1", "1.0rc0")
"""Versions of MMDetection, or the month of a version before 2.0, whose configs are of different forms."""


def older_text(model: Mapping[str, Any], version: str) -> str:
    """Return the text that MMDetection wrote for a model of `variant_model` in one of the versions `OLDER`.

    Configs of version 1 have two samples per bin, and count the background as a class.
    """
    age = OLDER.index(version)
    model = json.loads(json.dumps(model))
    del model["data_preprocessor"]
    for name in ("train_cfg", "test_cfg"):
        model["roi_head"].pop(name, None)
    model["backbone"]["init_cfg"] = {"type": "Pretrained", "checkpoint": "torchvision://resnet50"}
    beside: dict[str, Any] = {}
    if age >= OLDER.index("2.3"):
        beside = _to_version_2_0(model)
    if age >= OLDER.index("2020-01"):
        _to_january_2020(model)
    if age >= OLDER.index("1.1"):
        _to_version_1(model, beside)
    data = VERSION_2_DATA
    if age >= OLDER.index("1.0rc0"):
        _name_no_deformable_type(model["backbone"])
        data = WITHOUT_PIPELINES
    lines = ["configs/dcn/model.py", f"model = {as_text(model)}"]
    lines += [f"{name} = {as_text(value)}" for name, value in beside.items()]
    return "\n".join(lines) + data + "gpu_ids = range(0, 8)\n"


def _stages(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _rename(values: dict[str, Any], names: Mapping[str, str]) -> None:
    for name in list(values):
        values[names.get(name, name)] = values.pop(name)


def _to_version_2_0(model: dict[str, Any]) -> dict[str, Any]:
    """Change the names of settings, and return those that were beside the model."""
    del model["backbone"]["init_cfg"]
    model["pretrained"] = "torchvision://resnet50"
    if "dcn" in model["backbone"]:
        _rename(model["backbone"]["dcn"], {"deform_groups": "deformable_groups"})
        model["backbone"]["dcn"]["fallback_on_stride"] = False
    for name in ("bbox_roi_extractor", "mask_roi_extractor"):
        for extractor in _stages(model["roi_head"].get(name, [])):
            layer = extractor["roi_layer"]
            new = {"output_size": "out_size", "sampling_ratio": "sample_num", "output_channels": "out_channels"}
            _rename(layer, new)
            if layer["type"] != "RoIAlign":
                layer["type"] = layer["type"].replace("PoolPack", "PoolingPack")
                layer |= {"no_trans": False, "group_size": 1, "trans_std": 0.1}
    beside = {name: model.pop(name) for name in ("train_cfg", "test_cfg")}
    for proposals in (beside["train_cfg"]["rpn_proposal"], beside["test_cfg"]["rpn"]):
        proposals["nms_thr"] = proposals.pop("nms")["iou_threshold"]
        proposals["max_num"] = proposals["nms_post"] = proposals.pop("max_per_img")
        proposals["nms_across_levels"] = False
    _rename(beside["test_cfg"]["rcnn"]["nms"], {"iou_threshold": "iou_thr"})
    return beside


def _to_january_2020(model: dict[str, Any]) -> None:
    rpn = model["rpn_head"]
    rpn |= {f"anchor_{name}": value for name, value in rpn.pop("anchor_generator").items() if name != "type"}
    roi_head = model["roi_head"]
    heads = _stages(roi_head["bbox_head"])
    for head in [rpn, *heads]:
        head |= {name: value for name, value in head.pop("bbox_coder").items() if name != "type"}
    for head in heads:
        head |= {"type": "SharedFCBBoxHead", "num_fcs": 2}
    roi_head["type"] = roi_head["type"].replace("Standard", "Base")
    for extractor in _stages(roi_head["bbox_roi_extractor"]) + _stages(roi_head.get("mask_roi_extractor", [])):
        extractor["roi_layer"].pop("sample_num", None)
    for name in ("norm_cfg", "norm_eval"):
        del model["backbone"][name]


def _to_version_1(model: dict[str, Any], beside: dict[str, Any]) -> None:
    roi_head = model.pop("roi_head")
    del roi_head["type"]
    if "stage_loss_weights" in roi_head:
        beside["train_cfg"]["stage_loss_weights"] = roi_head.pop("stage_loss_weights")
        beside["test_cfg"]["keep_all_stages"] = False
    model |= roi_head
    for extractor in _stages(model["bbox_roi_extractor"]) + _stages(model.get("mask_roi_extractor", [])):
        if extractor["roi_layer"]["type"] == "RoIAlign":
            extractor["roi_layer"]["sample_num"] = 2
    for head in _stages(model["bbox_head"]) + _stages(model.get("mask_head", [])):
        head["num_classes"] += 1


def _name_no_deformable_type(backbone: dict[str, Any]) -> None:
    if "dcn" in backbone:
        backbone["dcn"]["modulated"] = backbone["dcn"].pop("type") == "DCNv2"
        if "groups" in backbone:
            backbone["dcn"]["groups"] = backbone["groups"]


def variant_shapes(file: str) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the state dict of one of MMDetection's DCN configs."""
    lines = []
    for first, behind_last in VARIANTS["state_dicts"][VARIANTS["variants"][file]["state_dict_sha256"]]:
        lines += VARIANTS["entries"][first:behind_last]
    shapes = {}
    for line in lines:
        name, _, sizes = line.partition(" ")
        shapes[name] = tuple(int(size) for size in sizes.split("x") if size)
    return shapes
