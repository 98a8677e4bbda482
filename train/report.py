"""What a run says before it starts and after it ends."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from torch import nn

from train.config import BASE_BATCH, Config
from train.data.coco_dataset import CocoDetection
from train.distributed import World
from train.evaluation.coco_metrics import NAMES
from train.run_folder import RunFolder
from train.schedule import Schedule

WIDTH = 80  # columns


def before(
    config: Config,
    world: World,
    model: nn.Module,
    train: CocoDetection,
    val: CocoDetection,
    schedule: Schedule,
    batches_per_epoch: int,
    notes: Sequence[str],
) -> str:
    """Return a table of what will happen.

    Args:
        config, world: of the run.
        model: to count its parameters.
        train, val: the splits.
        schedule: learning rate.
        batches_per_epoch: per process.
        notes: what else to know: where weights come from, what changed since the last start.
    """
    parts = list(model.parameters())
    trained = sum(part.numel() for part in parts if part.requires_grad)
    frozen = sum(part.numel() for part in parts) - trained
    optim, images = config.optim, schedule.images
    steps = -(-batches_per_epoch // optim.accumulate)
    dcn = f"DCN{config.model.dcn} in {_stages(config)}" if config.model.dcn else "plain convolutions"
    processes = "process" if world.size == 1 else "processes"
    shape = "cosine to 0"
    if optim.schedule == "steps":
        shape = f"x{optim.gamma:g} after epoch {', '.join(map(str, optim.milestones))}"
    rows = {
        "run": f"{config.out} (preset {config.preset}, seed {config.seed})",
        "training": f"{len(train)} images, {len(train.boxes)} boxes ({train.annotation_file}: {train.counts})",
        "validation": f"{len(val)} images, {len(val.boxes)} boxes ({val.annotation_file}: {val.counts})",
        "classes": f"{len(train.classes)} in the data: {_shorten(train.classes)}",
        "model": f"{'Mask' if config.model.mask else 'Faster'} R-CNN R{config.model.depth}-FPN, {dcn}, "
        f"norm {config.model.norm}, "
        f"images within {config.model.image_scale[0]} x {config.model.image_scale[1]}",
        "parameters": f"{trained / 1e6:.2f} M trained, {frozen / 1e6:.2f} M frozen",
        "device": f"{world.size} x {world.device.type}, amp {config.amp}",
        "batch": f"{images} = {config.data.batch} images x {world.size} {processes} x {optim.accumulate} accumulated",
        "learning rate": f"{schedule.peak:g} = {optim.lr:g} x {images} / {BASE_BATCH} (linear in the batch), "
        f"{optim.name}, warm-up {optim.warmup} steps, {shape}",
        "length": f"{config.epochs} epochs of {steps} steps"
        + (f", at most {config.max_steps} steps" if config.max_steps else "")
        + "; the progress line tells the time left",
    }
    return "\n".join(_row(name, text) for name, text in [*rows.items(), *(("note", note) for note in notes)])


def after(run: RunFolder, seconds: float) -> str:
    """Return the last evaluation as tables, the best checkpoint, the time, and where everything is."""
    evaluations = run.evaluations()
    lines = [evaluation(evaluations[-1]), ""] if evaluations else []
    best = max((line for line in evaluations if "AP" in line), key=lambda line: line["AP"], default=None)
    if best:
        lines.append(f"best checkpoint  {run.checkpoints / 'best.pt'}")
        lines.append(f"                 (epoch {best['epoch']}: AP {score(best['AP'])}, AP50 {score(best['AP50'])})")
    return "\n".join([*lines, f"this start took  {duration(seconds)}", places(run)])


def evaluation(line: dict[str, Any]) -> str:
    """Return an evaluation line of metrics.jsonl as two small tables: COCO's numbers, then the classes."""
    if "AP" not in line:
        return "no annotations to compare with: detections only"
    masks = "segm_AP" in line
    lines = ["  ".join(f"{name:>6}" for name in NAMES), "  ".join(f"{score(line[name]):>6}" for name in NAMES)]
    if masks:
        lines.append("  ".join(f"{score(line[f'segm_{name}']):>6}" for name in NAMES))
        lines = [start + text for start, text in zip(("       ", "boxes  ", "masks  "), lines, strict=True)]
    width = max([len(name) for name in line["classes"]] + [5])
    lines += ["", f"{'class':<{width}}      AP    AP50   boxes" + ("  masks AP    AP50" if masks else "")]
    for name, (ap, ap50, count) in line["classes"].items():
        row = f"{name:<{width}}  {score(ap):>6}  {score(ap50):>6}  {count:6d}"
        if masks:
            ap, ap50, _ = line["segm_classes"][name]
            row += f"  {score(ap):>8}  {score(ap50):>6}"
        lines.append(row)
    return "\n".join(lines)


def score(value: float) -> str:
    """Return an AP or AR with three digits, a dash where there was no ground truth to count (-1)."""
    return "-" if value < 0 else f"{value:.3f}"


def places(run: RunFolder) -> str:
    """Return where the files of a run are."""
    return "\n".join(
        [
            f"detections       {run.detections}",
            f"pictures         {run.pictures}/",
            f"curves           {run.metrics}",
            f"                 python train/plot.py {run.path}",
            f"                 tensorboard --logdir {run.path}",
        ]
    )


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _row(name: str, text: str) -> str:
    """Return a row of the table in lines of at most `WIDTH` columns; paths stay whole."""
    return textwrap.fill(
        f"{name:<14} {text}", WIDTH, subsequent_indent=" " * 15, break_long_words=False, break_on_hyphens=False
    )


def _stages(config: Config) -> str:
    return ", ".join(f"c{stage + 2}" for stage, used in enumerate(config.model.dcn_stages) if used)


def _shorten(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
