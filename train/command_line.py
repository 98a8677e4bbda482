"""The command line of `train/main.py`: receives the arguments, hands on a `Config`.

Most flags are the fields of `Config`. Of the model only the fields of `ModelFlags` are flags: what only research would
change (anchors, thresholds, sampling sizes, ...) is set in Python, see `train.main.run`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from detector import FasterRCNNConfig
from detector.text import show_message
from train.config import PRESETS, REMOVED, RENAMED, RENAMED_VALUES, Config, PresetName, complete


@dataclass(frozen=True)
class ModelFlags:
    """The network. All other fields of FasterRCNNConfig are set in Python."""

    depth: Literal[18, 50, 101]
    """Depth of the ResNet."""
    dcn: Literal["v1", "v2"] | None
    """Deformable convolutions in the backbone."""
    dcn_stages: tuple[bool, bool, bool, bool]
    """Which of the stages c2 to c5 have them."""
    deform_groups: int
    """Groups of channels that share offsets."""
    groups: int
    """Groups of channels of the 3x3 convolutions; 32 with a width of 4 is ResNeXt 32x4d."""
    width_per_group: int
    """Channels of each group in c2; 64 with one group is ResNet."""
    mask: bool
    """Predict masks too, with the head of Mask R-CNN."""
    cascade: bool
    """Three box heads one after the other, as in Cascade R-CNN; with masks, three mask heads."""
    roi_layer: Literal["align", "dpool", "mdpool"]
    """How the box heads read the pyramid: RoIAlign, or deformable RoI pooling, modulated or not."""
    frozen_stages: int
    """The stem and this many stages are not trained; 0 freezes the stem alone, -1 nothing."""
    norm: Literal["bn", "gn", "syncbn"]
    """Batch norm or, to train from scratch, group norm or batch norm with the statistics of all GPUs."""
    norm_eval: bool
    """Batch norms keep their running statistics in training."""
    image_scale: tuple[int, int]
    """Images are resized to fit (long side, short side); the ratio of the sides stays."""

    @classmethod
    def from_config(cls, model: FasterRCNNConfig) -> ModelFlags:
        """Take the values of a model's configuration."""
        return cls(**{flag.name: getattr(model, flag.name) for flag in fields(cls)})


PYTHON_ONLY = {"given", "data.flip", "optim.offset_lr", "optim.warmup_factor"} | {
    f"model.{field.name}"
    for field in fields(FasterRCNNConfig)
    if field.name not in {flag.name for flag in fields(ModelFlags)}
}
"""Values of `Config` that have no flag."""


def parse(argv: Sequence[str], *, gpu: bool, processes: int = 1, quiet: bool = False) -> Config:
    """Turn a command line into a configuration.

    The preset is read first, then every other flag overrides one of its values. A flag that does not exist ends the
    program with exit status 2 and the names of the nearest ones.

    Args:
        argv: arguments without the program's name.
        gpu: whether there is one; with `--data.root` it decides the preset where none is named.
        processes: of the run.
        quiet: print nothing; for all processes but one.

    Raises:
        SystemExit: help was asked for, or the command line is wrong.
        ValueError: a value is out of its range, contradicts another, or can only be set in Python; the message names
            the flag.
    """
    arguments, notes = _replace_former_flags(argv)
    if not quiet:
        for note in notes:
            show_message(note)

    given = _find_given(arguments)
    preset_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, name in (("--preset", "preset"), ("--data.root", "root"), ("--device", "device")):
        preset_parser.add_argument(flag, dest=name, nargs="?")
    named = preset_parser.parse_known_args(arguments)[0]
    has_data = named.root not in (None, "None")
    uses_gpu = gpu and named.device != "cpu"
    default_preset: PresetName = "coco-1x" if has_data and uses_gpu else "small"
    preset = PRESETS.get(named.preset or default_preset, PRESETS["small"])  # tyro refuses an unknown name below
    preset_model = ModelFlags.from_config(preset.model)

    def build_config(
        config: Annotated[Config, tyro.conf.arg(name="")] = preset,
        model: ModelFlags = preset_model,
    ) -> Config:
        """Train Faster R-CNN with deformable convolutions, evaluate it and leave pictures.

        The same command with the same --out goes on where the run stopped.
        """
        return replace(config, given=given, model=replace(config.model, **vars(model)))

    config = tyro.cli(build_config, args=arguments, prog="train/main.py", console_outputs=not quiet)
    if "preset" not in given and has_data and not uses_gpu and not config.eval_only and not quiet:
        show_message("preset small: coco-1x, the published recipe, wants a GPU; --preset coco-1x takes it all the same")
    config = _choose_weights(config)
    return complete(config, gpu=gpu, processes=processes)


def _choose_weights(config: Config) -> Config:
    """Return the configuration with the weights that suit its layers, where no flag names weights.

    Raises:
        ValueError: layers would be frozen with random weights, and no flag asks for that.
    """
    if config.weights == Path("None"):  # as earlier versions wrote "none"
        config = replace(config, weights="none")
    if "weights" not in config.given and config.model.norm == "gn" and config.model.frozen_stages < 0:
        config = replace(config, weights="none")  # from scratch: ImageNet weights have batch norm

    is_frozen = config.model.frozen_stages >= 0
    if config.weights == "none" and is_frozen and not config.eval_only and "model.frozen_stages" not in config.given:
        from_scratch = "--model.frozen-stages -1"
        if config.model.norm == "bn":
            from_scratch += " --model.norm gn --model.no-norm-eval"
        raise ValueError(
            "--weights none: expected --model.frozen-stages too, got none: layers would be frozen with random weights. "
            f"{from_scratch} trains from scratch, --model.frozen-stages {config.model.frozen_stages} freezes random "
            "layers all the same"
        )
    return config


def _find_given(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the values that a command line sets, as "model.mask" for --model.no-mask."""
    names = set()
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0].replace("-", "_")
            section, dot, field = name.rpartition(".")
            names.add(section + dot + field.removeprefix("no_"))
    return tuple(sorted(names))


def _replace_former_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Give renamed flags their current names and leave removed ones out.

    Returns:
        The arguments, and a line about each flag that was left out.

    Raises:
        ValueError: a flag names a value that is set in Python only.
    """
    arguments: list[str] = []
    notes: list[str] = []
    remaining = iter(argv)
    for argument in remaining:
        if not argument.startswith("--"):
            arguments.append(argument)
            continue

        flag, equals, value = argument.partition("=")
        name = flag[2:].replace("-", "_")
        if name in REMOVED:
            if not equals:
                next(remaining, None)  # its value
            notes.append(f"{flag} has no effect any more: {REMOVED[name]}")
            continue

        if name in RENAMED_VALUES:
            value = value if equals else next(remaining, "")
            value = RENAMED_VALUES[name].get(value, value)
            equals = "="
        if name in RENAMED:
            name = RENAMED[name]
            flag = "--" + name.replace("_", "-")
        if name in PYTHON_ONLY:
            section, dot, field = name.partition(".")
            value = f"replace(config.{section}, {field}=...)" if dot else "..."
            raise ValueError(
                f"{argument.partition('=')[0]}: expected a flag of train/main.py, got a value that is set in Python: "
                f"train.main.run(replace(config, {section}={value}))"
            )
        arguments.append(flag + equals + value)
    return arguments, notes
