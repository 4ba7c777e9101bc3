"""The command line: `lenet-fast train` and `lenet-fast env`, also as `python -m lenet_fast`."""

import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from . import data, env, plots
from .checkpoint import CheckpointError
from .models import MODELS
from .train import CHECKPOINT, DTYPES, OPTIMIZERS, SCHEDULES, Epoch, Run, TrainConfig, TrainingError

app = typer.Typer(
    help="Train LeNets with fused kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0, or 1 (expected error, one line), 2 (wrong usage), 130 (Ctrl-C)."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"lenet-fast: note: {message}", file=sys.stderr)
        try:
            app(arguments, prog_name="lenet-fast")
        except (ValueError, OSError, TrainingError, CheckpointError) as error:
            _exit(f"error: {error}", code=1)


def _exit(message: str, code: int) -> None:
    print(f"lenet-fast: {message}", file=sys.stderr)
    raise SystemExit(code)


@app.command("env")
def print_environment() -> None:
    """Print versions, hardware and the kernels that this installation has."""
    print(env.report())


def _one_of(names: Iterable[str]) -> str:
    return f"One of {', '.join(names)}."


@app.command()
def train(
    context: typer.Context,
    model: Annotated[str, typer.Option(help=_one_of(MODELS))] = TrainConfig.model,
    dataset: Annotated[
        str | None, typer.Option(help=_one_of(data.DATASETS), show_default="mnist-10k; with --data-dir mnist")
    ] = TrainConfig.dataset,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with the data set's IDX files.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = TrainConfig.epochs,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = TrainConfig.batch_size,
    optimizer: Annotated[str, typer.Option(help=_one_of(OPTIMIZERS))] = TrainConfig.optimizer,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Highest learning rate.",
            show_default=", ".join(f"{rate:g} for {name}" for name, rate in OPTIMIZERS.items()),
        ),
    ] = TrainConfig.lr,
    schedule: Annotated[
        str, typer.Option(help=f"Course of the learning rate. {_one_of(SCHEDULES)}")
    ] = TrainConfig.schedule,
    momentum: Annotated[float, typer.Option(help="Of sgd.")] = TrainConfig.momentum,
    weight_decay: Annotated[float, typer.Option(help="L2 penalty; of adamw decoupled.")] = TrainConfig.weight_decay,
    seed: Annotated[int, typer.Option(help="Of initial weights and shuffling.")] = TrainConfig.seed,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = TrainConfig.device,
    dtype: Annotated[str, typer.Option(help=f"{_one_of(DTYPES)} bfloat16 is autocast.")] = TrainConfig.dtype,
    reference: Annotated[
        bool, typer.Option("--reference", help="Train the plain PyTorch twin on the same batches.")
    ] = TrainConfig.reference,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="New folder for the results.", show_default="runs/MODEL-DATASET-TIME"),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN_DIR", help="Continue the run in this folder, with its settings."),
    ] = None,
) -> None:
    """Train a LeNet; its run folder gets a checkpoint after every epoch, metrics.csv and curve.png."""
    names = {field.name for field in fields(TrainConfig)}
    given = {
        name: value
        for name, value in context.params.items()
        if name in names and context.get_parameter_source(name).name == "COMMANDLINE"
    }
    if resume is None:
        config = TrainConfig(**given)
        run = Run.create(config, run_dir or _default_folder(config))
    elif run_dir is None:
        run = Run.resume(resume, **given)
    else:
        raise ValueError("--run-dir and --resume exclude each other: a resumed run stays in its folder")
    _print_summary(run)
    try:
        with _Display(run) as display:
            run.fit(on_step=display.show_step, on_epoch=display.show_epoch)
    except KeyboardInterrupt:
        command = f"lenet-fast train --resume {shlex.quote(str(run.folder))}"
        finished = f"{len(run.history)} of {run.config.epochs} epochs are finished"
        _exit(f"interrupted; {finished} and saved. Continue with: {command}", code=130)
    _print_result(run)


def _default_folder(config: TrainConfig) -> Path:
    twin = "-reference" if config.reference else ""
    return Path("runs") / f"{config.model}{twin}-{config.dataset}-{datetime.now():%Y%m%d-%H%M%S-%f}"


def _print_summary(run: Run) -> None:
    config, dataset = run.config, run.dataset
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    kind = "plain PyTorch twin" if config.reference else "fused layers"
    print(f"model   {config.model}, {kind}, {parameters:,} parameters")
    sizes = f"{len(dataset.train.labels):,} training and {len(dataset.test.labels):,} test images"
    print(f"data    {dataset.name}, {sizes}: {dataset.source}")
    finished = len(run.history)
    epochs = f"epochs {finished + 1} to {config.epochs}" if finished < config.epochs else "nothing left to do"
    rate = f"lr {config.lr:g} ({config.schedule})"
    print(f"train   {epochs}, batches of {config.batch_size}, {config.optimizer}, {rate}, seed {config.seed}")
    threads = f", {torch.get_num_threads()} threads" if config.device == "cpu" else ""
    print(f"on      {config.device}{threads}, {config.dtype}, {run.engine.name} engine")
    print(f"folder  {run.folder}")
    if finished == config.epochs:
        print(f"all {finished} epochs are finished; --epochs N with a larger N goes on")


def _print_result(run: Run) -> None:
    curve = run.folder / "curve.png"
    try:
        plots.learning_curves(run.history, curve, f"{run.config.model} on {run.dataset.name}")
        print(f"curve       {curve}")
    except ImportError as error:
        print(f"curve       not drawn: {error}")
    print(f"checkpoint  {run.folder / CHECKPOINT}")
    last = run.history[-1]
    rate = len(run.history) * len(run.dataset.train.labels) / sum(epoch.seconds for epoch in run.history)
    print(
        f"loss {last.loss:.3f}, train acc {last.train_accuracy:.3f}, test acc {last.test_accuracy:.3f}, "
        f"{rate:,.1f} examples/s on {run.config.device}"
    )


class _Display:
    """A line for every finished epoch and, where stdout is a terminal, a progress bar for the running one.

    While it is open, Ctrl-C takes effect between steps: the exception that Python raises just anywhere can be lost in
    a callback. A second Ctrl-C is raised at once.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        console = Console()
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %  {task.fields[status]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=len(run.dataset.train.labels), epoch="", status="")

    def __enter__(self) -> "_Display":
        self._interrupted = False
        self._on_interrupt = signal.signal(signal.SIGINT, self._interrupt)
        self._start_epoch()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        signal.signal(signal.SIGINT, self._on_interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        signal.signal(signal.SIGINT, self._on_interrupt)

    def _start_epoch(self) -> None:
        number = f"{len(self._run.history) + 1}/{self._run.config.epochs}"
        self._bar.update(self._task, completed=0, epoch=number, status="")
        self._started = time.perf_counter()

    def show_step(self, done: int, loss: float) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        rate = done / (time.perf_counter() - self._started)
        self._bar.update(self._task, completed=done, status=f"loss {loss:.4f}  {rate:,.0f} images/s")

    def show_epoch(self, epoch: Epoch) -> None:
        line = (
            f"epoch {epoch.epoch}/{self._run.config.epochs}  loss {epoch.loss:.4f}  "
            f"train acc {epoch.train_accuracy:.4f}  test acc {epoch.test_accuracy:.4f}  "
            f"{epoch.examples_per_second:,.0f} images/s"
        )
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        if epoch.epoch < self._run.config.epochs:
            if self._interrupted:
                raise KeyboardInterrupt
            self._start_epoch()
