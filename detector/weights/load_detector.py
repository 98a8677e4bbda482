"""Builds a detector from one checkpoint file: its configuration and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from detector.model.config import FasterRCNNConfig, rename_fields
from detector.model.faster_rcnn import FasterRCNN, default_class_names
from detector.text import shown
from detector.weights.checkpoint import Checkpoint, list_names, read_checkpoint
from detector.weights.load_weights import (
    CLASSIFIER,
    CLASSIFIERS,
    class_order_message,
    count_channels,
    count_classes,
    find_classifiers,
    has_version_1_names,
    is_background_first,
    match_weights,
)
from detector.weights.mmdet_config import MMDetectionConfig, differences_message, read_mmdet_config
from detector.weights.settings import is_same

DEPTHS: dict[tuple[int, int], Literal[18, 50, 101]] = {(2, 2): 18, (6, 3): 50, (23, 3): 101}
"""(blocks in layer3, convolutions in a block) -> depth."""

SHOWN_BY_WEIGHTS = (
    "depth",
    "num_classes",
    "dcn",
    "dcn_stages",
    "deform_groups",
    "groups",
    "width_per_group",
    "mask",
    "cascade",
    "roi_layer",
    "fpn_channels",
    "fc_channels",
)
"""Fields that `infer_config` finds in names and shapes, and an MMDetection config has, too."""


def load(path: str | Path, device: torch.device | str | None = None) -> tuple[FasterRCNN, list[str]]:
    """Build the model that a checkpoint was written from, with its weights, ready to detect.

        model, class_names = detector.load("best.pt")
        found = model.predict("photograph.jpg")

    Files of this project hold the configuration. MMDetection's files hold the text of its config: normalization,
    thresholds and sizes are taken from it, and a setting that this package does not have is an error. The architecture
    is inferred from the names and shapes of the weights, and must be that of the text. In a file of weights alone the
    rest is as in the defaults of `FasterRCNNConfig`.

    Args:
        path: a checkpoint of training, a `.safetensors` file of `save_weights`, or an MMDetection file.
        device: where to put the model; default: the GPU if there is one.

    Returns:
        The model in evaluation mode and the class names by label, which are also `model.class_names`. Where the file
        has no names they are "class 0", ...

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is damaged, not a checkpoint of a detector or of another one than this package has, or the
            device is not there; the message names the file or the device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)  # first, because it takes less time than reading the file
    return build_detector(read_checkpoint(path), device)


def build_detector(checkpoint: Checkpoint, device: torch.device | str) -> tuple[FasterRCNN, list[str]]:
    """Do `load` with a file that has been read."""
    path = checkpoint.path
    if not is_detector(checkpoint):
        if checkpoint.mmdet_config is not None:
            _read_mmdet_config(checkpoint)  # which names the model if it is another one
        if has_version_1_names(checkpoint.state):
            raise ValueError(class_order_message(checkpoint.path))
        raise ValueError(f"{path}: expected the weights of a whole detector, got a file without {CLASSIFIER}")
    config = find_config(checkpoint)
    class_names = checkpoint.classes
    if class_names is None:
        class_names = default_class_names(config.num_classes)
    if len(class_names) != config.num_classes:
        raise ValueError(
            f"{path}: expected {config.num_classes} class names, one per class of its weights, got {len(class_names)}"
        )

    state, _ = match_weights(make_skeleton(config, path), checkpoint)
    model = FasterRCNN(config)
    model.load_state_dict(state, strict=False)
    model.class_names = tuple(class_names)
    return model.to(device).eval(), list(class_names)


def is_detector(checkpoint: Checkpoint) -> bool:
    """Tell whether a file has the weights of a whole detector, and not those of a backbone alone."""
    return bool(find_classifiers(checkpoint.state))


def find_config(checkpoint: Checkpoint) -> FasterRCNNConfig:
    """Return the configuration of the detector in a file: the one it holds, else what its weights show.

    Raises:
        ValueError: the configuration is not one of this version, or has another number of classes than the weights, or
            the file is of another architecture; the message names the file.
    """
    if checkpoint.mmdet_config is not None:
        return _find_mmdet_config(checkpoint)
    try:
        config = infer_config(checkpoint.state) if checkpoint.config is None else stored_config(checkpoint.config)
        num_classes = count_classes(checkpoint.state)
        if num_classes != config.num_classes:
            raise ValueError(
                f"expected weights of {config.num_classes} classes, as its configuration says, got {num_classes}"
            )
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error
    return config


def _read_mmdet_config(checkpoint: Checkpoint) -> MMDetectionConfig:
    """Return what the MMDetection config of a file says, if this package has all of it."""
    assert checkpoint.mmdet_config is not None
    config = read_mmdet_config(checkpoint.mmdet_config)
    problems = config.network_problems + config.other_problems
    if problems:
        raise ValueError(f"{checkpoint.path}: {differences_message(problems)}")
    return config


def _find_mmdet_config(checkpoint: Checkpoint) -> FasterRCNNConfig:
    """Return the configuration of an MMDetection file with a config: its values, where they agree with the weights."""
    says = _read_mmdet_config(checkpoint)
    if is_background_first(checkpoint.state):
        raise ValueError(class_order_message(checkpoint.path))
    try:
        inferred = infer_config(checkpoint.state, dcn=says.network["dcn"])
        network = says.network
        if says.may_count_background and is_same(network["num_classes"], inferred.num_classes + 1):
            network = network | {"num_classes": inferred.num_classes}
        config = replace(inferred, **network, **says.others)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error
    for name in SHOWN_BY_WEIGHTS:
        expected = getattr(config, name)
        got = getattr(inferred, name)
        if expected != got:
            raise ValueError(
                f"{checkpoint.path}: {name}: expected weights of {expected}, as its MMDetection config says, got {got}"
            )
    return config


