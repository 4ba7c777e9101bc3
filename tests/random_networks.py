"""Networks of any shape that FusedTrainer takes natively, for tests that look for what nobody thought of.

A network grows link by link. A link may be of any kind that native steps have, a layer or a call, with any option of
that kind, at any place. It stays where it fits the images and the reader takes it, so that what the reader comes to
take is drawn, too. Few networks have calls: to read their forward takes some tenths of a second.
"""

import inspect
import operator
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from lenet_fast import functional, reference
from lenet_fast.calls import CALLS, SAME_VALUES, links_of_calls
from lenet_fast.fusable import ACTIVATIONS, CONV_OPTIONS, POOLS, LeftAlone
from lenet_fast.links import LAYERS, Link
from lenet_fast.network import Network, NetworkError
from lenet_fast.nn import RBF, ConvActPool2d, ConvSubsample2d, FusedConv2d, SparseConvActPool2d

OPS = torch.ops.lenet_fast
_FUSED = {  # by operator, as a forward has it: what a user calls, and which layer has its parameters
    OPS.conv_act_pool.default: (functional.conv_act_pool, ConvActPool2d),
    OPS.sparse_conv_act_pool.default: (functional.sparse_conv_act_pool, SparseConvActPool2d),
    OPS.conv_subsample.default: (functional.conv_subsample, ConvSubsample2d),
}
_PARAMETERS = {torch.conv2d: nn.Conv2d, torch._C._nn.linear: nn.Linear} | {op: kind for op, (_, kind) in _FUSED.items()}
LINKS = (*LAYERS, *CALLS, *(call for call in SAME_VALUES if call != "float"))  # everything is float64
_CONVOLUTIONS = [kind for kind in LAYERS if issubclass(kind, nn.Conv2d | FusedConv2d)]
_NOT_DRAWN = {"device", "dtype", *CONV_OPTIONS}  # arguments that the reader leaves no choice of
_MOST_VALUES = 3000  # of an image, between two layers
_IMAGES = 3


