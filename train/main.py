"""Train Faster R-CNN with deformable convolutions: `python train/main.py`, or the same file under torchrun.

`train` reads from top to bottom: data, model, resume, then for each epoch train, save, evaluate. From Python, `run`
takes a `Config`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Import the packages from any working folder, and nothing from train/ as a top-level module.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from triton_dcn.extras import require_extra

    require_extra("train")  # before the imports below stop at the first package that is missing

import torch

from detector import FasterRCNN
from detector.image import write_image
from detector.precision import check_precision, product_settings
from detector.text import lasting_output, printable, show
from detector.weights.checkpoint import read_checkpoint
from detector.weights.load_detector import build_detector
from train import report
from train.build import (
    build,
    build_graphs,
    check_weights_exist,
    is_finished,
    open_split,
    prepare_data,
    prepare_initial_weights,
    resume,
)
from train.checkpoint import (
    TrainState,
    checkpoint_of_step,
    mark_best,
    newest_checkpoint,
    save_checkpoint,
    to_checkpoint,
)
from train.command_line import parse
from train.config import Config, as_dict, complete
from train.data.coco_dataset import CocoDetection
from train.data.identity import identify_images
from train.data.loader import training_loader
from train.data.samplers import AspectRatioBatchSampler
from train.distributed import World, join_processes, leave_processes, world_size_from_environment
from train.errors import report_error
from train.evaluation.evaluate import evaluate
from train.evaluation.pictures import TRAINING_IMAGES
from train.fine_tuning import adapt_to_weights
from train.going_on import find_given, keep_recorded
from train.log import TrainLog
from train.loop import train_one_epoch
from train.mosaic import draw_training_images
from train.precision import choose_precision
from train.run_folder import RunFolder, provenance
from train.schedule import Schedule, choose_warmup, unreached_rates
from train.signals import Interrupted, StopRequest

DRAWN_TRAINING_IMAGES = 8


@lasting_output()
def main() -> int:
    """Run the command line and return the exit status."""
    config = None
    world = None
    try:
        is_quiet = os.environ.get("LOCAL_RANK", "0") != "0"
        gpu = torch.cuda.is_available()
        config = parse(sys.argv[1:], gpu=gpu, processes=world_size_from_environment(), quiet=is_quiet)
        world = join_processes(config.device, config.timeout)
        run(config, world)
        status = 0
    except (Exception, KeyboardInterrupt) as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise once more for a lost loader
        status = report_error(
            error, world, config.out if config else None, eval_only=config is not None and config.eval_only
        )
        for child in multiprocessing.active_children():
            child.kill()  # Python's cleanup would wait for a process that loads images and hangs
    if world is not None and world.size > 1:
        # End without Python's cleanup, which would wait for processes that are gone. A thread of gloo that releases a
        # tensor during the cleanup would also abort this process.
        sys.stdout.flush()
        os._exit(status)
    return status


@lasting_output()
def run(config: Config, world: World | None = None) -> RunFolder:
    """Train, or only evaluate, as the configuration says; the same as the command line does, from Python.

        small = PRESETS["small"]
        config = replace(small, out=Path("runs/birds"), data=replace(small.data, root=Path("birds")))
        best = run(config).checkpoints / "best.pt"

    Args:
        config: of the run; `train.config.PRESETS` has some to start from.
        world: the processes; None joins those that a launcher started, or runs alone.

    Returns:
        The folder of the run.

    Raises:
        Interrupted: a signal asked the run to stop. The same configuration goes on from there.
        OSError, ValueError, FloatingPointError: the run cannot go on; the message says what to change.
    """
    if world is None:
        world = join_processes(config.device, config.timeout)
    config = complete(config, gpu=torch.cuda.is_available(), processes=world.size)
    check_precision(config.precision, world.device)
    with _deterministic(config.deterministic):
        if config.eval_only:
            evaluate_only(config, world)
        else:
            train(config, world)
    leave_processes(world)
    return RunFolder(config.folder)


def train(config: Config, world: World) -> None:
    """Train until the run has its epochs or steps; save and evaluate on the way."""
    start = time.monotonic()
    run_folder = RunFolder(config.folder)
    config = replace(config, given=find_given(config))
    notes: list[str] = []
    record = world.broadcast(run_folder.recorded() if world.is_main else None)
    if record is not None:
        config, notes = keep_recorded(config, record)
    prepare_initial_weights(config, world)
    prepare_data(config, world)
    with StopRequest(world, config.timeout) as stop, contextlib.ExitStack() as stack:
        # A detector in --weights decides what model it is.
        if record is None:
            config, notes = world.broadcast(adapt_to_weights(config) if world.is_main else (config, []))
        config = complete(config, gpu=torch.cuda.is_available(), processes=world.size)

        # Data. The training split decides how many classes the model has.
        train_set = open_split(config, world, "train")
        val_set = open_split(config, world, "val", train_set.classes)
        config = replace(config, model=replace(config.model, num_classes=len(train_set.classes)))
        is_portrait = train_set.heights > train_set.widths
        sampler = AspectRatioBatchSampler(is_portrait, config.data.batch_size, config.seed, world.rank, world.size)
        loader = training_loader(train_set, sampler, config.data.workers, world.device.type == "cuda", config.timeout)

        # The folder of the run.
        choices = None
        if world.is_main:
            run_folder.check_content()
            notes += stack.enter_context(run_folder.lock())
            choices = run_folder.recorded_choices()
        choices = world.broadcast(choices)

        # What is chosen for the run where it begins, and kept where it goes on: its arithmetic and its warm-up.
        precision, precision_notes = choose_precision(config, world, choices.precision if choices else None)
        config = replace(config, precision=precision)
        stack.enter_context(product_settings(precision))
        steps_per_epoch = math.ceil(len(sampler) / config.optim.accumulate)
        warmup, warmup_notes = choose_warmup(config, steps_per_epoch, choices.warmup if choices else None)
        images_per_step = config.data.batch_size * world.size * config.optim.accumulate
        schedule = Schedule(replace(config.optim, warmup=warmup), images_per_step, config.epochs)
        if world.is_main:
            forced = ["precision"] if precision_notes else []
            notes += run_folder.claim(config, world.size, warmup=warmup, forced=forced)
            notes += [*precision_notes, *warmup_notes, *unreached_rates(schedule, steps_per_epoch, config.max_steps)]
        notes = world.broadcast(notes)

        # Model and optimizer; then the newest checkpoint, if there is one.
        state, network = build(config, world)
        resumption = resume(state, run_folder, config, world, train_set, len(sampler))
        notes += resumption.notes
        if state.step == 0:
            notes += report.graph_notes(config, world.device, world.size)
        if world.is_main:
            table = report.run_table(
                config, world, state.model, resumption.weights, train_set, val_set, schedule, len(sampler), notes
            )
            show(table)

        metadata = _checkpoint_metadata(config, world, train_set)
        log = TrainLog(
            run_folder,
            world,
            interval=config.log_every,
            total_steps=_total_steps(state, config, len(sampler)),
            first_step=state.step,
            num_images=len(train_set),
        )
        stack.callback(log.close)
        graphs = build_graphs(state, config, world, log.print)

        def save() -> Path:
            run_folder.check_presence()
            return save_checkpoint(run_folder.checkpoints, to_checkpoint(state, metadata), config.checkpoint.keep)

        if world.is_main and state.step == 0 and config.pictures:
            _draw_training_images(train_set, sampler, run_folder, log)

        # The last epoch may have been saved, but not evaluated before an interruption.
        if not resumption.is_epoch_repeated:
            _evaluate_if_due(state, val_set, config, world, run_folder, log, stop, save)
        while not is_finished(state, config):
            first_step = state.step
            sampler.set_epoch(state.epoch, state.batch)
            for step in train_one_epoch(
                state,
                network,
                loader,
                schedule,
                log,
                batches_per_epoch=len(sampler),
                seed=config.seed,
                rank=world.rank,
                accumulate=config.optim.accumulate,
                clip_grad=config.optim.clip_grad,
                precision=precision,
                graphs=graphs,
            ):
                stop_signal = stop.agreed()
                if stop_signal or _is_checkpoint_due(state, config):
                    log.flush()
                    if world.is_main:
                        save()
                if stop_signal:
                    world.barrier()
                    position = f"after step {step}; its checkpoint is in {run_folder.checkpoints}"
                    raise Interrupted(stop_signal, position)
                if is_finished(state, config):
                    break
            if state.step == first_step:
                raise RuntimeError(f"epoch {state.epoch + 1}: no batch from number {state.batch} of {len(sampler)} on")
            _evaluate_if_due(state, val_set, config, world, run_folder, log, stop, save)

    if world.is_main:
        show(report.summary(run_folder, time.monotonic() - start))


def _draw_training_images(
    train_set: CocoDetection, sampler: AspectRatioBatchSampler, run_folder: RunFolder, log: TrainLog
) -> None:
    """Draw the first images of a new run as the model will get them."""
    first_batches = itertools.chain.from_iterable(sampler.epoch_batches(0))
    keys = [(0, index) for index in itertools.islice(first_batches, DRAWN_TRAINING_IMAGES)]
    picture = draw_training_images(train_set, keys)
    if picture is None:
        return
    run_folder.pictures.mkdir(exist_ok=True)
    write_image(run_folder.pictures / f"{TRAINING_IMAGES}.png", picture)
    log.add_picture(TRAINING_IMAGES, picture, 0)


def evaluate_only(config: Config, world: World) -> None:
    """Evaluate the file of --weights, or the newest checkpoint of --out."""
    start = time.monotonic()
    run_folder = RunFolder(config.folder)
    path = _find_weights(config, world, run_folder)
    checkpoint = read_checkpoint(path)
    model, class_names = build_detector(checkpoint, world.device)
    config = replace(config, model=model.config)

    prepare_data(config, world)
    dataset = open_split(config, world, "val", class_names if checkpoint.classes else None)
    if len(dataset.classes) != model.config.num_classes:
        raise ValueError(
            f"{path}: number of classes: expected {len(dataset.classes)}, as in {dataset.annotation_file}, "
            f"got {model.config.num_classes}"
        )

    with contextlib.ExitStack() as stack:
        choices = None
        notes: list[str] = []
        if world.is_main:
            notes += stack.enter_context(run_folder.lock())
            if not isinstance(config.weights, Path):
                with contextlib.suppress(ValueError):  # a damaged config.json stops no evaluation
                    choices = run_folder.recorded_choices()
        choices = world.broadcast(choices)
        precision, precision_notes = choose_precision(config, world, choices.precision if choices else None)
        config = replace(config, precision=precision)
        stack.enter_context(product_settings(precision))
        if world.is_main:
            show(f"evaluating {printable(path)} on {printable(dataset.annotation_file)}")
            show(f"{report.describe_device(world)}, precision {report.describe_precision(precision)}")
            for note in [*notes, *precision_notes, *report.validation_notes(dataset)]:
                show(f"note: {note}")
        metrics = evaluate(model, dataset, config, world, run_folder)
        if metrics is None:
            return  # not rank 0
        run_folder.append_metrics({"weights": str(path), **metrics})
    show(f"{report.evaluation_tables(metrics)}\n\n{report.output_files(run_folder)}")
    show(f"took {report.format_duration(time.monotonic() - start)}")


@contextlib.contextmanager
def _deterministic(enabled: bool) -> Iterator[None]:
    """Ask PyTorch for deterministic algorithms in the block, or for none; its setting is that of the process."""
    before = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(enabled, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned_only)


def _find_weights(config: Config, world: World, run_folder: RunFolder) -> Path:
    """Return the checkpoint that `evaluate_only` evaluates."""
    if isinstance(config.weights, Path):
        check_weights_exist(config.weights)
        run_folder.check_no_other_run(config.weights)
        return config.weights
    cure = "evaluate another file with --weights FILE and an --out of its own"
    path = world.broadcast(newest_checkpoint(run_folder.checkpoints, show, cure) if world.is_main else None)
    if path is None:
        raise ValueError(
            f"--eval-only: expected --weights FILE, or a checkpoint in {run_folder.checkpoints}, got neither"
        )
    return path


def _checkpoint_metadata(config: Config, world: World, train_set: CocoDetection) -> dict[str, Any]:
    """Return what a checkpoint holds besides the state of the run."""
    return {
        "config": as_dict(config.model),
        "run": as_dict(config),
        "classes": list(train_set.classes),
        "images_per_batch": config.data.batch_size * world.size,
        "training_set": identify_images(train_set),
        **provenance(),
    }


def _total_steps(state: TrainState, config: Config, batches_per_epoch: int) -> int:
    """Return the steps of the whole run: those that are done, and those that are left."""
    accumulate = config.optim.accumulate
    steps_per_epoch = math.ceil(batches_per_epoch / accumulate)
    steps = state.step + (config.epochs - state.epoch) * steps_per_epoch - state.batch // accumulate
    if config.max_steps:
        steps = min(steps, config.max_steps)
    return steps


def _is_checkpoint_due(state: TrainState, config: Config) -> bool:
    """Tell whether to save a checkpoint: at regular steps, and at the end of an epoch and of the run."""
    is_regular = config.checkpoint.every > 0 and state.step % config.checkpoint.every == 0
    is_end_of_epoch = state.batch == 0
    return is_regular or is_end_of_epoch or is_finished(state, config)


def _is_evaluation_due(state: TrainState, config: Config, world: World, run_folder: RunFolder) -> bool:
    """Tell whether the model has to be evaluated here, and was not before an interruption."""
    is_end_of_epoch = state.batch == 0 and state.epoch > 0
    is_due = (is_end_of_epoch and state.epoch % config.eval_every == 0) or is_finished(state, config)
    was_evaluated = False
    if world.is_main:
        was_evaluated = any(line["step"] == state.step for line in run_folder.evaluations())
    return is_due and not world.broadcast(was_evaluated)


def _evaluate_if_due(
    state: TrainState,
    val_set: CocoDetection,
    config: Config,
    world: World,
    run_folder: RunFolder,
    log: TrainLog,
    stop: StopRequest,
    save: Callable[[], Path],
) -> None:
    """Evaluate the model as it is now, write the numbers, and keep its checkpoint if it is the best so far.

    `save` writes the checkpoint again where somebody has deleted it.
    """
    if not _is_evaluation_due(state, config, world, run_folder):
        return
    model = state.evaluated_model
    assert isinstance(model, FasterRCNN)
    metrics = evaluate(
        model,
        val_set,
        config,
        world,
        run_folder,
        show_picture=lambda name, picture: log.add_picture(name, picture, state.step),
        check_stop=stop.check,
    )
    if metrics is None:
        return  # not rank 0

    line = {"step": state.step, "epoch": state.epoch_number, **metrics}
    is_best = "AP" in line and (state.best_ap is None or line["AP"] > state.best_ap)
    if is_best:
        mark_best(checkpoint_of_step(run_folder.checkpoints, state.step) or save())
    run_folder.append_metrics(line)
    if is_best:
        state.best_ap = float(line["AP"])
    if "AP" in line:
        log.add_evaluation(state.step, line)
        log.print(report.evaluation_message(line))


if __name__ == "__main__":
    sys.exit(main())
