"""What is known of a published LeNet, and the registry of all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class PublicLeNet:
    """A published architecture and what is expected of it; `build`'s docstring names what it is modelled on."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (1, 28, 28)  # of an image
    classes: int = 10
    fused: tuple[int, int] = (2, 2)  # fused operators of one forward, in training and in evaluation mode
    unfused: str = ""  # why there are none of them
    autograd: str = ""  # why a training step needs autograd; empty: the whole step is native
    scores: Callable[[Any], torch.Tensor] | None = None  # from what the forward returns; None: it returns the scores
    images: int = 1  # arguments of the forward that are images
    others: tuple[Any, ...] = ()  # arguments behind these

    @property
    def origin(self) -> str:
        return self.build.__doc__.splitlines()[0]

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same parameters at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build().to(dtype)

    def inputs(self, batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        """The arguments of a forward: the same images at every call, and the others."""
        generator = torch.Generator().manual_seed(1)
        images = [torch.rand(batch, *self.shape, generator=generator).to(dtype) for _ in range(self.images)]
        return (*images, *self.others)

    def labels(self, batch: int = 3) -> torch.Tensor:
        return torch.randint(self.classes, (batch,), generator=torch.Generator().manual_seed(2))

    def trainable(self, model: nn.Module) -> nn.Module:
        """`model`, or around it a module that returns its scores alone, so that cross-entropy can take them."""
        return model if self.scores is None else Scores(model, self.scores)


class Scores(nn.Module):
    """A model that returns more than scores, reduced to these: what its users write to train it with cross-entropy."""

    def __init__(self, model, scores):
        super().__init__()
        self.model = model
        self.scores = scores

    def forward(self, x):
        return self.scores(self.model(x))


LENETS: dict[str, PublicLeNet] = {}


def lenet(name: str, **expected: Any) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Put the class or function below under this name into `LENETS`."""

    def register(build):
        assert name not in LENETS
        LENETS[name] = PublicLeNet(build, **expected)
        return build

    return register


def first(output):
    return output[0]


def first_of_some(output):
    return output[0] if isinstance(output, tuple) else output


def second(output):
    return output[1]


def logits(output):
    return output["logits"]
