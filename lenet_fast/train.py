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
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, data
from .checkpoint import save_checkpoint, write_atomically
from .engines import make_engine
from .inference import evaluate
from .memory import out_of_memory
from .models import MODELS, InputSpec, LeNet
from .run_folder import CHECKPOINT, CONFIG, METRICS, FolderInUseError, RunFolder
from .saved_run import Epoch, SavedRun
from .train_config import TrainConfig
from .trainer import TrainingError

__all__ = ["CHECKPOINT", "Epoch", "FolderInUseError", "Run", "TrainConfig", "TrainingError", "build_model"]

_REPORT_SECONDS = 0.1  # reading the loss waits for the device: not after every step


def build_model(config: TrainConfig) -> tuple[nn.Module, InputSpec]:
    """The network of `config` or its twin; a seed gives the same weights on every device and dtype.

    Raises:
        ValueError: nothing can run it, as $LENET_FAST_CPU_ISA names an instruction set that this machine lacks.
    """
    if config.device == "cpu":
        backends.cpu_isa()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        fused: LeNet = MODELS[config.model](device="cpu", dtype=torch.float32)
    model = fused.reference() if config.reference else fused
    return model.to(config.device, config.parameter_dtype), fused.input_spec


class Run:
    """One training run: model, data on the device, engine, shuffle generator, and the epochs finished so far.

    `folder` gets checkpoint.pt, config.json and metrics.csv, and is locked until `fit` ends; while it is None, nothing
    is written.
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
        self._folder: RunFolder | None = None
        self._data_crc32 = _crc32(self.dataset)

    @classmethod
    def create(cls, config: TrainConfig, folder: str | Path, *, dataset: data.Dataset | None = None) -> Run:
        """Start a run in a new or empty folder; where that fails, nothing of it stays.

        Raises:
            FolderInUseError (an OSError): another run uses the folder; names its process.
            FileExistsError: there is something already.
        """
        own = RunFolder.create(folder)
        try:
            run = cls(config, dataset=dataset)
            run._folder = own
            run._save([])
        except BaseException:
            own.discard()
            raise
        return run

    @classmethod
    def resume(cls, folder: str | Path, *, dataset: data.Dataset | None = None, **changes: Any) -> Run:
        """Take up the run in `folder` after its last finished epoch.

        `changes` are fields of TrainConfig: `epochs`, `data_dir` and `engine` may change, others have to agree.
        Warns where the result cannot equal an uninterrupted run's bit for bit: another number of threads, another
        engine, a schedule stretched over more epochs.

        Raises:
            FolderInUseError (an OSError): another run uses the folder; names its process.
            FileNotFoundError: no checkpoint there.
            CheckpointError: the checkpoint cannot be read, or has an entry that is not what it should be.
            ValueError: a setting that contradicts the run's, fewer epochs than are finished, or other data.
        """
        own = RunFolder.open(folder)
        try:
            run = cls._resume(own, dataset, changes)
        except BaseException:
            own.release()
            raise
        return run

    @classmethod
    def _resume(cls, folder: RunFolder, dataset: data.Dataset | None, changes: dict[str, Any]) -> Run:
        saved = SavedRun.load(folder.path / CHECKPOINT)
        stored, finished = saved.config, len(saved.history)
        config = replace(stored, **changes)
        for name in changes.keys() - {"epochs", "data_dir", "engine"}:
            if getattr(config, name) != (fixed := getattr(stored, name)):
                raise ValueError(f"{name}: cannot change in a run, {folder.path} has {fixed!r}; got {changes[name]!r}")
        if config.epochs < finished:
            raise ValueError(f"epochs: {folder.path} has finished {finished} already; got {config.epochs}")
        run = cls(config, dataset=dataset)
        if run._data_crc32 != saved.data_crc32:
            raise ValueError(f"dataset: {run.dataset.source} is not what the run in {folder.path} was trained on")
        saved.restore(run.model)
        saved.restore_generator(run.generator)
        run.engine.load_state_dict(saved.engine_state())
        if finished and config.epochs != stored.epochs and config.schedule != "constant":
            was = f"after {finished} of {stored.epochs} epochs"
            warnings.warn(f"{was}, the {config.schedule} schedule goes on over {config.epochs}", stacklevel=3)
        if saved.threads != (threads := torch.get_num_threads()):
            was = f"the run had {saved.threads} threads, now {threads}"
            warnings.warn(f"{was}: it goes on equal to rounding, not to the last bit", stacklevel=3)
        if run.engine.name != stored.engine:
            was = f"the run had the {stored.engine} engine, now {run.engine.name}"
            warnings.warn(f"{was}: it goes on equal to rounding, not to the last bit", stacklevel=3)
        run.history = saved.history
        run._folder = folder
        run._save(run.history)
        return run

    @property
    def folder(self) -> Path | None:
        """Where the run is saved; None: nowhere."""
        return None if self._folder is None else self._folder.path

    def fit(
        self,
        on_step: Callable[[int, float], None] | None = None,
        on_epoch: Callable[[Epoch], None] | None = None,
    ) -> list[Epoch]:
        """Train until `config.epochs` are finished; returns the history. After any exception, go on with `resume`.

        Until it returns, no other run can use the folder.

        `on_step` gets the number of images done in this epoch and the last batch's loss, at most ten times a
        second; `on_epoch` gets every finished epoch, once it is on disk.

        Raises:
            TrainingError: loss or parameters are not finite; the checkpoint stays at the epoch before.
            MemoryError: there is not enough for a batch.
            FolderInUseError (an OSError): another run uses the folder, or has gone on with this one.
        """
        with self._folder or nullcontext():
            return self._fit(on_step, on_epoch)

    def _fit(
        self, on_step: Callable[[int, float], None] | None, on_epoch: Callable[[Epoch], None] | None
    ) -> list[Epoch]:
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
        except (MemoryError, RuntimeError) as error:
            if (reason := out_of_memory(error)) is None:
                raise
            batch = f"a batch of {min(self.config.batch_size, size)} images; a smaller batch size needs less"
            raise MemoryError(f"not enough for {batch} ({reason})") from error
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
