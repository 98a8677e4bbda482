"""Copies the weights of a file into a model, name by name, and sums up which names were loaded and which were not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detector.model.faster_rcnn import FasterRCNN
from detector.text import plural, shown
from detector.weights.checkpoint import Checkpoint, list_names, read_checkpoint
from detector.weights.mmdet_config import differences_message, read_mmdet_config
from detector.weights.settings import is_same

STAGES = range(3)  # of a cascade
CONVERTER = "tools/model_converters/upgrade_model_version.py"
HEADS = (  # the layers whose size is the number of classes
    "roi_head.bbox_head.fc_cls",
    "roi_head.bbox_head.fc_reg",
    "roi_head.mask_head.conv_logits",
    *(f"roi_head.bbox_head.{stage}.fc_cls" for stage in STAGES),  # boxes of a cascade do not depend on the class
    *(f"roi_head.mask_head.{stage}.conv_logits" for stage in STAGES),
)
CLASSIFIER = "roi_head.bbox_head.fc_cls.weight"  # (classes + 1, hidden): the last row is background
CLASSIFIERS = tuple(f"roi_head.bbox_head.{stage}.fc_cls.weight" for stage in STAGES)  # those of a cascade
VERSION_1_CLASSIFIERS = ("bbox_head.fc_cls.weight", "bbox_head.0.fc_cls.weight")  # names in MMDetection 1
INPUT_FIELDS = ("pixel_mean", "pixel_std", "anchor_scale", "anchor_ratios", "roi_sampling_ratio")
"""Fields of the model that its weights are made for, though no name and no shape shows it."""


@dataclass(frozen=True)
class LoadSummary:
    """Which weights were loaded and which were not; `str()` gives one line for each kind.

    Attributes:
        path: the file.
        loaded: names of the model that took their values from the file.
        missing: names of the model that the file does not have: they keep the values they had.
        unexpected: names of the file that the model does not have.
        skipped: names of the file left out on purpose.
    """

    path: Path
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.path}: {plural(len(self.loaded), 'tensor')} loaded"]
        skipped = set(self.skipped)
        not_taken = [name for name in self.missing if name in skipped]
        kinds = {
            "in the file but not taken, left as they were": not_taken,
            "missing in the file, left as they were": [name for name in self.missing if name not in skipped],
            "unexpected, not used": self.unexpected,
            "skipped": [name for name in self.skipped if name not in not_taken],
        }
        for kind, names in kinds.items():
            if names:
                lines.append(f"  {len(names)} {kind}: {list_names(names)}")
        return "\n".join(lines)


def find_classifiers(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of the weights that classify: one, those of the stages of a cascade, or none."""
    if CLASSIFIER in state:
        return (CLASSIFIER,)
    return CLASSIFIERS if CLASSIFIERS[0] in state else ()


def count_classes(state: Mapping[str, Tensor]) -> int:
    """Return the number of classes of a detector's weights; its classifiers have one more, the background."""
    names = find_classifiers(state) or (CLASSIFIER,)
    counts = [count_channels(state, name) - 1 for name in names]
    if len(set(counts)) > 1:
        raise ValueError(f"weights: expected one number of classes in all stages, got {counts}")
    return counts[0]


