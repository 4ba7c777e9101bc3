"""What a training run is asked for: `TrainConfig`, checked when made, and the choices that it has."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, get_args

import torch

from . import data
from .functional import check_choice
from .models import MODELS

__all__ = ["DTYPES", "ENGINES", "OPTIMIZERS", "SCHEDULES", "TrainConfig"]

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
        engine: "fused" takes many steps in a call (`FusedTrainer`), "autograd" is torch.autograd and torch.optim;
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
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), field.type)
        check_choice("engine", self.engine, ENGINES)
        check_choice("model", self.model, MODELS)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("dtype", self.dtype, DTYPES)
        complete = {
            "dataset": self.dataset or ("mnist" if self.data_dir is not None else "mnist-10k"),
            "data_dir": None if self.data_dir is None else str(data.expand("data_dir", self.data_dir).resolve()),
            "lr": _float(OPTIMIZERS[self.optimizer] if self.lr is None else self.lr),
            "momentum": _float(self.momentum),
            "weight_decay": _float(self.weight_decay),
            "device": str(_resolve_device(self.device)),
        }
        for name, value in complete.items():
            object.__setattr__(self, name, value)
        check_choice("dataset", self.dataset, data.DATASETS)
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
                raise ValueError(f"{name}: expected an int of at least {least}, got {_shown(value)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr: expected a finite number above 0, got {self.lr!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected at least 0 and below 1, got {self.momentum!r}")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum: only 'sgd' takes it, got {self.momentum!r} with {self.optimizer!r}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay: expected a finite number >= 0, got {self.weight_decay!r}")

    @property
    def parameter_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32

    def learning_rates(self, epoch: int, steps: int) -> list[float]:
        """Learning rate of each of the `steps` of `epoch`, counted from 0."""
        schedule = SCHEDULES[self.schedule]
        return [self.lr * schedule((epoch + step / steps) / self.epochs) for step in range(steps)]


def _check_type(name: str, value: object, annotation: Any) -> None:
    kinds = get_args(annotation) or (annotation,)
    if kinds == (int,):  # checked with its range
        return
    if float in kinds:
        kinds += (int,)
    if name == "data_dir":
        kinds += (os.PathLike,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        words = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
        raise ValueError(f"{name}: expected {words}, got {_shown(value)}")


def _shown(value: object) -> str:
    """In one short line, whatever it is."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an int
        return math.inf if value > 0 else -math.inf


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
