"""Training runs: a LeNet, its data and an engine, and a run folder that every interruption leaves resumable.

    run = Run.create(TrainConfig(model="lenet5", epochs=6), "runs/first")
    run.fit()                                     # checkpoint.pt after every epoch
    Run.resume("runs/first", epochs=10).fit()

A resumed run continues bit for bit as if it had never stopped: on the same machine, with as many threads, and on CUDA
as far as the operators repeat themselves there (cuDNN's convolutions need not).
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import data
from .checkpoint import load_checkpoint, save_checkpoint, write_atomically
from .functional import check_choice
from .inference import evaluate
from .models import MODELS, InputSpec, LeNet, classify, criterion
from .network import NetworkError
from .trainer import FusedTrainer, TrainingError

__all__ = ["ENGINES", "Epoch", "Run", "TrainConfig", "TrainingError", "build_model"]

CHECKPOINT, CONFIG, METRICS = "checkpoint.pt", "config.json", "metrics.csv"  # the files of a run folder

OPTIMIZERS: dict[str, float] = {"adam": 2e-3, "adamw": 2e-3, "sgd": 0.1}  # name -> default learning rate

_WARM_UP = 0.3  # of a one-cycle run


def _fall(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the run done -> share of the learning rate
    "cosine": _fall,
    "one-cycle": lambda done: (
        1 - 0.96 * _fall(done / _WARM_UP) if done < _WARM_UP else _fall((done - _WARM_UP) / (1 - _WARM_UP))
    ),
    "constant": lambda done: 1.0,
}
DTYPES = ("float32", "float64", "bfloat16")
ENGINES = ("auto", "fused", "autograd")

_REPORT_SECONDS = 0.1  # reading the loss waits for the device: not after every step


@dataclass(frozen=True)
class TrainConfig:
    """What a run trains, and how. Checked when made; None and "auto" become what they stand for.

    Args:
        dataset: a name of `data.DATASETS`; None is "mnist" when there is a data_dir, else "mnist-10k".
        lr: highest learning rate; None is the optimizer's default.
        schedule: course of the rate from step to step: "cosine" falls to 0, "one-cycle" rises from 1/25 for the first
            30 % and then falls to 0, "constant" stays.
        momentum: of SGD.
        device: "auto" is CUDA where PyTorch has it, else the CPU.
        dtype: "float32", "float64", or "bfloat16" (autocast; the parameters stay float32).
        reference: train the plain PyTorch twin instead, from the same initial weights on the same batches.
        engine: "fused" takes whole steps in native code (`FusedTrainer`), "autograd" is torch.autograd and torch.optim;
            "auto" is fused where that can train what is asked for, but for the twin. A `Run` resolves it.

    Raises:
        ValueError: a value out of range, an unknown name, or a device that this machine lacks.
    """

    model: str = "lenet5"
    dataset: str | None = None
    data_dir: str | None = None
    epochs: int = 6
    batch_size: int = 32
    optimizer: str = "adam"
    lr: float | None = None
    schedule: str = "cosine"
    momentum: float = 0.0
    weight_decay: float = 0.0
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"
    reference: bool = False
    engine: str = "auto"

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, ENGINES)
        check_choice("model", self.model, MODELS)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("dtype", self.dtype, DTYPES)
        complete = {
            "dataset": self.dataset or ("mnist" if self.data_dir is not None else "mnist-10k"),
            "data_dir": None if self.data_dir is None else str(Path(self.data_dir).expanduser().resolve()),
            "lr": OPTIMIZERS[self.optimizer] if self.lr is None else self.lr,
            "device": str(_resolve_device(self.device)),
        }
        for name, value in complete.items():
            object.__setattr__(self, name, value)
        check_choice("dataset", self.dataset, data.DATASETS)
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value < 2**63:
                raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr: expected a finite number above 0, got {self.lr!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected at least 0 and below 1, got {self.momentum!r}")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum: only 'sgd' takes it, got {self.momentum!r} with {self.optimizer!r}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay: expected a finite number >= 0, got {self.weight_decay!r}")

    def learning_rates(self, epoch: int, steps: int) -> list[float]:
        """Learning rate of each of the `steps` of `epoch`, counted from 0."""
        schedule = SCHEDULES[self.schedule]
        return [self.lr * schedule((epoch + step / steps) / self.epochs) for step in range(steps)]


def _resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}") from None
    if device.type == "cpu":
        return torch.device("cpu")
    present = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count()
    if present is None or present.type != device.type or (device.index or 0) >= count:
        found = "no accelerator" if present is None else f"{count} of type {present.type!r}"
        raise ValueError(f"device: {name!r} is not available: PyTorch {torch.__version__} finds {found}")
    return device


@dataclass(frozen=True)
class Epoch:
    """One finished epoch, a row of metrics.csv. Loss and train accuracy are of the batches as trained on."""

    epoch: int
    learning_rate: float  # of the first step
    loss: float
    train_accuracy: float
    test_accuracy: float
    seconds: float  # of training alone
    examples_per_second: float


OnStep = Callable[[int, Tensor | float], None]


class AutogradEngine:
    """Training steps by torch.autograd and torch.optim, of any nn.Module."""

    name = "autograd"

    def __init__(self, model: nn.Module, input_spec: InputSpec, config: TrainConfig) -> None:
        self.model = model
        self.criterion = criterion(model)
        self.input_spec = input_spec
        self.batch_size = config.batch_size
        self.dtype = _parameter_dtype(config)
        self.autocast = torch.autocast(
            torch.device(config.device).type, torch.bfloat16, enabled=config.dtype == "bfloat16"
        )
        parameters, common = model.parameters(), {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
        self.optimizer: torch.optim.Optimizer = {  # fused: a third of the time on the CPU
            "adam": lambda: torch.optim.Adam(parameters, **common),
            "adamw": lambda: torch.optim.AdamW(parameters, **common),
            "sgd": lambda: torch.optim.SGD(parameters, momentum=config.momentum, **common),
        }[config.optimizer]()

    def run_epoch(
        self,
        images: Tensor,
        labels: Tensor,
        order: Tensor,
        learning_rates: Sequence[float],
        on_step: OnStep,
    ) -> tuple[Tensor, Tensor]:
        """Train once on every image, in batches along `order`, a permutation of their indices; a rate for each batch.

        `on_step` gets the number of images done and the mean loss of the batch after every step.
        Returns, on the device, the mean loss of each batch (steps,) and the number of images it got right.
        """
        self.model.train()
        batches = order.split(self.batch_size)
        losses = torch.empty(len(batches), dtype=self.dtype, device=images.device)
        correct = torch.zeros((), dtype=torch.int64, device=images.device)
        done = 0
        for step, batch in enumerate(batches):
            inputs = self.input_spec.prepare(images.index_select(0, batch), self.dtype)
            targets = labels.index_select(0, batch)
            with self.autocast:
                outputs = self.model(inputs)
                loss = self.criterion(outputs, targets)
            self.optimizer.zero_grad()
            loss.backward()
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rates[step]
            self.optimizer.step()
            losses[step] = loss.detach()
            correct += (classify(self.model, outputs.detach()) == targets).sum()
            done += len(batch)
            on_step(done, losses[step])
        return losses, correct

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer; the parameters are the model's own."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.optimizer.load_state_dict(state)


class FusedEngine:
    """The same by `FusedTrainer`: a native call takes whole steps. The state is the same too."""

    name = "fused"

    def __init__(self, model: nn.Module, input_spec: InputSpec, config: TrainConfig) -> None:
        """Raises NetworkError where the trainer cannot take the model."""
        options = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
        self.trainer = FusedTrainer(model, config.optimizer, **options, input_spec=input_spec)
        self.batch_size = config.batch_size

    def run_epoch(
        self, images: Tensor, labels: Tensor, order: Tensor, learning_rates: Sequence[float], on_step: OnStep
    ) -> tuple[Tensor, Tensor]:
        """As `AutogradEngine.run_epoch`, but `on_step` is called for several steps at a time, when they are done.

        Raises:
            TrainingError: a loss is not finite.
        """

        def report(step: int, loss: float) -> None:
            on_step(min(step * self.batch_size, len(order)), loss)

        losses, correct = self.trainer.run_epoch(images, labels, order, self.batch_size, learning_rates, report)
        return losses, correct.sum()

    def state_dict(self) -> dict[str, Any]:
        """As `AutogradEngine.state_dict`."""
        return self.trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` of this or the other engine returned."""
        self.trainer.load_state_dict(state)


