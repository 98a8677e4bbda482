"""Replaces functions of a library and classes of layers, and undoes it, for `compat.torchvision` and `compat.mmcv`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from torch import nn

from triton_dcn.nn import DeformConv2d, DeformConv2dPack

Replacement = tuple[ModuleType, str, Callable[..., Any]]
"""Module, name in it, new function."""

ORIGINAL_CLASS = "_class_before_triton_dcn"
"""Attribute of a converted layer: its class before."""

HAD_NO_BIAS = "_without_bias_before_triton_dcn"
"""Attribute of a converted layer: its class before has no attribute `bias`."""


class Patch:
    """Functions that stay replaced until `undo` or the end of a `with` block.

    Args:
        replacements: what to replace, and by what.
    """

    def __init__(self, replacements: Iterable[Replacement]):
        self._originals: list[Replacement] = []
        for module, name, function in replacements:
            self._originals.append((module, name, getattr(module, name)))
            setattr(module, name, function)

    def undo(self) -> None:
        """Put the original functions back; a second call does nothing. Undo the last patch first."""
        while self._originals:
            module, name, function = self._originals.pop()
            setattr(module, name, function)

    def __enter__(self) -> Patch:
        """Return the patch, which has been active since it was made."""
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

    Only the class changes; the object, its attributes, parameters and hooks stay. The new class must therefore work
    with the attributes of the old one. Layers of a subclass are left alone, because their methods would be lost.

    Args:
        model: may be such a layer itself.
        classes: old class -> new class.

    Returns:
        Names of the converted layers, as in `model.named_modules()`.
    """
    names = []
    for name, layer in model.named_modules():
        original = type(layer)
        if original not in classes:
            continue
        is_convolution = issubclass(classes[original], (DeformConv2d, DeformConv2dPack))
        if is_convolution and not hasattr(layer, "bias"):  # as in mmcv's version 1
            layer.register_parameter("bias", None)
            layer.__dict__[HAD_NO_BIAS] = True
        layer.__class__ = classes[original]
        layer.__dict__[ORIGINAL_CLASS] = original
        names.append(name)
    return names


def revert_layers(model: nn.Module, originals: Iterable[type[nn.Module]]) -> list[str]:
    """Undo `convert_layers`.

    Args:
        model: may be such a layer itself.
        originals: classes to go back to; layers that had another class are left alone.

    Returns:
        Names of the reverted layers, as in `model.named_modules()`.

    Raises:
        ValueError: a layer has been given a ReLU or a bias that its original class does not know; no layer is changed.
    """
    originals = tuple(originals)
    layers = {}
    for name, layer in model.named_modules():
        if layer.__dict__.get(ORIGINAL_CLASS) in originals:
            _check_revertible(name or "the layer", layer)
            layers[name] = layer

    for layer in layers.values():
        if layer.__dict__.pop(HAD_NO_BIAS, False):
            del layer.bias
        layer.__class__ = layer.__dict__.pop(ORIGINAL_CLASS)
    return list(layers)


def _check_revertible(name: str, layer: nn.Module) -> None:
    """Raise ValueError where the original class would silently ignore what fusing has added to a layer."""
    original = layer.__dict__[ORIGINAL_CLASS].__name__
    if isinstance(layer, (DeformConv2d, DeformConv2dPack)) and layer.relu:
        raise ValueError(f"{name}: expected no ReLU, which {original} does not have, got a layer fused with one")
    if HAD_NO_BIAS in layer.__dict__ and layer.bias is not None:
        raise ValueError(f"{name}: expected no bias, which {original} does not have, got a layer fused with one")
