"""A training step of a network as PyTorch takes it: the package's operators, autograd, and the updates of torch.optim.

Nothing in it looks at a value on the host, so that it can be captured in a CUDA graph.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from . import functional
from .loss import Loss
from .network import Network

__all__ = ["AutogradStep", "Update"]


@dataclass(frozen=True, eq=False)
class Update:
    """An optimizer's update of some parameters, in place, with their state.

    Args:
        optimizer: "sgd", "adam" or "adamw".
        settings: of its group of parameters.
        parameters: all of them.
        first_moments, second_moments, step_counts: of each, or none at all.
    """

    optimizer: str
    settings: Mapping[str, Any]
    parameters: Sequence[Tensor]
    first_moments: Sequence[Tensor]
    second_moments: Sequence[Tensor]
    step_counts: Sequence[Tensor]

    def __call__(self, gradients: Sequence[Tensor], rate: Tensor, skip: Tensor) -> None:
        """Update by `gradients` with the learning rate `rate`, float32 (), unless `skip`, float32 (), is 1."""
        settings = self.settings
        common = {"lr": rate, "weight_decay": settings["weight_decay"], "maximize": False}
        common |= {"fused": True, "found_inf": skip}  # made for gradient scaling: a step to leave out
        parameters, gradients = list(self.parameters), list(gradients)
        if self.optimizer == "sgd":
            velocities = list(self.first_moments) or [None] * len(parameters)
            options = {"momentum": settings["momentum"], "dampening": 0.0, "nesterov": settings["nesterov"]}
            sgd(parameters, gradients, velocities, **common, **options)
        else:
            state = [list(tensors) for tensors in (self.first_moments, self.second_moments, (), self.step_counts)]
            beta1, beta2 = settings["betas"]
            options = {"beta1": beta1, "beta2": beta2, "eps": settings["eps"], "amsgrad": False}
            adam(parameters, gradients, *state, **common, **options, decoupled_weight_decay=self.optimizer == "adamw")


@dataclass(frozen=True, eq=False)
class AutogradStep:
    """A step on one batch.

    Args:
        network: what is trained.
        tensors: of the network, in its order. Leaves of the step's own, that share the parameters' memory: what else
            autograd knows of the parameters is of another stream and would end a capture.
        prepare: images to the network's input.
        update: of those `tensors` that require gradients.
        loss: what is minimised: cross-entropy, or the MAP loss of a network with distances.
    """

    network: Network
    tensors: Sequence[Tensor]
    prepare: Callable[[Tensor], Tensor]
    update: Update
    loss: Loss

    @classmethod
    def of(
        cls,
        network: Network,
        prepare: Callable[[Tensor], Tensor],
        loss: Loss,
        optimizer: str,
        settings: Mapping[str, Any],
        state: Sequence[Sequence[Tensor]],
    ) -> "AutogradStep":
        """A step of the network's own tensors; `state` as `Update` has it, of those that are trained."""
        tensors = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in network.tensors()]
        trained = [tensor for tensor in tensors if tensor.requires_grad]
        return cls(network, tensors, prepare, Update(optimizer, settings, trained, *state), loss)

    def rehearsal(self) -> "AutogradStep":
        """The same on copies of all that it changes."""
        tensors = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in self.tensors]
        trained = [tensor for tensor in tensors if tensor.requires_grad]
        update = self.update
        state = (update.first_moments, update.second_moments, update.step_counts)
        copies = ([tensor.clone() for tensor in tensors] for tensors in state)
        return replace(self, tensors=tensors, update=Update(update.optimizer, update.settings, trained, *copies))

    def __call__(self, images: Tensor, labels: Tensor, rate: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss before the update, and the number of images classified rightly.

        Args:
            images, labels: the batch; labels int64.
            rate: learning rate, float32 ().
            skip: float32 (): no update where it is 1, which it becomes here if the loss is not finite.
        """
        # What surrounds a training is not for its steps; anomaly mode looks at values.
        with torch.autocast(images.device.type, enabled=False), torch.autograd.set_detect_anomaly(False):
            with torch.enable_grad():
                outputs = self.network.compute(self.prepare(images), self.tensors)
                j, label_smoothing = self.loss.settings()
                if self.network.measures_distance:
                    loss = functional.map_loss(outputs, labels, j=j)
                else:
                    loss = F.cross_entropy(outputs, labels, label_smoothing=label_smoothing)
            with torch.no_grad():
                skip.copy_(torch.maximum(skip, (~loss.isfinite()).to(skip.dtype)))
                if self.update.parameters:
                    self.update(torch.autograd.grad(loss, self.update.parameters), rate, skip)
                scores = -outputs if self.network.measures_distance else outputs
                return loss.detach(), (scores.argmax(1) == labels).sum()
