"""What a run prints before it starts and after it ends: tables as text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from detector.precision import PrecisionName
from detector.text import message_line, printable, short_list, short_name
from train.config import BASE_BATCH_SIZE, Config
from train.data.coco_dataset import CocoDetection
from train.distributed import World
from train.evaluation.coco_metrics import DEFAULT_EVALUATOR, METRIC_NAMES
from train.precision import DESCRIPTIONS
from train.run_folder import RunFolder
from train.schedule import Schedule

WIDTH = 80  # columns
LABEL_WIDTH = 14  # of the first column of the table


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
        ("evaluation", f"with {DEFAULT_EVALUATOR}"),
        ("classes", f"{len(train_set.classes)} in the data: {short_list(train_set.classes)}"),
        ("model", _describe_model(config)),
        ("weights", weights),
        ("parameters", _describe_parameters(model)),
        ("device", describe_device(world) + (", steps from CUDA graphs" if config.graph else "")),
        ("precision", describe_precision(config.precision or "float32")),
        ("batch", _describe_batch(config, world, schedule)),
        ("learning rate", _describe_learning_rate(schedule)),
        ("length", _describe_length(config, batches_per_epoch)),
    ]
    entries += [("note", note) for note in [*training_notes(train_set), *validation_notes(val_set), *notes]]
    return "\n".join(_format_entry(label, text) for label, text in entries)


def summary(run_folder: RunFolder, seconds: float) -> str:
    """Return the last evaluation as tables, the best checkpoint, the time, and where the files are."""
    lines = []
    evaluations = run_folder.evaluations()
    if evaluations:
        lines += [evaluation_tables(evaluations[-1]), ""]

    evaluations_with_ap = [line for line in evaluations if "AP" in line]
    if evaluations_with_ap:
        best = max(evaluations_with_ap, key=lambda line: line["AP"])
        ap = format_metric(best["AP"])
        ap50 = format_metric(best["AP50"])
        lines.append(f"best checkpoint  {printable(run_folder.checkpoints / 'best.pt')}")
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
    """Return an evaluation line of metrics.jsonl as two small tables: COCO's numbers, then the classes."""
    if "AP" not in line:
        return "no annotations to compare with: detections only"
    has_masks = "segm_AP" in line
    return "\n".join([*_numbers_table(line, has_masks), "", *_class_table(line, has_masks)])


def format_metric(value: float) -> str:
    """Return an AP or AR with three digits, a dash where there was no ground truth to count (-1)."""
    return "-" if value < 0 else f"{value:.3f}"


def format_duration(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    minutes, full_seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{full_seconds:02d}"


def output_files(run_folder: RunFolder) -> str:
    """Return where the files of a run are."""
    return "\n".join(
        [
            f"detections       {printable(run_folder.detections)}",
            f"pictures         {printable(run_folder.pictures)}/",
            f"curves           {printable(run_folder.metrics)}",
            f"                 python train/plot.py {printable(run_folder.path)}",
            f"                 tensorboard --logdir {printable(run_folder.path)}",
        ]
    )


def _describe_split(dataset: CocoDetection) -> str:
    """Return how many images and boxes are used, of how many in the file, and why the others are not."""
    images = f"{len(dataset)} images"
    left_out = str(dataset.image_counts)
    if left_out:
        images += f" (of {dataset.image_counts.total} in the file: {left_out})"

    boxes = f"{len(dataset.boxes)} boxes"
    left_out = str(dataset.counts)
    if left_out:
        boxes += f" (of {dataset.counts.total} annotations: {left_out})"
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
        notes.append(f"{dataset.boxes_without_area} {split} annotations without area: width x height of their box")
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


def _describe_batch(config: Config, world: World, schedule: Schedule) -> str:
    processes = "process" if world.size == 1 else "processes"
    return (
        f"{schedule.images_per_step} = {config.data.batch_size} images x {world.size} {processes} "
        f"x {config.optim.accumulate} accumulated"
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
        f"{optim.name}, warm-up {optim.warmup} steps, {fall}"
    )


def _describe_length(config: Config, batches_per_epoch: int) -> str:
    steps = math.ceil(batches_per_epoch / config.optim.accumulate)
    limit = f", at most {config.max_steps} steps" if config.max_steps else ""
    return f"{config.epochs} epochs of {steps} steps{limit}; the progress line tells the time left"


def _numbers_table(line: dict[str, Any], has_masks: bool) -> list[str]:
    header = "  ".join(f"{name:>6}" for name in METRIC_NAMES)
    boxes = "  ".join(f"{format_metric(line[name]):>6}" for name in METRIC_NAMES)
    if not has_masks:
        return [header, boxes]
    masks = "  ".join(f"{format_metric(line[f'segm_{name}']):>6}" for name in METRIC_NAMES)
    return [f"       {header}", f"boxes  {boxes}", f"masks  {masks}"]


def _class_table(line: dict[str, Any], has_masks: bool) -> list[str]:
    width = max(len(short_name(name)) for name in ["class", *line["classes"]])
    header = f"{'class':<{width}}      AP    AP50   boxes"
    if has_masks:
        header += "  masks AP    AP50"

    lines = [header]
    for name, (ap, ap50, box_count) in line["classes"].items():
        text = f"{short_name(name):<{width}}  {format_metric(ap):>6}  {format_metric(ap50):>6}  {box_count:6d}"
        if has_masks:
            mask_ap, mask_ap50, _ = line["segm_classes"][name]
            text += f"  {format_metric(mask_ap):>8}  {format_metric(mask_ap50):>6}"
        lines.append(text)
    return lines


def _format_entry(label: str, text: str) -> str:
    """Return an entry of the table in lines of at most `WIDTH` columns; paths stay whole."""
    return textwrap.fill(
        f"{label:<{LABEL_WIDTH}} {message_line(text)}",
        WIDTH,
        subsequent_indent=" " * (LABEL_WIDTH + 1),
        break_long_words=False,
        break_on_hyphens=False,
    )
