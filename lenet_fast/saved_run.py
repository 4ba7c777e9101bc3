"""What a checkpoint says of its run: every entry checked, against the run's own settings, before it is believed."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import CheckpointError, load_checkpoint
from .engines import AutogradEngine, make_optimizer, moments
from .train_config import TrainConfig

__all__ = ["Epoch", "SavedRun"]


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


@dataclass(frozen=True)
class SavedRun:
    """A run as its checkpoint has it, all tensors on the CPU."""

    path: Path
    config: TrainConfig
    history: list[Epoch]
    model: dict[str, Tensor]
    engine: dict[str, Any]
    generator: Tensor
    data_crc32: int
    threads: int

    @classmethod
    def load(cls, path: str | Path, device: str | None = None) -> "SavedRun":
        """Read a checkpoint and check what it says of itself. `device` replaces the run's.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: it is damaged, or an entry is missing, unknown or not what it should be; names it.
            ValueError: `device` is not available.
        """
        path = Path(path)
        checkpoint = load_checkpoint(path)
        if device is not None:
            device = TrainConfig(device=device).device
        with _naming(path):
            config = _read_config(path, checkpoint["config"], device)
            history = _read_history(checkpoint["history"], config.epochs)
            generator = checkpoint["generator"]
            if not isinstance(generator, Tensor) or generator.dtype != torch.uint8 or generator.dim() != 1:
                raise _Wrong("generator", "a tensor of uint8, (N,)", _words(generator))
            _check_count("data_crc32", checkpoint["data_crc32"], 0, 2**32 - 1)
            _check_count("threads", checkpoint["threads"], 1, 2**31 - 1)
        names = ("model", "engine", "generator", "data_crc32", "threads")
        return cls(path, config, history, **{name: checkpoint[name] for name in names})

    def restore(self, model: nn.Module) -> None:
        """Give `model`, the one of `config`, its parameters. What the engine saved was checked against it, too.

        Raises:
            CheckpointError: an entry does not fit the model; names it.
        """
        try:
            with _naming(self.path):
                _check_model(self.model, model)
        except CheckpointError as error:
            text = str(error).removeprefix(f"{self.path}: ")
            raise CheckpointError(f"{self.path}: its parameters do not fit {self.config.model}: {text}") from None
        with _naming(self.path):
            _check_engine(self.engine, model, self.config, is_trained=bool(self.history))
        model.load_state_dict(self.model)

    def engine_state(self) -> dict[str, Any]:
        """What the engine saved, in memory of its own: in a file two tensors may be one."""
        copies = {
            index: {name: value.clone(memory_format=torch.contiguous_format) for name, value in entries.items()}
            for index, entries in self.engine["state"].items()
        }
        return {**self.engine, "state": copies}

    def restore_generator(self, generator: torch.Generator) -> None:
        """Let `generator` go on where the run's was.

        Raises:
            CheckpointError: it is the state of another kind of generator.
        """
        like = generator.get_state()
        with _naming(self.path):
            _check_tensor("generator", self.generator, like)
            try:
                generator.set_state(self.generator.contiguous())
            except (RuntimeError, ValueError) as error:
                raise _Wrong("generator", "the state of a generator", f"another ({error})") from error


# ---- Checks; an entry is named by its place, as in engine.state[0].exp_avg


class _Wrong(Exception):
    def __init__(self, entry: str, expected: str, found: str) -> None:
        super().__init__(f"{entry}: expected {expected}, found {found}")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns what the checks find into an error that names the file."""
    try:
        yield
    except _Wrong as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__


def _words(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        return f"a {layout}tensor of {str(value.dtype).removeprefix('torch.')}, {tuple(value.shape)}"
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!a:.60}" if isinstance(value, str | int | float | None) else type(value).__name__


def _check_keys(entry: str, found: Any, expected: Iterable[Any]) -> None:
    expected = list(expected)
    if not isinstance(found, dict):
        raise _Wrong(entry, "a dict", _words(found))
    for key in expected:
        if key not in found:
            raise _Wrong(entry, f"an entry {key!r}", "none")
    for key in found:
        if key not in expected:
            raise _Wrong(entry, "no other entries than those of this version", f"{key!a:.60}")


def _check_count(entry: str, found: Any, least: int, most: int) -> None:
    if type(found) is not int or not least <= found <= most:
        raise _Wrong(entry, f"an int from {least} to {most}", _words(found))


def _check_number(entry: str, found: Any, most: float = sys.float_info.max) -> None:
    if type(found) not in (int, float) or not 0 <= found <= most:  # false for NaN, too
        raise _Wrong(entry, "a number from 0 to 1" if most == 1 else "a finite number from 0", _words(found))


