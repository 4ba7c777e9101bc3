"""The parts that a network consists of, as `Network` takes them in, and an nn.Sequential's layers as such parts."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from . import reference
from .fusable import ACTIVATIONS, POOLS, LeftAlone, calls_its_layers, is_observed, read_layer
from .nn import RBF, ConvActPool2d, ConvSubsample2d, FusedConv2d, SparseConvActPool2d

__all__ = ["LAYERS", "NO_LAYER", "OBSERVED", "Link", "NetworkError", "links_of_layers"]

NO_LAYER = "native steps have no {}"
OBSERVED = "it has hooks (pruning and weight norm are some) or a forward of its own"


class NetworkError(ValueError):
    """A model that the whole-network operators do not take, and which part of it is why."""


@dataclass(frozen=True)
class Link:
    """One part of a network.

    Args:
        label: what messages call it: the name of a layer, or the call that the user wrote.
        kind: "convolution", "linear", "distances", "activation", "pool", "dropout", "flatten", "maps" (features as maps
            of one value each), "log_softmax", or "images" (every image gets another shape before the first layer).
        options: of that kind.
        tensors: a name and a tensor for each of "weight", "bias", "coefficient", "pool_bias", "codes" that it has.
    """

    label: str = field(compare=False)
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Any] = field(default_factory=dict)


def links_of_layers(model: nn.Module) -> list[Link] | None:
    """The layers of a model whose forward calls one after the other; None: some forward has to be read first.

    Raises:
        NetworkError: one of PyTorch's own layers that no network has, or not with these options.
        TypeError: `model` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    links = []
    complete = True
    for name, layer in _layers_of(model, ""):
        read = LAYERS.get(type(layer))
        label = name or type(model).__name__
        try:
            if is_parametrized(layer):
                raise LeftAlone("it is parametrized")
            if "forward" in vars(layer):
                complete = False
            elif is_observed(layer):
                raise LeftAlone(OBSERVED)
            elif read is not None:
                links.append(read(name, layer))
            elif type(layer).__module__.startswith("torch.nn.") and type(layer) not in _READ_BY_SHAPE:
                raise LeftAlone(NO_LAYER.format(type(layer).__name__))
            else:
                complete = False
        except LeftAlone as why:
            raise NetworkError(f"{label}: {why}") from None
    return links if complete else None


def _layers_of(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers that a forward calls one after the other, as far as containers say so."""
    from .lenet import LeNet  # whose own forward reads it, too

    kind = type(module)
    if (calls_its_layers(kind) or calls_its_layers(kind, LeNet.forward)) and not is_observed(module):
        for own, child in module._modules.items():
            yield from _layers_of(child, f"{name}.{own}" if name else own)
    else:
        yield name, module


def _tensors(name: str, layer: nn.Module, *roles: str) -> dict[str, Any]:
    found = ((role, getattr(layer, role)) for role in roles)
    return {role: (f"{name}.{role}", tensor) for role, tensor in found if tensor is not None}


def _convolution(name: str, layer: nn.Conv2d) -> Link:
    return Link(name, "convolution", {"padding": read_layer(layer).value}, _tensors(name, layer, "weight", "bias"))


def _fused(name: str, layer: FusedConv2d) -> Link:
    subsamples = isinstance(layer, ConvSubsample2d)
    pool, pools = ("subsample", ("subsample",)) if subsamples else (layer.pool, tuple(reference.POOLS))
    for option, value, choices in (("activation", layer.activation, reference.ACTIVATIONS), ("pool", pool, pools)):
        if value not in choices:
            raise LeftAlone(f"its {option} is {value!r}")
    padding = layer.padding
    if padding not in ("valid", "same") and not (type(padding) is int and padding >= 0):
        raise LeftAlone(f"its padding is {padding!r}")
    options = {
        "padding": padding,
        "activation": layer.activation,
        "pool": pool,
        "connections": layer.connections,
    }
    roles = ("weight", "bias", "coefficient", "pool_bias") if subsamples else ("weight", "bias")
    return Link(name, "convolution", options, _tensors(name, layer, *roles))


def _linear(name: str, layer: nn.Linear) -> Link:
    return Link(name, "linear", {}, _tensors(name, layer, "weight", "bias"))


def _distances(name: str, layer: RBF) -> Link:
    return Link(name, "distances", {}, _tensors(name, layer, "codes"))


def _flatten(name: str, layer: nn.Flatten) -> Link:
    return Link(name, "flatten", {"start": layer.start_dim, "end": layer.end_dim})


def _dropout(name: str, layer: nn.Dropout | nn.Dropout2d) -> Link:
    p = float(layer.p) if layer.training else 0.0
    return Link(name, "dropout", {"p": p, "maps": isinstance(layer, nn.Dropout2d)})


def _log_softmax(name: str, layer: nn.LogSoftmax) -> Link:
    return Link(name, "log_softmax", {"dim": layer.dim})


def _activation(name: str, layer: nn.Module) -> Link:
    return Link(name, "activation", {"name": read_layer(layer).value})


def _pool(name: str, layer: nn.Module) -> Link:
    return Link(name, "pool", {"name": read_layer(layer).value})


# By type of layer: what makes a link of it.
LAYERS: dict[type, Callable[[str, Any], Link]] = {
    nn.Conv2d: _convolution,
    **dict.fromkeys((ConvActPool2d, SparseConvActPool2d, ConvSubsample2d), _fused),
    nn.Linear: _linear,
    RBF: _distances,
    nn.Flatten: _flatten,
    nn.Dropout: _dropout,
    nn.Dropout2d: _dropout,
    nn.LogSoftmax: _log_softmax,
    **{kind: _activation for kind in ACTIVATIONS if isinstance(kind, type)},
    **{kind: _pool for kind in POOLS if isinstance(kind, type)},
}
# What they come to depends on the shapes that arrive there.
_READ_BY_SHAPE = (nn.Unflatten,)
