"""Who computes a deformable convolution: ours by backend, peers where they can be imported, and the limits.

torchvision has no CPU-only wheel for some releases of torch. The CUDA wheel of the matching release works on a CPU-only
torch beside two empty libraries that stand in for the CUDA side of torch, which its CPU operator never calls:

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

Call = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Provider:
    """A way to compute the operator.

    Attributes:
        call: inputs to output, differentiable.
        checked: whether it computes the operator at all; limits do not.
    """

    call: Call
    checked: bool = True


def _ours(backend: str) -> Callable[[], Provider]:
    def call(t: Inputs) -> Tensor:
        c = t.case
        return deform_conv2d(
            t.input, t.offset, t.weight, None, c.stride, c.padding, c.dilation, t.mask, backend=backend
        )  # fmt: skip

    return lambda: Provider(call)


def _conv2d() -> Provider:
    def call(t: Inputs) -> Tensor:
        c = t.case
        return F.conv2d(t.input, t.weight, None, c.stride, c.padding, c.dilation, c.groups)

    return Provider(call, checked=False)


def _torchvision() -> Provider:
    peer = importlib.import_module("torchvision.ops").deform_conv2d
    return Provider(
        lambda t: peer(t.input, t.offset, t.weight, None, t.case.stride, t.case.padding, t.case.dilation, t.mask)
    )


def _mmcv() -> Provider:
    peer = importlib.import_module("mmcv.ops").modulated_deform_conv2d

    def call(t: Inputs) -> Tensor:
        c = t.case
        return peer(
            t.input, t.offset, t.mask, t.weight, None, c.stride, c.padding, c.dilation, c.groups, c.offset_groups
        )  # fmt: skip

    return Provider(call)


def _deformops() -> Provider:
    peer = importlib.import_module("deformops.integrations.torchvision").deform_conv2d
    return Provider(
        lambda t: peer(t.input, t.offset, t.weight, None, t.case.stride, t.case.padding, t.case.dilation, t.mask)
    )


def _tvdcn() -> Provider:
    peer = importlib.import_module("tvdcn.ops").deform_conv2d

    def call(t: Inputs) -> Tensor:
        c = t.case
        return peer(t.input, t.weight, t.offset, t.mask, None, c.stride, c.padding, c.dilation, c.groups)

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

OURS = ("triton", "torch")
"""Whose absence from a measurement is a failure."""


def available(names: list[str] | None, device: torch.device) -> tuple[dict[str, Provider], dict[str, str]]:
    """Return the providers that can run, and for the others the reason why not.

    Args:
        names: keys of `FACTORIES`; None is all of them but the reference, and without the interpreter on a CPU.
        device: where they shall run.

    Raises:
        ValueError: no such name.
    """
    unknown = set(names or []) - set(FACTORIES)
    if unknown:
        raise ValueError(f"unknown provider {sorted(unknown)[0]!r}, expected one of {', '.join(FACTORIES)}")
    found, missing = {}, {}
    for name in names or [name for name in FACTORIES if name != "reference"]:
        if name == "triton" and device.type == "cpu" and not names:
            missing[name] = "needs a GPU; its interpreter on a CPU says nothing about speed"
            continue
        try:
            found[name] = FACTORIES[name]()
        except (ImportError, OSError, RuntimeError, AttributeError) as error:  # compiled peers fail in many ways
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found, missing