def has_version_1_names(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a detector's heads have the names of MMDetection 1, where the first class is the background."""
    return any(name in state for name in VERSION_1_CLASSIFIERS)


def is_background_first(state: Mapping[str, Tensor]) -> bool:
    """Tell whether heads under present names are of MMDetection before 2.0, with the background as their first class.

    They then have boxes or masks of the background, too.
    """
    for classifier in find_classifiers(state):
        count = count_channels(state, classifier)
        boxes = state.get(classifier.replace("fc_cls", "fc_reg"))
        masks = state.get(classifier.replace("bbox_head", "mask_head").replace("fc_cls", "conv_logits"))
        for head, channels in ((boxes, 4 * count), (masks, count)):
            if head is not None and head.dim() and len(head) == channels:
                return True
    return False


def class_order_message(path: Path) -> str:
    """Return the message about a file whose classes are in the order of MMDetection 1."""
    return (
        f"{path}: expected heads of MMDetection 2 or 3, whose last class is the background, got heads of version 1, "
        f"whose first class it is: convert the file with MMDetection's {CONVERTER}"
    )


def count_channels(state: Mapping[str, Tensor], name: str) -> int:
    """Return the number of output channels of a layer, given the name of its weight.

    Raises:
        ValueError: there is no such weight, or it is a single number.
    """
    if name not in state or not state[name].dim():
        raise ValueError(f"weights: expected {name} with at least one dimension, got none")
    return len(state[name])


def load_weights(model: nn.Module, path: str | Path, *, strict: bool = True, skip_heads: bool = False) -> LoadSummary:
    """Load a file of MMDetection, torchvision or this project into a detector or a backbone.

    A torchvision ResNet file (trained on ImageNet) is loaded into the backbone without its classifier. Layers that such
    a network does not have, those that predict offsets and the rest of the detector, keep their values. Any other file
    must have the names of the model. After an error the model is unchanged.

    Args:
        model: a `FasterRCNN`, or for a torchvision file also a `ResNet`.
        path: the file, see `detector.weights.checkpoint.read_checkpoint`.
        strict: raise if names are missing or unexpected, or if the configuration in the file says that the weights are
            for other images or anchors, or for a network that computes something else. Shapes must agree in any case.
        skip_heads: leave out the last layers, whose size is the number of classes; for fine-tuning to other classes.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is damaged or not a checkpoint, or it does not fit; the message names the file and the
            weights.
    """
    checkpoint = read_checkpoint(path)
    if strict and isinstance(model, FasterRCNN):
        check_input(model, checkpoint)
    return copy_weights(model, checkpoint, strict=strict, skip_heads=skip_heads)


def check_input(model: FasterRCNN, checkpoint: Checkpoint) -> None:
    """Compare what a file says of its images and anchors with what a model does with them.

    Raises:
        ValueError: they differ, or the file is of a network that this package does not have; the message names the
            file and the field.
    """
    says: Mapping[str, Any] = {}
    if checkpoint.config is not None:
        stored = checkpoint.config.get("model", checkpoint.config)
        says = stored if isinstance(stored, Mapping) else {}
    elif checkpoint.mmdet_config is not None:
        config = read_mmdet_config(checkpoint.mmdet_config)
        if config.network_problems:
            raise ValueError(f"{checkpoint.path}: {differences_message(config.network_problems)}")
        says = config.network
    for name in INPUT_FIELDS:
        expected = getattr(model.config, name)
        if name in says and not is_same(says[name], expected):
            raise ValueError(
                f"{checkpoint.path}: {name}: expected {expected}, as the model has, got {shown(says[name])}"
            )


def copy_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    strict: bool = True,
    skip_heads: bool = False,
    new_layers: Sequence[str] = (),
) -> LoadSummary:
    """Copy a checkpoint that has been read into a model; arguments and errors as of `match_weights`."""
    state, summary = match_weights(model, checkpoint, strict=strict, skip_heads=skip_heads, new_layers=new_layers)
    model.load_state_dict(state, strict=False)
    return summary


def match_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    strict: bool = True,
    skip_heads: bool = False,
    new_layers: Sequence[str] = (),
) -> tuple[dict[str, Tensor], LoadSummary]:
    """Find the weights of a model in a checkpoint; other arguments and errors as of `load_weights`.

    Args:
        model: only its names, shapes and dtypes are used, so it may be on the meta device, where it takes no memory.
        new_layers: parts of names. Such layers take from the file what has their shape, and keep their values where it
            has nothing that fits; what the model has no place for is left out.

    Returns:
        The state dict to load, and what is in it.
    """
    model_state = model.state_dict()
    state = checkpoint.state
    if (strict and has_version_1_names(state)) or (not skip_heads and is_background_first(state)):
        raise ValueError(class_order_message(checkpoint.path))
    skipped = list(checkpoint.dropped)

    from_imagenet = "conv1.weight" in state and "layer1.0.conv1.weight" in state
    if from_imagenet:
        state, classifier = _split(state, ("fc.",))
        skipped += classifier
        if "backbone.conv1.weight" in model_state:
            state = {f"backbone.{name}": value for name, value in state.items()}

    # The averaged weights of MMDetection 2 have underscores where the names of the model have dots.
    dotted = {name.replace(".", "_"): name for name in model_state}
    state = {dotted.get(name, name): value for name, value in state.items()}
    if skip_heads:
        state, heads = _split(state, HEADS)
        skipped += heads
    state, without_place = _drop_misfits(state, model_state, new_layers)
    skipped += without_place

    _check_shapes(checkpoint.path, model_state, state)
    loaded = [name for name in model_state if name in state]
    missing = [name for name in model_state if name not in state]
    unexpected = [name for name in state if name not in model_state]
    if strict:
        not_optional = [name for name in missing if not _is_optional(name, from_imagenet, skip_heads, new_layers)]
        if not_optional or unexpected:
            raise ValueError(
                f"{checkpoint.path} does not fit the model: "
                f"names missing in the file: {len(not_optional)} ({list_names(not_optional) or 'none'}), "
                f"unknown to the model: {len(unexpected)} ({list_names(unexpected) or 'none'})"
            )

    matched = {name: state[name] for name in loaded}
    _check_values(checkpoint.path, model_state, matched)
    summary = LoadSummary(
        path=checkpoint.path,
        loaded=tuple(loaded),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        skipped=tuple(skipped),
    )
    return matched, summary