@dataclass(frozen=True)
class Call:
    """A call of a function or method, with the parameters of a layer of the chain or without."""

    kind: Any
    layer: str | None
    options: tuple[Any, ...] = ()
    named: tuple[tuple[str, Any], ...] = ()

    def parameters(self, chain: nn.Module) -> list[Tensor | None]:
        if self.layer is None:
            return []
        roles = ("weight", "bias", "coefficient", "pool_bias")
        layer = getattr(chain, self.layer)
        return [getattr(layer, role) for role in roles if hasattr(layer, role)]

    def __call__(self, chain: nn.Module, x: Tensor) -> Tensor:
        if isinstance(self.kind, str):
            return getattr(x, self.kind)(*self.options, **dict(self.named))
        if self.kind in _FUSED:
            layer = getattr(chain, self.layer)
            named = {"padding": layer.padding, "activation": layer.activation}
            if layer.connections is not None:
                named["table"] = layer.connections
            if self.kind is not OPS.conv_subsample.default:
                named["pool"] = layer.pool
            return _FUSED[self.kind][0](x, *self.parameters(chain), **named)
        return self.kind(x, *self.parameters(chain), *self.options, **dict(self.named))

    def node(self, graph: fx.Graph, before: fx.Node, chain: nn.Module) -> fx.Node:
        """As Dynamo captures it."""
        parameters = []
        for parameter in self.parameters(chain):
            parameters.append(None if parameter is None else graph.placeholder("parameter"))
            if parameter is not None:
                parameters[-1].meta["example_value"] = parameter
        options = self.options
        if self.kind in _FUSED:
            layer = getattr(chain, self.layer)
            padding = {"valid": 0, "same": layer.kernel_size // 2}.get(layer.padding, layer.padding)
            indices = None if layer.connections is None else layer.connections.indices
            options = {
                OPS.conv_act_pool.default: lambda: (padding, layer.activation, layer.pool),
                OPS.sparse_conv_act_pool.default: lambda: (
                    *(indices, layer.out_channels, padding, layer.activation, layer.pool),
                ),
                OPS.conv_subsample.default: lambda: (indices, padding, layer.activation),
            }[self.kind]()
        create = graph.call_method if isinstance(self.kind, str) else graph.call_function
        return create(self.kind, (before, *parameters, *options), dict(self.named))


class Chain(nn.Module):
    """One link after the other.

    Args:
        links: names of layers, which are children, and calls.
    """

    links: tuple[str | Call, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        for link in self.links:
            x = getattr(self, link)(x) if isinstance(link, str) else link(self, x)
        return x


@dataclass
class Drawn:
    """A network of float64, some of whose parameters may be frozen.

    Args:
        shape: of an image as it is given to the network.
        image: (C, H, W) as its first layer gets it.
        classes: how many scores or distances it has.
        kinds: of its links, as `LINKS` has them.
        reading: what the reader found in it.
    """

    network: nn.Module
    shape: tuple[int, ...]
    image: tuple[int, int, int]
    classes: int
    kinds: list[Any]
    reading: Network


def random_network(seed: int, calls: bool = False) -> Drawn:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    while True:
        height = draw.randint(4, 20)
        image = draw.choice((1, 1, 2, 3)), height, height if draw.random() < 0.8 else draw.randint(4, 20)
        preferred = [LINKS[(8 * (seed // 10) + i) % len(LINKS)] for i in range(8)]
        growth = _Growth(draw, torch.zeros(_IMAGES, *image, dtype=torch.float64), calls, preferred)
        growth.grow_all()
        try:
            growth.reading.numbers(image)
        except NetworkError:
            continue
        if growth.output.dim() == 2 and (classes := growth.output.shape[1]) > 1:
            break
    network: nn.Module = growth.network
    if not calls:
        network = nn.Sequential()
        for name in growth.network.links:
            network.add_module(name, getattr(growth.network, name))
    for parameter in network.parameters():
        parameter.requires_grad_(draw.random() < 0.8)
    draw.choice(list(network.parameters())).requires_grad_(True)  # one at least
    return Drawn(network, growth.shape, image, classes, growth.kinds, growth.reading)


@dataclass
class _Growth:
    draw: random.Random
    output: Tensor  # of images, by the links so far
    calls: bool
    preferred: Sequence[Any]  # links that are tried at many places
    network: Chain = field(default_factory=Chain)
    reading: Network = field(default_factory=Network)
    kinds: list[Any] = field(default_factory=list)
    takes_windows: bool = False  # convolutions whose window is the whole input, which are dense layers to the reader

    def grow_all(self) -> None:
        draw = self.draw
        self.shape = tuple(self.output.shape[1:])
        if self.calls and draw.random() < 0.8:  # images of another shape than the first layer takes
            self.grow_images()
        for _ in range(draw.choices((1, 2, 3, 4), (4, 5, 3, 1))[0]):
            self.grow(self.one_of(nn.Conv2d, *_CONVOLUTIONS))
            self.grow_anything()
        if draw.random() < 0.8:
            self.takes_windows = True
            self.grow(self.one_of(nn.Conv2d, *_CONVOLUTIONS))
            self.takes_windows = False
            self.grow_anything()
        flattenings = ("view", "reshape", "flatten", torch.reshape, torch.flatten)
        self.grow(draw.choice(flattenings) if self.calls else nn.Flatten)
        self.grow_anything()
        for _ in range(draw.choice((0, 0, 1, 1, 2, 3))):
            self.grow(self.one_of(nn.Linear))
            self.grow_anything()
        if draw.random() < 0.4:
            self.grow(RBF)
            self.grow_anything()
        elif draw.random() < 0.3:
            ends = [kind for kind in LINKS if "log_softmax" in name_of(kind)] if self.calls else [nn.LogSoftmax]
            self.grow(draw.choice(ends))

    def one_of(self, *kinds: Any) -> Any:
        """One of the kinds of layers, or a call that is the same."""
        kind = self.draw.choice(kinds)
        same = [call for call, layer in _PARAMETERS.items() if layer is kind]
        return self.draw.choice(same) if self.calls and same and self.draw.random() < 0.5 else kind

    def grow_anything(self) -> None:
        draw = self.draw
        if self.calls and draw.random() < 0.5:
            for kind in draw.sample(self.preferred, len(self.preferred)):
                self.grow(kind)
        for _ in range(draw.choice((1, 2, 4) if self.calls else (0, 0, 1, 1, 2, 3))):
            if draw.random() < (0.5 if self.calls else 0.2):
                self.grow(draw.choice(LINKS if self.calls else list(LAYERS)))
            else:  # each name as often as another, however many ways there are to write it
                table = POOLS if draw.random() < 0.4 and self.output.dim() == 4 else ACTIVATIONS
                name = draw.choice(sorted(set(table.values())))
                written = [kind for kind in table if table[kind] == name and (self.calls or isinstance(kind, type))]
                self.grow(draw.choice(written))

    def grow_images(self) -> None:
        """The first call gives the images their shape."""
        image = tuple(self.output.shape[1:])
        one = image[0] == 1
        ways = (
            [(image[1:], Call("unsqueeze", None, (1,))), (image[1:], Call(torch.unsqueeze, None, (1,)))] if one else []
        )
        ways += [(image[1:], Call(operator.getitem, None, ((slice(None), None),)))] if one else []
        ways.append(((self.output[0].numel(),), Call("view", None, (-1, *image))))
        self.shape, call = self.draw.choice(ways)
        self.network.links += (call,)
        self.kinds.append(call.kind)
        self.reading.take(Link("images", "images", {"shape": image}))

    def grow(self, kind: Any) -> None:
        """Append a link of this kind, if it fits here and the reader takes it."""
        name = f"layer{len(self.network.links)}"
        layer = kind if isinstance(kind, type) else _PARAMETERS.get(kind)
        if layer is not None:
            self.network.add_module(name, self.layer(layer))
        link = name if isinstance(kind, type) else self.call(kind, None if layer is None else name)
        output = self.taken(kind, link)
        if output is not None:
            self.output = output
            self.network.links += (link,)
            self.kinds.append(kind)
        elif layer is not None:
            delattr(self.network, name)

    @torch.no_grad()
    def taken(self, kind: Any, link: str | Call) -> Tensor | None:
        """What the link makes of the output, if it fits and the reader takes it."""
        chain, given = self.network, self.output.clone()  # it may be one that changes its input
        try:
            output = getattr(chain, link)(given) if isinstance(link, str) else link(chain, given)
            if not isinstance(output, Tensor) or output[0].numel() > _MOST_VALUES:
                return None
            for found in self.links(kind, link, output):
                self.reading.take(found)
        except (LeftAlone, RuntimeError, ValueError, IndexError, TypeError, UserWarning):
            return None
        return output

    def links(self, kind: Any, link: str | Call, output: Tensor) -> list[Link]:
        if isinstance(link, str):
            return [LAYERS[kind](link, getattr(self.network, link))]
        graph = fx.Graph()
        before = graph.placeholder("x")
        before.meta["example_value"] = self.output
        node = link.node(graph, before, self.network)
        node.meta["example_value"] = output
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        links = []
        for found in links_of_calls([before, before, node], 2):
            given = {role: node.meta["example_value"] for role, node in found.tensors.items()}
            tensors = {role: (names[id(tensor)], tensor) for role, tensor in given.items()}
            links.append(Link(found.label, found.kind, found.options, tensors))
        return links

    def layer(self, kind: type[nn.Module]) -> nn.Module:
        if kind in POOLS:
            return kind(2)
        options = self.options()
        if kind is SparseConvActPool2d and options["table"] is None:
            options["table"] = torch.rand(options["out_channels"], options["in_channels"]) < 0.6
        layer = kind(**{name: options[name] for name in options_of(kind)}).double()
        if hasattr(layer, "backend") and not self.calls:  # written out, not all of them are read
            layer.backend = "reference"
        if isinstance(layer, nn.Dropout | nn.Dropout2d):
            layer.eval()  # what it drops is not what PyTorch drops
        return layer

    def call(self, kind: Any, layer: str | None) -> Call:
        shape, draw = self.output.shape, self.draw
        last, name = len(shape) - 1, name_of(kind)
        if kind in POOLS:
            return Call(kind, layer, (2,))
        if kind is torch.conv2d:
            padding = getattr(self.network, layer).padding
            return Call(kind, layer, named=(("padding", padding),))
        if "dropout" in name:
            return Call(kind, layer, draw.choice(((0.0, True), (0.5, False))))
        if "log_softmax" in name:
            return Call(kind, layer, (draw.choice((1, -1)),))
        flat = self.output[0].numel()
        options: dict[str, tuple] = {
            "view": (-1, flat),
            "reshape": ((-1, flat),) if kind is torch.reshape else (-1, flat),
            "flatten": (draw.choice((1, -last)), draw.choice((-1, last))),
            "unflatten": (1, (shape[1], 1, 1)),
            "squeeze": (1,),
            "unsqueeze": (1,),
            "getitem": ((..., slice(None)),),
            "to": (torch.float64,),
        }
        return Call(kind, layer, options.get(name, ()))

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
            "p": draw.random(),
            "dim": draw.choice((1, -1)),
        }


def name_of(kind: Any) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", "")


def options_of(kind: type[nn.Module]) -> list[str]:
    """The arguments of a layer, but those that are the same in all that the reader takes."""
    named = [p.name for p in inspect.signature(kind).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return [name for name in named if name not in _NOT_DRAWN]


def random_data(seed: int, image: tuple[int, ...], classes: int, most: int = 20) -> tuple[Tensor, Tensor, int]:
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
        bias = "bias" if layer.has_bias else "no bias"
        options = {f"activation {layer.activation}", bias}
        if index < convolutions:
            size = layer.sizes()[2]
            options.add(f"kernel size {size if size in (3, 5, 7) else 'any'}")  # three have code of their own
            padding = {"valid": 0, "same": size // 2}.get(layer.padding, layer.padding)
            options.add("no padding" if padding == 0 else "padding" if padding < size else "padding beyond the kernel")
            options.add(f"pool {layer.pool}")
            options.add("all connections" if layer.connections is None else "table")
        found.append(("convolution" if index < convolutions else "linear" if layer.is_dense else "window", options))
    return [*found, ("end", {"distances" if network.reading.measures_distance else "scores"})]
