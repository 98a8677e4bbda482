"""The arithmetic of a run, for training and evaluation: what `--precision` means, and what a device can do."""

from __future__ import annotations

import contextlib

import torch

from train.config import Config, PrecisionName
from train.distributed import World
from triton_dcn.tf32 import allow_tf32

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TENSOR_CORES = (8, 0)  # the first compute capability whose tensor cores take TF32 and bfloat16: A100

DESCRIPTIONS: dict[PrecisionName, str] = {
    "float32": "no TF32 in any product",
    "tf32": "float32, multiplied as TF32 on tensor cores: convolutions, deformable and linear layers",
    "bf16": "autocast to bfloat16, weights and their updates in float32",
    "fp16": "autocast to float16 with a scaled loss, weights and their updates in float32",
}


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
    if precision is None or not (reason := _what_is_missing(precision, device)):
        return
    raise ValueError(f"--precision {precision}: {reason}")


def choose_precision(config: Config, world: World, recorded: PrecisionName | None) -> tuple[PrecisionName, list[str]]:
    """Return the precision of a run, and notes.

    Args:
        config: of this start; a precision that it names is taken.
        world: the processes; each has to ask, and tells what its device can do.
        recorded: precision of the run that goes on, or None.
    """
    if config.precision is not None:
        return config.precision, []
    if recorded is not None:
        missing = _what_is_missing(recorded, world.device)
        if world.sum(int(missing != "")) == 0:
            return recorded, []
        return "float32", [f"precision {recorded} before, float32 now: {missing}"]

    if config.preset == "coco-1x" and world.sum(int(_what_is_missing("tf32", world.device) != "")) == 0:
        return "tf32", []
    return "float32", []


def _what_is_missing(precision: PrecisionName, device: torch.device) -> str:
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
