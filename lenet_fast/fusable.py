"""What the fused operator can take the place of: convolution, activation and pooling in a traced forward."""

import contextlib
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from . import functional, reference
from .nn import ScaledTanh
from .snapshot import HOOKS

# Weights from which PyTorch's own convolution trains faster than the fused operator at batch 128: measured 1.3-1.5x
# at 18,432 (32 -> 64 maps, 3x3), 2.2x at 25,000 (20 -> 50, 5x5), 0.8x at 51,200 (32 -> 64, 5x5), 0.6x at 73,728.
_MAX_WEIGHTS = 32_768

# By layer type, function or method name.
ACTIVATIONS: dict[Any, str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    ScaledTanh: "scaled_tanh",
    F.relu: "relu",
    F.sigmoid: "sigmoid",
    F.tanh: "tanh",
    torch.special.expit: "sigmoid",
    **{getattr(torch, name + end): name for name in ("relu", "sigmoid", "tanh") for end in ("", "_")},
    **{name + end: name for name in ("relu", "sigmoid", "tanh") for end in ("", "_")},
}
POOLS: dict[Any, str] = {
    nn.MaxPool2d: "max",
    nn.AvgPool2d: "avg",
    F.max_pool2d: "max",
    torch.max_pool2d: "max",
    F.avg_pool2d: "avg",
}
CONV_OPTIONS = {"stride": (1, 1), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
POOL_OPTIONS = {  # after the input, in the order of the functions' arguments
    "max": {"kernel_size": 2, "stride": 2, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False},
    "avg": {"kernel_size": 2, "stride": 2, "padding": 0, "ceil_mode": False, "count_include_pad": True}
    | {"divisor_override": None},
}
NO_POOLING = "no 2x2 pooling follows"
_NOT_OURS = "{}, which the kernels do not have, comes before any pooling"
_OBSERVED = "hooks (pruning and weight norm are some) or a forward of its own"


class LeftAlone(Exception):
    """Why something is not fused, as a phrase for the report."""


class Part(NamedTuple):
    """One link of a run: kind "convolution" with its padding, "activation" or "pool" with its name."""

    kind: str
    value: str | int


def read_layer(layer: nn.Module) -> Part:
    """What `layer` is to a run.

    Raises:
        LeftAlone: nothing, or not with these options.
    """
    kind = type(layer)
    if isinstance(layer, nn.Conv2d):
        part = Part("convolution", _padding(layer))
    elif kind in ACTIVATIONS:
        part = Part("activation", ACTIVATIONS[kind])
    elif kind in POOLS:
        pool = POOLS[kind]
        part = Part("pool", _check_pool(pool, {name: getattr(layer, name) for name in POOL_OPTIONS[pool]}))
    else:
        raise LeftAlone(_NOT_OURS.format(kind.__name__))
    if is_observed(layer):
        raise LeftAlone(f"{kind.__name__} has {_OBSERVED}")
    return part


def is_observed(layer: nn.Module) -> bool:
    """Whether someone besides `forward` sees or changes what goes in and out of this very object."""
    return "forward" in layer.__dict__ or any(getattr(layer, hooks) for hooks in HOOKS)


def _padding(conv: nn.Conv2d) -> int | str:
    """The padding of a convolution that can be fused."""
    if type(conv) is not nn.Conv2d:
        if isinstance(conv, nn.modules.lazy.LazyModuleMixin):
            raise LeftAlone("not initialised yet: run a batch through the model, then accelerate it")
        how = "it is parametrized" if is_parametrized(conv) else f"{type(conv).__name__} is a subclass of Conv2d"
        raise LeftAlone(how)
    for name, expected in CONV_OPTIONS.items():
        if getattr(conv, name) != expected:
            raise LeftAlone(f"{name} {getattr(conv, name)!r}")
    height, width = conv.kernel_size
    if height != width:
        raise LeftAlone(f"kernel size {conv.kernel_size} is not square")
    if not conv.weight.is_floating_point():
        raise LeftAlone(f"its weight has dtype {conv.weight.dtype}")
    if isinstance(conv.padding, str):
        return conv.padding
    if conv.padding[0] != conv.padding[1]:
        raise LeftAlone(f"padding {conv.padding} differs between the axes")
    return conv.padding[0]


def check_size(weight: Tensor) -> None:
    """Raise LeftAlone for a weight of a convolution that PyTorch computes faster."""
    if (weights := weight.numel()) > _MAX_WEIGHTS:
        raise LeftAlone(f"with {weights:,} weights PyTorch's own convolution is faster")


def _check_pool(pool: str, options: Mapping[str, Any]) -> str:
    for name, expected in POOL_OPTIONS[pool].items():
        value = options.get(name, expected)
        if name == "stride" and value in (None, (), []):  # the kernel size, then
            continue
        if name != "count_include_pad" and _pair(value) != _pair(expected):  # which is of no effect without padding
            raise LeftAlone(f"pooling with {name} {value!r}")
    return pool


def _pair(value: Any) -> Any:
    """(2, 2) for 2, [2], (2,), [2, 2]; what is no number stays as it is."""
    if isinstance(value, list | tuple):
        return tuple(value) * 2 if len(value) == 1 else tuple(value)
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def read_call(node: fx.Node) -> Part:
    """What a function or method call of a traced forward is to a run.

    Raises:
        LeftAlone: nothing, or not with these options.
    """
    if node.target is torch.conv2d:
        return Part("convolution", _called_padding(node))
    if node.target in ACTIVATIONS:
        return Part("activation", ACTIVATIONS[node.target])
    if node.target not in POOLS:
        raise LeftAlone(_NOT_OURS.format(label(node)))
    pool = POOLS[node.target]
    options = {**dict(zip(("input", *POOL_OPTIONS[pool]), node.args, strict=False)), **node.kwargs}
    return Part("pool", _check_pool(pool, options))


def _called_padding(node: fx.Node) -> int | str:
    """The padding of a call of `torch.conv2d` that can be fused; its tensors have their sizes in `example_value`."""
    given = conv_arguments(node)
    for name in ("stride", "dilation", "groups"):
        value = given.get(name, 1)
        if _pair(value) != (1, 1):
            raise LeftAlone(f"{name} {value!r}")
    weight = given["weight"].meta["example_value"]
    height, width = weight.shape[-2:]
    if height != width:
        raise LeftAlone(f"kernel size {(height, width)} is not square")
    if not weight.is_floating_point():
        raise LeftAlone(f"its weight has dtype {weight.dtype}")
    padding = given.get("padding", 0)
    if isinstance(padding, str):
        return padding
    if len(set(_pair(padding))) != 1:
        raise LeftAlone(f"padding {padding} differs between the axes")
    return _pair(padding)[0]


def conv_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of `torch.conv2d` by name."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def label(node: fx.Node) -> str:
    """What a node of a traced forward is called in reports."""
    if node.op == "call_module":
        return str(node.target)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", repr(node.target))
    return f"{name}()"


# --- runs in a traced forward ----------------------------------------------------------------------------------------


@dataclass
class _Match:
    """A run found in a graph: its nodes in order, its layers by name, the options of the fused operator."""

    nodes: list[fx.Node]
    layers: dict[str, Part] = field(default_factory=dict)
    activation: str = "identity"
    pool: str = "none"

    def labels(self) -> tuple[str, ...]:
        return tuple(label(node) for node in self.nodes)

    def follow(self, module: nn.Module) -> None:
        """Take in the activations and the pooling behind the convolution.

        Raises:
            LeftAlone: they do not make a run; those taken in stay in `nodes`.
        """
        while self.pool == "none":
            kind, value = self._take_next(module)
            if kind == "pool":
                self.pool = value
            elif value != "identity":
                if self.activation != "identity":
                    raise LeftAlone("two activations come before the pooling")
                self.activation = value
        if self.pool == "max" and self.activation == "identity":
            longer = _Match(list(self.nodes), dict(self.layers), pool=self.pool)
            with contextlib.suppress(LeftAlone):
                kind, value = longer._take_next(module)
                if kind == "activation":
                    self.nodes, self.layers, self.activation = longer.nodes, longer.layers, value

    def _take_next(self, module: nn.Module) -> Part:
        node = _only_user(self.nodes[-1])
        self.nodes.append(node)
        if _is_product(node, reference.SCALED_TANH_SLOPE):
            tanh = self._take_next(module)
            scaled = _only_user(self.nodes[-1])
            self.nodes.append(scaled)
            if tanh == ("activation", "tanh") and _is_product(scaled, reference.SCALED_TANH_AMPLITUDE):
                return Part("activation", "scaled_tanh")
        if node.op != "call_module":
            return read_call(node)
        layer = module.get_submodule(node.target)
        if isinstance(layer, nn.Conv2d):
            raise LeftAlone(NO_POOLING)
        self.layers[node.target] = read_layer(layer)
        return self.layers[node.target]

    def replace(self, graph: fx.Graph) -> None:
        """Put the fused operator in the place of the run."""
        convolution, last = self.nodes[0], self.nodes[-1]
        name = convolution.target
        with graph.inserting_before(convolution):
            parameters = [graph.create_node("get_attr", f"{name}.{own}") for own in ("weight", "bias")]
            options = {"padding": self.layers[name].value, "activation": self.activation, "pool": self.pool}
            arguments = (*convolution.all_input_nodes, *parameters)
            fused = graph.call_function(functional.conv_act_pool, arguments, options)
        last.replace_all_uses_with(fused)
        for node in reversed(self.nodes):
            graph.erase_node(node)


def _only_user(node: fx.Node) -> fx.Node:
    if len(node.users) != 1:
        raise LeftAlone(f"the result of {label(node)} is used {len(node.users)} times")
    (user,) = node.users
    if user.op == "output":
        raise LeftAlone(NO_POOLING)
    return user


def _is_product(node: fx.Node, factor: float) -> bool:
    return node.op == "call_function" and node.target in (operator.mul, torch.mul) and factor in node.args


def matches(module: nn.Module, graph: fx.Graph) -> Iterator[tuple[_Match, str | None]]:
    """Every call of a Conv2d in a traced forward, and why it cannot be fused."""
    for node in list(graph.nodes):
        if node.op != "call_module" or not isinstance(layer := module.get_submodule(node.target), nn.Conv2d):
            continue
        match = _Match([node])
        try:
            match.follow(module)
            match.layers[node.target] = read_layer(layer)
            check_size(layer.weight)
        except LeftAlone as why:
            yield match, str(why)
        else:
            yield match, None
