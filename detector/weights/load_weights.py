"""Weights from files into a model, name by name, with an account of what went where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from detector.weights.checkpoint import Checkpoint, list_names, read_checkpoint

HEADS = ("roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg", "roi_head.mask_head.conv_logits")
CLASSIFIER = "roi_head.bbox_head.fc_cls.weight"  # (classes + 1, hidden): the last row is background


@dataclass(frozen=True)
class LoadSummary:
    """Which names went where; `str()` is one readable line per kind.

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
        lines = [f"{self.path}: {len(self.loaded)} tensors loaded"]
        kinds = {
            "missing, left as they were": self.missing,
            "unexpected, not used": self.unexpected,
            "skipped": self.skipped,
        }
        lines += [f"  {len(names)} {kind}: {list_names(names)}" for kind, names in kinds.items() if names]
        return "\n".join(lines)


def load_weights(model: nn.Module, path: str | Path, *, strict: bool = True, skip_heads: bool = False) -> LoadSummary:
    """Load a file of MMDetection, torchvision or this project into a detector or a backbone.

    A torchvision ResNet file (trained on ImageNet) goes into the backbone: its classifier is skipped, and everything
    that an ImageNet network lacks (the layers that predict offsets, the detector's own) keeps its values. Any other
    file must agree with the model name by name. Either all of the file is loaded or, on an error, nothing.

    Args:
        model: a `FasterRCNN`, or for a torchvision file also a `ResNet`.
        path: the file, see `detector.weights.checkpoint.read_checkpoint`.
        strict: raise if names are missing or unexpected. Shapes must agree in any case.
        skip_heads: leave out the last layers, whose size is the number of classes; for fine-tuning to other classes.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is not a checkpoint, or it does not fit; the message names the file and the weights.
    """
    return copy_weights(model, read_checkpoint(path), strict=strict, skip_heads=skip_heads)


def copy_weights(
    model: nn.Module, checkpoint: Checkpoint, *, strict: bool = True, skip_heads: bool = False
) -> LoadSummary:
    """Copy a checkpoint that has been read into a model; as `load_weights`."""
    ours = model.state_dict()
    state, skipped = dict(checkpoint.state), list(checkpoint.dropped)
    from_imagenet = "conv1.weight" in state and "layer1.0.conv1.weight" in state
    if from_imagenet:
        skipped += [state_name for state_name in state if state_name.startswith("fc.")]
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
        if "backbone.conv1.weight" in ours:
            state = {f"backbone.{name}": value for name, value in state.items()}
    flat = {name.replace(".", "_"): name for name in ours}  # as the averaged weights of MMDetection 2 are called
    state = {flat.get(name, name): value for name, value in state.items()}
    if skip_heads:
        heads = [name for name in state if name.startswith(HEADS)]
        skipped += heads
        state = {name: value for name, value in state.items() if name not in heads}

    _check_shapes(checkpoint.path, ours, state)
    missing = [name for name in ours if name not in state]
    unexpected = [name for name in state if name not in ours]
    if strict:
        excused = [name for name in missing if _may_be_missing(name, from_imagenet, skip_heads)]
        absent = [name for name in missing if name not in excused]
        if absent or unexpected:
            raise ValueError(
                f"{checkpoint.path} does not fit the model: "
                f"{len(absent)} names missing in the file ({list_names(absent) or 'none'}), "
                f"{len(unexpected)} unknown to the model ({list_names(unexpected) or 'none'})"
            )
    loaded = [name for name in ours if name in state]
    model.load_state_dict({name: state[name] for name in loaded}, strict=False)
    return LoadSummary(checkpoint.path, tuple(loaded), tuple(missing), tuple(unexpected), tuple(skipped))


def _may_be_missing(name: str, from_imagenet: bool, skip_heads: bool) -> bool:
    """Tell whether the model's own value will do. Old files lack the counter that batch norms never read here."""
    if name.endswith(".num_batches_tracked") or (skip_heads and name.startswith(HEADS)):
        return True
    return from_imagenet and (".conv_offset." in name or name.startswith(("neck.", "rpn_head.", "roi_head.")))


def _check_shapes(path: Path, ours: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Raise ValueError if a weight has another shape than the model's; different class counts get their own words."""
    wrong = [name for name in ours if name in state and state[name].shape != ours[name].shape]
    if CLASSIFIER in wrong and ours[CLASSIFIER].shape[1:] == state[CLASSIFIER].shape[1:]:
        heads = [name for name in wrong if name.startswith(HEADS)]
        raise ValueError(
            f"{path}: the file has {len(state[CLASSIFIER]) - 1} classes, the model has {len(ours[CLASSIFIER]) - 1} "
            f"({list_names(heads)}). To keep everything but these last layers, load with skip_heads=True"
        )
    if wrong:
        shapes = [f"{name} {tuple(state[name].shape)} instead of {tuple(ours[name].shape)}" for name in wrong]
        raise ValueError(f"{path} does not fit the model: {len(wrong)} shapes differ: {list_names(shapes)}")
