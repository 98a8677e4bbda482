"""The precision of a run: what `--precision` means, and what is taken without it."""

from __future__ import annotations

from detector.precision import PrecisionName, what_is_missing
from train.config import Config
from train.distributed import World

DESCRIPTIONS: dict[PrecisionName, str] = {
    "float32": "no TF32 in any product",
    "tf32": "float32, multiplied as TF32 on tensor cores: convolutions, deformable and linear layers",
    "bf16": "autocast to bfloat16, weights and their updates in float32",
    "fp16": "autocast to float16 with a scaled loss, weights and their updates in float32",
}


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
        missing = what_is_missing(recorded, world.device)
        if world.sum(int(missing != "")) == 0:
            return recorded, []
        return "float32", [f"precision {recorded} before, float32 now: {missing}"]

    if config.preset == "coco-1x" and world.sum(int(what_is_missing("tf32", world.device) != "")) == 0:
        return "tf32", []
    return "float32", []
