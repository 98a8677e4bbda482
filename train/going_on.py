"""A run that goes on keeps the values that it began with, also where its preset has others by now."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import fields, replace
from typing import Any

from detector.text import short_list
from detector.weights.load_detector import stored_config
from train.config import PRESETS, Config, as_dict
from train.run_folder import flatten, may_change, values_before

SECTIONS = ("data", "optim", "checkpoint")
NEVER_KEPT = {"out", "given", "data.root", "precision"}  # places; and what `choose_precision` keeps


def find_given(config: Config) -> tuple[str, ...]:
    """Return the names of the values that were asked for: by a flag, or in Python as others than the preset's."""
    preset = flatten(as_dict(PRESETS[config.preset]))
    values = flatten(as_dict(config))
    differing = {name for name, value in values.items() if value != preset[name]}
    return tuple(sorted(differing.union(config.given) - {"given"}))


def keep_recorded(config: Config, record: dict[str, Any]) -> tuple[Config, list[str]]:
    """Give a run that goes on the values of its config.json, but for those that were asked for, then or now.

    Presets change from version to version, which preset is taken by default depends on the machine, and fine-tuning
    took model and learning rate from a file that may be gone.

    Args:
        config: of this start, with `given` as `find_given` returns it.
        record: what config.json holds.

    Returns:
        The configuration to go on with, and a note about values that the preset has otherwise.

    Raises:
        ValueError: the model in config.json is damaged.
    """
    before = values_before(record)
    is_whole = all(isinstance(record.get(section), dict) for section in ("model", *SECTIONS))
    if not is_whole or ("preset" in config.given and before["preset"] != config.preset):
        return config, []  # the folder refuses it as another run

    asked = NEVER_KEPT.union(config.given)
    if isinstance(given_before := record.get("given"), list):
        asked |= set(map(str, given_before))
    else:  # of an earlier version, which did not record what was asked for
        asked |= may_change(before)
    if before["weights"] not in ("imagenet", "none"):
        asked.add("weights")

    try:
        model_before = stored_config(record)
    except ValueError as error:
        raise ValueError(f"config.json in --out {config.folder}: {error}") from error
    before |= {f"model.{name}": value for name, value in vars(model_before).items()}
    sections = {name: _keep(getattr(config, name), before, f"{name}.", asked) for name in ("model", *SECTIONS)}
    kept = replace(_keep(config, before, "", asked), **sections)
    return kept, _describe_difference(config, kept)


def _keep(values: Any, before: dict[str, Any], prefix: str, asked: Set[str]) -> Any:
    """Return a dataclass with the recorded values of the fields that nobody asked for."""
    changes = {}
    for field in fields(values):
        name = prefix + field.name
        if name not in before or name in asked:
            continue
        recorded = before[name]
        if isinstance(recorded, list):
            recorded = tuple(recorded)
        if prefix == "model." or type(recorded) is type(getattr(values, field.name)):
            changes[field.name] = recorded
    return replace(values, **changes)


def _describe_difference(config: Config, kept: Config) -> list[str]:
    """Return a note about kept values that are others than those of this start; fine-tuning has had its notes."""
    is_of_file = kept.weights not in ("imagenet", "none")
    asked = flatten(as_dict(config))
    differences = []
    for name, value in flatten(as_dict(kept)).items():
        if name == "model.num_classes" or (is_of_file and (name == "optim.lr" or name.startswith("model."))):
            continue
        if value != asked[name]:
            differences.append(f"{name} {value} instead of {asked[name]}")
    if kept.preset != config.preset:
        differences = [f"preset {kept.preset} instead of {config.preset}"]
    if not differences:
        return []
    return [f"the run keeps the values that it began with: {short_list(differences, length=120)}"]
