"""The command line: `lenet-fast train`, `eval`, `predict`, `figures` and `env`, also as `python -m lenet_fast`."""

import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from torch import nn

from . import data, env, figures, images, inference
from .checkpoint import CheckpointError
from .interrupts import STATUS, Interrupted, Interrupts
from .memory import out_of_memory
from .models import MODELS, InputSpec, classify, criterion, measures_distance
from .run_folder import CHECKPOINT
from .saved_run import SavedRun
from .terminal import printable
from .train import Run, TrainConfig, TrainingError, build_model
from .train_config import DTYPES, ENGINES, OPTIMIZERS, SCHEDULES
from .train_display import Display, print_result, print_summary, print_time

app = typer.Typer(
    help="Train LeNets with fused kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0, or 1 (expected error, one line), 2 (wrong usage), 130 (Ctrl-C)."""
    with warnings.catch_warnings(), Interrupts() as interrupts:
        warnings.showwarning = lambda message, *_: print(f"lenet-fast: note: {printable(message)}", file=sys.stderr)
        try:
            app(arguments, prog_name="lenet-fast", obj=interrupts)
        except (Interrupted, KeyboardInterrupt):
            _exit("interrupted", code=STATUS)
        except Exception as error:
            if (message := _expected(error)) is None:
                raise
            _exit(f"error: {message}", code=1)


def _expected(error: Exception) -> str | None:
    """What to say of an error that input, settings or the machine caused; None of a fault of this program."""
    if (reason := out_of_memory(error)) is not None:
        return f"out of memory: {reason}"
    if isinstance(error, ValueError | OSError | TrainingError | CheckpointError):
        return str(error)
    return None


def _exit(message: str, code: int) -> NoReturn:
    print(f"lenet-fast: {printable(message)}", file=sys.stderr)
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
    engine: Annotated[
        str, typer.Option(help=f"{_one_of(ENGINES)} auto: fused (whole steps in native code) where it can.")
    ] = TrainConfig.engine,
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
    print_summary(run)
    finished, started = len(run.history), time.perf_counter()
    try:
        with Display(run, context.obj) as display:
            run.fit(on_step=display.show_step, on_epoch=display.show_epoch)
        print_time(run, run.history[finished:], time.perf_counter() - started)
        print_result(run)
    except (Interrupted, KeyboardInterrupt):
        command = f"lenet-fast train --resume {shlex.quote(str(run.folder))}"
        state = f"{len(run.history)} of {run.config.epochs} epochs are finished"
        _exit(f"interrupted; {state} and saved. Continue with: {command}", code=STATUS)


def _default_folder(config: TrainConfig) -> Path:
    twin = "-reference" if config.reference else ""
    return Path("runs") / f"{config.model}{twin}-{config.dataset}-{datetime.now():%Y%m%d-%H%M%S-%f}"


# ---- Using a trained network

_Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run folder, or its checkpoint.pt.")]
_Dataset = Annotated[str | None, typer.Option(help=_one_of(data.DATASETS), show_default="that of the run")]
_DataDir = Annotated[
    Path | None, typer.Option(help="Folder with the data set's IDX files.", show_default="that of the run")
]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


@app.command("eval")
def evaluate(
    checkpoint: _Checkpoint, dataset: _Dataset = None, data_dir: _DataDir = None, device: _Device = "auto"
) -> None:
    """Test a trained network: loss, accuracy and the errors of each class."""
    config, model, input_spec = _load_trained(checkpoint, device)
    whole = _load_data(config, dataset, data_dir)
    labels = whole.test.labels
    outputs = inference.outputs(model, input_spec, whole.test.images)
    loss = criterion(model)(outputs, labels).item()
    wrong = classify(model, outputs) != labels
    print(f"data    {whole.name}, {len(labels):,} test images: {printable(whole.source)}")
    errors = wrong.sum().item()
    rate = 100 * errors / len(labels)
    print(f"test    loss {loss:.4f}, accuracy {100 - rate:.2f} %, error rate {rate:.2f} %, {errors:,} errors")
    width = max(len("class"), *map(len, whole.classes))
    print(f"{'class':{width}}  images  errors  error rate")
    counts = torch.bincount(labels, minlength=10).tolist(), torch.bincount(labels[wrong], minlength=10).tolist()
    for name, count, errors in zip(whole.classes, *counts, strict=True):
        print(f"{name:{width}}  {count:6,}  {errors:6,}  {100 * errors / max(1, count):8.2f} %")


@app.command()
def predict(
    checkpoint: _Checkpoint,
    pictures: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="PNG or JPEG pictures of a drawn digit.")],
    save: Annotated[Path, typer.Option(help="Picture of what the network saw, as PNG.")] = Path("seen.png"),
    device: _Device = "auto",
) -> None:
    """Name the digit in each picture: any size, any colours, dark on light or light on dark."""
    config, model, input_spec = _load_trained(checkpoint, device)
    names = data.CLASSES[config.dataset]
    if names != data.CLASSES["mnist"]:
        warnings.warn(f"the network was trained on {config.dataset}; the pictures are read as digits", stacklevel=1)
    if os.path.realpath(save) in map(os.path.realpath, pictures):
        raise ValueError(f"--save: {save} is one of the pictures to read; name another")
    digits, captions = [], []
    try:
        images.check_replaceable(save)
        for picture in pictures:
            try:
                digit = images.read_digit(picture)
            except (images.ImageError, OSError) as error:
                print(f"lenet-fast: error: {printable(error)}", file=sys.stderr)
                continue
            outputs = inference.outputs(model, input_spec, digit.pixels[None])
            caption, details = _answer(model, outputs, names)
            left_out = f"; left out: {', '.join(digit.left_out)}" if digit.left_out else ""
            print(f"{printable(picture)}: {caption}; {details}{left_out}")
            digits.append(digit)
            captions.append(caption)
        if digits:
            images.save_png(images.seen_picture(digits, input_spec, captions), save)
            print(f"what the network saw: {printable(save)}")
    except ImportError as error:
        _exit(f"error: {error}", code=1)
    if len(digits) < len(pictures):
        raise SystemExit(1)


