"""What an MMDetection config says, as fields of `FasterRCNNConfig`; what has no field must be as it is here.

Read are the forms of MMDetection 1, 2 and 3. Settings that only training reads are taken where there is a field for
them, and are otherwise not looked at: they change nothing in what a detector of a file detects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from detector.model.faster_rcnn import CASCADE_DELTA_STDS
from detector.text import short_list, shown
from detector.weights.settings import Settings, is_same, to_numbers

MODELS = ("FasterRCNN", "MaskRCNN", "CascadeRCNN")
ROI_LAYERS: dict[str, Literal["align", "dpool", "mdpool"]] = {
    "RoIAlign": "align",
    "DeformRoIPoolPack": "dpool",
    "DeformRoIPoolingPack": "dpool",  # until 2020; newer versions load such files into the layer above
    "ModulatedDeformRoIPoolPack": "mdpool",
    "ModulatedDeformRoIPoolingPack": "mdpool",
}
NORMS = {"BN": "bn", "BN2d": "bn", "SyncBN": "syncbn", "MMSyncBN": "syncbn", "naiveSyncBN": "syncbn"}

Pipeline = list[tuple[str, Any]]
"""Paths and settings of the transforms of an image."""


@dataclass(frozen=True)
class MMDetectionConfig:
    """The fields of `FasterRCNNConfig` that a config gives, and what they cannot express.

    Attributes:
        network: fields that the weights were trained for, the normalization of images among them.
        others: fields of detection and training: thresholds, numbers, the size of images.
        network_problems: settings of the network that this package does not have, one line each.
        other_problems: such settings of the detection.
        may_count_background: whether `num_classes` may be one more than the classes of the weights, see
            `_may_count_background`.
    """

    network: dict[str, Any]
    others: dict[str, Any]
    network_problems: tuple[str, ...]
    other_problems: tuple[str, ...]
    may_count_background: bool = False


def read_mmdet_config(values: Mapping[str, Any]) -> MMDetectionConfig:
    """Find out what a config says.

    Args:
        values: its names and values, as `read_config_text` returns them.
    """
    problems: list[str] = []
    other_problems: list[str] = []
    model = Settings(values.get("model"), "model", problems)
    if not model.expect_type(*MODELS):
        return MMDetectionConfig({}, {}, tuple(problems), ())
    network = _read_model(model)
    pipeline = _find_pipeline(values)
    network |= _read_normalization(values, pipeline, problems)

    others = _read_thresholds(values, network["mask"], other_problems)
    others |= _read_training(values, network["cascade"], other_problems)
    backbone = Settings(model.values.get("backbone"), "model.backbone", [])
    others |= {
        "frozen_stages": backbone.take("frozen_stages", default=-1),
        "norm_eval": backbone.take("norm_eval", default=True),
    }
    others |= _read_pipeline(pipeline, other_problems) if pipeline else _read_dataset(values, other_problems)
    return MMDetectionConfig(
        network,
        others,
        tuple(problems),
        tuple(other_problems),
        may_count_background=_may_count_background(model.values, network),
    )


def _may_count_background(model: Mapping[str, Any], network: Mapping[str, Any]) -> bool:
    """Tell whether weights of one class less than the config says can be those of the config.

    MMDetection 1 counted the background, as its first class. Its converter moves the background behind the classes,
    renames the weights, and leaves the config as it is.

    In spring 2020 weights had their present names for some weeks with the background still first. Shapes show it, but
    for the heads of a cascade without masks: nothing in them depends on the number of classes except the classifiers,
    which have one row more in either order.
    """
    is_from_before_2 = _at(model, "rpn_head", "anchor_generator") is None
    is_from_1 = model.get("roi_head") is None
    shapes_tell = network["mask"] or not network["cascade"]
    return is_from_before_2 and (is_from_1 or shapes_tell)


def differences_message(problems: tuple[str, ...]) -> str:
    """Return the message about settings that this package does not have."""
    return f"its MMDetection config is of another model: {short_list(problems, limit=6, length=200)}"


def find_class_names(values: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the class names that a config has, or None."""
    sources: list[Any] = []
    for loader in ("test_dataloader", "val_dataloader", "train_dataloader"):
        dataset = _at(values, loader, "dataset")
        sources += [_at(dataset, "metainfo"), _at(dataset, "dataset", "metainfo")]  # a wrapper has a data set inside
    sources.append(values.get("metainfo"))
    for split in ("test", "val", "train"):
        dataset = _at(values, "data", split)
        sources += [dataset, _at(dataset, "dataset")]
    sources.append(values)
    for source in sources:
        for key in ("classes", "CLASSES"):
            names = _at(source, key)
            if isinstance(names, list | tuple) and names and all(isinstance(name, str) and name for name in names):
                return tuple(names)
    return None


