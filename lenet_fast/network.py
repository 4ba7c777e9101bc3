"""A whole LeNet as the native operators take it: what it is made of, its parameters, and its sizes for an image."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import functional, reference
from .fusable import ACTIVATIONS, POOLS, LeftAlone, is_observed, label, read_call, read_layer
from .nn import RBF, ConvActPool2d, ConvSubsample2d, FusedConv2d, SparseConvActPool2d
from .tables import Connections
from .tracing import trace_forward

__all__ = ["LINKS", "Network", "NetworkError"]

_ACTIVATIONS = tuple(reference.ACTIVATIONS)  # in the order of csrc/activation.h
_POOLS = ("avg", "max", "none", "subsample")  # in the order of csrc/geometry.h
_MOST_LAYERS = 4  # convolutions, and dense layers: csrc/network.h
_FUSED = (ConvActPool2d, SparseConvActPool2d, ConvSubsample2d)


class NetworkError(ValueError):
    """A model that the whole-network operators do not take, and which part of it is why."""


@dataclass
class _Layer:
    """A convolution with its activation and pooling, or a dense layer with its activation."""

    name: str
    module: nn.Module
    activation: str = "identity"
    pool: str = "none"  # "subsample" for ConvSubsample2d
    padding: int | str = 0

    @property
    def is_dense(self) -> bool:
        return isinstance(self.module, nn.Linear)

    @property
    def connections(self) -> Connections | None:
        return getattr(self.module, "connections", None)

    def sizes(self) -> tuple[int, int, int]:
        """Inputs and outputs (maps or features) of the weight, and its kernel size, 0 for a matrix.

        What a layer computes depends on its weight alone: `out_channels`, `in_features` and the like are notes.

        Raises:
            NetworkError: a weight of another shape.
        """
        shape = tuple(self.module.weight.shape)
        if self.is_dense:
            if len(shape) == 2:
                return shape[1], shape[0], 0
            expected = "(O, D)"
        elif self.connections is None:
            if len(shape) == 4 and shape[2] == shape[3]:
                return shape[1], shape[0], shape[2]
            expected = "(C_out, C_in, K, K)"
        else:
            count = len(self.connections)
            if len(shape) == 3 and shape[0] == count and shape[1] == shape[2]:
                return self.connections.in_channels, self.connections.out_channels, shape[1]
            expected = f"({count}, K, K)"
        raise NetworkError(f"{self.name}.weight: expected {expected}, got {shape}")

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name in ("weight", "bias", "coefficient", "pool_bias"):
            parameter = getattr(self.module, name, None)
            if parameter is not None:
                yield f"{self.name}.{name}", parameter

    def compute(self, input: Tensor, parameters: Iterator[Tensor]) -> Tensor:
        """The layer's output by the package's operators; takes its parameters, of which there may be more."""
        weight = next(parameters)
        bias = None if self.module.bias is None else next(parameters)
        if self.is_dense:
            return reference.ACTIVATIONS[self.activation](F.linear(input.flatten(1), weight, bias))
        options = {"padding": self.padding, "activation": self.activation}
        if self.pool == "subsample":
            subsampling = next(parameters), next(parameters)
            return functional.conv_subsample(input, weight, bias, *subsampling, table=self.connections, **options)
        options["pool"] = self.pool
        if self.connections is None:
            return functional.conv_act_pool(input, weight, bias, **options)
        return functional.sparse_conv_act_pool(input, weight, bias, table=self.connections, **options)

    def follow(self, kind: str, value: str) -> None:
        """Take in an activation or a pooling behind the layer."""
        if kind == "pool":
            if self.pool != "none" or self.is_dense:
                raise LeftAlone(f"a pooling cannot follow {self.name}" + " and its pooling" * (self.pool != "none"))
            self.pool = value
        elif value != "identity":
            if self.activation != "identity":
                raise LeftAlone(f"{self.name} has an activation already, {self.activation}")
            if self.pool not in ("none", "max"):  # every activation is nondecreasing: it may follow the maximum
                raise LeftAlone(f"an activation cannot follow the {self.pool} pooling of {self.name}")
            self.activation = value


@dataclass
class Network:
    """A LeNet found in a module: convolutions, dense layers, and perhaps an RBF layer, one after the other."""

    layers: list[_Layer] = field(default_factory=list)
    rbf: RBF | None = None
    _flattened: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> "Network":
        """Read `model`: convolution blocks (plain or fused layers), flatten, dense layers, perhaps an `RBF`.

        Raises:
            NetworkError: it is something else; names the part.
            TypeError: `model` is no nn.Module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        try:
            if is_observed(model):
                raise LeftAlone("the model has hooks or a forward of its own")
            trace = trace_forward(model, training=True)
        except LeftAlone as why:
            raise NetworkError(f"{type(model).__name__}: {why}") from None
        network = cls()
        node = None
        try:
            for node in _chain(model, trace.graph):
                network.take(model, node)
        except LeftAlone as why:
            raise NetworkError(f"{label(node)}: {why}") from None
        network._check()
        return network

    def take(self, model: nn.Module, node: fx.Node) -> None:
        """Take in the next link of the chain, one of `LINKS`: a call of a layer of `model`, of a function or a method.

        Raises:
            LeftAlone: it is something else, or cannot follow what was taken in before.
        """
        layer = model.get_submodule(node.target) if node.op == "call_module" else None
        if self.rbf is not None:
            raise LeftAlone("nothing can follow the RBF layer")
        if layer is not None and is_observed(layer):
            raise LeftAlone("it has hooks (pruning and weight norm are some) or a forward of its own")
        if not self.layers and not isinstance(layer, (nn.Conv2d, *_FUSED)):
            raise LeftAlone("a convolution has to come first")
        kind = node.target if layer is None else type(layer)
        _TAKE.get(kind, Network._take_part)(self, node, layer)

    def _take_fused(self, node: fx.Node, layer: FusedConv2d) -> None:
        subsamples = isinstance(layer, ConvSubsample2d)
        pool, pools = ("subsample", ("subsample",)) if subsamples else (layer.pool, tuple(reference.POOLS))
        for option, value, choices in (("activation", layer.activation, _ACTIVATIONS), ("pool", pool, pools)):
            if value not in choices:
                raise LeftAlone(f"its {option} is {value!r}")
        padding = layer.padding
        if padding not in ("valid", "same") and not (type(padding) is int and padding >= 0):
            raise LeftAlone(f"its padding is {padding!r}")
        self._take_convolution(_Layer(node.target, layer, layer.activation, pool, padding))

    def _take_linear(self, node: fx.Node, layer: nn.Linear) -> None:
        if not self._flattened:
            raise LeftAlone("a dense layer needs a flattening between it and the convolutions")
        self.layers.append(_Layer(node.target, layer))

    def _take_rbf(self, node: fx.Node, layer: RBF) -> None:
        if not self._flattened:
            raise LeftAlone("an RBF layer needs a dense layer before it")
        self.rbf = layer

    def _take_flatten(self, node: fx.Node, layer: nn.Flatten | None) -> None:
        start, end = _flatten_range(node, layer)
        last = 1 if self._flattened else 3
        if start not in (1, -last) or end not in (-1, last):
            raise LeftAlone(f"flattens dimensions {start} to {end}, not 1 to -1")
        self._flattened = True

    def _take_part(self, node: fx.Node, layer: nn.Module | None) -> None:
        """A plain convolution, an activation or a pooling."""
        kind, value = read_call(node) if layer is None else read_layer(layer)
        last = self.layers[-1] if self.layers else None
        if kind == "convolution":
            self._take_convolution(_Layer(node.target, layer, padding=value))
        elif last.pool == "subsample":
            raise LeftAlone(f"nothing can follow the subsampling of {last.name}")
        elif kind == "pool" and self._flattened:
            raise LeftAlone("a pooling cannot follow the flattening")
        else:
            last.follow(kind, value)

    def _take_convolution(self, layer: _Layer) -> None:
        if self._flattened:
            raise LeftAlone("a convolution cannot follow the flattening")
        self.layers.append(layer)

    def _check(self) -> None:
        if not self.layers or self.layers[0].is_dense:
            raise NetworkError("a convolution has to come first")
        if not self._flattened:
            raise NetworkError("its end: expected a flattening and dense layers behind the convolutions")
        owners: dict[nn.Parameter, str] = {}
        for name, parameter in self.named_parameters():
            if parameter in owners:
                raise NetworkError(f"{name}: the same parameter as {owners[parameter]}")
            owners[parameter] = name

    def compute(self, input: Tensor, tensors: Iterable[Tensor]) -> Tensor:
        """What the model computes, (N, C, H, W) to scores or distances (N, classes), by the package's operators.

        Args:
            tensors: in the place of what `tensors()` returns.
        """
        remaining = iter(tensors)
        for layer in self.layers:
            input = layer.compute(input, remaining)
        features = input.flatten(1)
        return features if self.rbf is None else functional.rbf(features, next(remaining))

    @property
    def measures_distance(self) -> bool:
        return self.rbf is not None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters in the order of the operators."""
        for layer in self.layers:
            yield from layer.parameters()

    def tensors(self) -> list[Tensor]:
        """All tensors that the operators take: the parameters, and the codes of the RBF layer."""
        codes = [] if self.rbf is None else [self.rbf.codes]
        return [parameter for _, parameter in self.named_parameters()] + codes

    def numbers(self, image: tuple[int, int, int]) -> list[int]:
        """The network as int[] for images (C, H, W); see csrc/network_operands.h.

        Raises:
            NetworkError: a layer does not fit what arrives there.
        """
        channels, height, width = image
        convs: list[list[int]] = []
        denses: list[list[int]] = []
        for index, layer in enumerate(self.layers):
            inputs, outputs, kernel = layer.sizes()
            if layer.is_dense:
                features = channels * height * width
                if inputs != features:
                    raise NetworkError(
                        f"{layer.name}: expected {inputs} features, "
                        f"{features} arrive there from images of shape {image}"
                    )
                denses.append(_dense_numbers(layer, outputs, kernel))
                channels, height, width = outputs, 1, 1
                continue
            if channels != inputs:
                raise NetworkError(f"{layer.name}: expected {inputs} channels, {channels} arrive there")
            padding = _padding(layer, kernel)
            sizes = [size + 2 * padding - kernel + 1 for size in (height, width)]
            least = 1 if layer.pool == "none" else 2
            if min(sizes) < least:
                raise NetworkError(f"{layer.name}: nothing is left of images of shape {image} there")
            behind = self.layers[index + 1 :]
            if sizes == [1, 1] and padding == 0 and layer.connections is None and all(b.is_dense for b in behind):
                denses.append(_dense_numbers(layer, outputs, kernel))  # a window over the whole input
                channels, height, width = outputs, 1, 1
                continue
            indices = [] if layer.connections is None else list(layer.connections.indices)
            count = -1 if layer.connections is None else len(indices)
            has_bias = int(layer.module.bias is not None)
            options = [_ACTIVATIONS.index(layer.activation), _POOLS.index(layer.pool), has_bias, count]
            convs.append([outputs, kernel, padding, *options, *indices])
            channels = outputs
            height, width = sizes if layer.pool == "none" else [size // 2 for size in sizes]
        classes = channels
        if self.rbf is not None:
            codes = tuple(self.rbf.codes.shape)
            if len(codes) != 2 or codes[1] != channels:
                raise NetworkError(f"RBF: codes of shape {codes}, {channels} features arrive there")
            classes = codes[0]
        for kind, found in (("convolutions", convs), ("dense layers", denses)):
            if not 1 <= len(found) <= _MOST_LAYERS:
                raise NetworkError(f"{len(found)} {kind}: the native network has 1 to {_MOST_LAYERS}")
        head = [*image, int(self.measures_distance), classes, len(convs), len(denses)]
        return [*head, *itertools.chain(*convs, *denses)]


_TAKE: dict[Any, Callable[[Network, fx.Node, Any], None]] = {
    **dict.fromkeys(_FUSED, Network._take_fused),
    nn.Linear: Network._take_linear,
    RBF: Network._take_rbf,
    nn.Flatten: Network._take_flatten,
    torch.flatten: Network._take_flatten,
    "flatten": Network._take_flatten,
}
# All that a chain may consist of: types of layers, functions, names of methods.
LINKS: tuple[Any, ...] = (nn.Conv2d, *_TAKE, *ACTIVATIONS, *POOLS)


def _chain(model: nn.Module, graph: fx.Graph) -> Iterator[fx.Node]:
    """The calls of a forward that is one chain from its input to its output."""
    nodes = list(graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise NetworkError(f"{type(model).__name__}: expected a forward of one input, got {len(inputs)}")
    previous = inputs[0]
    for node in nodes:
        if node.op == "placeholder":
            continue
        if node.op == "get_attr" or list(node.all_input_nodes) != [previous] or len(previous.users) != 1:
            raise NetworkError(f"{label(node)}: not a step of a plain sequence of layers")
        if node.op == "output":
            return
        yield node
        previous = node


def _flatten_range(node: fx.Node, layer: nn.Module | None) -> tuple[int, int]:
    if layer is not None:
        return layer.start_dim, layer.end_dim
    given = dict(zip(("input", "start_dim", "end_dim"), node.args, strict=False)) | dict(node.kwargs)
    return given.get("start_dim", 0), given.get("end_dim", -1)


def _padding(layer: _Layer, kernel: int) -> int:
    if not isinstance(layer.padding, str):
        return layer.padding
    if layer.padding == "same" and kernel % 2 == 0:
        raise NetworkError(f"{layer.name}: padding 'same' of an even kernel size, {kernel}, is not symmetric")
    return (kernel - 1) // 2 if layer.padding == "same" else 0


def _dense_numbers(layer: _Layer, outputs: int, kernel: int) -> list[int]:
    return [outputs, _ACTIVATIONS.index(layer.activation), int(layer.module.bias is not None), kernel]