def _answer(model: nn.Module, outputs: torch.Tensor, names: Sequence[str]) -> tuple[str, str]:
    """In words, from outputs (1, C): the class with its probability, and what else the network says."""
    is_distance = measures_distance(model)
    share = inference.probabilities(model, outputs)[0]
    best, second = outputs[0].argsort(descending=not is_distance)[:2].tolist()
    answer, details = (f"{names[index]}, probability {share[index]:.3f}" for index in (best, second))
    if is_distance:  # the posterior leaves at least one half to "none of them"
        details += f"; no digit, probability {1 - share.sum():.3f}; distance {outputs[0, best]:.3g}"
    return answer, f"runner-up {details}"


@app.command("figures")
def draw_figures(
    checkpoint: _Checkpoint,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures.", show_default="figures in the run folder")
    ] = None,
    chosen: Annotated[
        str, typer.Option("--images", help="Test images whose feature maps are shown, by index.")
    ] = "0,1,2",
    dataset: _Dataset = None,
    data_dir: _DataDir = None,
    device: _Device = "auto",
) -> None:
    """Draw a trained network: filters, feature maps, C3's wiring, confusions, worst mistakes, behaviour on noise."""
    try:
        indices = [int(index) for index in chosen.split(",")]
    except ValueError:
        raise ValueError(f"images: expected indices such as 0,1,2, got {chosen!r}") from None
    config, model, input_spec = _load_trained(checkpoint, device)
    whole = _load_data(config, dataset, data_dir)
    study = figures.Study(model, input_spec, whole, f"{config.model} on {whole.name}")
    folder = out or (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "figures"
    try:
        for path in figures.draw_all(study, folder, indices):
            print(printable(path))
    except ImportError as error:
        _exit(f"error: {error}", code=1)


def _load_trained(path: Path, device: str) -> tuple[TrainConfig, nn.Module, InputSpec]:
    """The network of a run folder or checkpoint, on `device`, and its run's settings. Says what it is."""
    saved = SavedRun.load(path / CHECKPOINT if path.is_dir() else path, device)
    config, epochs = saved.config, len(saved.history)
    model, input_spec = build_model(config)
    saved.restore(model)
    kind = "plain PyTorch twin" if config.reference else "fused layers"
    print(f"model   {config.model}, {kind}, {epochs} of {config.epochs} epochs on {config.dataset}; on {config.device}")
    if epochs == 0:
        warnings.warn(f"{saved.path}: not trained yet, its weights are the initial ones", stacklevel=1)
    return config, model.eval(), input_spec


def _load_data(config: TrainConfig, name: str | None, folder: Path | None) -> data.Dataset:
    """The data set asked for; what is left open is that of the run."""
    if name is None:
        name = "mnist" if folder is not None and config.dataset == "mnist-10k" else config.dataset
    if folder is None and name == config.dataset:
        folder = config.data_dir
    if data.CLASSES.get(name) not in (None, data.CLASSES[config.dataset]):
        warnings.warn(f"the network was trained on {config.dataset}, {name} has other classes", stacklevel=1)
    return data.load(name, folder)