def takes_bgr(values: Mapping[str, Any]) -> bool:
    """Tell whether a config says that the channels of images reach the network as blue, green, red."""
    normalization = _find_normalization(values, _find_pipeline(values))
    return normalization is not None and _is_bgr(*normalization)


def _at(values: Any, *keys: str) -> Any:
    """Return a value inside dicts, or None if it is not there."""
    for key in keys:
        if not isinstance(values, Mapping):
            return None
        values = values.get(key)
    return values


def _read_model(model: Settings) -> dict[str, Any]:
    """Return the fields of the network."""
    model.ignore("pretrained", "init_cfg", "data_preprocessor", "train_cfg", "test_cfg")
    fields = _read_backbone(model.part("backbone"))
    fields |= _read_neck(model.part("neck"))
    fields |= _read_rpn(model.part("rpn_head"))
    if "bbox_head" in model and "roi_head" not in model:  # MMDetection 1
        fields |= _read_heads(model, cascade=model.values["type"].endswith("CascadeRCNN"))
    else:
        fields |= _read_roi_head(model.part("roi_head"))
    model.finish()
    return fields


def _read_backbone(backbone: Settings) -> dict[str, Any]:
    kind = backbone.expect_type("ResNet", "ResNeXt")
    if not kind:
        return {}
    depth = backbone.take("depth")
    backbone.expect("in_channels", value=3, default=3)
    backbone.expect("num_stages", value=4, default=4)
    backbone.expect("strides", value=(1, 2, 2, 2), default=(1, 2, 2, 2))
    backbone.expect("dilations", value=(1, 1, 1, 1), default=(1, 1, 1, 1))
    backbone.expect("out_indices", value=(0, 1, 2, 3), default=(0, 1, 2, 3))
    backbone.expect("deep_stem", value=False, default=False)
    backbone.expect("avg_down", value=False, default=False)
    backbone.ignore("stem_channels", "base_channels")  # the shapes of the weights show them
    backbone.ignore("frozen_stages", "norm_eval", "with_cp", "zero_init_residual", "pretrained", "init_cfg")
    if depth in (18, 34):
        backbone.ignore("style")  # blocks of two 3x3 convolutions have no choice
    else:
        backbone.expect("style", value="pytorch", default="pytorch")

    norm_eval = backbone.take("norm_eval", default=True)
    fields = {"depth": depth, "norm": _read_norm(backbone.part("norm_cfg", default={"type": "BN"}), norm_eval)}
    if kind == "ResNeXt":
        groups = backbone.take("groups", default=1)
        width = backbone.take("base_width", default=4)
        fields |= {"groups": groups, "width_per_group": 64 if groups == 1 else width}
    else:
        fields |= {"groups": 1, "width_per_group": 64}
    fields |= _read_deformable(backbone, fields["groups"])
    backbone.finish()
    return fields


def _read_norm(norm: Settings, norm_eval: Any) -> str | None:
    """Return the field `norm`; a norm that keeps its statistics does not need those of other processes."""
    kind = norm.expect_type(*NORMS)
    norm.expect("eps", value=1e-5, default=1e-5)
    norm.ignore("requires_grad", "momentum")
    norm.finish()
    return "bn" if norm_eval is True else NORMS.get(kind)


