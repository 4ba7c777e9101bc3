"""Networks of any shape that FusedTrainer takes, for tests that look for what nobody thought of.

A network grows link by link. A link may be of any kind that the reader of lenet_fast/network.py knows, with any option
of that kind, at any place. It stays where it fits the images and the reader takes it, so that what the reader comes to
take is drawn, too.
"""

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from lenet_fast import reference
from lenet_fast.fusable import ACTIVATIONS, CONV_OPTIONS, POOLS, LeftAlone
from lenet_fast.network import LINKS, Network, NetworkError
from lenet_fast.nn import RBF, FusedConv2d, SparseConvActPool2d

_CONVOLUTIONS = [kind for kind in LINKS if inspect.isclass(kind) and issubclass(kind, nn.Conv2d | FusedConv2d)]
_FLATTENINGS = [kind for kind in LINKS if kind in (nn.Flatten, torch.flatten, "flatten")]
_NOT_DRAWN = {"device", "dtype", *CONV_OPTIONS}  # arguments that the reader leaves no choice of
_MOST_VALUES = 3000  # between two layers


class Chain(nn.Module):
    """One link after the other.

    Args:
        links: names of layers, which are children, and functions of a tensor.
    """

    links: tuple[str | Callable[[Tensor], Tensor], ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        for link in self.links:
            x = getattr(self, link)(x) if isinstance(link, str) else link(x)
        return x


@dataclass
class Drawn:
    """A network of float64, some of whose parameters may be frozen.

    Args:
        image: (C, H, W).
        classes: how many scores or distances it has.
        kinds: of its links, as `LINKS` has them.
        reading: what the reader found in it.
    """

    network: Chain
    image: tuple[int, int, int]
    classes: int
    kinds: list[Any]
    reading: Network


def random_network(seed: int) -> Drawn:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    while True:
        height = draw.randint(4, 20)
        image = draw.randint(1, 3), height, height if draw.random() < 0.8 else draw.randint(4, 20)
        growth = _Growth(draw, torch.zeros(1, *image))
        growth.grow_all()
        try:
            growth.reading.numbers(image)
        except NetworkError:
            continue
        if (classes := growth.output.shape[1]) > 1:
            break
    network = growth.network.double()
    for parameter in network.parameters():
        parameter.requires_grad_(draw.random() < 0.8)
    draw.choice(list(network.parameters())).requires_grad_(True)  # one at least
    return Drawn(network, image, classes, growth.kinds, growth.reading)


@dataclass
class _Growth:
    draw: random.Random
    output: Tensor  # of an image, by the links so far
    network: Chain = field(default_factory=Chain)
    reading: Network = field(default_factory=Network)
    kinds: list[Any] = field(default_factory=list)
    takes_windows: bool = False  # convolutions whose window is the whole input, which are dense layers to the reader

    def grow_all(self) -> None:
        draw = self.draw
        for _ in range(draw.choices((1, 2, 3, 4), (4, 5, 3, 1))[0]):
            self.grow(draw.choice(_CONVOLUTIONS))
            self.grow_anything()
        if draw.random() < 0.8:
            self.takes_windows = True
            self.grow(draw.choice((nn.Conv2d, *_CONVOLUTIONS)))
            self.takes_windows = False
            self.grow_anything()
        self.grow(draw.choice(_FLATTENINGS))
        self.grow_anything()
        for _ in range(draw.choice((0, 0, 1, 1, 2, 3))):
            self.grow(nn.Linear)
            self.grow_anything()
        if draw.random() < 0.4:
            self.grow(RBF)
            self.grow_anything()

    def grow_anything(self) -> None:
        draw = self.draw
        for _ in range(draw.choice((0, 0, 1, 1, 2, 3))):
            what = draw.random()
            if what < 0.2:
                self.grow(draw.choice(LINKS))
            else:  # each name as often as another, however many ways there are to write it
                table = POOLS if what < 0.5 and self.output.dim() == 4 else ACTIVATIONS
                name = draw.choice(sorted(set(table.values())))
                self.grow(draw.choice([kind for kind in table if table[kind] == name]))

    def grow(self, kind: Any) -> None:
        """Append a link of this kind, if it fits here and the reader takes it."""
        graph = fx.Graph()
        before = graph.placeholder("x")
        if inspect.isclass(kind):
            link = f"layer{len(self.network.links)}"
            self.network.add_module(link, self.layer(kind))
            apply, node = getattr(self.network, link), graph.call_module(link, (before,))
        else:
            options = self.call_options(kind)
            call = graph.call_method if isinstance(kind, str) else graph.call_function
            link = apply = _applying(kind, options)
            node = call(kind, (before,), options)
        output = self.taken(apply, node)
        if output is not None:
            self.output = output
            self.network.links += (link,)
            self.kinds.append(kind)
        elif inspect.isclass(kind):
            delattr(self.network, link)

    @torch.no_grad()
    def taken(self, apply: Callable[[Tensor], Tensor], node: fx.Node) -> Tensor | None:
        """What the link makes of the output, if it fits and the reader takes it."""
        try:
            output = apply(self.output.clone())  # it may be one that changes its input
            if output.numel() > _MOST_VALUES:
                return None
            self.reading.take(self.network, node)
        except (LeftAlone, RuntimeError, ValueError, IndexError):
            return None
        return output

    def layer(self, kind: type[nn.Module]) -> nn.Module:
        if kind in POOLS:
            return kind(2)
        options = self.options()
        if kind is SparseConvActPool2d and options["table"] is None:
            options["table"] = torch.rand(options["out_channels"], options["in_channels"]) < 0.6
        layer = kind(**{name: options[name] for name in options_of(kind)})
        if hasattr(layer, "backend"):
            layer.backend = "reference"
        return layer

    def call_options(self, kind: Any) -> dict[str, Any]:
        if kind in POOLS:
            return {"kernel_size": 2}
        options = self.options()
        return {name: options[name] for name in ("start_dim", "end_dim")} if kind in _FLATTENINGS else {}

    def options(self) -> dict[str, Any]:
        """Of all kinds of layers, by the names of their arguments."""
        draw, shape = self.draw, self.output.shape
        channels, maps = min(shape[1], 18), draw.randint(1, 18)
        kernel_size = draw.choice((1, 2, 3, 3, 3, 4, 5, 5, 5, 6, 7, 7, 7))
        paddings = [0, "valid", draw.randint(1, kernel_size + 1), "same" if kernel_size % 2 else 0]
        if self.takes_windows and len(shape) == 4:
            kernel_size, paddings = shape[-1], [0, "valid"]
        last = len(shape) - 1
        return {
            "in_channels": channels,
            "out_channels": maps,
            "kernel_size": kernel_size,
            "padding": draw.choice(paddings),
            "table": torch.rand(maps, channels) < 0.6 if draw.random() < 0.5 else None,
            "bias": draw.random() < 0.7,
            "activation": draw.choice(list(reference.ACTIVATIONS)),
            "pool": draw.choice(list(reference.POOLS)),
            "in_features": shape[-1],
            "out_features": draw.randint(2, 20),
            "num_classes": draw.randint(2, 6),
            "codes": None,
            "inplace": draw.random() < 0.5,
            "start_dim": draw.choice((1, -last)),
            "end_dim": draw.choice((-1, last)),
        }


def options_of(kind: type[nn.Module]) -> list[str]:
    """The arguments of a layer, but those that are the same in all that the reader takes."""
    named = [p.name for p in inspect.signature(kind).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return [name for name in named if name not in _NOT_DRAWN]


def _applying(kind: Any, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    if isinstance(kind, str):
        return lambda x: getattr(x, kind)(**options)
    return lambda x: kind(x, **options)


def random_data(seed: int, image: tuple[int, int, int], classes: int, most: int = 20) -> tuple[Tensor, Tensor, int]:
    """Images, labels, and a batch size that may leave a smaller last batch."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    number = draw.randint(1, most)
    images = torch.randn(number, *image, dtype=torch.float64, generator=generator)
    return images, torch.randint(classes, (number,), generator=generator), draw.randint(1, 10)


def batches(number: int, batch_size: int, epochs: int, seed: int) -> Iterator[torch.Tensor]:
    """The indices of every step of `FusedTrainer.run`."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(number, generator=generator).split(batch_size)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


_DENSE_OPTIONS = {*(f"activation {name}" for name in reference.ACTIVATIONS), "bias", "no bias"}
OPTIONS = {
    "convolution": {
        *_DENSE_OPTIONS,
        *(f"kernel size {size}" for size in (3, 5, 7, "any")),
        *(f"pool {name}" for name in (*reference.POOLS, "subsample")),
        *("no padding", "padding", "padding beyond the kernel", "table", "all connections"),
    },
    "window": _DENSE_OPTIONS,
    "linear": _DENSE_OPTIONS,
    "end": {"scores", "distances"},
}


def features(network: Drawn) -> list[tuple[str, set[str]]]:
    """What each layer is to the native network, and the options that it has; at the end what the loss is of."""
    convolutions = network.reading.numbers(network.image)[5]
    found = []
    for index, layer in enumerate(network.reading.layers):
        bias = "no bias" if layer.module.bias is None else "bias"
        options = {f"activation {layer.activation}", bias}
        if index < convolutions:
            size = layer.module.kernel_size
            size = size if isinstance(size, int) else size[0]
            options.add(f"kernel size {size if size in (3, 5, 7) else 'any'}")  # three have code of their own
            padding = {"valid": 0, "same": size // 2}.get(layer.padding, layer.padding)
            options.add("no padding" if padding == 0 else "padding" if padding < size else "padding beyond the kernel")
            options.add(f"pool {layer.pool}")
            options.add("all connections" if layer.connections is None else "table")
        found.append(("convolution" if index < convolutions else "linear" if layer.is_dense else "window", options))
    return [*found, ("end", {"distances" if network.reading.measures_distance else "scores"})]
