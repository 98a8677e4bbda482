"""The implementations to measure: ours by backend, peers where they can be imported, and a plain conv2d as a limit.

Of torchvision take the release that fits torch, and for a torch without CUDA its build for CPUs:

    pip install torchvision --index-url https://download.pytorch.org/whl/cpu

Where only PyPI can be reached, its CUDA wheel works on a torch without CUDA beside two empty libraries that stand in
for the CUDA side of torch, which its CPU operator never calls:

    pip install --no-deps --target peers torchvision==0.28.0        # for torch 2.13
    nm -D --undefined-only peers/torchvision/_C.so | grep -o '_ZN.*cuda[^@]*' | sort -u \\
      | sed 's/.*/void &(void) { abort(); }/' | (echo '#include <stdlib.h>'; cat) > stub.c
    gcc -shared -fPIC -o peers/libc10_cuda.so stub.c && cp peers/libc10_cuda.so peers/libtorch_cuda.so
    LD_LIBRARY_PATH=peers PYTHONPATH=peers:. python -m bench.deform_conv
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Inputs
from triton_dcn import deform_conv2d


@dataclass(frozen=True)
class Provider:
    """One implementation to measure.

    Attributes:
        call: returns the output for the inputs, differentiable.
        checked: whether its results are compared with the reference. Those of a plain conv2d are not: it computes
            something else, and its time is a lower limit.
    """

    call: Callable[[Inputs], Tensor]
    checked: bool = True


def _ours(backend: str) -> Callable[[], Provider]:
    def call(inputs: Inputs) -> Tensor:
        case = inputs.case
        return deform_conv2d(
            inputs.input,
            inputs.offset,
            inputs.weight,
            None,
            case.stride,
            case.padding,
            case.dilation,
            inputs.mask,
            backend=backend,
        )

    return lambda: Provider(call)


def _conv2d() -> Provider:
    def call(inputs: Inputs) -> Tensor:
        case = inputs.case
        return F.conv2d(inputs.input, inputs.weight, None, case.stride, case.padding, case.dilation, case.groups)

    return Provider(call, checked=False)


def _torchvision() -> Provider:
    return _with_torchvision_arguments("torchvision.ops")


def _deformops() -> Provider:
    return _with_torchvision_arguments("deformops.integrations.torchvision")


def _with_torchvision_arguments(module: str) -> Provider:
    deform_conv2d = importlib.import_module(module).deform_conv2d

    def call(inputs: Inputs) -> Tensor:
        case = inputs.case
        return deform_conv2d(
            inputs.input, inputs.offset, inputs.weight, None, case.stride, case.padding, case.dilation, inputs.mask
        )

    return Provider(call)


def _mmcv() -> Provider:
    modulated_deform_conv2d = importlib.import_module("mmcv.ops").modulated_deform_conv2d

    def call(inputs: Inputs) -> Tensor:
        case = inputs.case
        sizes = (case.stride, case.padding, case.dilation, case.groups, case.offset_groups)
        return modulated_deform_conv2d(inputs.input, inputs.offset, inputs.mask, inputs.weight, None, *sizes)

    return Provider(call)


def _tvdcn() -> Provider:
    deform_conv2d = importlib.import_module("tvdcn.ops").deform_conv2d

    def call(inputs: Inputs) -> Tensor:
        case = inputs.case
        sizes = (case.stride, case.padding, case.dilation, case.groups)
        return deform_conv2d(inputs.input, inputs.weight, inputs.offset, inputs.mask, None, *sizes)

    return Provider(call)


FACTORIES: dict[str, Callable[[], Provider]] = {
    "triton": _ours("triton"),
    "torch": _ours("torch"),
    "reference": _ours("reference"),
    "conv2d": _conv2d,
    "torchvision": _torchvision,
    "mmcv": _mmcv,
    "deformops": _deformops,
    "tvdcn": _tvdcn,
}

INSTALL = {
    "torchvision": f"it has to fit torch {torch.__version__}: pip install torchvision, for a torch without CUDA "
    "pip install torchvision --index-url https://download.pytorch.org/whl/cpu"
}
"""How to get a peer that is missing."""

OURS = ("triton", "torch")
"""Providers whose absence from a measurement is a failure."""


def load_providers(names: list[str] | None, device: torch.device) -> tuple[dict[str, Provider], dict[str, str]]:
    """Return the providers that can run, and for the others the reason why not.

    Args:
        names: keys of `FACTORIES`; None is all but "reference", and on a CPU also without "triton".
        device: where they will run.

    Raises:
        ValueError: no such name.
    """
    for name in names or []:
        if name not in FACTORIES:
            raise ValueError(f"--providers: expected one of {', '.join(FACTORIES)}, got {name!r}")

    providers: dict[str, Provider] = {}
    missing: dict[str, str] = {}
    for name in names or FACTORIES:
        if name == "reference" and not names:
            continue
        if name == "triton" and device.type == "cpu" and not names:
            missing[name] = "needs a GPU; its interpreter on a CPU says nothing about speed"
            continue
        try:
            providers[name] = FACTORIES[name]()
        except (ImportError, OSError, RuntimeError, AttributeError) as error:  # compiled peers fail in many ways
            message = str(error).splitlines()[0] if str(error) else ""
            missing[name] = f"{type(error).__name__}: {message}"
            if name in INSTALL:
                missing[name] += f"; {INSTALL[name]}"
    return providers, missing
