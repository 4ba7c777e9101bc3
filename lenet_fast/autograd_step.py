"""A training step of a network as PyTorch takes it: the package's operators, autograd, and the updates of torch.optim.

Nothing in it looks at a value on the host, so that it can be captured in a CUDA graph.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from . import functional
from .network import Network

__all__ = ["AutogradStep", "Update"]


@dataclass(frozen=True, eq=False)
class Update:
    """An optimizer's update of the parameters that are trained, in place, with their state.

    Args:
        optimizer: "sgd", "adam" or "adamw".
        settings: momentum, nesterov, weight decay, two betas and epsilon, as `lenet_fast::network_train` takes them.
        parameters: those that are trained.
        first_moments, second_moments, step_counts: of each, or none at all.
    """

    optimizer: str
    settings: Sequence[float]
    parameters: Sequence[Tensor]
    first_moments: list[Tensor]
    second_moments: list[Tensor]
    step_counts: list[Tensor]

    def __call__(self, gradients: Sequence[Tensor], rate: Tensor, skip: Tensor) -> None:
        """Update by `gradients` with the learning rate `rate`, float32 (), unless `skip`, float32 (), is 1."""
        momentum, nesterov, weight_decay, beta1, beta2, epsilon = self.settings
        common = {"lr": rate, "weight_decay": weight_decay, "maximize": False, "fused": True, "found_inf": skip}
        parameters, gradients = list(self.parameters), list(gradients)
        if self.optimizer == "sgd":
            velocities = self.first_moments or [None] * len(parameters)
            options = {"momentum": momentum, "dampening": 0.0, "nesterov": bool(nesterov)}
            sgd(parameters, gradients, velocities, **common, **options)
        else:
            moments = self.first_moments, self.second_moments, [], self.step_counts
            options = {"beta1": beta1, "beta2": beta2, "eps": epsilon, "amsgrad": False}
            decoupled = self.optimizer == "adamw"
            adam(parameters, gradients, *moments, **common, **options, decoupled_weight_decay=decoupled)


@dataclass(frozen=True, eq=False)
class AutogradStep:
    """A step on one batch.

    Args:
        network: what is trained.
        prepare: images to the network's input.
        update: of its parameters.
        j: of the MAP loss, which a network with distances is trained with.
    """

    network: Network
    prepare: Callable[[Tensor], Tensor]
    update: Update
    j: float

    def __call__(self, images: Tensor, labels: Tensor, rate: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss before the update, and the number of images classified rightly.

        Args:
            images, labels: the batch; labels int64.
            rate: learning rate, float32 ().
            skip: float32 (): no update where it is 1, which it becomes here if the loss is not finite.
        """
        device = images.device.type
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            outputs = self.network(self.prepare(images))
            if self.network.measures_distance:
                loss = functional.map_loss(outputs, labels, j=self.j)
            else:
                loss = F.cross_entropy(outputs, labels)
        with torch.no_grad():
            skip.copy_(torch.maximum(skip, (~loss.isfinite()).to(skip.dtype)))
            if self.update.parameters:
                self.update(torch.autograd.grad(loss, self.update.parameters), rate, skip)
            scores = -outputs if self.network.measures_distance else outputs
            return loss.detach(), (scores.argmax(1) == labels).sum()
