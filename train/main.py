"""Train Faster R-CNN with deformable convolutions: `python train/main.py`, or the same file under torchrun.

Reads from top to bottom: parse, join the other processes, data, model, resume, then train, save and evaluate.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # find the packages from any folder; this one's files must not pass for top-level modules
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

import detector
from detector.weights.checkpoint import read_checkpoint
from train import errors, report
from train.build import build, check_weights, open_split, resume
from train.checkpoint import TrainState, find, mark, newest, pack, save
from train.config import Config, as_dict, parse
from train.counting import Counting
from train.data.coco_dataset import CocoDetection
from train.data.loader import training_loader
from train.data.samplers import AspectRatioBatchSampler
from train.distributed import Interrupted, StopRequest, World, announced, join, leave
from train.evaluation.coco_metrics import evaluator_classes
from train.evaluation.validation import count, detect
from train.log import TrainLog
from train.loop import train_one_epoch
from train.run_folder import RunFolder, provenance
from train.schedule import Schedule


def main() -> int:
    """Run the command line and return the exit status."""
    world = out = None
    try:
        quiet = os.environ.get("LOCAL_RANK", "0") != "0"
        config = parse(sys.argv[1:], gpu=torch.cuda.is_available(), processes=announced(), quiet=quiet)
        out = config.out
        evaluator_classes(config.evaluator)  # what is missing is told before the others are waited for
        world = join(config.device, config.timeout)
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
        (evaluate_only if config.eval_only else train)(config, world)
        leave(world)
        status = 0
    except (Exception, KeyboardInterrupt) as error:
        status = errors.report(error, world, out)
    if world is not None and world.size > 1:
        # Without Python's farewells: they wait for processes that are gone, and a thread of gloo that still has to let
        # go of a tensor aborts in them.
        sys.stdout.flush()
        os._exit(status)
    return status


def train(config: Config, world: World) -> None:
    """Train until the run has its epochs or steps; save and evaluate on the way."""
    begin, stop = time.monotonic(), StopRequest(world)
    scale, masks = config.model.image_scale, config.model.mask
    train_set = open_split(config, world, "train", scale, masks=masks)
    val_set = open_split(config, world, "val", scale, train_set.classes, masks=masks)
    config = replace(config, model=replace(config.model, num_classes=len(train_set.classes)))
    run = RunFolder(config.out)
    notes = world.broadcast(run.claim(config, world.size) if world.first else None)

    state, network = build(config, world)
    upright = train_set.heights > train_set.widths
    batches = AspectRatioBatchSampler(upright, config.data.batch, config.seed, world.rank, world.size)
    loader = training_loader(train_set, batches, config.data.workers, world.device.type == "cuda")
    schedule = Schedule(config.optim, config.data.batch * world.size * config.optim.accumulate, config.epochs)
    notes += resume(state, run, config, world, train_set.classes, len(batches))
    if world.first:
        print(report.before(config, world, state.model, train_set, val_set, schedule, len(batches), notes), flush=True)

    steps_per_epoch = -(-len(batches) // config.optim.accumulate)
    steps = min(config.epochs * steps_per_epoch, config.max_steps or sys.maxsize)
    log = TrainLog(run.metrics, run.path, world, config.log_every, steps, state.step, len(train_set))
    about = {"config": as_dict(config.model), "run": as_dict(config), "classes": list(train_set.classes)}
    about |= {"images_per_batch": config.data.batch * world.size, **provenance()}
    counting = Counting(run, val_set, config.evaluator)
    try:
        if world.first:
            counting.take_up(state.step)
        while True:
            if _evaluation_is_due(state, config, run, world, counting):
                _record_counted(counting.wait(stop.check), counting, run, log)
                _evaluate(state, val_set, config, world, run, log, stop, counting)
            if _is_finished(state, config):
                _record_counted(counting.wait(stop.check), counting, run, log)
                break
            batches.set_epoch(state.epoch, state.batch)
            for step in train_one_epoch(
                state, network, loader, schedule, log, batches_per_epoch=len(batches), seed=config.seed,
                rank=world.rank, accumulate=config.optim.accumulate, clip_grad=config.optim.clip_grad, amp=config.amp,
            ):  # fmt: skip
                signal = stop.agreed()
                regular = config.checkpoint.every and step % config.checkpoint.every == 0
                if signal or regular or state.batch == 0 or _is_finished(state, config):
                    log.flush()
                    if world.first:
                        save(run.checkpoints, pack(state, about), config.checkpoint.keep)
                if signal:
                    world.barrier()
                    raise Interrupted(signal, f"after step {step}; its checkpoint is in {run.checkpoints}")
                if _is_finished(state, config):
                    break
                if not stop.received:
                    _record_counted(counting.collect(), counting, run, log)
    finally:
        counting.stop()
        log.close()
    if world.first:
        print(report.after(run, time.monotonic() - begin), flush=True)


def evaluate_only(config: Config, world: World) -> None:
    """Evaluate --weights, or the newest checkpoint of --out."""
    begin, run = time.monotonic(), RunFolder(config.out)
    if config.weights:
        check_weights(config.weights)
    path = config.weights or world.broadcast(newest(run.checkpoints, print) if world.first else None)
    if path is None:
        raise ValueError(f"--eval-only needs --weights, or a checkpoint in {run.checkpoints}")
    model, names = detector.load(path, world.device)
    classes = names if read_checkpoint(path).classes else None
    dataset = open_split(config, world, "val", model.config.image_scale, classes, masks=model.config.mask)
    if len(dataset.classes) != model.config.num_classes:
        known = f"{path} knows {model.config.num_classes} classes"
        raise ValueError(f"{known}, {dataset.annotation_file} has {len(dataset.classes)}")
    run.path.mkdir(parents=True, exist_ok=True)
    found = detect(model, dataset, config, world, run, lambda *_: None, lambda: None)
    if world.first:
        line = count(*found, dataset, run, config.evaluator)
        run.append({"weights": str(path), **line})
        print(report.evaluation(line), report.places(run), sep="\n\n")
        print(f"took {report.duration(time.monotonic() - begin)}")


def _is_finished(state: TrainState, config: Config) -> bool:
    return state.epoch >= config.epochs or 0 < config.max_steps <= state.step


def _evaluation_is_due(state: TrainState, config: Config, run: RunFolder, world: World, counting: Counting) -> bool:
    """Tell whether this is a place for an evaluation, and it has not been made before an interruption."""
    at_end_of_epoch = state.batch == 0 and state.epoch > 0 and state.epoch % config.eval_every == 0
    steps = [counting.step, *(line["step"] for line in run.evaluations())] if world.first else []
    known = world.broadcast(state.step in steps)
    return (at_end_of_epoch or _is_finished(state, config)) and not known


def _evaluate(
    state: TrainState, dataset: CocoDetection, config: Config, world: World, run: RunFolder, log: TrainLog,
    stop: StopRequest, counting: Counting,
) -> None:  # fmt: skip
    """Let the model as it is now detect, and count: at once, or beside the next epoch where that takes long."""
    epoch = state.epoch + bool(state.batch)
    found = detect(
        state.evaluated, dataset, config, world, run, lambda name, picture: log.picture(name, picture, state.step),
        stop.check,
    )  # fmt: skip
    if not world.first:
        return
    if 0 < config.eval_overlap <= len(dataset) and not _is_finished(state, config):
        counting.begin(state.step, epoch, *found)
        return
    line = count(*found, dataset, run, config.evaluator)
    _record({"step": state.step, "epoch": epoch, **line}, find(run.checkpoints)[0], run, log)


def _record_counted(line: dict[str, Any] | None, counting: Counting, run: RunFolder, log: TrainLog) -> None:
    """Keep the numbers that were counted beside training, if they are there."""
    if line is not None:
        _record(line, counting.candidate, run, log)
        counting.close_books()


def _record(line: dict[str, Any], weights: Path, run: RunFolder, log: TrainLog) -> None:
    """Keep the numbers of an evaluation, and the checkpoint they belong to if it is the best so far."""
    best = max((before["AP"] for before in run.evaluations() if "AP" in before), default=-2.0)
    if line.get("AP", -2.0) > best:
        mark(weights)
    run.append(line)
    if "AP" in line:
        log.evaluation(line["step"], line)
        ap, ap50 = report.score(line["AP"]), report.score(line["AP50"])
        masks = f"  masks AP {report.score(line['segm_AP'])}" if "segm_AP" in line else ""
        log.say(f"epoch {line['epoch']}: AP {ap}  AP50 {ap50}{masks}  ({line['evaluation_seconds']:.0f} s)")


if __name__ == "__main__":
    sys.exit(main())
