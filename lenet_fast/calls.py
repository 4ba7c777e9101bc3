"""The calls in a graph of a forward, as Dynamo captures it, read as links of a native network."""

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from . import ops, reference
from .fusable import ACTIVATIONS, POOLS, LeftAlone, read_call
from .links import LAYERS, NO_LAYER, Link
from .tables import Connections

__all__ = ["CALLS", "SAME_VALUES", "links_of_calls", "read_graph"]


def read_graph(graph: fx.Graph) -> tuple[tuple[Link, ...], tuple[int, ...]]:
    """The links of a graph that is one chain from its images to its result, and which of its inputs are their tensors.

    Args:
        graph: as Dynamo captures it: every node has its value, a fake tensor, in `meta["example_value"]`.

    Raises:
        LeftAlone: it is something else; names the part.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    places: list[int] = []

    def place(node: fx.Node) -> int:
        number = inputs.index(node)
        if number not in places:
            places.append(number)
        return places.index(number)

    links = []
    for link in links_of_calls(_chain_of(graph)):
        tensors = {role: place(node) for role, node in link.tensors.items()}
        links.append(Link(link.label, link.kind, link.options, tensors))
    return tuple(links), tuple(places)


def _is_images(node: fx.Node) -> bool:
    source = getattr(node.meta.get("grapharg"), "source", None)
    return getattr(source, "local_name", None) == "images" and _value(node) is not None


def _value(node: fx.Node) -> Tensor | None:
    value = node.meta.get("example_value")
    return value if isinstance(value, Tensor) else None


def _chain_of(graph: fx.Graph) -> list[fx.Node]:
    """The images and the calls behind them, one of the result of the other, up to the output."""
    *nodes, output = graph.nodes
    if len(output.all_input_nodes) != 1:
        raise LeftAlone(f"{len(output.all_input_nodes)} results: expected that of the last layer alone")
    chain = output.all_input_nodes[:1]
    while not _is_images(chain[0]):
        inputs = [node for node in chain[0].all_input_nodes if not (_is_size(node) or _is_parameter(node))]
        if len(inputs) != 1:
            raise _left_alone(chain[0], f"computed of {len(inputs)} results, expected one: no chain of layers")
        chain.insert(0, inputs[0])
    known = set(chain)
    for node in nodes:
        if node.op == "placeholder":
            if _value(node) is None and not _is_size(node):
                raise LeftAlone(f"{node.name}: a value that changes from call to call")
        elif not (node in known or _is_size(node) or _is_of_a_parameter(node) or _is_without_effect(node)):
            raise _left_alone(node, "stands beside the chain of layers")
    return chain


def _is_size(node: fx.Node) -> bool:
    """Whether it is a size, or what one is computed of."""
    return isinstance(node.meta.get("example_value"), bool | int | float | torch.SymInt | torch.SymFloat)


_PURE = (F.softmax, torch.softmax, F.log_softmax, torch.log_softmax, torch.argmax, "softmax", "log_softmax", "argmax")


def _is_without_effect(node: fx.Node) -> bool:
    """Whether its result goes nowhere: probabilities that nobody asks for, the log entry of a layer made in forward."""
    if node.target is torch._C._log_api_usage_once:
        return True
    return node.target in _PURE and all(map(_is_without_effect, node.users))


def _is_parameter(node: fx.Node) -> bool:
    return _is_of_a_parameter(node) or (node.op == "placeholder" and not _is_images(node))


def _is_of_a_parameter(node: fx.Node) -> bool:
    """Whether it is a weight of windows made a matrix, which a window over the whole input is computed with."""
    return (
        (node.op, node.target) == ("call_method", "flatten")
        and node.args[1:] == (1,)
        and node.args[0].op == "placeholder"
        and not _is_images(node.args[0])
    )


def links_of_calls(chain: list[fx.Node], at: int = 1) -> Iterator[Link]:
    """What the calls of a chain from number `at` on are; the tensors of the links are nodes.

    Raises:
        LeftAlone: one is no link; names it.
    """
    while at < len(chain):
        for pattern in (_scaled_tanh, _distances, _window, _reshaping):
            taken, found = pattern(chain, at)
            if taken:
                break
        else:
            taken, found = 1, [_read(chain[at])]
        yield from found
        at += taken


_Found = tuple[int, list[Link]]  # how many nodes a pattern has taken, 0: none, and what they are
_NOTHING: _Found = (0, [])


def _scaled_tanh(chain: list[fx.Node], at: int) -> _Found:
    nodes = chain[at : at + 3]
    factors = [_factor(node) for node in nodes]
    if factors != [reference.SCALED_TANH_SLOPE, None, reference.SCALED_TANH_AMPLITUDE]:
        return _NOTHING
    if ACTIVATIONS.get(nodes[1].target) != "tanh":
        return _NOTHING
    return 3, [Link(call_label(nodes[1]), "activation", {"name": "scaled_tanh"})]


def _factor(node: fx.Node) -> float | None:
    """What a product multiplies the chain with."""
    if node.target not in (operator.mul, torch.mul, "mul") or len(node.args) != 2 or node.kwargs:
        return None
    factors = [value for value in node.args if isinstance(value, float)]
    return factors[0] if len(factors) == 1 else None


def _distances(chain: list[fx.Node], at: int) -> _Found:
    """(x.unsqueeze(-2) - codes).square().sum(-1), see `reference.rbf`."""
    nodes = chain[at : at + 4]
    if [node.target for node in nodes] != ["unsqueeze", operator.sub, "square", "sum"]:
        return _NOTHING
    unsqueeze, subtract, square, total = nodes
    codes = subtract.args[1]
    if (
        (unsqueeze.args[1:], square.args[1:], total.args[1:]) != ((-2,), (), (-1,))
        or any(node.kwargs for node in nodes)
        or _layer_of(subtract) is None  # what decides on the loss is the RBF layer, see `Loss`
        or not (isinstance(codes, fx.Node) and codes.op == "placeholder" and _value(codes) is not None)
        or subtract.args[0] is not unsqueeze
        or len(_value(chain[at - 1]).shape) != 2
        or len(_value(codes).shape) != 2
    ):
        return _NOTHING
    return 4, [Link(call_label(subtract), "distances", {}, {"codes": codes})]


def _window(chain: list[fx.Node], at: int) -> _Found:
    """A convolution whose windows are the whole input, which `functional.conv_act_pool` computes as a product."""
    nodes = chain[at : at + 2]
    if [node.target for node in nodes] != ["flatten", _linear] or nodes[0].args[1:] != (1,):
        return _NOTHING
    weight = nodes[1].args[1]
    if not (isinstance(weight, fx.Node) and _is_of_a_parameter(weight)):
        return _NOTHING
    input, weight = _value(chain[at - 1]), weight.args[0]
    if len(input.shape) != 4 or tuple(input.shape[1:]) != tuple(_value(weight).shape[1:]):
        return _NOTHING
    label = call_label(nodes[1])
    options = {"padding": 0}
    convolution = Link(label, "convolution", options, _tensors(nodes[1], weight, _bias(nodes[1])))
    return 2, [convolution, Link(label, "flatten", {"of_single_values": True})]


def _reshaping(chain: list[fx.Node], at: int) -> _Found:
    """Calls that give the values of every image another shape, in their order."""
    end = at
    while end < len(chain) and _keeps_values(chain[end]) and not (_distances(chain, end)[0] or _window(chain, end)[0]):
        end += 1
    if end == at:
        return _NOTHING
    label = call_label(chain[end - 1])
    before, after = _value(chain[at - 1]), _value(chain[end - 1])
    for node in chain[at:end]:  # of all: values are rounded where a dtype changes and changes back
        if (_value(node).dtype, _value(node).device) != (before.dtype, before.device):
            raise LeftAlone(f"{call_label(node)}: makes {_value(node).dtype} of {before.dtype}")
    if not after.dim() or not _same(before.shape[0], after.shape[0]):
        raise LeftAlone(f"{label}: makes {_sizes(after)} of {_sizes(before)}, whose first dimension are the images")
    old, new = tuple(before.shape[1:]), tuple(after.shape[1:])
    taken = end - at
    if not all(type(size) is int for size in (*old, *new)):
        raise LeftAlone(f"{label}: makes {_sizes(after)} of {_sizes(before)}")
    if old == new:
        return taken, []
    if at == 1 and len(new) == 3:
        return taken, [Link(label, "images", {"shape": new})]
    if len(new) == 1:
        return taken, [Link(label, "flatten")]
    if new == (math.prod(old), 1, 1):
        return taken, [*([Link(label, "flatten")] if len(old) > 1 else []), Link(label, "maps")]
    raise LeftAlone(f"{label}: makes {_sizes(after)} of {_sizes(before)}")


def _keeps_values(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        index = node.args[1]
        return all(part in (None, ...) or part == slice(None) for part in (index if type(index) is tuple else (index,)))
    return node.target in SAME_VALUES


def _same(one: Any, other: Any) -> bool:
    """Whether two sizes are the same one, and not only in this batch."""
    if isinstance(one, torch.SymInt) and isinstance(other, torch.SymInt):
        return one.node.expr == other.node.expr
    return type(one) is type(other) is int and one == other


def _sizes(tensor: Tensor) -> str:
    return f"({', '.join(_text(size) for size in tensor.shape)})"


def _read(node: fx.Node) -> Link:
    read = CALLS.get(node.target)
    if read is None:
        raise _left_alone(node, "native steps have no such part")
    label = call_label(node)
    try:
        return read(label, node)
    except LeftAlone as why:
        raise LeftAlone(f"{label}: {why}") from None


def _tensors(node: fx.Node, *parameters: fx.Node | None) -> dict[str, fx.Node]:
    roles = ("weight", "bias", "coefficient", "pool_bias")
    for role, parameter in zip(roles, parameters, strict=False):
        if parameter is not None and parameter.op != "placeholder":
            raise LeftAlone(f"its {role} is computed, and no parameter")
    return {role: given for role, given in zip(roles, parameters, strict=False) if given is not None}


def _arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _bias(node: fx.Node) -> fx.Node | None:
    return _arguments(node, "input", "weight", "bias").get("bias")


def _convolution(label: str, node: fx.Node) -> Link:
    padding = read_call(node).value
    weight = _arguments(node, "input", "weight")["weight"]
    if _value(node).dim() != 4:
        raise LeftAlone("a convolution of a single image")
    return Link(label, "convolution", {"padding": padding}, _tensors(node, weight, _bias(node)))


def _fused(label: str, node: fx.Node) -> Link:
    given = {argument.name: value for argument, value in zip(node.target._schema.arguments, node.args, strict=False)}
    given |= node.kwargs
    connections = given.get("connections")
    if connections is not None:
        channels = given["out_channels"] if "out_channels" in given else _value(given["coefficient"]).shape[0]
        connections = Connections(int(channels), int(_value(given["input"]).shape[1]), tuple(connections))
    options = {
        "padding": given["padding"],
        "activation": given["activation"],
        "pool": given.get("pool", "subsample"),
        "connections": connections,
    }
    parameters = [given.get(role) for role in ("weight", "bias", "coefficient", "pool_bias")]
    return Link(label, "convolution", options, _tensors(node, *parameters))


def _matrix(label: str, node: fx.Node) -> Link:
    weight = _arguments(node, "input", "weight")["weight"]
    return Link(label, "linear", {}, _tensors(node, weight, _bias(node)))


def _dropout(label: str, node: fx.Node) -> Link:
    given = _arguments(node, "input", "p", "training")
    if node.target in (torch.dropout, torch.dropout_, torch.feature_dropout, torch.feature_dropout_):
        given["training"] = given.pop("train", given.get("training"))
    maps = node.target in (F.dropout2d, torch.feature_dropout, torch.feature_dropout_)
    p = given.get("p", 0.5) if given.get("training", True) else 0.0
    if maps and _value(node).dim() != 4:
        raise LeftAlone("a dropout of maps where there are none")
    if not isinstance(p, int | float):
        raise LeftAlone("its probability is computed")
    return Link(label, "dropout", {"p": float(p), "maps": maps})


def _log_softmax(label: str, node: fx.Node) -> Link:
    given = _arguments(node, "input", "dim")
    if _value(node).dtype != _value(node.all_input_nodes[0]).dtype:
        raise LeftAlone("in another dtype")
    return Link(label, "log_softmax", {"dim": given.get("dim")})


def _part(label: str, node: fx.Node) -> Link:
    kind, value = read_call(node)
    return Link(label, kind, {"name": value})


_linear = torch._C._nn.linear
# Calls after which the values of an image are the same, in the same order.
SAME_VALUES = (
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "contiguous",
    "clone",
    "to",
    "float",
    "double",
    *(torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze, torch.clone, operator.getitem),
)
# By function or name of a method: what makes a link of a call.
CALLS: dict[Any, Callable[[str, fx.Node], Link]] = {
    torch.conv2d: _convolution,
    _linear: _matrix,
    **{getattr(torch.ops.lenet_fast, name).default: _fused for name in ops.dispatched},
    **dict.fromkeys((F.dropout, F.dropout2d, torch.dropout, torch.dropout_), _dropout),
    **dict.fromkeys((torch.feature_dropout, torch.feature_dropout_), _dropout),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, "log_softmax"), _log_softmax),
    **{kind: _part for kind in (*ACTIVATIONS, *POOLS) if not isinstance(kind, type)},
}


# --- what a call is called -------------------------------------------------------------------------------------------


def _layer_of(node: fx.Node) -> tuple[str, type] | None:
    """The dotted name and the type of the layer of PyTorch or this package that makes the call."""
    stack: Mapping[str, tuple[str, type]] = node.meta.get("nn_module_stack") or {}
    path, kind = next(reversed(stack.values()), ("", object))
    return (_name(path), kind) if kind.__module__.startswith(("torch.nn.", "lenet_fast.nn")) else None


def _left_alone(node: fx.Node, why: str) -> LeftAlone:
    layer = _layer_of(node)
    if layer is not None and layer[1] not in LAYERS:
        why = NO_LAYER.format(layer[1].__name__)
    return LeftAlone(f"{call_label(node)}: {why}")


def call_label(node: fx.Node) -> str:
    """The layer that makes the call, or the call as a user writes it."""
    if (layer := _layer_of(node)) is not None:
        return layer[0]
    name = node.target if isinstance(node.target, str) else _function_name(node.target)
    given = [_text(value) for value in node.args if not isinstance(value, fx.Node) or _is_size(value)]
    given += [f"{name}={_text(value)}" for name, value in node.kwargs.items()]
    return f"{name}({', '.join(given)})"


def _name(path: str) -> str:
    """The dotted name of a layer: "f.0" for "L['model']._modules['f'].0"."""
    path = re.sub(r"^L\['\w+'\]", "", path)
    path = re.sub(r"(?:\.__dict__\['_modules'\]|\._modules)\['(\w+)'\]", r".\1", path)
    return path.lstrip(".")


def _function_name(function: Any) -> str:
    named = next((name for name, value in vars(F).items() if value is function), None)
    return named or getattr(function, "__name__", str(function))


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        value = value.meta.get("example_value")
    if isinstance(value, torch.SymInt):
        return re.sub(r"\bs\d+\b", "N", str(value))  # the one size that is not known: how many images
    if isinstance(value, Tensor):
        return "..."
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_text, value))})"
    return "..." if value is ... else str(value)