def _read_deformable(backbone: Settings, groups: Any) -> dict[str, Any]:
    """Return `dcn`, `dcn_stages` and `deform_groups`; `groups` are those of the backbone's convolutions."""
    stages = backbone.take("stage_with_dcn", default=(False,) * 4)
    stages = tuple(stages) if isinstance(stages, list | tuple) else stages
    if "dcn" not in backbone or stages == (False,) * 4:
        backbone.ignore("dcn")
        return {"dcn": None, "dcn_stages": (False,) * 4}
    dcn = backbone.part("dcn")
    kind = dcn.expect_type("DCN", "DCNv2", default="DCN")  # which MMDetection 1 did not name
    is_modulated = dcn.take("modulated", default=False) is True or kind == "DCNv2"
    deform_groups = dcn.take("deform_groups", "deformable_groups", default=1)
    dcn.expect("groups", value=groups, default=groups)
    dcn.expect("fallback_on_stride", value=False, default=False)
    dcn.finish()
    return {"dcn": "v2" if is_modulated else "v1", "dcn_stages": stages, "deform_groups": deform_groups}


def _read_neck(neck: Settings) -> dict[str, Any]:
    if not neck.expect_type("FPN"):
        return {}
    neck.expect("num_outs", value=5)
    neck.expect("start_level", value=0, default=0)
    neck.expect("end_level", value=-1, default=-1)
    neck.expect("add_extra_convs", value=False, default=False)
    neck.expect("upsample_cfg", value={"mode": "nearest"}, default={"mode": "nearest"})
    neck.ignore("in_channels", "relu_before_extra_convs", "extra_convs_on_inputs", "no_norm_on_lateral", "init_cfg")
    fields = {"fpn_channels": neck.take("out_channels")}
    neck.finish()  # conv_cfg, norm_cfg and act_cfg must be None
    return fields


def _read_rpn(rpn: Settings) -> dict[str, Any]:
    if not rpn.expect_type("RPNHead"):
        return {}
    rpn.expect("num_convs", value=1, default=1)
    rpn.expect("num_classes", value=1, default=1)
    rpn.ignore("in_channels", "feat_channels", "loss_bbox", "reg_decoded_bbox", "init_cfg", "train_cfg", "test_cfg")
    rpn.expect("use_sigmoid_cls", value=True, default=True)  # until MMDetection 1.0
    loss = rpn.part("loss_cls", default={"use_sigmoid": True})
    loss.expect("use_sigmoid", value=True)
    _check_coder(rpn, (1.0, 1.0, 1.0, 1.0))
    if "anchor_generator" in rpn:
        fields = _read_anchors(rpn.part("anchor_generator"), prefix="")
    else:  # MMDetection before version 2.0
        fields = _read_anchors(rpn, prefix="anchor_")
    rpn.finish()
    return fields


def _read_anchors(anchors: Settings, prefix: str) -> dict[str, Any]:
    """Return the fields of the anchors; `prefix` is that of the names of their settings."""
    if not prefix and not anchors.expect_type("AnchorGenerator"):
        return {}
    anchors.expect(f"{prefix}strides", value=(4, 8, 16, 32, 64))
    fields = {"anchor_ratios": to_numbers(anchors.take(f"{prefix}ratios"))}
    if "octave_base_scale" in anchors:
        anchors.expect("scales_per_octave", value=1)
        anchors.ignore("scales")
        fields["anchor_scale"] = anchors.take("octave_base_scale")
    else:
        anchors.ignore("scales_per_octave")
        scales = anchors.take(f"{prefix}scales")
        if isinstance(scales, list | tuple) and len(scales) == 1:
            fields["anchor_scale"] = scales[0]
        elif scales is not None:
            anchors.problems.append(f"{anchors.path}.{prefix}scales: expected one number, got {shown(scales)}")
    if not prefix:
        anchors.expect("center_offset", value=0, default=0)
        anchors.ignore("scale_major", "use_box_type")  # of one scale, the order of scales does not matter
        anchors.finish()  # base_sizes and centers must be None
    return fields