def _split(state: dict[str, Tensor], prefixes: tuple[str, ...]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights whose names have none of the prefixes, and the names of the others."""
    kept = {name: value for name, value in state.items() if not name.startswith(prefixes)}
    left_out = [name for name in state if name.startswith(prefixes)]
    return kept, left_out


def _drop_misfits(
    state: dict[str, Tensor], model_state: dict[str, Tensor], new_layers: Sequence[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights without those of new layers that the model has no place for, and the names of these."""
    misfits = []
    for name, value in state.items():
        if _is_part_of(name, new_layers) and (name not in model_state or model_state[name].shape != value.shape):
            misfits.append(name)
    kept = {name: value for name, value in state.items() if name not in misfits}
    return kept, misfits


def _is_part_of(name: str, layers: Sequence[str]) -> bool:
    return any(part in name for part in layers)


def _is_optional(name: str, from_imagenet: bool, skip_heads: bool, new_layers: Sequence[str]) -> bool:
    """Tell whether the model can keep its own value of a weight that the file does not have."""
    if name.endswith(".num_batches_tracked"):
        return True  # old files lack this counter, and no batch norm of the model reads it
    if skip_heads and name.startswith(HEADS):
        return True
    if _is_part_of(name, new_layers):
        return True
    if from_imagenet:
        return ".conv_offset." in name or name.startswith(("neck.", "rpn_head.", "roi_head."))
    return False


def _check_shapes(path: Path, model_state: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Raise ValueError if a weight has another shape than the model's.

    A different number of classes, the most frequent reason, has its own message.
    """
    differing = [name for name in model_state if name in state and state[name].shape != model_state[name].shape]
    classifiers = [name for name in differing if name in (CLASSIFIER, *CLASSIFIERS)]
    if classifiers:
        expected = model_state[classifiers[0]]
        got = state[classifiers[0]]
        if got.dim() and expected.shape[1:] == got.shape[1:]:
            heads = [name for name in differing if name.startswith(HEADS)]
            raise ValueError(
                f"{path}: expected {len(expected) - 1} classes, as the model has, got {len(got) - 1} "
                f"({list_names(heads)}). To keep everything but these last layers, load with skip_heads=True"
            )
    if differing:
        shapes = []
        for name in differing:
            expected_shape = tuple(model_state[name].shape)
            got_shape = tuple(state[name].shape)
            shapes.append(f"{name}: expected {expected_shape}, got {got_shape}")
        raise ValueError(f"{path} does not fit the model: shapes that differ: {len(shapes)}: {list_names(shapes)}")


def _check_values(path: Path, model_state: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Raise ValueError if a weight is of another kind of numbers than the model's, or not finite in its dtype."""
    for name, value in state.items():
        dtype = model_state[name].dtype
        if value.is_floating_point() != dtype.is_floating_point or value.is_complex() or value.dtype == torch.bool:
            kind = "floating-point numbers" if dtype.is_floating_point else "whole numbers"
            raise ValueError(f"{path}: {name}: expected {kind}, got {value.dtype}")
        if dtype.is_floating_point and not value.to(dtype).isfinite().all():
            raise ValueError(f"{path}: {name}: expected finite numbers, got NaN or infinity")
