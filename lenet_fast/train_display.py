"""What `lenet-fast train` shows of a run: what is trained, its progress, what came of it."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from . import plots
from .interrupts import Interrupts
from .terminal import printable
from .train import CHECKPOINT, Epoch, Run

__all__ = ["Display", "print_result", "print_summary", "print_time"]


def print_summary(run: Run) -> None:
    """What is trained, on what, how and where."""
    config, dataset = run.config, run.dataset
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    kind = "plain PyTorch twin" if config.reference else "fused layers"
    print(f"model   {config.model}, {kind}, {parameters:,} parameters")
    sizes = f"{len(dataset.train.labels):,} training and {len(dataset.test.labels):,} test images"
    print(f"data    {dataset.name}, {sizes}: {printable(dataset.source)}")
    finished = len(run.history)
    epochs = f"epochs {finished + 1} to {config.epochs}" if finished < config.epochs else "nothing left to do"
    rate = f"lr {config.lr:g} ({config.schedule})"
    print(f"train   {epochs}, batches of {config.batch_size}, {config.optimizer}, {rate}, seed {config.seed}")
    threads = f", {torch.get_num_threads()} threads" if config.device == "cpu" else ""
    why = f" ({run.why_not_fused})" if run.why_not_fused else ""
    print(f"on      {config.device}{threads}, {config.dtype}, {run.engine.name} engine: {run.engine.how}{why}")
    print(f"folder  {printable(run.folder)}")
    if finished == config.epochs:
        print(f"all {finished} epochs are finished; --epochs N with a larger N goes on")


def print_time(run: Run, epochs: Sequence[Epoch], seconds: float) -> None:
    """How long `epochs`, those of this call, took in all; for LeCun's experiment beside LeCun et al. (1998), III.B."""
    if epochs:
        training = sum(epoch.seconds for epoch in epochs)
        print(f"time        {seconds:.1f} s for {len(epochs)} epochs, {training:.1f} s of it training")
    if run.config.model == "lenet5-1998" and run.config.dataset == "mnist":
        error = 100 * (1 - run.history[-1].test_accuracy)
        digits = f"{len(run.history)} passes over {len(run.dataset.train.labels):,} digits"
        lecun = "0.95 % after 20 passes over 60,000 digits, in 2 to 3 days"
        print(f"1998        test error {error:.2f} % after {digits}; LeCun et al.: {lecun}")


def print_result(run: Run) -> None:
    """Draw the curve, and print where the files are and what the last epoch reached."""
    curve = run.folder / "curve.png"
    try:
        plots.learning_curves(run.history, curve, f"{run.config.model} on {run.dataset.name}")
        print(f"curve       {printable(curve)}")
    except ImportError as error:
        print(f"curve       not drawn: {error}")
    print(f"checkpoint  {printable(run.folder / CHECKPOINT)}")
    last = run.history[-1]
    rate = len(run.history) * len(run.dataset.train.labels) / sum(epoch.seconds for epoch in run.history)
    print(
        f"loss {last.loss:.3f}, train acc {last.train_accuracy:.3f}, test acc {last.test_accuracy:.3f}, "
        f"{rate:,.1f} examples/s on {run.config.device}"
    )


class Display:
    """A line for every finished epoch and, where stdout is a terminal, a progress bar for the running one.

    While it is open, Ctrl-C takes effect between steps.
    """

    def __init__(self, run: Run, interrupts: Interrupts) -> None:
        self._run = run
        self._interrupts = interrupts
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

    def __enter__(self) -> "Display":
        with ExitStack() as stack:
            stack.enter_context(self._interrupts.deferred())
            self._start_epoch()
            stack.enter_context(self._bar)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _start_epoch(self) -> None:
        number = f"{len(self._run.history) + 1}/{self._run.config.epochs}"
        self._bar.update(self._task, completed=0, epoch=number, status="")
        self._started = time.perf_counter()

    def show_step(self, done: int, loss: float) -> None:
        self._interrupts.check()
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
            self._interrupts.check()
            self._start_epoch()