def _check_coder(head: Settings, stds: tuple[float, ...]) -> None:
    """Compare how a head expresses boxes."""
    means = (0.0, 0.0, 0.0, 0.0)
    coder = head
    if "bbox_coder" in head:
        coder = head.part("bbox_coder")
        if not coder.expect_type("DeltaXYWHBBoxCoder"):
            return
        coder.expect("clip_border", value=True, default=True)
        coder.expect("add_ctr_clamp", value=False, default=False)
        coder.ignore("ctr_clamp", "use_box_type")
    coder.expect("target_means", value=means, default=means)
    is_rpn = head.path.endswith("rpn_head")
    default_stds = (1.0,) * 4 if is_rpn or coder is not head else CASCADE_DELTA_STDS[0]
    coder.expect("target_stds", value=stds, default=default_stds)
    if coder is not head:
        coder.finish()


def _read_roi_head(roi_head: Settings) -> dict[str, Any]:
    kind = roi_head.expect_type("StandardRoIHead", "BaseRoIHead", "CascadeRoIHead")  # the second until April 2020
    cascade = kind == "CascadeRoIHead"
    if not kind:
        return {"cascade": cascade, "mask": "mask_head" in roi_head}
    roi_head.ignore("stage_loss_weights", "init_cfg", "train_cfg", "test_cfg", "pretrained")
    fields = _read_heads(roi_head, cascade)
    roi_head.finish()
    return fields


def _read_heads(parent: Settings, cascade: bool) -> dict[str, Any]:
    """Return the fields of the heads and of the layers that pool for them, which are settings of `parent`."""
    fields: dict[str, Any] = {"cascade": cascade, "mask": "mask_head" in parent}
    stages = 1
    if cascade:
        stages = len(CASCADE_DELTA_STDS)
        parent.expect("num_stages", value=stages)

    for extractor in _stages(parent, "bbox_roi_extractor", stages):
        layers = tuple(name for name, layer in ROI_LAYERS.items() if layer == fields.get("roi_layer", layer))
        fields |= _read_extractor(extractor, 7, layers, fields)
    heads = _stages(parent, "bbox_head", stages)
    for stds, head in zip(CASCADE_DELTA_STDS, heads, strict=False):
        fields |= _read_box_head(head, stds, fields)
    if fields["mask"]:
        for extractor in _stages(parent, "mask_roi_extractor", stages):
            _read_extractor(extractor, 14, ("RoIAlign",), fields)
        for head in _stages(parent, "mask_head", stages):
            _check_mask_head(head, fields)
    else:
        parent.ignore("mask_roi_extractor", "mask_head")
    return fields


def _stages(parent: Settings, name: str, count: int) -> list[Settings]:
    """Return the settings of each stage of a cascade, which are a list or, where they are the same, one dict."""
    value = parent.take(name)
    path = f"{parent.path}.{name}"
    if count == 1 or not isinstance(value, list | tuple):
        return [Settings(value, path, parent.problems)]
    if len(value) != count:
        parent.problems.append(f"{path}: expected {count} stages, got {len(value)}")
    return [Settings(stage, f"{path}[{index}]", parent.problems) for index, stage in enumerate(value[:count])]


