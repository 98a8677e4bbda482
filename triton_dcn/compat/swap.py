"""Replaces functions of a library and classes of layers, and undoes it, for `compat.torchvision` and `compat.mmcv`."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from triton_dcn.nn import DeformConv2d, DeformConv2dPack

Replacement = tuple[ModuleType, str, Callable[..., Any]]
"""Module, name in it, new function."""

ORIGINAL_CLASS = "_class_before_triton_dcn"
"""Attribute of a converted layer: its class before."""

HAD_NO_BIAS = "_without_bias_before_triton_dcn"
"""Attribute of a converted layer: its class before has no attribute `bias`."""

NAMED_LAYERS = 8
"""How many of the layers that `convert` leaves alone its warning names."""


class Place(NamedTuple):
    """A name of a module whose value a patch has replaced.

    Attributes:
        module: name of the module.
        name: name in the module.
        namespace: the module's `__dict__`.
        original, replacement: values of the name before and after.
    """

    module: str
    name: str
    namespace: dict[str, Any]
    original: Callable[..., Any]
    replacement: Callable[..., Any]

    def __str__(self) -> str:
        """Return the dotted name."""
        return f"{self.module}.{self.name}"


class Patch:
    """Functions that stay replaced until `undo` or the end of a `with` block.

    A function is replaced under all names that modules have for it, so that code that imported it by name is reached,
    whether that was before the patch or is after it. Not reached are functions that are kept in attributes of objects
    and classes, in containers and in default arguments. The module that defines the new function keeps the original,
    since it may call it. What is replaced already stays as it is: a second patch with the same functions has no places
    and undoes nothing.

    `len` tells how many places were replaced, and `repr` which.

    Args:
        replacements: what to replace, and by what.

    Raises:
        AttributeError: a module does not have the name.
    """

    def __init__(self, replacements: Iterable[Replacement]):
        self._places: list[Place] = []
        modules = []
        wanted = {}
        for module, name, function in replacements:
            original = getattr(module, name)
            if original is not function:
                modules.append(module)
                vars(module).setdefault(name, original)  # a module may make its names as they are asked for
                wanted[id(original)] = (original, function)

        for module_name, namespace in _namespaces(modules):
            for name, value in list(namespace.items()):
                if id(value) in wanted:
                    place = Place(module_name, name, namespace, *wanted[id(value)])
                    if getattr(place.replacement, "__globals__", None) is not namespace:
                        self._places.append(place)
        for place in self._places:
            place.namespace[place.name] = place.replacement

    def undo(self) -> None:
        """Put the original functions back; a second call does nothing.

        A name that has been given another value since, by another patch for example, keeps that value and its place
        here: once that patch is undone, this one can be undone again. Modules that were imported while the patch was
        active keep the function that they found then.
        """
        changed_since = []
        for place in self._places:
            if place.namespace.get(place.name) is place.replacement:
                place.namespace[place.name] = place.original
            else:
                changed_since.append(place)
        self._places = changed_since

    def __len__(self) -> int:
        """Return how many places are replaced."""
        return len(self._places)

    def __repr__(self) -> str:
        """List the places."""
        names = ", ".join(map(str, self._places))
        return f"<Patch of {len(self)} places{': ' if names else ''}{names}>"

    def __enter__(self) -> Patch:
        """Return the patch, which has been active since it was made."""
        return self

    def __exit__(self, *error: object) -> None:
        """Undo the patch."""
        self.undo()


def _namespaces(modules: Iterable[ModuleType]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and `__dict__` of each loaded module outside this package, and of `modules`, once.

    No module sees it: some load what they promise as soon as an attribute is asked for, and some define a `__dict__`
    that loads all of it.
    """
    package = __name__.partition(".")[0]
    seen = set()
    named = [*sys.modules.items(), *((module.__name__, module) for module in modules)]
    for name, module in named:
        if name.partition(".")[0] == package:  # it is what calls are directed to
            continue
        if not issubclass(type(module), ModuleType):  # None, or an object that stands for a module
            continue
        namespace = vars(ModuleType)["__dict__"].__get__(module)
        if id(namespace) not in seen:
            seen.add(id(namespace))
            yield name, namespace


def import_library(name: str) -> ModuleType:
    """Import a module of another library.

    Raises:
        ImportError: the library is not installed or does not load; says which one was asked for.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # compiled parts fail in all these ways
        raise ImportError(f"cannot import {name}, whose functions were to be replaced: {error}") from error


def convert_layers(model: nn.Module, library: str, classes: Mapping[type[nn.Module], type[nn.Module]]) -> list[str]:
    """Give the layers of `model` new classes, in place.

    Only the class changes; the object, its attributes, parameters and hooks stay. The new class must therefore work
    with the attributes of the old one. Layers of a subclass are left alone, because their methods would be lost.

    Args:
        model: may be such a layer itself.
        library: where the old classes are from, for the warning.
        classes: old class -> new class.

    Returns:
        Names of the converted layers, as in `model.named_modules()`.

    Warns:
        UserWarning: there are no such layers, or also layers of subclasses; says what to do.
    """
    names = []
    left_alone = []
    converted_before = False
    for name, layer in model.named_modules():
        original = type(layer)
        if original in classes:
            is_convolution = issubclass(classes[original], (DeformConv2d, DeformConv2dPack))
            if is_convolution and not hasattr(layer, "bias"):  # as in mmcv's version 1
                layer.register_parameter("bias", None)
                layer.__dict__[HAD_NO_BIAS] = True
            layer.__class__ = classes[original]
            layer.__dict__[ORIGINAL_CLASS] = original
            names.append(name)
        elif isinstance(layer, tuple(classes)):
            left_alone.append(f"{name or 'the model itself'} ({original.__name__})")
        elif layer.__dict__.get(ORIGINAL_CLASS) in classes:
            converted_before = True

    if left_alone:
        more = f" and {len(left_alone) - NAMED_LAYERS} more" if len(left_alone) > NAMED_LAYERS else ""
        warnings.warn(
            f"model: expected layers of {library} itself, left alone those of derived classes: "
            f"{', '.join(left_alone[:NAMED_LAYERS])}{more}; use patch(), which replaces the functions that they call",
            stacklevel=3,
        )
    elif not names and not converted_before:
        warnings.warn(
            f"model: expected layers of {library}, got {type(model).__name__} without any; models that call its "
            "functions (BiRefNet, EDVR, BasicVSR++, ProPainter and VRT do) need patch() instead",
            stacklevel=3,
        )
    return names


def revert_layers(model: nn.Module, originals: Iterable[type[nn.Module]]) -> list[str]:
    """Undo `convert_layers`.

    Args:
        model: may be such a layer itself.
        originals: classes to go back to; layers that had another class are left alone.

    Returns:
        Names of the reverted layers, as in `model.named_modules()`.

    Raises:
        ValueError: a layer has been given a ReLU, a bias or a parametrization that would be lost; no layer is changed.
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
    """Raise ValueError where the original class would lose or ignore what has been added to a layer."""
    original = layer.__dict__[ORIGINAL_CLASS].__name__
    if parametrize.is_parametrized(layer):
        raise ValueError(
            f"{name}: expected no parametrizations, which go with the class, got some; call "
            "torch.nn.utils.parametrize.remove_parametrizations first"
        )
    if isinstance(layer, (DeformConv2d, DeformConv2dPack)) and layer.relu:
        raise ValueError(f"{name}: expected no ReLU, which {original} does not have, got a layer fused with one")
    if HAD_NO_BIAS in layer.__dict__ and layer.bias is not None:
        raise ValueError(f"{name}: expected no bias, which {original} does not have, got a layer fused with one")
