"""The networks that are raced whole: ours, the same in plain PyTorch layers, what a step costs, and the data."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import layers
import torch
from torch import Tensor, nn

from lenet_fast import data, models
from lenet_fast.models import LeNet
from lenet_fast.nn import RBF, ConvSubsample2d, FusedConv2d
from lenet_fast.tables import LENET5_C3


@dataclass(frozen=True)
class Network:
    """A model and the learning rate at which SGD trains it steadily, whatever the batch."""

    build: Callable[[], LeNet]
    lr: float


NETWORKS: Mapping[str, Network] = {
    "lenet5-d2l": Network(models.lenet5_d2l, 0.05),
    "lenet5": Network(models.lenet5, 0.01),
    "lenet5-sparse": Network(partial(models.lenet5, connections=LENET5_C3), 0.01),
    "lenet5-1998": Network(models.lenet5_1998, 1e-4),
    "lenet1": Network(models.lenet1, 0.01),
    "lenet5-wide": Network(partial(models.lenet5, channels=(32, 64)), 0.01),
}


@dataclass(frozen=True)
class Task:
    """What every contestant gets: a network with its initial weights, and resident batches of digits."""

    name: str
    model: LeNet  # float32, on the CPU; to be copied
    lr: float
    pixels: Tensor  # uint8 (steps * batch, 28, 28)
    images: Tensor  # the same as the model takes them, float32 (steps * batch, 1, size, size)
    labels: Tensor  # (steps * batch,)
    batch: int

    @classmethod
    def make(cls, name: str, batch: int, steps: int, device: str = "cpu") -> "Task":
        """The same at every call. The 10,000 embedded digits, repeated where they do not suffice."""
        network = NETWORKS[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = network.build()
        train = data.load("mnist-10k").train
        index = torch.arange(batch * steps) % len(train.labels)
        pixels, labels = train.images[index].to(device), train.labels[index].to(device)
        return cls(name, model, network.lr, pixels, model.input_spec.prepare(pixels), labels, batch)

    @property
    def steps(self) -> int:
        return len(self.labels) // self.batch

    def first(self, steps: int) -> "Task":
        """The task of the first `steps` batches; of all where there are fewer."""
        end = steps * self.batch
        return replace(self, pixels=self.pixels[:end], images=self.images[:end], labels=self.labels[:end])

    def batches(self, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
        """Images and labels of each step."""
        return list(zip(self.images.to(dtype).split(self.batch), self.labels.split(self.batch), strict=True))


@dataclass(frozen=True)
class Trained:
    """A network made ready: `run` takes one step on each batch of a task and returns the losses before each update."""

    run: Callable[[], Iterable]
    reset: Callable[[], None]  # to the initial weights


def plain(model: LeNet) -> nn.Sequential:
    """`model` as a user would write it: fused layers taken apart, sparse ones as dense ones with a masked weight."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for (name, layer), size in zip(model.named_children(), _input_sizes(model), strict=True):
        if not isinstance(layer, FusedConv2d):
            modules[name] = copy.deepcopy(layer)
            continue
        shape = _shape(layer, size, needs_input_grad=bool(modules))
        pool = layers.SUBSAMPLE if isinstance(layer, ConvSubsample2d) else layer.pool
        modules[name] = layers.build_plain(layers.Case(shape, layer.activation, pool))
        values = layers.store_dense(shape, [parameter.detach() for parameter in layer.parameters()])
        with torch.no_grad():
            for parameter, value in zip(modules[name].parameters(), values, strict=True):
                parameter.copy_(value.view_as(parameter))
    return nn.Sequential(modules)


def flops(model: LeNet, training: bool) -> int:
    """Of one image's convolutions and matrix products, in training with their gradients but the image's own."""
    total = 0
    for index, (layer, size) in enumerate(zip(model.children(), _input_sizes(model), strict=True)):
        if isinstance(layer, FusedConv2d):
            passes = "forward+backward" if training else "forward"
            total += _shape(layer, size, needs_input_grad=index > 0).flops(passes)
        elif isinstance(layer, nn.Linear):
            total += 2 * layer.weight.numel() * (3 if training else 1)
        elif isinstance(layer, RBF):  # its codes are not trained
            total += 2 * layer.codes.numel() * (2 if training else 1)
    return total


def _shape(layer: FusedConv2d, size: int, needs_input_grad: bool) -> layers.Layer:
    return layers.Layer(
        layer.in_channels,
        layer.out_channels,
        size,
        layer.padding,
        needs_input_grad,
        variants=(),
        contestants={},
        connections=layer.connections,
        kernel_size=layer.kernel_size,
    )


def _input_sizes(model: LeNet) -> Iterator[int]:
    """The width of what arrives at each layer."""
    size = model.input_spec.size
    value = torch.zeros(1, 1, size, size)
    with torch.no_grad():
        for layer in model.children():
            yield value.shape[-1]
            value = layer(value)