def _read_extractor(
    extractor: Settings, size: int, layers: tuple[str, ...], fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `roi_layer` and `roi_sampling_ratio` of an extractor.

    Args:
        extractor: its settings.
        size: bins per side that its layer must have.
        layers: types that its layer may have.
        fields: those of the extractors before it, which must have the same sampling ratio.
    """
    if not extractor.expect_type("SingleRoIExtractor"):
        return {}
    extractor.expect("featmap_strides", value=(4, 8, 16, 32))
    extractor.expect("finest_scale", value=56, default=56)
    extractor.ignore("out_channels", "init_cfg")
    layer = extractor.part("roi_layer")
    extractor.finish()

    kind = layer.expect_type(*layers)
    if not kind:
        return {}
    layer.expect("output_size", "out_size", value=size)
    ratio = fields.get("roi_sampling_ratio", 0)
    if "Pooling" not in kind:
        ratio = fields.get("roi_sampling_ratio", layer.take("sampling_ratio", "sample_num", default=0))
        layer.expect("sampling_ratio", "sample_num", value=ratio, default=0)
    if kind == "RoIAlign":
        layer.expect("aligned", value=True, default=True)
        layer.expect("pool_mode", value="avg", default="avg")
        layer.ignore("use_torchvision")
    elif "Pooling" in kind:
        layer.expect("no_trans", value=False, default=False)
        layer.expect("group_size", value=1, default=1)
        layer.expect("trans_std", value=0.1, default=0.0)
        layer.ignore("out_channels", "deform_fc_channels", "part_size", "sample_per_part", "num_offset_fcs")
        layer.ignore("num_mask_fcs")
    else:
        layer.expect("gamma", value=0.1, default=0.1)
        layer.ignore("output_channels", "deform_fc_channels")
    layer.finish()
    return {"roi_layer": ROI_LAYERS[kind], "roi_sampling_ratio": ratio}


def _read_box_head(head: Settings, stds: tuple[float, ...], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a box head; `fields` are those that are known: of the stages before it, for example."""
    kind = head.expect_type("Shared2FCBBoxHead", "SharedFCBBoxHead")
    if not kind:
        return {}
    if kind == "SharedFCBBoxHead":  # before MMDetection 2.0
        head.expect("num_fcs", value=2, default=2)
    head.expect("roi_feat_size", value=7, default=7)
    head.expect("reg_class_agnostic", value=fields["cascade"], default=False)
    head.expect("with_avg_pool", value=False, default=False)
    head.expect("with_cls", value=True, default=True)
    head.expect("with_reg", value=True, default=True)
    for name in ("cls_predictor_cfg", "reg_predictor_cfg"):
        head.expect(name, value={"type": "Linear"}, default={"type": "Linear"})
    head.ignore("in_channels", "loss_bbox", "reg_decoded_bbox", "init_cfg")
    loss = head.part("loss_cls", default={"type": "CrossEntropyLoss", "use_sigmoid": False})
    loss.expect_type("CrossEntropyLoss")  # other losses come with other scores
    loss.expect("use_sigmoid", value=False, default=False)
    _check_coder(head, stds)

    new = {
        "num_classes": head.take("num_classes", default=80),
        "fc_channels": head.take("fc_out_channels", default=1024),
    }
    for name, setting in (("num_classes", "num_classes"), ("fc_channels", "fc_out_channels")):
        if name in fields and not is_same(new[name], fields[name]):
            head.problems.append(f"{head.path}.{setting}: expected {shown(fields[name])}, got {shown(new[name])}")
    head.finish()
    return new


def _check_mask_head(head: Settings, fields: Mapping[str, Any]) -> None:
    if not head.expect_type("FCNMaskHead"):
        return
    head.expect("num_convs", value=4, default=4)
    head.expect("conv_kernel_size", value=3, default=3)
    head.expect("class_agnostic", value=False, default=False)
    head.expect("predictor_cfg", value={"type": "Conv"}, default={"type": "Conv"})
    upsample = head.part("upsample_cfg", default={"type": "deconv"})
    upsample.expect("type", value="deconv")
    upsample.expect("scale_factor", value=2, default=2)
    head.expect("upsample_method", value="deconv", default="deconv")  # both before MMDetection 2.0
    head.expect("upsample_ratio", value=2, default=2)
    head.expect("num_classes", value=fields.get("num_classes"), default=80)
    head.ignore("in_channels", "conv_out_channels", "roi_feat_size", "loss_mask", "init_cfg")
    head.finish()  # conv_cfg and norm_cfg must be None


def _find_pipeline(values: Mapping[str, Any]) -> Pipeline:
    """Return the transforms of the images to detect in, flattened; nothing if a config has none."""
    places = (
        ("test_dataloader", "dataset", "pipeline"),
        ("val_dataloader", "dataset", "pipeline"),
        ("data", "test", "pipeline"),
        ("data", "val", "pipeline"),
        ("test_pipeline",),
    )
    for place in places:
        pipeline = _at(values, *place)
        if isinstance(pipeline, list | tuple) and pipeline:
            return list(_flatten(pipeline, ".".join(place)))
    return []


def _flatten(pipeline: list[Any] | tuple[Any, ...], path: str) -> Iterator[tuple[str, Any]]:
    """Yield the transforms of a pipeline, and behind one that applies others these."""
    for index, transform in enumerate(pipeline):
        name = f"{path}[{index}]"
        yield name, transform
        inner = _at(transform, "transforms")
        if isinstance(inner, list | tuple):
            yield from ((f"{name}.transforms[{number}]", value) for number, value in enumerate(inner))


def _type_of(transform: Any) -> str:
    kind = _at(transform, "type")
    return kind.rpartition(".")[2] if isinstance(kind, str) else ""


def _find_normalization(values: Mapping[str, Any], pipeline: Pipeline) -> tuple[str, Any] | None:
    """Return path and settings of what normalizes images: in the model since MMDetection 3, else a transform."""
    for place in (("model", "data_preprocessor"), ("data_preprocessor",)):
        preprocessor = _at(values, *place)
        if preprocessor is not None:
            return ".".join(place), preprocessor
    for path, transform in pipeline:
        if _type_of(transform) == "Normalize":
            return path, transform
    normalization = values.get("img_norm_cfg")
    return None if normalization is None else ("img_norm_cfg", normalization)


def _is_bgr(path: str, normalization: Any) -> bool:
    """Tell whether images, which are read as blue, green, red, stay so."""
    settings = Settings(normalization, path, [])
    if path.endswith("data_preprocessor"):
        flags = [settings.take(name, default=False) for name in ("bgr_to_rgb", "rgb_to_bgr")]  # both turn the order
        return flags == [False, False]
    return settings.take("to_rgb", default=True) is False


def _read_normalization(values: Mapping[str, Any], pipeline: Pipeline, problems: list[str]) -> dict[str, Any]:
    """Return mean and deviation in the order red, green, blue."""
    found = _find_normalization(values, pipeline)
    if found is None:
        problems.append("model.data_preprocessor: expected mean and std of images, or a transform Normalize, got none")
        return {}
    path, normalization = found
    settings = Settings(normalization, path, problems)
    mean = to_numbers(settings.take("mean", default=None))
    std = to_numbers(settings.take("std", default=None))
    if path.endswith("data_preprocessor"):
        settings.expect_type("DetDataPreprocessor", default="DetDataPreprocessor")
        settings.expect("pad_size_divisor", value=32, default=1)
        settings.expect("pad_value", value=0, default=0)
        for name in ("bgr_to_rgb", "rgb_to_bgr"):
            _expect_flag(settings, name, default=False)
        settings.ignore("pad_mask", "mask_pad_value", "pad_seg", "seg_pad_value", "boxtype2tensor", "non_blocking")
        settings.ignore("batch_augments")  # of training
        if any(_type_of(transform) == "Normalize" for _, transform in pipeline):
            problems.append(f"{path}: expected to normalize images alone, got a transform Normalize too")
    else:
        settings.ignore("type")
        _expect_flag(settings, "to_rgb", default=True)
    settings.finish()

    if mean is None and std is None:
        mean, std = (0.0,) * 3, (1.0,) * 3
    if _is_bgr(*found):
        mean, std = (value[::-1] if isinstance(value, tuple) else value for value in (mean, std))
    return {"pixel_mean": mean, "pixel_std": std}


def _expect_flag(settings: Settings, name: str, default: bool) -> None:
    """List a setting that is neither True nor False."""
    value = settings.take(name, default=default)
    if not isinstance(value, bool):
        settings.problems.append(f"{settings.path}.{name}: expected True or False, got {shown(value)}")


def _read_dataset(values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the size of images in configs before July 2019: the data set has the settings of its only pipeline.

    Without them nothing is known.
    """
    for split in ("test", "val"):
        dataset = _at(values, "data", split)
        if _at(dataset, "img_scale") is not None:
            settings = Settings(dataset, f"data.{split}", problems)
            settings.expect("size_divisor", value=32, default=None)
            settings.expect("flip_ratio", value=0, default=0)
            settings.expect("resize_keep_ratio", value=True, default=True)
            return {"image_scale": _to_scale(settings.take("img_scale"))}
    return {}


def _read_pipeline(pipeline: Pipeline, problems: list[str]) -> dict[str, Any]:
    """Return the size of images; compare everything else that happens to them."""
    kinds = [_type_of(transform) for _, transform in pipeline]
    is_version_3 = "PackDetInputs" in kinds
    scale: Any = None
    for kind, (path, transform) in zip(kinds, pipeline, strict=True):
        settings = Settings(transform, path, problems)
        if not settings.expect_type(*_TRANSFORMS):
            continue
        if kind == "MultiScaleFlipAug":
            scale = settings.take("img_scale")
            settings.expect("flip", value=False, default=False)
            settings.ignore("flip_direction", "transforms")
        elif kind == "Resize":
            scale = settings.take("scale", "img_scale", default=scale)
            settings.expect("keep_ratio", value=True, default=not is_version_3)
            settings.expect("interpolation", value="bilinear", default="bilinear")
            settings.expect("backend", value="cv2", default="cv2")
            settings.ignore("multiscale_mode", "clip_object_border", "override", "bbox_clip_border")
        elif kind == "Pad":
            settings.expect("size_divisor", value=32)
            if not is_same(settings.take("pad_val", default=0), 0):
                pad = settings.part("pad_val")
                pad.expect("img", value=0, default=0)
        elif kind == "LoadImageFromFile":
            settings.expect("to_float32", value=False, default=False)
            settings.expect("color_type", value="color", default="color")
            settings.expect("channel_order", value="bgr", default="bgr")
            settings.expect("imdecode_backend", value="cv2", default="cv2")
            settings.ignore("file_client_args", "backend_args", "ignore_empty")
        elif kind == "RandomFlip" and is_version_3:
            settings.expect("prob", value=0, default=None)
        else:
            settings.ignore(*map(str, settings.values))
        settings.finish()

    if "Normalize" in kinds and "Pad" not in kinds:
        problems.append(f"{_path_of(pipeline)}: expected a transform Pad with size_divisor 32, got none")
    if "Resize" not in kinds:
        problems.append(f"{_path_of(pipeline)}: expected a transform Resize, got none")
        return {}
    return {"image_scale": _to_scale(scale)}


_TRANSFORMS = (
    "LoadImageFromFile",
    "LoadAnnotations",
    "MultiScaleFlipAug",
    "Resize",
    "RandomFlip",
    "Normalize",
    "Pad",
    "ImageToTensor",
    "DefaultFormatBundle",
    "Collect",
    "PackDetInputs",
)


def _path_of(pipeline: Pipeline) -> str:
    return pipeline[0][0].removesuffix("[0]")


def _to_scale(scale: Any) -> Any:
    """Return a size as (long side, short side); what is none is left as it is, for a message."""
    if isinstance(scale, list | tuple) and len(scale) == 1 and isinstance(scale[0], list | tuple):
        scale = scale[0]
    if isinstance(scale, list | tuple) and len(scale) == 2 and all(type(side) is int for side in scale):
        return max(scale), min(scale)
    return scale


def _test_settings(values: Mapping[str, Any], name: str, problems: list[str]) -> Settings:
    """Return `train_cfg` or `test_cfg` of the model; MMDetection 2 had them beside it.

    Version 3 has there other settings, of its loops, under the same names.
    """
    inside = _at(values, "model", name)
    if inside is not None:
        return Settings(inside, f"model.{name}", problems)
    beside = values.get(name)
    if name == "train_cfg" and (beside is None or "type" in beside):
        return Settings({}, f"model.{name}", problems)
    return Settings(beside, name, problems)


def _read_thresholds(values: Mapping[str, Any], mask: bool, problems: list[str]) -> dict[str, Any]:
    """Return the fields of the detection."""
    test = _test_settings(values, "test_cfg", problems)
    rpn = test.part("rpn")
    rpn.expect("nms_across_levels", value=False, default=False)
    rpn.expect("min_bbox_size", value=0, default=-1)
    top_n = rpn.take("max_per_img", "max_num")
    per_level = rpn.take("nms_post", default=top_n)  # boxes that each level keeps; all of them since version 2.4
    if isinstance(per_level, int) and isinstance(top_n, int) and per_level < top_n:
        problems.append(f"{rpn.path}.nms_post: expected at least {top_n}, as many as of all levels, got {per_level}")
    fields = {
        "rpn_pre_nms_top_n": rpn.take("nms_pre"),
        "rpn_post_nms_top_n": top_n,
        "rpn_nms_iou": rpn.take("nms_thr") if "nms_thr" in rpn else _read_nms(rpn.part("nms")),
    }
    rpn.finish()

    rcnn = test.part("rcnn")
    fields |= {
        "score_threshold": rcnn.take("score_thr"),
        "max_detections": rcnn.take("max_per_img"),
        "nms_iou": _read_nms(rcnn.part("nms")),
    }
    if mask:
        rcnn.expect("mask_thr_binary", value=0.5)
    rcnn.ignore("mask_thr_binary")
    rcnn.finish()

    training = _at(_test_settings(values, "train_cfg", []).values, "rpn_proposal", "nms_pre")
    in_training = training if isinstance(training, int) else 2000
    fields["rpn_pre_nms_top_n"] = (in_training, fields["rpn_pre_nms_top_n"])
    return fields


def _read_nms(nms: Settings) -> Any:
    """Return the threshold of a non-maximum suppression."""
    if not nms.expect_type("nms", default="nms"):
        return None
    threshold = nms.take("iou_threshold", "iou_thr", "nms_thr")
    nms.expect("class_agnostic", value=False, default=False)
    nms.ignore("split_thr")  # beyond which boxes the classes are suppressed one after the other
    nms.finish()  # max_num, score_threshold, ...
    return threshold


def _read_training(values: Mapping[str, Any], cascade: bool, problems: list[str]) -> dict[str, Any]:
    """Return the fields of training that a config has; of a cascade those of its first stage."""
    training = _test_settings(values, "train_cfg", problems).values
    rpn = _at(training, "rpn")
    rcnn = _at(training, "rcnn")
    if cascade and isinstance(rcnn, list | tuple) and rcnn:
        rcnn = rcnn[0]
    fields = {
        "rpn_positive_iou": _at(rpn, "assigner", "pos_iou_thr"),
        "rpn_negative_iou": _at(rpn, "assigner", "neg_iou_thr"),
        "rpn_batch_size": _at(rpn, "sampler", "num"),
        "rpn_positive_fraction": _at(rpn, "sampler", "pos_fraction"),
        "roi_positive_iou": _at(rcnn, "assigner", "pos_iou_thr"),
        "roi_batch_size": _at(rcnn, "sampler", "num"),
        "roi_positive_fraction": _at(rcnn, "sampler", "pos_fraction"),
    }
    return {name: value for name, value in fields.items() if value is not None}
