"""What a training minimises: cross-entropy, the distances' MAP loss, or what the user gives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .fusable import is_observed
from .network import Network
from .nn import RBF, MAPLoss

__all__ = ["Loss"]

_REMEDY = "pass loss=, a function of the model's outputs and the labels that returns a scalar"


@dataclass(frozen=True)
class Loss:
    """The loss of a trainer.

    Args:
        given: the user's own, a function of outputs and labels; None: cross-entropy of scores, or the MAP loss of the
            distances of an `nn.RBF` at the end of the model.
        label_smoothing: of cross-entropy, see `torch.nn.functional.cross_entropy`.
        j: of the MAP loss.
    """

    given: Callable[[Any, Tensor], Tensor] | None = None
    label_smoothing: float = 0.0
    j: float = 0.0

    @property
    def checks_labels(self) -> bool:
        """Whether labels have to be classes."""
        return self.given is None

    def why_not_native(self, network: Network) -> str | None:
        """Why native steps, which have cross-entropy and the MAP loss, do not have this one; None: they do.

        Raises:
            ValueError: label smoothing of distances.
        """
        measures_distance = network.measures_distance
        given = self.given
        if given is None:
            if measures_distance and self.label_smoothing:
                raise ValueError("label_smoothing: the MAP loss behind an RBF layer has none")
            return None
        plain = {"weight": None, "reduction": "mean"}
        fits = {
            nn.CrossEntropyLoss: not measures_distance,
            nn.NLLLoss: network.ends_in_log_softmax,
            MAPLoss: measures_distance,
        }.get(type(given), False)
        if not fits or is_observed(given):
            return "loss: native steps have cross-entropy, and the MAP loss behind an RBF layer"
        if any(getattr(given, name, value) != value for name, value in plain.items()):
            return "loss: native steps have no weights of classes, and the mean of a batch alone"
        if not 0 <= getattr(given, "label_smoothing", 0.0) <= 1:
            return "loss: native steps have a label_smoothing from 0 to 1"
        if getattr(given, "ignore_index", -100) >= 0:
            return "loss: native steps ignore no class"
        return None

    def settings(self) -> tuple[float, float]:
        """j and the label smoothing that the native steps take."""
        smoothing = getattr(self.given, "label_smoothing", self.label_smoothing)
        return float(getattr(self.given, "j", self.j)), float(smoothing)

    def __call__(self, model: nn.Module, outputs: Any, labels: Tensor, largest: int | None) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and how many of it are classified rightly.

        Args:
            outputs: what `model` returned.
            largest: of all labels, where they have to be classes.

        Raises:
            TypeError, ValueError: outputs that the loss does not take, or a loss that is no scalar.
        """
        if self.given is not None:
            loss = self.given(outputs, labels)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
                what = f"{loss.dtype} {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"loss: expected it to return a scalar tensor of a floating dtype, got {what}")
            return loss.reshape(()), _right(outputs, labels, isinstance(self.given, MAPLoss))
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"outputs: expected a tensor (N, classes) of the model, got {type(outputs).__name__}; {_REMEDY}"
            )
        if outputs.dim() != 2 or len(outputs) != len(labels) or not outputs.is_floating_point():
            got = f"{outputs.dtype} of shape {tuple(outputs.shape)}"
            raise ValueError(f"outputs: expected floats ({len(labels)}, classes) of the model, got {got}; {_REMEDY}")
        if largest is not None and largest >= outputs.shape[1]:
            raise ValueError(f"labels: expected 0 to {outputs.shape[1] - 1}, got {largest}")
        distances = _measures_distance(model)
        if distances:
            if self.label_smoothing:
                raise ValueError("label_smoothing: the MAP loss behind an RBF layer has none")
            loss = functional.map_loss(outputs, labels, j=self.j)
        else:
            loss = F.cross_entropy(outputs, labels, label_smoothing=self.label_smoothing)
        return loss, _right(outputs, labels, distances)


def _measures_distance(model: nn.Module) -> bool:
    """Whether the outputs of `model` are distances.

    Raises:
        ValueError: there is no telling.
    """
    if not any(isinstance(layer, RBF) for layer in model.modules()):
        return False
    last = model
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    if last is model or not (isinstance(last, RBF) or type(last).__module__.startswith("torch.nn.")):
        raise ValueError(
            "loss: the model has an RBF layer, and its forward does not tell whether its outputs are distances or "
            "scores; pass loss=lenet_fast.nn.MAPLoss() or torch.nn.CrossEntropyLoss()"
        )
    return isinstance(last, RBF)


def _right(outputs: Any, labels: Tensor, distances: bool) -> Tensor:
    """How many images are classified rightly; 0 where outputs and labels are not of classes."""
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or labels.dim() != 1 or labels.is_floating_point():
        return torch.zeros((), dtype=torch.int64, device=labels.device)
    scores = outputs.detach()
    return ((-scores if distances else scores).argmax(1) == labels).sum()
