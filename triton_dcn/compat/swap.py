"""What `compat.torchvision` and `compat.mmcv` share: undoable replacement of functions and of the classes of layers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from torch import nn

ORIGINAL = "_class_before_triton_dcn"
WITHOUT_BIAS = "_without_bias_before_triton_dcn"


class Patch:
    """Replaced functions, until `undo` or the end of a `with` block.

    Args:
        replacements: (module, name, new function) each.
    """

    def __init__(self, replacements: Iterable[tuple[ModuleType, str, Callable[..., Any]]]):
        self._originals: list[tuple[ModuleType, str, Any]] = []
        for module, name, function in replacements:
            self._originals.append((module, name, getattr(module, name)))
            setattr(module, name, function)

    def undo(self) -> None:
        """Put the original functions back; a second call does nothing. Undo the last patch first."""
        while self._originals:
            setattr(*self._originals.pop())

    def __enter__(self) -> Patch:
        """Return the patch, which is active already."""
        return self

    def __exit__(self, *error: object) -> None:
        """Undo the patch."""
        self.undo()


def import_library(name: str) -> ModuleType:
    """Import a module of another library.

    Raises:
        ImportError: the library is not installed or does not load; says which one was asked for.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # compiled parts fail in all these ways
        raise ImportError(f"cannot import {name}, whose functions were to be replaced: {error}") from error


def convert_layers(model: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> list[str]:
    """Give the layers of `model` new classes, in place.

    Only the class changes: the object, its attributes, parameters and hooks stay. So the new class must work with the
    attributes of the old one. Layers of a subclass are left alone, since their own methods would be lost.

    Args:
        model: may be such a layer itself.
        classes: old class -> new class.

    Returns:
        Names of the converted layers, as in `model.named_modules()`.
    """
    names = []
    for name, layer in model.named_modules():
        old = type(layer)
        if old in classes:
            if not hasattr(layer, "bias"):  # as in mmcv's version 1
                layer.register_parameter("bias", None)
                layer.__dict__[WITHOUT_BIAS] = True
            layer.__class__ = classes[old]
            layer.__dict__[ORIGINAL] = old
            names.append(name)
    return names


def revert_layers(model: nn.Module, originals: Iterable[type[nn.Module]]) -> list[str]:
    """Undo `convert_layers` for the layers that were of one of the classes `originals`; return their names.

    Raises:
        ValueError: a layer has been given a rectifier or a bias that its original class does not know; all are left.
    """
    originals = tuple(originals)
    layers = [(name, layer) for name, layer in model.named_modules() if layer.__dict__.get(ORIGINAL) in originals]
    for name, layer in layers:
        for what, there in (
            ("rectifies its output", layer.relu),
            ("has a bias", WITHOUT_BIAS in layer.__dict__ and layer.bias is not None),
        ):
            if there:
                original = layer.__dict__[ORIGINAL].__name__
                raise ValueError(f"{name or 'the layer'} {what} since it was fused, which {original} does not")
    for _, layer in layers:
        if layer.__dict__.pop(WITHOUT_BIAS, False):
            del layer.bias
        layer.__class__ = layer.__dict__.pop(ORIGINAL)
    return [name for name, _ in layers]
