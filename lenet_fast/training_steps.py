"""Training steps of a model and its optimizer: native calls, CUDA graphs of a network, or the model's own forward."""

import contextlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .autograd_step import AutogradStep
from .eager import is_replaced
from .graphed_steps import GraphedSteps
from .lenet import InputSpec
from .loss import Loss
from .model_steps import ModelSteps
from .network import NetworkError, SizeError
from .nn import FusedConv2d
from .training_operands import TrainingOperands, device_queues

__all__ = ["Masks", "TrainingSteps"]

_UNKNOWN = {  # settings that torch.optim has and steps have not, by kind of optimizer
    "sgd": ("dampening", "maximize"),
    "adam": ("amsgrad", "maximize", "decoupled_weight_decay"),
    "adamw": ("amsgrad", "maximize"),
}
_NATIVE = "whole steps in native code"
_BY_GRAPHS = "CUDA graphs of the operators, autograd and torch.optim"
_BY_AUTOGRAD = "accelerated forward, autograd and torch.optim"
_log = logging.getLogger("lenet_fast.trainer")


@dataclass
class Masks:
    """What the masks of dropout in native steps are drawn from, besides a step's number.

    Args:
        generator: draws the seed, once, where there is a dropout; None: PyTorch's default one of the CPU.
        first_step: number of the next step in the training.
    """

    generator: torch.Generator | None
    first_step: int = 0
    _seed: int | None = None

    def seed(self) -> int:
        if self._seed is None:
            device = "cpu" if self.generator is None else self.generator.device
            self._seed = int(torch.randint(2**63 - 1, (), generator=self.generator, device=device))
        return self._seed