def make_engine(
    model: nn.Module, input_spec: InputSpec, config: TrainConfig
) -> tuple[AutogradEngine | FusedEngine, str | None]:
    """The engine that `config` asks for, and why "auto" is not the fused one, None where it is.

    Raises:
        ValueError: "fused" cannot train this.
    """
    reason = None
    if config.engine != "autograd":
        if config.dtype == "bfloat16":
            reason = "the fused engine has no autocast to bfloat16"
        elif config.reference and config.engine == "auto":
            reason = "the twin is there to be trained by plain PyTorch"
        else:
            try:
                return FusedEngine(model, input_spec, config), None
            except NetworkError as error:
                reason = str(error)
        if config.engine == "fused":
            raise ValueError(f"engine: 'fused' cannot train this: {reason}")
    return AutogradEngine(model, input_spec, config), reason


def build_model(config: TrainConfig) -> tuple[nn.Module, InputSpec]:
    """The network of `config` or its twin; a seed gives the same weights on every device and dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        fused: LeNet = MODELS[config.model](device="cpu", dtype=torch.float32)
    model = fused.reference() if config.reference else fused
    return model.to(config.device, _parameter_dtype(config)), fused.input_spec


def _parameter_dtype(config: TrainConfig) -> torch.dtype:
    return torch.float64 if config.dtype == "float64" else torch.float32


class Run:
    """One training run: model, data on the device, engine, shuffle generator, and the epochs finished so far.

    `folder` gets checkpoint.pt, config.json and metrics.csv; while it is None, nothing is written.
    """

    def __init__(self, config: TrainConfig, *, dataset: data.Dataset | None = None) -> None:
        """Prepare a run without a folder. `dataset` saves loading the one that `config` names."""
        self.config = config
        self.dataset = data.load(config.dataset, config.data_dir) if dataset is None else dataset
        self._train, self._test = (
            data.Split(split.images.to(config.device), split.labels.to(config.device))
            for split in (self.dataset.train, self.dataset.test)
        )
        self.model, self.input_spec = build_model(config)
        self.engine, self.why_not_fused = make_engine(self.model, self.input_spec, config)
        self.config = replace(config, engine=self.engine.name)
        self.generator = torch.Generator(config.device).manual_seed(config.seed)
        self.history: list[Epoch] = []
        self.folder: Path | None = None
        self._data_crc32 = _crc32(self.dataset)

    @classmethod
    def create(cls, config: TrainConfig, folder: str | Path, *, dataset: data.Dataset | None = None) -> Run:
        """Start a run in a new folder. Raises FileExistsError where there is something already."""
        run = cls(config, dataset=dataset)
        run.folder = Path(folder)
        run.folder.mkdir(parents=True, exist_ok=True)
        if any(run.folder.iterdir()):
            raise FileExistsError(f"{folder}: not empty; name another folder, or resume the run in it")
        (run.folder / CONFIG).touch(exist_ok=False)  # of two runs that start at once, one gets the folder
        run._save([])
        return run

    @classmethod
    def resume(cls, folder: str | Path, *, dataset: data.Dataset | None = None, **changes: Any) -> Run:
        """Take up the run in `folder` after its last finished epoch.

        `changes` are fields of TrainConfig: `epochs`, `data_dir` and `engine` may change, others have to agree.
        Warns where the result cannot equal an uninterrupted run's bit for bit: another number of threads, another
        engine, a schedule stretched over more epochs.

        Raises:
            FileNotFoundError: no checkpoint there.
            CheckpointError: the checkpoint cannot be read.
            ValueError: a setting that contradicts the run's, fewer epochs than are finished, or other data.
        """
        folder = Path(folder)
        checkpoint = load_checkpoint(folder / CHECKPOINT)
        written = {"engine": AutogradEngine.name} | checkpoint["config"]  # versions without engines had this one
        stored, history = TrainConfig(**written), checkpoint["history"]
        config = replace(stored, **changes)
        for name in changes.keys() - {"epochs", "data_dir", "engine"}:
            if getattr(config, name) != (fixed := getattr(stored, name)):
                raise ValueError(f"{name}: cannot change in a run, {folder} has {fixed!r}; got {changes[name]!r}")
        if config.epochs < len(history):
            raise ValueError(f"epochs: {folder} has finished {len(history)} already; got {config.epochs}")
        run = cls(config, dataset=dataset)
        if run._data_crc32 != checkpoint["data_crc32"]:
            raise ValueError(f"dataset: {run.dataset.source} is not what the run in {folder} was trained on")
        if history and config.epochs != stored.epochs and config.schedule != "constant":
            was = f"after {len(history)} of {stored.epochs} epochs"
            warnings.warn(f"{was}, the {config.schedule} schedule goes on over {config.epochs}", stacklevel=2)
        if checkpoint["threads"] != (threads := torch.get_num_threads()):
            was = f"the run had {checkpoint['threads']} threads, now {threads}"
            warnings.warn(f"{was}: it goes on equal to rounding, not to the last bit", stacklevel=2)
        if run.engine.name != stored.engine:
            was = f"the run had the {stored.engine} engine, now {run.engine.name}"
            warnings.warn(f"{was}: it goes on equal to rounding, not to the last bit", stacklevel=2)
        run.model.load_state_dict(checkpoint["model"])
        run.engine.load_state_dict(checkpoint["engine"])
        run.generator.set_state(checkpoint["generator"])
        run.history = [Epoch(**epoch) for epoch in history]
        run.folder = folder
        run._save(run.history)
        return run

    def fit(
        self,
        on_step: Callable[[int, float], None] | None = None,
        on_epoch: Callable[[Epoch], None] | None = None,
    ) -> list[Epoch]:
        """Train until `config.epochs` are finished; returns the history. After any exception, go on with `resume`.

        `on_step` gets the number of images done in this epoch and the last batch's loss, at most ten times a
        second; `on_epoch` gets every finished epoch, once it is on disk.

        Raises:
            TrainingError: loss or parameters are not finite; the checkpoint stays at the epoch before.
        """
        while len(self.history) < self.config.epochs:
            epoch = self._run_epoch(on_step)
            if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
                raise TrainingError(_not_finite("a parameter", epoch.epoch))
            if self.folder is not None:
                self._save([*self.history, epoch])
            self.history.append(epoch)
            if on_epoch is not None:
                on_epoch(epoch)
        return self.history

    def _run_epoch(self, on_step: Callable[[int, float], None] | None) -> Epoch:
        number, size = len(self.history) + 1, len(self._train.labels)
        rates = self.config.learning_rates(number - 1, math.ceil(size / self.config.batch_size))
        reported = started = time.perf_counter()

        def report(done: int, loss: Tensor | float) -> None:
            nonlocal reported
            if time.perf_counter() - reported >= _REPORT_SECONDS:
                reported = time.perf_counter()
                value = float(loss)
                if not math.isfinite(value):
                    raise TrainingError(_not_finite("the loss", number))
                if on_step is not None:
                    on_step(done, value)

        order = torch.randperm(size, generator=self.generator, device=self.config.device)
        try:
            losses, correct = self.engine.run_epoch(self._train.images, self._train.labels, order, rates, report)
        except TrainingError as error:
            raise TrainingError(_not_finite("the loss", number)) from error
        sizes = torch.tensor([len(batch) for batch in order.split(self.config.batch_size)], dtype=torch.float64)
        loss = (losses.to("cpu", torch.float64) @ sizes).item() / size  # waits for the device, so before the clock
        seconds = time.perf_counter() - started
        if not math.isfinite(loss):
            raise TrainingError(_not_finite("the loss", number))
        test_accuracy = evaluate(self.model, self.input_spec, self._test)
        return Epoch(number, rates[0], loss, correct.item() / size, test_accuracy, seconds, size / seconds)

    def _save(self, history: list[Epoch]) -> None:
        """Bring the run folder up to date. The checkpoint counts; the other files show what is in it."""
        state = {
            "config": asdict(self.config),
            "history": [asdict(epoch) for epoch in history],
            "model": self.model.state_dict(),
            "engine": self.engine.state_dict(),
            "generator": self.generator.get_state(),
            "data_crc32": self._data_crc32,
            "threads": torch.get_num_threads(),
        }
        save_checkpoint(self.folder / CHECKPOINT, state)
        write_atomically(self.folder / CONFIG, json.dumps(state["config"], indent=2).encode() + b"\n")
        table = io.StringIO(newline="")
        rows = csv.DictWriter(table, [field.name for field in fields(Epoch)], lineterminator="\n")
        rows.writeheader()
        rows.writerows(state["history"])
        write_atomically(self.folder / METRICS, table.getvalue().encode())


def _crc32(dataset: data.Dataset) -> int:
    crc = 0
    for split in (dataset.train, dataset.test):
        for tensor in (split.images, split.labels):
            crc = zlib.crc32(tensor.cpu().contiguous().numpy(), crc)
    return crc


def _not_finite(what: str, epoch: int) -> str:
    return f"{what} is not finite in epoch {epoch}: training diverged; a lower learning rate may help"