def _check_tensor(entry: str, found: Any, like: Tensor) -> None:
    if _words(found) != _words(like):
        raise _Wrong(entry, _words(like), _words(found))
    if found.device.type != "cpu" or found.requires_grad:
        raise _Wrong(entry, "values alone", f"a tensor on {found.device}, requires_grad={found.requires_grad}")
    if others := (~found.isfinite()).sum().item():
        raise _Wrong(entry, "finite values", f"{others} others of {found.numel()}")


def _read_config(path: Path, found: Any, device: str | None) -> TrainConfig:
    known = [field.name for field in fields(TrainConfig)]
    if isinstance(found, dict):
        if unknown := found.keys() - set(known):
            names = ", ".join(sorted(map(str, unknown)))
            raise CheckpointError(f"{path}: written by another version of lenet_fast, with {names:.200} in its config")
        found = {"engine": AutogradEngine.name} | found  # versions without engines had this one
    _check_keys("config", found, known)
    if type(found["device"]) is not str:
        raise _Wrong("config: device", "a str", _words(found["device"]))
    try:
        config = TrainConfig(**(found if device is None else found | {"device": device}))
    except ValueError as error:
        raise CheckpointError(f"{path}: config: {error}") from error
    for name in known:  # the settings of a run are complete
        if name not in ("data_dir", "device") and (expected := getattr(config, name)) != found[name]:
            raise _Wrong(f"config: {name}", repr(expected), _words(found[name]))
    return config


def _read_history(found: Any, most: int) -> list[Epoch]:
    if not isinstance(found, list):
        raise _Wrong("history", "a list", _words(found))
    if len(found) > most:
        raise _Wrong("history", f"at most {most} epochs, as config has it", _words(found))
    for index, row in enumerate(found):
        entry = f"history[{index}]"
        _check_keys(entry, row, [field.name for field in fields(Epoch)])
        if type(row["epoch"]) is not int or row["epoch"] != index + 1:
            raise _Wrong(f"{entry}: epoch", str(index + 1), _words(row["epoch"]))
        for name in ("train_accuracy", "test_accuracy"):
            _check_number(f"{entry}: {name}", row[name], 1)
        for name in ("loss", "learning_rate", "seconds", "examples_per_second"):
            _check_number(f"{entry}: {name}", row[name])
        if not row["seconds"]:  # rates are images by seconds
            raise _Wrong(f"{entry}: seconds", "a number above 0", "0")
    return [Epoch(**row) for row in found]


def _check_model(found: Any, model: nn.Module) -> None:
    expected = model.state_dict()
    _check_keys("model", found, expected)
    for name, tensor in expected.items():
        _check_tensor(f"model: {name}", found[name], tensor)
    for name, buffer in model.named_buffers():  # constants: an RBF layer's codes
        if name in expected and not torch.equal(found[name], buffer.cpu()):
            raise _Wrong(f"model: {name}", "the constants of this model", "others")


def _check_engine(found: Any, model: nn.Module, config: TrainConfig, is_trained: bool) -> None:
    parameters = list(model.parameters())
    _check_keys("engine", found, ("state", "param_groups"))
    groups, state = found["param_groups"], found["state"]
    if not isinstance(groups, list) or len(groups) != 1:
        raise _Wrong("engine: param_groups", "a list of 1", _words(groups))
    (expected,) = make_optimizer(parameters, config).state_dict()["param_groups"]
    _check_keys("engine: param_groups[0]", groups[0], expected)
    for name, value in expected.items():
        if name == "lr":  # that of the last step
            _check_number("engine: param_groups[0]: lr", groups[0]["lr"])
        elif not _equals(groups[0][name], value):
            raise _Wrong(f"engine: param_groups[0]: {name}", repr(value), _words(groups[0][name]))
    names = moments(config) if is_trained else ()
    _check_keys("engine: state", state, range(len(parameters)) if names else ())
    for index in state:
        _check_keys(f"engine: state[{index}]", state[index], names)
        for name, value in state[index].items():
            entry = f"engine: state[{index}]: {name}"
            _check_tensor(entry, value, torch.zeros((), dtype=torch.float32) if name == "step" else parameters[index])
            if name in ("step", "exp_avg_sq") and (value < 0).any():
                raise _Wrong(entry, "values of at least 0", f"{value.min().item():g}")


def _equals(found: Any, expected: Any) -> bool:
    if isinstance(expected, list | tuple):
        return type(found) is type(expected) and len(found) == len(expected) and all(map(_equals, found, expected))
    if isinstance(found, bool) is not isinstance(expected, bool):
        return False
    return isinstance(found, str | int | float | None) and found == expected
