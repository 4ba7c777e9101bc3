"""Training steps with dropout and label smoothing, of the native operator and of plain PyTorch with the same masks.

A network is a list of stages, each of which is one layer to the native operator, with its activation and pooling; what
is dropped is dropped from the input of a stage, or from the output of the last.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lenet_fast as lf
from lenet_fast.dropout_masks import mask
from lenet_fast.network import Network

SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}
ADAM = {"lr": 2e-3, "weight_decay": 1e-2}


@dataclass(frozen=True)
class Steps:
    """How the steps are taken.

    Args:
        dropout: of each place, the probabilities for single values and for maps; empty: none.
        settings: of SGD, or of Adam where they have no momentum.
    """

    dropout: tuple[tuple[float, float], ...] = ()
    seed: int = 9
    first_step: int = 0
    label_smoothing: float = 0.0
    batch_size: int = 8
    settings: dict[str, Any] = field(default_factory=lambda: SGD)
    j: float = 0.0

    @property
    def is_sgd(self) -> bool:
        return "momentum" in self.settings


@dataclass(frozen=True)
class Taken:
    losses: Tensor
    correct: Tensor
    parameters: list[Tensor]


@dataclass(frozen=True)
class Example:
    """A network for images (C, H, W): its stages, and an RBF layer behind them or nothing."""

    image: tuple[int, int, int]
    classes: int
    stages: list[nn.Module]
    end: list[nn.Module] = field(default_factory=list)

    @property
    def model(self) -> nn.Sequential:
        return nn.Sequential(*self.stages, *self.end)

    @property
    def num_places(self) -> int:
        return len(self.stages) + 1

    def data(self, number: int = 40, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and an order."""
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(number, *self.image, generator=generator, dtype=torch.float64).to(dtype)
        labels = torch.randint(self.classes, (number,), generator=generator)
        return images, labels, torch.randperm(number, generator=generator)


def example(name: str, dtype: torch.dtype = torch.float64) -> Example:
    torch.manual_seed(0)
    found = _EXAMPLES[name]()
    for layer in found.model.modules():
        layer.backend = "reference"
    found.model.to(dtype)
    return found


def _lenet() -> Example:
    stages = [
        nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
        nn.Sequential(nn.Conv2d(6, 7, 5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(28, 21), nn.Sigmoid()),
        nn.Sequential(nn.Linear(21, 18), nn.Tanh()),
        nn.Linear(18, 10),
    ]
    return Example((1, 16, 16), 10, stages)


def _colours() -> Example:
    stages = [
        lf.nn.ConvActPool2d(3, 5, 3, padding=1, activation="scaled_tanh", pool="none"),
        nn.Sequential(nn.Conv2d(5, 4, 4, padding=1), nn.Sigmoid(), nn.AvgPool2d(2)),
        nn.Sequential(nn.Conv2d(4, 3, 2), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(6, 3), lf.nn.ScaledTanh()),
    ]
    return Example((3, 9, 12), 3, stages)


def _distances() -> Example:
    table = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    stages = [
        lf.nn.ConvSubsample2d(1, 4, 3, padding=1, activation="tanh"),
        lf.nn.SparseConvActPool2d(table, 3, activation="relu", pool="max"),
        nn.Sequential(nn.Flatten(), nn.Linear(12, 11), nn.Tanh()),
    ]
    return Example((1, 13, 13), 4, stages, [lf.nn.RBF(11, 4)])


_EXAMPLES = {"lenet": _lenet, "colours": _colours, "distances": _distances}
PLACES = {name: make().num_places for name, make in _EXAMPLES.items()}


def one_place(number: int, place: int, values: float = 0.0, maps: float = 0.0) -> tuple[tuple[float, float], ...]:
    return tuple((values, maps) if i == place else (0.0, 0.0) for i in range(number))


def everywhere(number: int) -> tuple[tuple[float, float], ...]:
    return tuple((0.1 + 0.05 * i, 0.25 - 0.03 * i) for i in range(number))


def native(
    operator: Callable[..., Any],
    model: nn.Module,
    steps: Steps,
    images: Tensor,
    labels: Tensor,
    order: Tensor | None = None,
    *,
    image: tuple[int, int, int] | None = None,
    scale: float = 0.0,
    background: float = 0.0,
) -> Taken:
    """One call of `network_train` on a copy of the model's parameters.

    Args:
        image: (C, H, W) of what uint8 images become.
    """
    network = Network.of(model)
    tensors = [tensor.detach().clone() for tensor in network.tensors()]
    parameters = tensors[: len(list(model.parameters()))]
    s = steps.settings
    if steps.is_sgd:
        state = [[torch.zeros_like(p) for p in parameters] if s["momentum"] else [], [], []]
        settings = [s["momentum"], float(s["nesterov"]), s["weight_decay"], 0.0, 0.0, 0.0]
    else:
        state = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
        state.append([torch.zeros(()) for _ in parameters])
        settings = [0.0, 0.0, s["weight_decay"], 0.9, 0.999, 1e-8]
    total = len(images if order is None else order)
    losses, correct = operator(
        network.numbers(tuple(images.shape[1:]) if image is None else image),
        tensors,
        *state,
        [1] * len(parameters),
        images,
        labels,
        order,
        steps.batch_size,
        scale,
        background,
        "sgd" if steps.is_sgd else "adam",
        settings,
        [s["lr"]] * -(-total // steps.batch_size),
        steps.j,
        list(itertools.chain(*steps.dropout)),
        steps.seed,
        steps.first_step,
        steps.label_smoothing,
    )
    return Taken(losses, correct, parameters)


def masked(steps: Steps, step: int, place: int, x: Tensor) -> Tensor:
    """What is left of the values at a place in a step."""
    for maps, p in enumerate(steps.dropout[place] if steps.dropout else ()):
        x = x * mask(steps.seed, step, place, x.shape, p, maps=bool(maps), dtype=x.dtype)
    return x


def forward(network: Example, steps: Steps, step: int, x: Tensor) -> Tensor:
    """What a batch becomes in a training step."""
    for place, layer in enumerate([*network.stages, nn.Sequential(*network.end)]):
        x = layer(masked(steps, step, place, x))
    return x


def plain(network: Example, steps: Steps, images: Tensor, labels: Tensor, order: Tensor) -> Taken:
    """The same steps by autograd and torch.optim, on the network itself."""
    parameters = list(network.model.parameters())
    optimizer = (torch.optim.SGD if steps.is_sgd else torch.optim.Adam)(parameters, **steps.settings)
    losses, correct = [], []
    for number, batch in enumerate(order.split(steps.batch_size)):
        outputs = forward(network, steps, steps.first_step + number, images[batch])
        if network.end:
            loss = lf.nn.MAPLoss(steps.j)(outputs, labels[batch])
        else:
            loss = F.cross_entropy(outputs, labels[batch], label_smoothing=steps.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        answers = outputs.argmin(1) if network.end else outputs.argmax(1)
        correct.append((answers == labels[batch]).sum().item())
    return Taken(torch.tensor(losses, dtype=torch.float64), torch.tensor(correct), [p.detach() for p in parameters])


def natively(
    operator: Callable[..., Any], name: str, steps: Steps, number: int = 40, dtype: torch.dtype = torch.float64
) -> Taken:
    """What the operator makes of an example."""
    network = example(name, dtype)
    return native(operator, network.model, steps, *network.data(number, dtype))


def plainly(name: str, steps: Steps, number: int = 40, dtype: torch.dtype = torch.float64) -> Taken:
    """What plain PyTorch makes of an example."""
    network = example(name, dtype)
    return plain(network, steps, *network.data(number, dtype))