class TrainingSteps:
    """Takes steps on data that is checked, in place.

    Args:
        model: what is trained.
        optimizer: of its parameters; settings and state are those of the steps.
        kind: "sgd", "adam" or "adamw", which it is.
        input_spec: how uint8 images become an input.
        loss: what is minimised.
        native_only: raise where there are no native steps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        kind: str,
        input_spec: InputSpec | None,
        loss: Loss,
        native_only: bool,
    ) -> None:
        self.model = model
        self.operands = TrainingOperands(model)
        self.optimizer = optimizer
        self.input_spec = input_spec
        self._kind = kind
        self._loss = loss
        self._native_only = native_only
        self._by_model = ModelSteps(model, optimizer, loss, self._prepare)
        self._image: tuple[int, int, int]  # (C, H, W) of what arrives at the network's first layer
        self._said: tuple[str | None, str] | None = None  # why the last steps were not native, and what took them
        self._graphed: tuple[tuple, GraphedSteps] | None = None  # what they are of
        known = not self.operands.reader.is_handwritten
        if (native_only or device_queues(self.device)) and (known or (native_only and input_spec is not None)):
            self._say_early()

    def __reduce__(self) -> tuple:  # without graphs
        return TrainingSteps, (self.model, self.optimizer, self._kind, self.input_spec, self._loss, self._native_only)

    @property
    def device(self) -> torch.device:
        """Of the model's first parameter: where data has to be."""
        return self._like.device

    @property
    def takes_any_labels(self) -> bool:
        """Whether labels are whatever the user's own loss takes."""
        return self._loss.given is not None

    @property
    def _like(self) -> Tensor:
        return self.optimizer.param_groups[0]["params"][0]

    def group(self) -> dict[str, Any]:
        """The optimizer's settings.

        Raises:
            ValueError: what the steps do not do.
        """
        groups = self.optimizer.param_groups
        if len(groups) != 1:
            raise ValueError(f"optimizer: expected one group of parameters, got {len(groups)}")
        for name in _UNKNOWN[self._kind]:
            if groups[0].get(name):
                raise ValueError(f"optimizer: the fused trainer has no {name}, got {groups[0][name]!r}")
        return groups[0]

    # --- which way ---------------------------------------------------------------------------------------------------

    def how(self, images: Tensor | None, labels: Tensor | None = None) -> str:
        """What takes the steps on batches like `images`, in one line.

        Args:
            images: None: of the size that `input_spec` says, or of any size where the answer is the same for all, or
                else as in the last steps.
        """
        if images is None and self.input_spec is not None:
            kinds = nn.Conv2d | FusedConv2d
            # Of the first layer, which has the fewest: layers need not be in the order in which a forward calls them.
            channels = min((layer.in_channels for layer in self.model.modules() if isinstance(layer, kinds)), default=1)
            shape = 2, channels, self.input_spec.size, self.input_spec.size
            images = torch.empty(shape, dtype=torch.uint8, device=self.device)
        with _in_training_mode(self.model):
            if images is not None:
                return self._sentence(images, self._why_not_native(images, labels, len(images), len(images)))
            if not self.operands.reader.is_handwritten:
                try:
                    self._look([])
                except NetworkError as error:
                    return f"{_BY_AUTOGRAD}: {error}"
                if not device_queues(self.device):
                    return _NATIVE
        if self._said is not None:
            return self._said[1]
        return "not known before the first batch: how(images) tells"

    def _say_early(self) -> None:
        """Raise, or warn, where steps on images of the size that `input_spec` says will not be native."""
        try:
            how = self.how(None)
        except SizeError:  # perhaps it is trained on other images
            return
        if self._native_only and how.startswith(_BY_AUTOGRAD):
            raise NetworkError(how.removeprefix(f"{_BY_AUTOGRAD}: "))

    def _sentence(self, images: Tensor, reason: str | None) -> str:
        if reason is not None:
            return f"{_BY_AUTOGRAD}: {reason}"
        if not device_queues(images.device):
            return _NATIVE
        refusal = self.operands.refusal(self._image)
        self.operands.warn_of(refusal)
        return f"{_NATIVE}, one launch an epoch" if refusal is None else f"{_BY_GRAPHS}: {refusal}"

    def _why_not_native(self, images: Tensor, labels: Tensor | None, number: int, batch_size: int) -> str | None:
        """Bring the operands up to date for steps on `number` images; why there are none, None where there are.

        Raises:
            SizeError: images that do not fit the model.
            TypeError, ValueError: images of another kind than its network takes.
        """
        operands = self.operands
        prepared = images.dtype == torch.uint8 and self.input_spec is not None
        if self.optimizer._optimizer_step_pre_hooks or self.optimizer._optimizer_step_post_hooks:
            return "optimizer: has hooks, which native steps do not call"
        try:
            self._look(self._batches(images, number, batch_size), None if prepared else images.dtype)
            self._check_images(images)
            self._image = image = operands.network.image or self._prepared_shape(images)
            if prepared and image != self._prepared_shape(images):
                raise NetworkError(f"uint8 images of {self._prepared_shape(images)} become {image} in the forward")
            classes = operands.numbers(image)[4]
            if operands.dropout and (refusal := operands.refusal(image)):
                raise NetworkError(f"dropout: CUDA graphs of the operators have none, and {refusal}")
        except NetworkError as error:
            if isinstance(error, SizeError) and not operands.reader.is_handwritten:
                raise
            return str(error)
        if labels is None or self._loss.given is None or _are_classes(labels, classes):
            return None
        return "loss: its labels are no classes"

    def _batches(self, images: Tensor, number: int, batch_size: int) -> Iterator[tuple[int, ...]]:
        """The shapes of the batches that the model gets."""
        for size in {min(batch_size, number), number % batch_size or batch_size}:
            yield size, *self._prepared_shape(images)

    def _look(self, shapes: Iterable[tuple[int, ...]], dtype: torch.dtype | None = None) -> None:
        """Bring the operands up to date.

        Raises:
            NetworkError: there are no native steps; names the part.
        """
        self.operands.look(shapes, dtype or self._like.dtype, self.device)
        if (reason := self._loss.why_not_native(self.operands.network)) is not None:
            raise NetworkError(reason)

    def _check_images(self, images: Tensor) -> None:
        if images.dtype == torch.uint8:
            if self.input_spec is None:
                raise ValueError(
                    "images: uint8 ones need an input_spec, and the model has none; name it or pass floats"
                )
            if images.dim() not in (3, 4):
                raise ValueError(f"images: expected uint8 (N, H, W) or (N, C, H, W), got shape {tuple(images.shape)}")
            return
        if images.dtype != (expected := self.operands.parameter.dtype):
            raise TypeError(f"images: expected uint8 or {expected} as the model has, got {images.dtype}")
        if images.dim() != 4 and self.operands.network.image is None:
            raise ValueError(f"images: expected (N, C, H, W), got shape {tuple(images.shape)}")

    def _prepared_shape(self, images: Tensor) -> tuple[int, ...]:
        """Of an image as the model gets it."""
        if images.dtype != torch.uint8 or self.input_spec is None or images.dim() not in (3, 4):
            return tuple(images.shape[1:])
        return 1 if images.dim() == 3 else images.shape[1], self.input_spec.size, self.input_spec.size

    # --- steps -------------------------------------------------------------------------------------------------------

    def check(self, images: Tensor, labels: Tensor, batch_size: int) -> None:
        """Raise for images, and on CUDA for labels, that no step can be taken on: before many are.

        Raises:
            SizeError, TypeError, ValueError: they are.
        """
        self._begin()
        if self._why_not_native(images, labels, len(images), batch_size) is None and labels.is_cuda:
            low, high = torch.stack(labels.aminmax()).tolist()  # on the CPU the native steps look at them
            classes = self.operands.numbers(self._image)[4]
            if low < 0 or high >= classes:
                raise ValueError(f"labels: expected 0 to {classes - 1}, got {low} to {high}")

    def are_queued(self, images: Tensor, labels: Tensor, number: int, batch_size: int) -> bool:
        """Whether a call of `number` images returns when its steps are queued, in one launch, before they are done."""
        if not device_queues(images.device):
            return False
        self._begin()
        if self._why_not_native(images, labels, number, batch_size) is not None:
            return False
        return self.operands.refusal(self._image) is None

    def take(
        self,
        images: Tensor,
        labels: Tensor,
        order: Tensor | None,
        batch_size: int,
        rates: Sequence[float],
        masks: Masks,
        watch: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A step for each of the learning rates; of graphs, perhaps only the first ones.

        Args:
            images, labels: contiguous, labels int64.
            order: of the images, None: as they lie.
            masks: of dropout in native steps.
            watch: see `Watch`; where the steps are queued.

        Returns:
            The mean loss, float64, and the number of images right, int64, of each step until one whose loss is not
            finite, which was not taken; where the steps are queued NaN of those that were not taken.

        Raises:
            NetworkError: there are no native steps, and no others are wanted.
            TypeError, ValueError: data that no step can be taken on.
        """
        self._begin()
        number = len(labels) if order is None else len(order)
        reason = self._why_not_native(images, labels, number, batch_size)
        if self._said is None or self._said[0] != reason:
            said, self._said = self._said, (reason, self._sentence(images, reason))
            if said is None or (said[0] is None) != (reason is None):  # another way, and not another reason for it
                _log.info("%s: %s", type(self.model).__name__, self._said[1])
        if reason is not None:
            if self._native_only:
                raise NetworkError(reason)
            return self._by_model.take(images, labels, order, batch_size, rates)
        settings = self._refresh()
        operands, spec, image = self.operands, self.input_spec, self._image
        torch.autograd.graph.increment_version(operands.trained)
        if operands.network.image is not None and images.dtype != torch.uint8:
            images = images.reshape(len(images), *image)
        if (refusal := operands.refusal(image)) is not None:
            operands.warn_of(refusal)
            return self._graphs(settings)(images, labels, order, batch_size, rates)
        scale, background = (0.0, 0.0) if spec is None else ((spec.foreground - spec.background) / 255, spec.background)
        j, label_smoothing = self._loss.settings()
        return torch.ops.lenet_fast.network_train(
            operands.numbers(image),
            operands.tensors,
            operands.first_moments,
            operands.second_moments,
            operands.step_counts,
            operands.trains,
            images,
            labels,
            order,
            batch_size,
            scale,
            background,
            self._kind,
            settings,
            list(map(float, rates)),
            j,
            operands.dropout,
            masks.seed() if operands.dropout else 0,
            masks.first_step,
            label_smoothing,
            watch,
        )

    def _begin(self) -> None:
        """Refuse what cannot be trained in, and put the model into training mode."""
        if is_replaced():
            raise RuntimeError(
                "fake tensors, make_fx, torch.jit.trace and torch.func cannot follow the fused trainer, which changes "
                "its model in native code: train with autograd there"
            )
        if not self.model.training:
            self.model.train()

    def _refresh(self) -> list[float]:
        """Bring the optimizer's state up to date; returns its settings as the native steps take them."""
        group = self.group()
        if self._kind == "sgd":
            moments = ("momentum_buffer",) if group["momentum"] else ()
            settings = [group["momentum"], group["nesterov"], group["weight_decay"], 0.0, 0.0, 0.0]
        else:
            moments = ("exp_avg", "exp_avg_sq")
            settings = [0.0, 0.0, group["weight_decay"], *group["betas"], group["eps"]]
        self.operands.refresh(self.optimizer, moments, counts_steps=self._kind != "sgd")
        return list(map(float, settings))

    def _graphs(self, settings: list[float]) -> GraphedSteps:
        """Of the operands and settings as they are: a graph has their addresses and values."""
        operands = self.operands
        state = operands.first_moments, operands.second_moments, operands.step_counts
        addresses = [tensor.data_ptr() for tensor in itertools.chain(operands.tensors, *state)]
        of = operands.version, addresses, settings, torch.get_float32_matmul_precision()
        if self._graphed is None or self._graphed[0] != of:
            of_trained = [list(itertools.compress(tensors, operands.trains)) for tensors in state]
            group = dict(self.group())
            step = AutogradStep.of(operands.network, self._prepare, self._loss, self._kind, group, of_trained)
            self._graphed = of, GraphedSteps(step, operands.parameter.device)
        return self._graphed[1]

    def _prepare(self, images: Tensor) -> Tensor:
        """The model's input."""
        if images.dtype != torch.uint8 or self.input_spec is None:
            return images
        return self.input_spec.prepare(images, self._like.dtype)


def _are_classes(labels: Tensor, classes: int) -> bool:
    if labels.dtype != torch.int64 or labels.dim() != 1:
        return False
    low, high = torch.stack(labels.aminmax()).tolist()
    return low >= 0 and high < classes


@contextlib.contextmanager
def _in_training_mode(model: nn.Module) -> Iterator[None]:
    """As steps put the model into, for a look at it."""
    modes = [(module, module.training) for module in model.modules()]
    if not model.training:
        model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
