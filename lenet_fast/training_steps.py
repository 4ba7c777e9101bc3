"""Training steps of one network and one optimizer: native calls, or CUDA graphs of a network that those refuse."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd_step import AutogradStep
from .graphed_steps import GraphedSteps
from .lenet import InputSpec
from .training_operands import TrainingOperands

__all__ = ["TrainingSteps"]


class TrainingSteps:
    """Takes steps on data that is checked, in place.

    Args:
        operands: of the model.
        optimizer: of its parameters; settings and state are those of the steps.
        kind: "sgd", "adam" or "adamw", which it is.
        input_spec: how uint8 images become an input.
        j: of the MAP loss.
    """

    def __init__(
        self,
        operands: TrainingOperands,
        optimizer: torch.optim.Optimizer,
        kind: str,
        input_spec: InputSpec | None,
        j: float,
    ) -> None:
        self.operands = operands
        self.optimizer = optimizer
        self.input_spec = input_spec
        self._kind = kind
        self._j = j
        self._graphed: tuple[tuple, GraphedSteps] | None = None  # what they are of

    def __reduce__(self) -> tuple:
        return TrainingSteps, (self.operands, self.optimizer, self._kind, self.input_spec, self._j)  # without graphs

    def group(self) -> dict[str, Any]:
        """The optimizer's settings.

        Raises:
            ValueError: what the steps do not do.
        """
        groups = self.optimizer.param_groups
        if len(groups) != 1:
            raise ValueError(f"optimizer: expected one group of parameters, got {len(groups)}")
        for name in ("dampening", "maximize", "amsgrad"):
            if groups[0].get(name):
                raise ValueError(f"optimizer: the fused trainer has no {name}, got {groups[0][name]!r}")
        return groups[0]

    def image_shape(self, images: Tensor) -> tuple[int, int, int]:
        """(C, H, W) of what arrives at the network."""
        if images.dtype == torch.uint8:
            return 1, self.input_spec.size, self.input_spec.size
        return tuple(images.shape[1:])

    def num_classes(self, images: Tensor) -> int:
        """Of which these are images."""
        return self.operands.numbers(self.image_shape(images))[4]

    def are_queued(self, images: Tensor) -> bool:
        """Whether a call returns when its steps are queued, in one launch, and not when they are done."""
        if not self.operands.device_queues:
            return False
        self._refresh()
        return self.operands.refusal(self.image_shape(images)) is None

    def take(
        self,
        images: Tensor,
        labels: Tensor,
        order: Tensor | None,
        batch_size: int,
        rates: Sequence[float],
        watch: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A step for each of the learning rates; of graphs, perhaps only the first ones.

        Args:
            images, labels: contiguous, labels int64.
            order: of the images, None: as they lie.
            watch: see `Watch`; where the steps are queued.

        Returns:
            The mean loss, float64, and the number of images right, int64, of each step until one whose loss is not
            finite, which was not taken; where the steps are queued NaN of those that were not taken.
        """
        settings = self._refresh()
        operands, spec, image = self.operands, self.input_spec, self.image_shape(images)
        torch.autograd.graph.increment_version(operands.trained)
        if operands.refusal(image) is not None:
            return self._graphs(settings)(images, labels, order, batch_size, rates)
        scale, background = (0.0, 0.0) if spec is None else ((spec.foreground - spec.background) / 255, spec.background)
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
            self._j,
            [],
            0,
            0,
            0.0,
            watch,
        )

    def _refresh(self) -> list[float]:
        """Bring the operands up to date; returns the optimizer's settings as the native steps take them."""
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
            step = AutogradStep.of(operands.network, self._prepare, self._j, self._kind, group, of_trained)
            self._graphed = of, GraphedSteps(step, operands.parameter.device)
        return self._graphed[1]

    def _prepare(self, images: Tensor) -> Tensor:
        """The network's input."""
        if images.dtype != torch.uint8:
            return images
        return self.input_spec.prepare(images, self.operands.parameter.dtype)
