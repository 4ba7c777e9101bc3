"""A whole LeNet as the native operators take it: what it is made of, its parameters, and its sizes for an image."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import functional, reference
from .fusable import LeftAlone
from .links import Link, NetworkError, links_of_layers
from .tables import Connections

__all__ = ["Network", "NetworkError", "SizeError"]

_ACTIVATIONS = tuple(reference.ACTIVATIONS)  # in the order of csrc/activation.h
_POOLS = ("avg", "max", "none", "subsample")  # in the order of csrc/geometry.h
_MOST_LAYERS = 4  # convolutions, and dense layers: csrc/network.h


class SizeError(NetworkError):
    """Images that do not fit a layer, for any way of computing it."""


@dataclass
class _Drops:
    """What dropout drops of the values at one place: of single values, and of whole maps, with which probability."""

    values: float = 0.0
    maps: float = 0.0

    def add(self, p: float, maps: bool) -> None:
        """Take in another dropout behind what there is: kept are the values that both keep."""
        if maps:
            self.maps += p * (1 - self.maps)
        else:
            self.values += p * (1 - self.values)

    def __bool__(self) -> bool:
        return self.values > 0 or self.maps > 0


@dataclass
class _Layer:
    """A convolution with its activation and pooling, or a dense layer with its activation.

    Args:
        tensors: a name and a tensor for each of its parameters, in the order of the operators.
    """

    name: str
    tensors: Mapping[str, tuple[str, Tensor]]
    is_dense: bool
    activation: str = "identity"
    pool: str = "none"  # "subsample" for ConvSubsample2d
    padding: int | str = 0
    connections: Connections | None = None
    drops: "_Drops" = field(default_factory=lambda: _Drops())  # of its output, behind activation and pooling

    @property
    def has_bias(self) -> bool:
        return "bias" in self.tensors

    def sizes(self) -> tuple[int, int, int]:
        """Inputs and outputs (maps or features) of the weight, and its kernel size, 0 for a matrix.

        What a layer computes depends on its parameters alone: `out_channels`, `in_features` and the like are notes.

        Raises:
            NetworkError: parameters of other shapes.
        """
        sizes = self._sizes_of_weight()
        for role, (name, tensor) in self.tensors.items():
            if role != "weight" and tuple(tensor.shape) != sizes[1:2]:
                raise NetworkError(f"{name}: expected {sizes[1:2]}, got {tuple(tensor.shape)}")
        return sizes

    def _sizes_of_weight(self) -> tuple[int, int, int]:
        name, weight = self.tensors["weight"]
        shape = tuple(weight.shape)
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
        raise NetworkError(f"{name}: expected {expected}, got {shape}")

    def compute(self, input: Tensor, parameters: Iterator[Tensor]) -> Tensor:
        """The layer's output by the package's operators; takes its parameters, of which there may be more."""
        weight = next(parameters)
        bias = next(parameters) if self.has_bias else None
        if self.is_dense:
            return reference.ACTIVATIONS[self.activation](F.linear(input.flatten(1), weight, bias))
        if input.dim() == 2:  # features, each a map of one value
            input = input[..., None, None]
        options = {"padding": self.padding, "activation": self.activation}
        if self.pool == "subsample":
            subsampling = next(parameters), next(parameters)
            return functional.conv_subsample(input, weight, bias, *subsampling, table=self.connections, **options)
        options["pool"] = self.pool
        if self.connections is None:
            return functional.conv_act_pool(input, weight, bias, **options)
        return functional.sparse_conv_act_pool(input, weight, bias, table=self.connections, **options)

    def follow(self, kind: str, value: str) -> None:
        """Take in an activation or a pooling behind the layer and the dropout of its output.

        The dropout moves behind them where that is the same: zeros and products stay what they are in a ReLU, and those
        of a whole map in a pooling.
        """
        if kind == "pool":
            if self.drops.values:
                raise LeftAlone("a pooling cannot follow a dropout of single values")
            if self.pool != "none" or self.is_dense:
                raise LeftAlone(f"a pooling cannot follow {self.name}" + " and its pooling" * (self.pool != "none"))
            self.pool = value
        elif value != "identity":
            if self.drops and value != "relu":
                raise LeftAlone(f"{value} cannot follow a dropout")
            if self.activation != "identity":
                raise LeftAlone(f"{self.name} has an activation already, {self.activation}")
            if self.pool not in ("none", "max"):  # every activation is nondecreasing: it may follow the maximum
                raise LeftAlone(f"an activation cannot follow the {self.pool} pooling of {self.name}")
            self.activation = value


@dataclass
class Network:
    """A LeNet found in a module: convolutions, dense layers, and perhaps an RBF layer, one after the other.

    Args:
        image: (C, H, W) that the network's own forward gives every image first; None: it takes them as they are.
        ends_in_log_softmax: behind the last layer, where the cross-entropy of its scores is the same with and without.
    """

    layers: list[_Layer] = field(default_factory=list)
    codes: tuple[str, Tensor] | None = None
    image: tuple[int, int, int] | None = None
    ends_in_log_softmax: bool = False
    _image_drops: _Drops = field(default_factory=_Drops)
    _flattened: bool = False
    _of_single_values: bool = False  # what is flattened: maps of one value each

    @classmethod
    def of(cls, model: nn.Module) -> "Network":
        """The network of a model whose forward calls one layer after the other, as nn.Sequential's.

        Raises:
            NetworkError: it is something else; names the part.
        """
        links = links_of_layers(model)
        if links is None:
            raise NetworkError(f"{type(model).__name__}: a forward that has to be read with a batch")
        return cls.of_links(links)

    @classmethod
    def of_links(cls, links: Iterable[Link]) -> "Network":
        """The network of these parts: convolution blocks, flatten, dense layers, perhaps distances.

        Raises:
            NetworkError: they are something else; names the part.
        """
        network = cls()
        for link in links:
            try:
                network.take(link)
            except LeftAlone as why:  # noqa: PERF203
                raise NetworkError(f"{link.label}: {why}") from None
        network._check()
        return network

    def take(self, link: Link) -> None:
        """Take in the next part.

        Raises:
            LeftAlone: it cannot follow what was taken in before.
        """
        if self.codes is not None:
            raise LeftAlone("nothing can follow the RBF layer")
        if self.ends_in_log_softmax:
            raise LeftAlone("nothing can follow log_softmax")
        if not self.layers and link.kind not in ("convolution", "images", "dropout"):
            raise LeftAlone("a convolution has to come first")
        _TAKE[link.kind](self, link, **link.options)

    def _take_images(self, link: Link, shape: tuple[int, int, int]) -> None:
        if self._image_drops:
            raise LeftAlone("images get their shape behind a dropout")
        self.image = shape

    def _take_convolution(self, link: Link, **options: Any) -> None:
        if self._flattened:
            raise LeftAlone("a convolution cannot follow the flattening")
        self.layers.append(_Layer(link.label, link.tensors, is_dense=False, **options))

    def _take_linear(self, link: Link) -> None:
        if not self._flattened:
            raise LeftAlone("a dense layer needs a flattening between it and the convolutions")
        self.layers.append(_Layer(link.label, link.tensors, is_dense=True))

    def _take_distances(self, link: Link) -> None:
        if not self._flattened:
            raise LeftAlone("an RBF layer needs a dense layer before it")
        self.codes = link.tensors["codes"]

    def _take_flatten(self, link: Link, start: int = 1, end: int = -1, of_single_values: bool = False) -> None:
        last = 1 if self._flattened else 3
        if start not in (1, -last) or end not in (-1, last):
            raise LeftAlone(f"flattens dimensions {start} to {end}, not 1 to -1")
        self._flattened, self._of_single_values = True, of_single_values

    def _take_maps(self, link: Link) -> None:
        if not (self.layers[-1].is_dense or self._of_single_values):
            raise LeftAlone("makes maps of one value each of larger ones")
        self._flattened = False

    def _take_pool(self, link: Link, name: str) -> None:
        if self._flattened:
            raise LeftAlone("a pooling cannot follow the flattening")
        self._last_of_parts().follow("pool", name)

    def _take_activation(self, link: Link, name: str) -> None:
        self._last_of_parts().follow("activation", name)

    def _take_dropout(self, link: Link, p: float, maps: bool) -> None:
        if maps and self._flattened and p:
            raise LeftAlone("a dropout of maps cannot follow the flattening")
        (self.layers[-1].drops if self.layers else self._image_drops).add(p, maps)

    def _take_log_softmax(self, link: Link, dim: int | None) -> None:
        if not self._flattened:
            raise LeftAlone("log_softmax needs a flattening before it")
        if dim not in (1, -1, None):
            raise LeftAlone(f"of dimension {dim}, not 1")
        self.ends_in_log_softmax = True

    def _last_of_parts(self) -> _Layer:
        """What an activation or a pooling belongs to."""
        last = self.layers[-1]
        if last.pool == "subsample":
            raise LeftAlone(f"nothing can follow the subsampling of {last.name}")
        return last

    def _check(self) -> None:
        if not self.layers or self.layers[0].is_dense:
            raise NetworkError("a convolution has to come first")
        if not self._flattened:
            raise NetworkError("its end: expected a flattening and dense layers behind the convolutions")
        owners: dict[Tensor, str] = {}
        for name, parameter in self.named_parameters():
            if parameter in owners:
                raise NetworkError(f"{name}: the same parameter as {owners[parameter]}")
            owners[parameter] = name
        if self.codes is not None and self.codes[1].requires_grad:
            raise NetworkError(f"{self.codes[0]}: codes that are trained")

    def compute(self, input: Tensor, tensors: Iterable[Tensor]) -> Tensor:
        """Scores or distances (N, classes) of images (N, C, H, W), by the package's operators, without dropout.

        Args:
            tensors: in the place of what `tensors()` returns.
        """
        remaining = iter(tensors)
        for layer in self.layers:
            input = layer.compute(input, remaining)
        features = input.flatten(1)
        return features if self.codes is None else functional.rbf(features, next(remaining))

    def dropout(self) -> list[float]:
        """The probabilities of dropping, as the native steps take them; empty: nothing is dropped."""
        places = [self._image_drops, *(layer.drops for layer in self.layers)]
        return [p for drops in places for p in (drops.values, drops.maps)] if any(places) else []

    @property
    def measures_distance(self) -> bool:
        return self.codes is not None

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The trained parameters in the order of the operators."""
        for layer in self.layers:
            yield from layer.tensors.values()

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """All tensors that the operators take: the parameters, and the codes of the RBF layer."""
        return [*self.named_parameters(), *([] if self.codes is None else [self.codes])]

    def tensors(self) -> list[Tensor]:
        return [tensor for _, tensor in self.named_tensors()]

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
                    raise SizeError(
                        f"{layer.name}: expected {inputs} features, "
                        f"{features} arrive there from images of shape {image}"
                    )
                denses.append(_dense_numbers(layer, outputs, kernel))
                channels, height, width = outputs, 1, 1
                continue
            if channels != inputs:
                raise SizeError(f"{layer.name}: expected {inputs} channels, {channels} arrive there")
            padding = _padding(layer, kernel)
            sizes = [size + 2 * padding - kernel + 1 for size in (height, width)]
            least = 1 if layer.pool == "none" else 2
            if min(sizes) < least:
                raise SizeError(f"{layer.name}: nothing is left of images of shape {image} there")
            behind = self.layers[index + 1 :]
            if sizes == [1, 1] and padding == 0 and layer.connections is None and all(b.is_dense for b in behind):
                denses.append(_dense_numbers(layer, outputs, kernel))  # a window over the whole input
                channels, height, width = outputs, 1, 1
                continue
            if denses:
                raise NetworkError(f"{layer.name}: a convolution cannot follow a dense layer")
            indices = [] if layer.connections is None else list(layer.connections.indices)
            count = -1 if layer.connections is None else len(indices)
            options = [_ACTIVATIONS.index(layer.activation), _POOLS.index(layer.pool), int(layer.has_bias), count]
            convs.append([outputs, kernel, padding, *options, *indices])
            channels = outputs
            height, width = sizes if layer.pool == "none" else [size // 2 for size in sizes]
        classes = channels
        if self.codes is not None:
            name, codes = self.codes[0], tuple(self.codes[1].shape)
            if len(codes) != 2 or codes[1] != channels:
                raise SizeError(f"{name}: expected (classes, {channels}) as features arrive there, got {codes}")
            classes = codes[0]
        for kind, found in (("convolutions", convs), ("dense layers", denses)):
            if not 1 <= len(found) <= _MOST_LAYERS:
                raise NetworkError(f"{len(found)} {kind}: the native network has 1 to {_MOST_LAYERS}")
        head = [*image, int(self.measures_distance), classes, len(convs), len(denses)]
        return [*head, *itertools.chain(*convs, *denses)]


_TAKE: dict[str, Callable[..., None]] = {
    "images": Network._take_images,
    "convolution": Network._take_convolution,
    "linear": Network._take_linear,
    "distances": Network._take_distances,
    "flatten": Network._take_flatten,
    "maps": Network._take_maps,
    "pool": Network._take_pool,
    "activation": Network._take_activation,
    "dropout": Network._take_dropout,
    "log_softmax": Network._take_log_softmax,
}


def _padding(layer: _Layer, kernel: int) -> int:
    if not isinstance(layer.padding, str):
        return layer.padding
    if layer.padding == "same" and kernel % 2 == 0:
        raise NetworkError(f"{layer.name}: padding 'same' of an even kernel size, {kernel}, is not symmetric")
    return (kernel - 1) // 2 if layer.padding == "same" else 0


def _dense_numbers(layer: _Layer, outputs: int, kernel: int) -> list[int]:
    return [outputs, _ACTIVATIONS.index(layer.activation), int(layer.has_bias), kernel]
