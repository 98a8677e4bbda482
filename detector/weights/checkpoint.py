"""Checkpoint files of several kinds, read into one form: a flat state dict under MMDetection's names.

Nothing in a file is executed: torch files are read with `weights_only`, and objects that are not plain data (the logs
of a trainer, say) are replaced by placeholders.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

WRAPPINGS = ("state_dict", "model", "ema_state_dict")  # MMDetection; ours and torchvision's; averaged weights alone
PREFIXES = ("module.", "_orig_mod.", "ema_model.")  # DistributedDataParallel, torch.compile, averaged models
AVERAGED = "ema_"  # MMDetection 2 keeps a second set of weights under this prefix


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        path: the file.
        state: name -> tensor on the CPU; prefixes of wrappers removed.
        config: fields of the model's configuration, or None if the file has none.
        classes: class names by label, or None if the file has none.
        dropped: names in the file that are no weights of the model (a second, averaged set).
    """

    path: Path
    state: dict[str, Tensor]
    config: dict[str, Any] | None = None
    classes: tuple[str, ...] | None = None
    dropped: tuple[str, ...] = ()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file of MMDetection, torchvision or this project, `.safetensors` or written by `torch.save`.

    Args:
        path: the file; its suffix tells safetensors from the rest.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is cut off, is not a checkpoint or holds no weights; the message names it.
    """
    path = Path(path)
    with path.open("rb"):  # a missing file or a folder is named here, in the words of the operating system
        pass
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state = _find_state(path, content)
    while prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    averaged = [name for name in state if name.startswith(AVERAGED)]
    if len(averaged) == len(state):
        state = {name.removeprefix(AVERAGED): value for name, value in state.items()}
        averaged = []
    # MMDetection 2 swaps both sets before it saves: the averaged weights are under the plain names.
    state = {_today(name): value for name, value in state.items() if name not in averaged}
    config, classes = _describe(path, content)
    return Checkpoint(path, state, config, classes, tuple(averaged))


def save_weights(path: str | Path, model: nn.Module, classes: Sequence[str]) -> None:
    """Write weights to share, without training state: safetensors with configuration and class names inside.

    The file appears under its name only when it is complete.

    Args:
        path: file to write, `.safetensors`.
        model: a `FasterRCNN`.
        classes: class names by label.

    Raises:
        ValueError: another suffix, or not as many names as the model has classes.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path: expected a name ending in .safetensors, found {path}")
    if len(classes) != model.config.num_classes:
        raise ValueError(f"classes: expected {model.config.num_classes} names, found {len(classes)}")
    metadata = {"config": json.dumps(asdict(model.config)), "classes": json.dumps(list(classes))}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, partial, metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def list_names(names: Sequence[object], limit: int = 6) -> str:
    """Join names for a message: the first `limit`, then how many more there are."""
    shown = ", ".join(str(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


class _Placeholder:
    """Stands for an object of a class that is not plain data; takes whatever the file builds it from and forgets it."""

    def __new__(cls, *args: Any) -> _Placeholder:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_torch(path: Path) -> Any:
    path.open("rb").close()  # a file that is missing or forbidden is told as such
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            with torch.serialization.safe_globals([(_Placeholder, name) for name in foreign]):
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are not a checkpoint make the readers fail in any way, with OSError too
        raise ValueError(_unreadable(path, error)) from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
        described = {key: json.loads(metadata[key]) for key in ("config", "classes") if key in metadata}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(_unreadable(path, error)) from error
    return {"model": state} | described


def _unreadable(path: Path, error: Exception) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return f"{path}: not a checkpoint, or cut off ({path.stat().st_size} bytes): {reason}"


def _find_state(path: Path, content: Any) -> dict[str, Tensor]:
    """Return the state dict inside whatever was stored around it."""
    if isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPINGS if isinstance(content.get(key), Mapping)), content)
        state = {name: value for name, value in inner.items() if isinstance(value, Tensor) and name != "steps"}
        if state and (inner is not content or len(state) == len(content)):
            return state
    found = f"the keys {list_names(list(content))}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise ValueError(f"{path}: expected a state dict, bare or under one of {WRAPPINGS}, found {found}")


def _describe(path: Path, content: Mapping[str, Any]) -> tuple[dict[str, Any] | None, tuple[str, ...] | None]:
    """Return configuration and class names: ours beside the weights, MMDetection's names inside `meta`."""
    config, classes = content.get("config"), content.get("classes")
    meta = content.get("meta")
    if classes is None and isinstance(meta, Mapping):
        dataset = meta.get("dataset_meta")
        for source in (dataset if isinstance(dataset, Mapping) else {}, meta):
            classes = classes or source.get("classes") or source.get("CLASSES")
    if config is not None and not isinstance(config, Mapping):
        raise ValueError(f"{path}: expected `config` to be a dict, found {type(config).__name__}")
    if classes is not None and not (isinstance(classes, list | tuple) and all(isinstance(n, str) for n in classes)):
        raise ValueError(f"{path}: expected `classes` to be a list of names, found {classes!r}")
    return None if config is None else dict(config), None if classes is None else tuple(classes)


def _today(name: str) -> str:
    """Return the present name of a weight: the first mmcv called the layer that predicts offsets `conv2_offset`."""
    return re.sub(r"\b(conv\d)_offset\.", r"\1.conv_offset.", name)
