"""What a run prints before it starts and after it ends: tables as text."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from detector.precision import PrecisionName
from detector.text import message_line, plural, printable, short_list, short_name
from train.config import BASE_BATCH_SIZE, Config, graph_obstacle
from train.data.coco_dataset import CocoDetection
from train.distributed import World
from train.evaluation.coco_metrics import DEFAULT_EVALUATOR, METRIC_NAMES
from train.evaluation.score_curves import BestF1, format_best
from train.metrics_file import read_lines
from train.precision import DESCRIPTIONS
from train.run_folder import RunFolder
from train.schedule import Schedule

WIDTH = 80  # columns
LABEL_WIDTH = 14  # of the first column of the table

ALL_CLASSES = "all classes"
UNKNOWN_F1 = (-1.0, -1.0, -1.0, -1.0)
F1_NOTE = """precision, recall, F1: at IoU 0.5, of the detections from that score on, where
F1 is highest; of all classes, with one score for all of them"""


def run_table(
    config: Config,
    world: World,
    model: nn.Module,
    weights: str,
    train_set: CocoDetection,
    val_set: CocoDetection,
    schedule: Schedule,
    batches_per_epoch: int,
    notes: Sequence[str],
) -> str:
    """Return what the run will do, as a table of labels and texts.

    Args:
        config: of the run.
        world: its processes.
        model: to count its parameters.
        weights: where they come from.
        train_set: images to train on.
        val_set: images to evaluate on.
        schedule: learning rate.
        batches_per_epoch: per process.
        notes: further lines: what has changed since the last start.
    """
    entries = [
        ("run", f"{config.out} (preset {config.preset}, seed {config.seed})"),
        ("training", _describe_split(train_set)),
        ("validation", _describe_split(val_set)),
        ("evaluation", _describe_evaluation(config)),
        ("classes", f"{len(train_set.classes)} in the data: {short_list(train_set.classes)}"),
        ("model", _describe_model(config)),
        ("weights", weights),
        ("parameters", _describe_parameters(model)),
        ("device", describe_device(world)),
        ("precision", describe_precision(config.precision or "float32")),
        ("batch", _describe_batch(config, world, schedule)),
        ("learning rate", _describe_learning_rate(schedule)),
        ("length", _describe_length(config, batches_per_epoch)),
    ]
    options = _describe_options(config)
    if options:
        entries.append(("options", ", ".join(options)))
    entries += [("note", note) for note in [*training_notes(train_set), *validation_notes(val_set), *notes]]
    return "\n".join(_format_entry(label, text) for label, text in entries)


def summary(run_folder: RunFolder, seconds: float) -> str:
    """Return the last evaluation as tables, the best checkpoint, the time, and where the files are."""
    lines = []
    evaluations = run_folder.evaluations()
    if evaluations:
        lines += [evaluation_tables(evaluations[-1]), ""]

    evaluations_with_ap = [line for line in evaluations if "AP" in line]
    best_checkpoint = run_folder.checkpoints / "best.pt"
    if evaluations_with_ap and best_checkpoint.exists():
        best = max(evaluations_with_ap, key=lambda line: line["AP"])
        ap = format_metric(best["AP"])
        ap50 = format_metric(best["AP50"])
        lines.append(f"best checkpoint  {printable(best_checkpoint)}")
        lines.append(f"                 (epoch {best['epoch']}: AP {ap}, AP50 {ap50})")

    lines.append(f"this start took  {format_duration(seconds)}")
    lines.append(output_files(run_folder))
    return "\n".join(lines)


def evaluation_message(line: dict[str, Any]) -> str:
    """Return one short line about an evaluation of an epoch."""
    ap = format_metric(line["AP"])
    ap50 = format_metric(line["AP50"])
    masks = f"  masks AP {format_metric(line['segm_AP'])}" if "segm_AP" in line else ""
    return f"epoch {line['epoch']}: AP {ap}  AP50 {ap50}{masks}  ({line['evaluation_seconds']:.0f} s)"


def evaluation_tables(line: dict[str, Any]) -> str:
    """Return an evaluation line of metrics.jsonl as small tables: COCO's numbers, then the classes."""
    if "AP" not in line:
        return "no annotations to compare with: detections only"
    has_masks = "segm_AP" in line
    lines = [*_numbers_table(line, has_masks), ""]
    if has_masks:
        lines += [*_class_table(line, "", "class, boxes"), "", *_class_table(line, "segm_", "class, masks")]
    else:
        lines += _class_table(line, "", "class")
    return "\n".join([*lines, "", F1_NOTE])


def format_metric(value: float) -> str:
    """Return an AP or AR with three digits, a dash where there was no ground truth to count (-1)."""
    return "-" if value < 0 else f"{value:.3f}"


