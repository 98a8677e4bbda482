"""The arithmetic of a detector: names of precisions, what a device can do, and PyTorch's settings for them."""

from __future__ import annotations

import contextlib
from typing import Literal

import torch

from triton_dcn.tf32 import allow_tf32

PrecisionName = Literal["float32", "tf32", "bf16", "fp16"]

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TENSOR_CORES = (8, 0)  # the first compute capability whose tensor cores take TF32 and bfloat16: A100


def autocast(device: torch.device, precision: PrecisionName) -> torch.autocast:
    """Return the autocast of a precision; with float32 and tf32 it does nothing."""
    return torch.autocast(device.type, AUTOCAST_DTYPES.get(precision), enabled=precision in AUTOCAST_DTYPES)


def product_settings(precision: PrecisionName) -> contextlib.AbstractContextManager[None]:
    """Return a block in which PyTorch's settings for float32 products are those of the precision.

    With bf16 and fp16 they stay as they are: autocast leaves no product in float32.
    """
    if precision in AUTOCAST_DTYPES:
        return contextlib.nullcontext()
    return allow_tf32(precision == "tf32")


def check_precision(precision: PrecisionName | None, device: torch.device) -> None:
    """Raise ValueError, which names the flag, where the device does not have a precision; None is always there."""
    if precision is None or not (reason := what_is_missing(precision, device)):
        return
    raise ValueError(f"--precision {precision}: {reason}")


def what_is_missing(precision: PrecisionName, device: torch.device) -> str:
    """Return what a device lacks for a precision, as "expected X, got Y", or an empty text."""
    if precision in ("float32", "fp16") or (precision == "bf16" and device.type == "cpu"):
        return ""
    if device.type == "cpu":
        return "expected a GPU, got a CPU, which has no tensor cores"

    if torch.version.hip:
        return "" if precision == "bf16" else "expected a GPU of NVIDIA, got one of AMD"
    capability = torch.cuda.get_device_capability(device)
    if capability >= TENSOR_CORES:
        return ""
    return f"expected a GPU from compute capability 8.0 on, got one of {capability[0]}.{capability[1]}"
