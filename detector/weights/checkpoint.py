"""Checkpoint files of several kinds, read into one form: a flat state dict under MMDetection's names.

Nothing in a file is executed, and damage is seen where a file has sums: zip files of torch and the names of our own
checkpoints have them, and safetensors files of `save_weights`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from detector.files import open_regular, replacing
from detector.model.faster_rcnn import FasterRCNN
from detector.text import printable, short_list, short_name, shown
from detector.weights.checkpoint_name import file_digest, parse_name
from detector.weights.config_text import read_config_text
from detector.weights.mmdet_config import find_class_names, takes_bgr
from detector.weights.torch_file import ForeignTensor, read_torch_file, unreadable

STATE_KEYS = ("state_dict", "model", "ema_state_dict")  # MMDetection; ours and torchvision's; only averaged weights
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "ema_model.")  # DistributedDataParallel, torch.compile, averaged models
AVERAGED_PREFIX = "ema_"  # MMDetection 2 keeps a second, averaged set of weights under this prefix
AVERAGED_COUNTER = "steps"  # mmengine's averaged models count their updates under this name
FIRST_CONV = "backbone.conv1.weight"  # (C, 3, 7, 7): the layer that sees the colors
SUM = "sha256"  # key of `_sum` in the metadata of our safetensors files


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        path: the file.
        state: name -> tensor on the CPU; prefixes of wrappers removed. Its first convolution takes red, green, blue,
            also where that in the file takes them the other way round.
        config: fields of the model's configuration, or None if the file has none.
        mmdet_config: names and values of an MMDetection config, or None if the file has none.
        classes: class names by label, or None if the file has none.
        dropped: names in the file that are left out: those of a second, averaged set of weights.
    """

    path: Path
    state: dict[str, Tensor]
    config: dict[str, Any] | None = None
    mmdet_config: dict[str, Any] | None = None
    classes: tuple[str, ...] | None = None
    dropped: tuple[str, ...] = ()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file of MMDetection, torchvision or this project, `.safetensors` or written by `torch.save`.

    Args:
        path: the file; its suffix tells safetensors from the rest.

    Raises:
        OSError: the file cannot be opened, or is a pipe or a device.
        ValueError: the file is damaged, cut off, is not a checkpoint or holds no weights; the message names it.
    """
    path = Path(path)
    open_regular(path).close()  # raises the error of the operating system if the file is missing or a folder
    name = parse_name(path)
    if name is not None:
        digest = file_digest(path)
        if digest != name.digest:
            raise ValueError(f"{path}: damaged: expected the SHA-256 in its name, {name.digest}, got {digest}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)

    state = _find_state(path, content)
    state = _remove_wrapper_prefixes(state)
    state, dropped = _drop_averaged(state)
    state = {_rename_legacy_offset(name): value for name, value in state.items()}
    config = _find_config(path, content)
    classes = _find_classes(path, content)
    mmdet_config = None if config is not None else _find_mmdet_config(path, content)
    if mmdet_config is not None:
        state = _turn_colors(state, mmdet_config)
        classes = classes or find_class_names(mmdet_config)
    return Checkpoint(
        path=path,
        state=state,
        config=config,
        mmdet_config=mmdet_config,
        classes=classes,
        dropped=tuple(dropped),
    )


def save_weights(path: str | Path, model: FasterRCNN, classes: Sequence[str]) -> None:
    """Write weights to share, without training state: safetensors with configuration and class names inside.

    The file appears under its name only when it is complete. It holds a sum, by which `read_checkpoint` sees damage.

    Args:
        path: file to write, `.safetensors`.
        model: the detector.
        classes: class names by label.

    Raises:
        ValueError: another suffix, or not as many names as the model has classes.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path: expected a name ending in .safetensors, got {path}")
    if len(classes) != model.config.num_classes:
        raise ValueError(f"classes: expected {model.config.num_classes} names, got {len(classes)}")

    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    metadata = {
        "config": json.dumps(asdict(model.config)),
        "classes": json.dumps(list(classes)),
    }
    metadata[SUM] = _sum(state, metadata)
    with replacing(path) as partial:
        partial.write_bytes(save(state, metadata))  # `save_file` makes a file that only its owner can read


def list_names(names: Sequence[object]) -> str:
    """Join names of weights for a message: the first ones, then how many more there are."""
    return short_list(names, limit=6, length=200)


