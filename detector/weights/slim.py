"""Weights without training state, to share and to keep.

    python -m detector.weights.slim runs/default/checkpoints/best.pt fish.safetensors

A checkpoint of training also holds the state of the optimizer, and with `--optim.ema` a second set of weights. The file
that is written has the weights that were evaluated, the configuration and the class names.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from detector.text import lasting_output, printable, show, show_message
from detector.weights.checkpoint import read_checkpoint, save_weights
from detector.weights.load_detector import build_detector


@dataclass(frozen=True)
class SlimOptions:
    """Write the weights of a checkpoint, its configuration and its class names, without training state.

    `detector.load`, `--weights` of every command and `--eval-only` take the file that is written.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Checkpoint of a detector."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.safetensors")]
    """File to write, which must not exist."""


def slim(checkpoint: Path, out: Path) -> None:
    """Write the weights of a checkpoint with `save_weights`.

    Args:
        checkpoint: file of a detector with class names.
        out: file to write, `.safetensors`.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the checkpoint is damaged, not one of a detector or has no class names, or `out` has another suffix
            or exists; the message names the file.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: expected a name ending in .safetensors")
    if out.exists():
        raise ValueError(f"{out}: expected the name of a new file, got one that exists")
    content = read_checkpoint(checkpoint)
    if content.classes is None:
        raise ValueError(
            f"{checkpoint}: expected a file with class names, got one without: "
            "`detector.weights.checkpoint.save_weights` writes them from Python"
        )
    model, class_names = build_detector(content, "cpu")
    save_weights(out, model, class_names)


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    options = tyro.cli(SlimOptions, prog="python -m detector.weights.slim", args=arguments)
    try:
        slim(options.checkpoint, options.out)
    except (OSError, ValueError) as error:
        show_message(f"error: {error}")
        return 1
    before, after = (path.stat().st_size / 1e6 for path in (options.checkpoint, options.out))
    show(printable(f"{options.out}: {after:.1f} MB of {before:.1f} MB"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
