"""What a layer or a call is to a run of convolution, activation and pooling that the fused operator computes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .nn import ScaledTanh
from .snapshot import HOOKS

# Weights from which PyTorch's own convolution trains faster than the fused operator at batch 128: measured 1.3-1.5x
# at 18,432 (32 -> 64 maps, 3x3), 2.2x at 25,000 (20 -> 50, 5x5), 0.8x at 51,200 (32 -> 64, 5x5), 0.6x at 73,728.
_MAX_WEIGHTS = 32_768


def _function_name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", repr(target))


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
# Those that change their input and return it.
IN_PLACE: frozenset[Any] = frozenset(kind for kind in ACTIVATIONS if _function_name(kind).endswith("_"))
DROPOUTS: dict[Any, bool] = {  # whether they drop by default
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout), True),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout, torch.alpha_dropout), False),
}
CONV_OPTIONS = {"stride": (1, 1), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
POOL_OPTIONS = {  # after the input, in the order of the functions' arguments
    "max": {"kernel_size": 2, "stride": 2, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False},
    "avg": {"kernel_size": 2, "stride": 2, "padding": 0, "ceil_mode": False, "count_include_pad": True}
    | {"divisor_override": None},
}
NO_POOLING = "no 2x2 pooling follows"
_NO_LAYER_OF_OURS = "{}, which the kernels do not have, comes before any pooling"
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_OBSERVED = "hooks (pruning and weight norm are some) or a forward of its own"


class LeftAlone(Exception):
    """Why something is not fused, as a phrase for the report."""


class Foreign(LeftAlone):
    """It is no part of any run."""


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
        raise foreign_layer(kind)
    if is_observed(layer):
        raise LeftAlone(f"{kind.__name__} has {_OBSERVED}")
    return part


def foreign_layer(kind: type) -> Foreign:
    """What is to be said of a layer that no run can contain."""
    return Foreign(_NO_LAYER_OF_OURS.format(kind.__name__))


def is_observed(layer: nn.Module) -> bool:
    """Whether someone besides `forward` sees or changes what goes in and out of this very object."""
    return "forward" in layer.__dict__ or any(getattr(layer, hooks) for hooks in HOOKS)


def calls_its_layers(kind: type[nn.Module], forward: Callable[..., Any] = nn.Sequential.forward) -> bool:
    """Whether a call of a module of this class is calls of its layers, one after the other, and nothing else.

    Args:
        forward: the one that does so.
    """
    return (
        getattr(kind, "forward", None) is forward  # a class of TorchScript has none
        and kind.__iter__ is nn.Sequential.__iter__
        and kind.__call__ is nn.Module.__call__
        and kind._call_impl is nn.Module._call_impl
    )


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
    _check_dtype(conv.weight)
    if isinstance(conv.padding, str):
        return conv.padding
    if conv.padding[0] != conv.padding[1]:
        raise LeftAlone(f"padding {conv.padding} differs between the axes")
    return conv.padding[0]


def _check_dtype(weight: Tensor) -> None:
    if weight.dtype not in _DTYPES:
        raise LeftAlone(f"its weight has dtype {weight.dtype}")


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
    """What a function or method call of a graph is to a run.

    Raises:
        Foreign: nothing.
        LeftAlone: nothing with these options.
    """
    if node.op not in ("call_function", "call_method"):
        raise Foreign(f"{label(node)} comes before any pooling")
    if node.target is torch.conv2d:
        return Part("convolution", _called_padding(node))
    if node.target in ACTIVATIONS:
        return Part("activation", ACTIVATIONS[node.target])
    if node.target in DROPOUTS:
        _check_dropout(node)
        return Part("activation", "identity")
    if node.target not in POOLS:
        raise Foreign(f"{call_text(node)} comes before any pooling")
    pool = POOLS[node.target]
    return Part("pool", _check_pool(pool, _arguments(node, ("input", *POOL_OPTIONS[pool]))))


def _check_dropout(node: fx.Node) -> None:
    """Dropout is nothing outside of training, and with probability 0."""
    given = _arguments(node, ("input", "p", "training"))
    training = given.get("training", given.get("train", DROPOUTS[node.target]))
    p = given.get("p", 0.5)
    if training is not False and not (isinstance(p, int | float) and p == 0):
        raise LeftAlone(f"{_function_name(node.target)} in training mode comes before its pooling")


def _called_padding(node: fx.Node) -> int | str:
    """The padding of a call of `torch.conv2d` that can be fused; its tensors have their sizes in `example_value`."""
    given = conv_arguments(node)
    for name in ("stride", "dilation", "groups"):
        value = given.get(name, 1)
        if _pair(value) != (1, 1):
            raise LeftAlone(f"{name} {value!r}")
    weight = example(given["weight"])
    height, width = weight.shape[-2:]
    if height != width:
        raise LeftAlone(f"kernel size {(height, width)} is not square")
    _check_dtype(weight)
    padding = given.get("padding", 0)
    if isinstance(padding, str):
        return padding
    both = _pair(padding)
    if not isinstance(both, tuple) or not all(isinstance(value, int) for value in both):
        raise LeftAlone("its padding changes from call to call")
    if len(set(both)) != 1:
        raise LeftAlone(f"padding {padding} differs between the axes")
    return both[0]


def conv_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of `torch.conv2d` by name."""
    return _arguments(node, ("input", "weight", "bias", "stride", "padding", "dilation", "groups"))


def example(node: fx.Node) -> Tensor:
    """A tensor of the sizes and dtype of a node's.

    Raises:
        LeftAlone: they are not known, or the tensor is of a kind of its own.
    """
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor) or is_traceable_wrapper_subclass(value):
        raise LeftAlone(f"nothing is known of {label(node)}")
    return value


def _arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def label(node: fx.Node) -> str:
    """What a node of a graph is called in reports."""
    return str(node.target) if node.op == "call_module" else f"{_function_name(node.target)}()"


def call_text(node: fx.Node) -> str:
    """A call as it was written, without the tensors: "view(-1, 256)"."""
    if node.op == "call_module":
        return str(node.target)
    values = [repr(value) for value in node.args if isinstance(value, int | float | str | torch.dtype)]
    values += [f"{name}={value!r}" for name, value in node.kwargs.items() if isinstance(value, int | float | str)]
    return f"{_function_name(node.target)}({', '.join(values)})"