def _sum(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of names, types, shapes and bytes of weights, and of the metadata beside them."""
    sha256 = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(state):
        value = state[name].detach().cpu()
        sha256.update(json.dumps([name, str(value.dtype), value.shape]).encode())
        sha256.update(value.flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Return the content of a safetensors file as our checkpoints have it: "model", "config" and "classes"."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
        expected_sum = metadata.pop(SUM, None)
        is_damaged = expected_sum is not None and expected_sum != _sum(state, metadata)
    except Exception as error:  # its header may say anything
        raise ValueError(f"{path}: damaged: {unreadable(path, error)}") from error
    if is_damaged:
        raise ValueError(f"{path}: damaged: its content does not have the SHA-256 in its metadata")

    content: dict[str, Any] = {"model": state}
    for key in ("config", "classes"):
        if key in metadata:
            try:
                content[key] = json.loads(metadata[key])
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: expected `{key}` to be JSON, got {shown(metadata[key])}") from error
    return content


def _find_state(path: Path, content: Any) -> dict[str, Tensor]:
    """Return the state dict of a file: what one of `STATE_KEYS` holds, or the whole content if it is tensors only."""
    if not isinstance(content, Mapping):
        raise ValueError(_no_state_message(path, f"a {type(content).__name__}"))

    wrapper_keys = [key for key in STATE_KEYS if isinstance(content.get(key), Mapping)]
    source = content[wrapper_keys[0]] if wrapper_keys else content
    state = {name: value for name, value in source.items() if name != AVERAGED_COUNTER}
    tensors = [value for value in state.values() if isinstance(value, Tensor | ForeignTensor)]
    if not tensors or not (wrapper_keys or len(tensors) == len(content)):
        raise ValueError(_no_state_message(path, f"the keys {list_names(list(content))}"))

    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: expected names of weights, got {shown(name)}")
        if isinstance(value, ForeignTensor):
            raise ValueError(f"{path}: {printable(name)}: expected a dense tensor, got a {short_name(value.kind)}")
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {printable(name)}: expected a tensor, got {shown(value)}")
    return state


def _no_state_message(path: Path, got: str) -> str:
    return f"{path}: expected a state dict, bare or under one of {STATE_KEYS}, got {got}"


def _remove_wrapper_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers that all names begin with, of several wrappers one after the other."""
    while True:
        shared = [prefix for prefix in WRAPPER_PREFIXES if all(name.startswith(prefix) for name in state)]
        if not shared:
            return state
        state = {name.removeprefix(shared[0]): value for name, value in state.items()}


def _drop_averaged(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return one set of weights, and the names of a second set that the file also has.

    MMDetection 2 swaps both sets before it saves: the plain names hold the averaged weights, so these are kept.
    """
    averaged = [name for name in state if name.startswith(AVERAGED_PREFIX)]
    if len(averaged) == len(state):
        return {name.removeprefix(AVERAGED_PREFIX): value for name, value in state.items()}, []
    plain = {name: value for name, value in state.items() if not name.startswith(AVERAGED_PREFIX)}
    return plain, averaged


def _rename_legacy_offset(name: str) -> str:
    """Return the present name of a weight: the first mmcv called the layer that predicts offsets `conv2_offset`."""
    return re.sub(r"\b(conv\d)_offset\.", r"\1.conv_offset.", name)


def _find_config(path: Path, content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the configuration, which our own files keep next to the weights."""
    config = content.get("config")
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise ValueError(f"{path}: expected `config` to be a dict, got {type(config).__name__}")
    return dict(config)


def _find_mmdet_config(path: Path, content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the MMDetection config that is in `meta`: as a text, or as the object that was made from it."""
    meta = content.get("meta")
    if not isinstance(meta, Mapping):
        return None
    for key in ("cfg", "config"):  # of version 3, of version 2
        config = meta.get(key)
        if _is_empty(config):
            continue
        if isinstance(config, Mapping):
            return dict(config)
        if not isinstance(config, str):
            raise ValueError(f"{path}: meta: {key}: expected the text of a config, got {shown(config)}")
        try:
            return read_config_text(config)
        except ValueError as error:
            raise ValueError(f"{path}: its MMDetection config cannot be read: {error}") from error
    return None


def _turn_colors(state: dict[str, Tensor], mmdet_config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights for images in the order red, green, blue."""
    weight = state.get(FIRST_CONV)
    if weight is None or weight.dim() != 4 or not takes_bgr(mmdet_config):
        return state
    return state | {FIRST_CONV: weight.flip(1)}


def _find_classes(path: Path, content: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the class names: ours are next to the weights, MMDetection's inside `meta`."""
    classes = content.get("classes")
    meta = content.get("meta")
    if classes is None and isinstance(meta, Mapping):
        dataset_meta = meta.get("dataset_meta")  # MMDetection 3; version 2 writes into `meta` itself
        for source in (dataset_meta, meta):
            if isinstance(source, Mapping):
                for key in ("classes", "CLASSES"):
                    if classes is None and not _is_empty(source.get(key)):
                        classes = source[key]
    if classes is None:
        return None
    if isinstance(classes, np.ndarray) and classes.ndim == 1:
        classes = classes.tolist()
    if not isinstance(classes, list | tuple) or not all(isinstance(name, str) and name for name in classes):
        raise ValueError(f"{path}: expected `classes` to be a list of names, got {shown(classes)}")
    return tuple(classes)


def _is_empty(value: object) -> bool:
    """Tell whether a value is None or a container of nothing, as MMDetection writes where it knows no names."""
    return value is None or (isinstance(value, Sized) and len(value) == 0)
