"""Who competes in training whole networks: our trainer, and PyTorch in every form that a user would try."""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import devices
import jax_networks
import torch
from harness import Run
from networks import Task, Trained, plain
from torch import Tensor, nn

from lenet_fast import FusedTrainer
from lenet_fast.models import criterion

Step = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contestant:
    """One way to train a network."""

    prepare: Callable[[Task], Trained]
    compiled: bool = False
    dtype: str = "float32"  # of the arithmetic


# ---- Ours


def fused_step(task: Task) -> Trained:
    """A call for each step, on images that are floats already."""
    trainer, reset = _fused(task)
    batches = task.batches()
    return Trained(lambda: [trainer.step(*batch) for batch in batches], reset)


def fused_run(task: Task) -> Trained:
    """A call for all steps, as a user's epoch: from 8-bit images, gathered in an order."""
    trainer, reset = _fused(task)
    order = torch.arange(len(task.labels), device=task.labels.device)
    return Trained(lambda: trainer.run_epoch(task.pixels, task.labels, order, task.batch)[0], reset)


def fused_phases(task: Task) -> Trained:
    """As `fused_run` where a GPU has no cooperative launches."""
    trained = fused_run(task)

    def run() -> Tensor:
        with devices.cooperative_launches("0"):
            return trained.run()

    return Trained(run, trained.reset)


def _fused(task: Task) -> tuple[FusedTrainer, Callable[[], None]]:
    model = copy.deepcopy(task.model).to(task.images.device)
    return FusedTrainer(model, "sgd", lr=task.lr), _resetting(model)


def _resetting(model: nn.Module) -> Callable[[], None]:
    initial = [parameter.detach().clone() for parameter in model.parameters()]

    def reset() -> None:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), initial, strict=True):
                parameter.copy_(value)

    return reset


# ---- PyTorch


@dataclass(frozen=True)
class Plain:
    """How plain PyTorch takes a step. Calling it with a task makes the network ready."""

    memory_format: torch.memory_format = torch.contiguous_format
    optimizer: Mapping[str, bool] = field(default_factory=dict)  # options of torch.optim.SGD
    compiles_network: bool = False  # with the loss
    compiles_update: bool = False
    compile_options: Mapping[str, object] = field(default_factory=dict)
    autocasts: bool = False
    captures: bool = False  # the step in a CUDA graph
    dtype: torch.dtype = torch.float32

    def __call__(self, task: Task) -> Trained:
        device = task.images.device
        model = plain(task.model).to(device, self.dtype, memory_format=self.memory_format)
        reset = _resetting(model)
        measure = criterion(model)
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(parameters, lr=task.lr, **self.optimizer)

        def loss_of(images: Tensor, labels: Tensor) -> Tensor:
            with self._autocast(device):
                return measure(model(images), labels)

        if self.compiles_network:
            options = dict(self.compile_options) or None
            loss_of = torch.compile(loss_of, fullgraph=True, dynamic=False, options=options)
        update = torch.compile(optimizer.step, dynamic=False) if self.compiles_update else optimizer.step

        def step(images: Tensor, labels: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(images, labels)
            loss.backward()
            update()
            return loss.detach()

        if self.captures:
            return Trained(_captured(step, task), reset)
        batches = task.batches(self.dtype)
        return Trained(lambda: [step(*batch) for batch in batches], reset)

    def _autocast(self, device: torch.device) -> AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16) if self.autocasts else nullcontext()


def _captured(step: Step, task: Task) -> Run:
    """A graph replayed for each step, which finds its batch by a counter on the device: the host copies nothing."""
    images, labels = (tensor.unflatten(0, (task.steps, task.batch)) for tensor in (task.images, task.labels))
    losses = torch.zeros(task.steps, device=images.device)
    number = torch.zeros(1, dtype=torch.int64, device=images.device)

    def numbered_step() -> None:
        batch = images.index_select(0, number)[0], labels.index_select(0, number)[0]
        losses.index_copy_(0, number, step(*batch).view(1))
        number.add_(1).remainder_(task.steps)

    replay = devices.captured(numbered_step)

    def run() -> Tensor:
        number.zero_()
        for _ in range(task.steps):
            replay()
        return losses

    return run


# ---- Who competes where

JUDGE = Plain(dtype=torch.float64)
EAGER = Plain()
_FASTEST = Plain(torch.channels_last, {"fused": True}, compiles_network=True)
_TUNED = {"max_autotune": True, "coordinate_descent_tuning": True}
OURS = {"cpu": "fused-step", "cuda": "fused-run"}  # whom the others' times are divided by
OWN = ("fused-step", "fused-run", "fused-phases")  # all that are this package's


def _with(**changes: object) -> Plain:
    return Plain(**{**vars(_FASTEST), **changes})


_EVERYWHERE = {
    "fused-step": Contestant(fused_step),
    "fused-run": Contestant(fused_run),
    "eager": Contestant(EAGER),
    "eager-channels-last": Contestant(Plain(torch.channels_last, {"fused": True})),
    "compile": Contestant(Plain(compiles_network=True), compiled=True),
    "compile-channels-last": Contestant(_FASTEST, compiled=True),
    "compile-update": Contestant(_with(optimizer={"foreach": True}, compiles_update=True), compiled=True),
    "compile-max-autotune": Contestant(_with(compile_options=_TUNED), compiled=True),
    "compile-bfloat16": Contestant(_with(autocasts=True), compiled=True, dtype="bfloat16 autocast"),
}
CONTESTANTS: Mapping[str, Mapping[str, Contestant]] = {
    "cpu": {
        **_EVERYWHERE,
        "compile-fused-sgd": Contestant(_with(memory_format=torch.contiguous_format), compiled=True),
        "compile-max-autotune-update": Contestant(
            _with(optimizer={"foreach": True}, compiles_update=True, compile_options=_TUNED), compiled=True
        ),
        "jax": Contestant(jax_networks.train_step_by_step, compiled=True),
    },
    "cuda": {
        **_EVERYWHERE,
        "fused-phases": Contestant(fused_phases),
        "compile-graph": Contestant(_with(memory_format=torch.contiguous_format, captures=True), compiled=True),
        "jax-scan": Contestant(jax_networks.train_in_a_scan, compiled=True),
    },
}