def make_skeleton(config: FasterRCNNConfig, path: Path) -> FasterRCNN:
    """Build a model without memory for its weights, to see whether those of a file fit what the file claims.

    Raises:
        ValueError: there is no such network; the message names the file.
    """
    try:
        with torch.device("meta"):
            return FasterRCNN(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def infer_config(state: Mapping[str, Tensor], dcn: str | None = None) -> FasterRCNNConfig:
    """Infer the architecture from the names and shapes of a detector's weights.

    Args:
        state: state dict under MMDetection's names.
        dcn: version of the deformable convolutions if it is known, "v1" or "v2". The shapes show it, but for layers
            of 54 channels, say: version 2 with two groups of offsets, or version 1 with three.

    Returns:
        The configuration; fields that the weights do not show (thresholds, frozen stages) have their defaults.

    Raises:
        ValueError: the weights are not those of a ResNet 18, 50 or 101 with FPN and two fully connected layers.
    """
    num_blocks = 0
    while f"backbone.layer3.{num_blocks}.conv1.weight" in state:
        num_blocks += 1
    num_convs = 3 if "backbone.layer3.0.conv3.weight" in state else 2
    depth = DEPTHS.get((num_blocks, num_convs))
    if depth is None:
        raise ValueError(f"weights: expected a ResNet of depth {sorted(DEPTHS.values())}, got another backbone")

    cascade = CLASSIFIERS[0] in state
    stage = "0." if cascade else ""
    return FasterRCNNConfig(
        depth=depth,
        num_classes=count_classes(state),
        mask=f"roi_head.mask_head.{stage}conv_logits.weight" in state,
        cascade=cascade,
        roi_layer=_infer_roi_layer(state, stage),
        norm="bn" if "backbone.bn1.running_mean" in state else "gn",
        base_channels=count_channels(state, "backbone.conv1.weight"),
        fpn_channels=count_channels(state, "neck.fpn_convs.0.conv.weight"),
        fc_channels=count_channels(state, f"roi_head.bbox_head.{stage}shared_fcs.0.weight"),
        **_infer_groups(state),
        **_infer_deformable_fields(state, dcn),
    )


def _infer_roi_layer(state: Mapping[str, Tensor], stage: str) -> Literal["align", "dpool", "mdpool"]:
    """Return `roi_layer`; `stage` is the part of the names that stands for the first stage of a cascade."""
    layer = f"roi_head.bbox_roi_extractor.{stage}roi_layers.0"
    if f"{layer}.mask_fc.0.weight" in state:
        return "mdpool"
    return "dpool" if f"{layer}.offset_fc.0.weight" in state else "align"


def _infer_groups(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return `groups` and `width_per_group`: a convolution in groups has as many input channels as one group."""
    name = "backbone.layer1.0.conv2.weight"
    width = count_channels(state, name)
    stem = count_channels(state, "backbone.conv1.weight")
    in_channels = state[name].shape[1] if state[name].dim() > 1 else 0
    if not in_channels or width % in_channels or not stem:
        raise ValueError(f"weights: expected {name} of a convolution in groups, got {tuple(state[name].shape)}")
    groups = width // in_channels
    return {"groups": groups, "width_per_group": 64 * in_channels // stem}


def _infer_deformable_fields(state: Mapping[str, Tensor], dcn: str | None) -> dict[str, Any]:
    """Return `dcn`, `dcn_stages` and `deform_groups` of a `FasterRCNNConfig`."""
    names = [f"backbone.layer{stage}.0.conv2.conv_offset.weight" for stage in range(1, 5)]
    dcn_stages = tuple(name in state for name in names)
    if not any(dcn_stages):
        return {"dcn": None, "dcn_stages": dcn_stages}

    # Per group and tap of the 3x3 kernel: two offsets and a mask (version 2), or two offsets alone (version 1).
    channels = next(count_channels(state, name) for name in names if name in state)
    if channels % 27 == 0 and not (dcn == "v1" and channels % 18 == 0):
        return {"dcn": "v2", "dcn_stages": dcn_stages, "deform_groups": channels // 27}
    return {"dcn": "v1", "dcn_stages": dcn_stages, "deform_groups": max(channels // 18, 1)}


def _check_device(device: torch.device | str) -> None:
    """Raise ValueError if nothing can be computed on the device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"device: cannot compute on {str(device)!r}: {first_line}") from error


def stored_config(stored: Mapping[str, Any]) -> FasterRCNNConfig:
    """Rebuild a model's configuration from plain values, as checkpoints and `config.json` files hold them.

    Args:
        stored: its fields, with present or former names; or those of a run, of which it is the field "model".

    Raises:
        ValueError: a field is unknown, of another type or out of its range.
    """
    model = stored.get("model", stored)
    if not isinstance(model, Mapping):
        raise ValueError(f"expected `model` in its configuration to be a dict, got {shown(model)}")
    values = rename_fields(model)
    known = {field.name for field in fields(FasterRCNNConfig)}
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(
            f"unknown fields in its configuration of the model: {list_names(unknown)}; "
            "a newer version of this package wrote it"
        )
    return FasterRCNNConfig(**{name: _to_tuples(value) for name, value in values.items()})


def _to_tuples(value: Any) -> Any:
    """Turn lists back into the tuples that they were before JSON."""
    if isinstance(value, list):
        return tuple(_to_tuples(item) for item in value)
    return value
