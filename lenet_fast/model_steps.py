"""Training steps of any model that PyTorch can train: its own forward, autograd, and its `torch.optim` optimizer."""

import contextlib
import itertools
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .dynamo import compiled_forward
from .eager import check_memory, in_plain_modes
from .loss import Loss

__all__ = ["ModelSteps"]


class ModelSteps:
    """Takes steps one by one.

    Args:
        model: what is trained.
        optimizer: over its parameters, of one group.
        loss: of its outputs.
        prepare: images to the model's input.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, prepare: Callable[[Tensor], Tensor]
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self._loss = loss
        self._prepare = prepare
        # compiled_forward calls forward and hooks, and knows nothing of a `__call__` of the model's own.
        self._forward = compiled_forward(model) if type(model).__call__ is nn.Module.__call__ else model

    def take(
        self, images: Tensor, labels: Tensor, order: Tensor | None, batch_size: int, rates: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """A step for each of the learning rates, as `TrainingSteps.take`.

        Raises:
            ValueError: a label out of range, parameters or state that the optimizer cannot have; nothing was trained.
            TypeError, ValueError: outputs that the loss does not take; no further step was taken.
        """
        for name, tensor in (("images", images), ("labels", labels), *self.model.state_dict(keep_vars=True).items()):
            if isinstance(tensor, Tensor) and not is_lazy(tensor):
                check_memory(name, tensor)
        self._check_state()
        largest = self._largest(labels if order is None else labels.index_select(0, order))
        with in_plain_modes(images.device.type):
            losses, correct = self._take_all(images, labels, order, batch_size, rates, largest)
        return torch.tensor(losses, dtype=torch.float64), torch.stack(correct).cpu()

    def _take_all(
        self,
        images: Tensor,
        labels: Tensor,
        order: Tensor | None,
        batch_size: int,
        rates: Sequence[float],
        largest: int | None,
    ) -> tuple[list[float], list[Tensor]]:
        number = len(labels) if order is None else len(order)
        losses: list[float] = []
        correct: list[Tensor] = []
        for start, rate in zip(range(0, number, batch_size), rates, strict=True):
            if order is None:
                batch = images[start : start + batch_size].clone() if images.is_inference() else images
                targets = labels.clone() if labels.is_inference() else labels
            else:
                chosen = order[start : start + batch_size]
                batch, targets = images.index_select(0, chosen), labels.index_select(0, chosen)
            loss, right = self._take_one(batch, targets, rate, largest)
            losses.append(loss)
            correct.append(right)
            if not math.isfinite(loss):
                break
        return losses, correct

    def _take_one(self, images: Tensor, labels: Tensor, rate: float, largest: int | None) -> tuple[float, Tensor]:
        """One step, unless its loss is not finite: then nothing of the model has changed."""
        buffers = _buffers_of(self.model)
        with _gradients_aside(self.optimizer):
            try:
                outputs = self._forward(self._prepare(images))
                loss, right = self._loss(self.model, outputs, labels, largest)
                value = loss.item()
                if math.isfinite(value) and any(p.requires_grad for p in self.model.parameters()):
                    loss.backward()
            except BaseException:
                _put_back(buffers)
                raise
            if not math.isfinite(value):
                _put_back(buffers)
            else:
                self._update(rate)
        return value, right

    def _update(self, rate: float) -> None:
        group = self.optimizer.param_groups[0]
        before = group["lr"]
        with _uninterrupted():
            group["lr"] = rate
            try:
                self.optimizer.step()
            finally:
                group["lr"] = before

    def _check_state(self) -> None:
        """Raise where the optimizer is not that of the model's parameters."""
        known = {id(parameter) for parameter in self.optimizer.param_groups[0]["params"]}
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in known:
                raise ValueError(f"{name}: was replaced after the trainer was made; make a new one")
            if is_lazy(parameter):
                continue
            if parameter.requires_grad and torch._debug_has_internal_overlap(parameter) == 1:
                raise ValueError(f"{name}: several of its values are one in memory, strides {parameter.stride()}")
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if key == "step" or not isinstance(value, Tensor):
                    continue
                if (value.dtype, value.shape, value.device) != (parameter.dtype, parameter.shape, parameter.device):
                    raise ValueError(
                        f"optimizer: its {key} of {name} is {value.dtype} {tuple(value.shape)}, the parameter "
                        f"{parameter.dtype} {tuple(parameter.shape)} now; make a new trainer"
                    )

    def _largest(self, labels: Tensor) -> int | None:
        if not self._loss.checks_labels:
            return None
        low, high = torch.stack(labels.aminmax()).tolist()
        if low < 0:
            raise ValueError(f"labels: expected classes from 0 on, got {low}")
        return high


_Buffers = list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]]  # owner, name, buffer, and its values


def _buffers_of(model: nn.Module) -> _Buffers:
    owned = ((layer._buffers, name, buffer) for layer in model.modules() for name, buffer in layer._buffers.items())
    return [(*of, of[-1].clone()) for of in owned if of[-1] is not None and not is_lazy(of[-1])]


def _put_back(buffers: _Buffers) -> None:
    with torch.no_grad():
        for owner, name, buffer, values in buffers:
            owner[name] = buffer
            buffer.copy_(values)


@contextlib.contextmanager
def _gradients_aside(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let gradients be those of one step, and put back what was there."""
    parameters = list(itertools.chain(*(group["params"] for group in optimizer.param_groups)))
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until all parameters have been updated."""
    asked: list[tuple[int, FrameType | None]] = []
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    signal.signal(signal.SIGINT, lambda *of: asked.append(of))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if asked:
            handler(*asked[0])