def format_duration(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    minutes, full_seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{full_seconds:02d}"


def output_files(run_folder: RunFolder) -> str:
    """Return where the files of a run are, and the commands that show them; only what is there."""
    out = str(run_folder.path)
    lines = [f"detections       {printable(run_folder.detections)}"]
    if any(run_folder.pictures.glob("*.png")):
        lines.append(f"pictures         {printable(run_folder.pictures)}/")
    if any("loss" in line for line in read_lines(run_folder.metrics)):
        plot = _relative(Path(__file__).with_name("plot.py"))
        lines.append(f"curves           {printable(run_folder.metrics)}")
        lines.append(f"                 {_python_command(plot, out)}")
    if any(run_folder.path.glob("events.out.tfevents.*")):
        lines.append(f"                 {_python_command('-m', 'tensorboard.main', '--logdir', out)}")
    return "\n".join(lines)


def _python_command(*arguments: str) -> str:
    """Return a command for the Python that runs here, which need not be the one that `python` starts in a shell."""
    python = shutil.which("python")
    is_same = python is not None and os.path.dirname(python) == os.path.dirname(sys.executable)
    return printable(shlex.join(["python" if is_same else _relative(Path(sys.executable)), *arguments]))


def _relative(path: Path) -> str:
    """Return a path from the working folder on, if it is inside."""
    with contextlib.suppress(OSError, ValueError):  # the working folder was deleted; the path is not inside
        path = path.relative_to(Path.cwd())
    return str(path)


def _describe_split(dataset: CocoDetection) -> str:
    """Return how many images and boxes are used, of how many in the file, and why the others are not."""
    images = plural(len(dataset), "image")
    left_out = str(dataset.image_counts)
    if left_out:
        images += f" (of {dataset.image_counts.total} in the file: {left_out})"

    boxes = plural(len(dataset.boxes), "box", "boxes")
    left_out = str(dataset.counts)
    if left_out:
        boxes += f" (of {plural(dataset.counts.total, 'annotation')}: {left_out})"
    return f"{images}, {boxes}, {dataset.annotation_file}"


def training_notes(dataset: CocoDetection) -> list[str]:
    """Return what is worth knowing about the training data before the training."""
    notes = []
    box_counts = np.bincount(dataset.labels, minlength=len(dataset.classes))
    has_no_annotation = dataset.annotations_per_class == 0
    has_no_box = (box_counts == 0) & ~has_no_annotation
    if has_no_annotation.any():
        note = f"classes without annotations: {_name_classes(dataset, has_no_annotation)}"
        if has_no_annotation[dataset.category_ids == 0].any():
            note += "; the one with the id 0 may be the root category that Roboflow adds: remove it from both files"
        notes.append(note)
    if has_no_box.any():
        notes.append(f"classes of which no box is left to train on: {_name_classes(dataset, has_no_box)}")
    return notes + _split_notes(dataset, "training")


def validation_notes(dataset: CocoDetection) -> list[str]:
    """Return what is worth knowing about the validation data before an evaluation."""
    notes = []
    if dataset.has_annotations and not len(dataset.boxes):
        notes.append("no usable box in the validation data: AP will say nothing")
    return notes + _split_notes(dataset, "validation")


def _split_notes(dataset: CocoDetection, split: str) -> list[str]:
    notes = []
    if dataset.boxes_without_area:
        annotations = plural(dataset.boxes_without_area, f"{split} annotation")
        notes.append(f"{annotations} without area: width x height of their box")
    return notes + [f"{split} data: {mistake}" for mistake in dataset.mistakes]


def _name_classes(dataset: CocoDetection, is_named: np.ndarray) -> str:
    names = [dataset.classes[label] for label in np.flatnonzero(is_named)]
    return f"{short_list(names)} ({len(names)} of {len(dataset.classes)})"


def _describe_model(config: Config) -> str:
    model = config.model
    family = "Mask" if model.mask else "Faster"
    if model.cascade:
        family = "Cascade Mask" if model.mask else "Cascade"
    pooling = {"align": "", "dpool": "deformable RoI pooling, ", "mdpool": "modulated deformable RoI pooling, "}
    convolutions = "plain convolutions"
    if model.dcn:
        stages = [f"c{stage}" for stage, has_dcn in enumerate(model.dcn_stages, start=2) if has_dcn]
        convolutions = f"DCN{model.dcn} in {', '.join(stages)}"
    long_side, short_side = model.image_scale
    return (
        f"{family} R-CNN {model.backbone_name}-FPN, {convolutions}, {pooling[model.roi_layer]}norm {model.norm}, "
        f"images within {long_side} x {short_side}"
    )


def _describe_parameters(model: nn.Module) -> str:
    trained = 0
    frozen = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
        else:
            frozen += parameter.numel()
    return f"{trained / 1e6:.2f} M trained, {frozen / 1e6:.2f} M frozen"


def describe_device(world: World) -> str:
    """Return how many devices of which kind compute."""
    return f"{world.size} x {world.device.type}"


def describe_precision(precision: PrecisionName) -> str:
    """Return the name of a precision, and what it means."""
    return f"{precision}: {DESCRIPTIONS[precision]}"


def _describe_evaluation(config: Config) -> str:
    when = "after every epoch"
    if config.eval_every > 1:
        when = f"after every {config.eval_every} epochs and the last"
    return f"with {DEFAULT_EVALUATOR}, {when}"


def _describe_options(config: Config) -> list[str]:
    """Return what is on that may be off, and is in no other line of the table."""
    data = config.data
    optim = config.optim
    options = []
    if data.flip:
        options.append(f"mirrored images ({data.flip:g} of them)")
    if data.short_sides:
        options.append(f"multi-scale (short side {', '.join(map(str, data.short_sides))})")
    if config.half_size_epochs:
        epochs = "epoch 1" if config.half_size_epochs == 1 else f"epochs 1 to {config.half_size_epochs}"
        options.append(f"images at half the size in {epochs}")
    if optim.offset_lr != 1:
        options.append(f"{optim.offset_lr:g} of the learning rate for offsets")
    if optim.weight_decay:
        options.append(f"weight decay {optim.weight_decay:g}")
    if optim.clip_grad:
        options.append(f"gradients clipped to norm {optim.clip_grad:g}")
    if optim.ema:
        options.append(f"EMA of the weights (decay {optim.ema:g}), which is evaluated")
    if config.compile:
        options.append("torch.compile")
    if config.graph:
        options.append("CUDA graphs")
    if config.deterministic:
        options.append("deterministic algorithms")
    return options


def graph_notes(config: Config, device: torch.device, processes: int) -> list[str]:
    """Return a note about `--graph` where a new run could have it."""
    if config.graph or graph_obstacle(config, gpu=device.type == "cuda", processes=processes):
        return []
    return ["without --graph a fast GPU waits for its host: on an H200 steps took more than twice as long"]


def _describe_batch(config: Config, world: World, schedule: Schedule) -> str:
    return (
        f"{schedule.images_per_step} = {plural(config.data.batch_size, 'image')} x "
        f"{plural(world.size, 'process', 'processes')} x {config.optim.accumulate} accumulated"
    )


def _describe_learning_rate(schedule: Schedule) -> str:
    optim = schedule.config
    fall = "cosine to 0"
    if optim.schedule == "steps" and not optim.milestones:
        fall = "then constant"
    elif optim.schedule == "steps":
        fall = f"x{optim.gamma:g} after epoch {', '.join(map(str, optim.milestones))}"
    return (
        f"{schedule.peak_lr:g} = {optim.lr:g} x {schedule.images_per_step} / {BASE_BATCH_SIZE} (linear in the batch), "
        f"{optim.name}, warm-up {plural(optim.warmup, 'step')}, {fall}"
    )


def _describe_length(config: Config, batches_per_epoch: int) -> str:
    steps = math.ceil(batches_per_epoch / config.optim.accumulate)
    limit = f", at most {plural(config.max_steps, 'step')}" if config.max_steps else ""
    epochs = f"{plural(config.epochs, 'epoch')} of {plural(steps, 'step')}"
    return f"{epochs}{limit}; the progress line tells the time left"


def _numbers_table(line: dict[str, Any], has_masks: bool) -> list[str]:
    header = "  ".join(f"{name:>6}" for name in METRIC_NAMES)
    boxes = "  ".join(f"{format_metric(line[name]):>6}" for name in METRIC_NAMES)
    if not has_masks:
        return [header, boxes]
    masks = "  ".join(f"{format_metric(line[f'segm_{name}']):>6}" for name in METRIC_NAMES)
    return [f"       {header}", f"boxes  {boxes}", f"masks  {masks}"]


def _class_table(line: dict[str, Any], prefix: str, title: str) -> list[str]:
    """Return a line for each class, and one for all of them.

    Args:
        line: of metrics.jsonl.
        prefix: of the names of its numbers.
        title: of the first column.
    """
    classes = line[f"{prefix}classes"]
    best_f1 = line.get(f"{prefix}classes_F1", {})  # lines of earlier versions have none
    width = max(len(short_name(name)) for name in [title, ALL_CLASSES, *classes])
    lines = [f"{title:<{width}}      AP    AP50  precision  recall    F1 at score   boxes"]
    for name, (ap, ap50, boxes) in classes.items():
        lines.append(_class_row(f"{short_name(name):<{width}}", ap, ap50, best_f1.get(name, UNKNOWN_F1), boxes))

    boxes = sum(boxes for _, _, boxes in classes.values())
    together = [line.get(prefix + name, -1.0) for name in ("precision", "recall", "F1", "score_threshold")]
    lines.append(_class_row(f"{ALL_CLASSES:<{width}}", line[f"{prefix}AP"], line[f"{prefix}AP50"], together, boxes))
    return lines


def _class_row(name: str, ap: float, ap50: float, best_f1: Sequence[float], boxes: int) -> str:
    best = BestF1(*best_f1)
    return (
        f"{name}  {format_metric(ap):>6}  {format_metric(ap50):>6}  {format_metric(best.precision):>9}  "
        f"{format_metric(best.recall):>6}  {format_best(best):>13}  {boxes:6d}"
    )


def _format_entry(label: str, text: str) -> str:
    """Return an entry of the table in lines of at most `WIDTH` columns; paths stay whole."""
    return textwrap.fill(
        f"{label:<{LABEL_WIDTH}} {message_line(text)}",
        WIDTH,
        subsequent_indent=" " * (LABEL_WIDTH + 1),
        break_long_words=False,
        break_on_hyphens=False,
    )
