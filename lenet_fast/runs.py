"""Runs of convolution, activation and pooling in a graph of Dynamo's, and the fused operator in the place of each."""

import contextlib
import dataclasses
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from . import functional, reference
from .fusable import (
    IN_PLACE,
    NO_POOLING,
    Foreign,
    LeftAlone,
    Part,
    call_text,
    check_size,
    conv_arguments,
    example,
    foreign_layer,
    is_observed,
    label,
    read_call,
    read_layer,
)

__all__ = ["NOT_CALLED", "WATCHED", "Captured", "CapturedRun", "fuse", "read_sequential"]

NOT_CALLED = "not called yet: call the accelerated model, or give `report` example inputs"
WATCHED = (
    "plain PyTorch ran in all calls, as another tool looked on (hooks of all modules, a dispatch mode, torch.func, "
    "forward-mode gradients, jit.trace, export)"
)

# Layers of these are named in reports by where they are in the model; within other modules, functions by their names.
_LIBRARIES = ("torch.nn.", "lenet_fast.")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class CapturedRun:
    """A convolution in a graph and what follows it.

    `parts` are dotted names as seen from the module whose call was captured, functions end in "()". `weight` is the
    position of the convolution's weight among the graph's inputs, None where the graph computes it. `reason` tells why
    it is left alone.
    """

    parts: tuple[str, ...]
    weight: int | None
    reason: str | None


@dataclass(frozen=True, eq=False)
class Captured:
    """What was found in one graph; equal to itself alone."""

    runs: tuple[CapturedRun, ...]


def fuse(module: fx.GraphModule) -> Captured:
    """Put the fused operator in the place of every run in a graph of Dynamo's, and in those that it calls."""
    found = []
    for part in module.modules():  # of a checkpointed or conditional part, say
        if isinstance(part, fx.GraphModule):
            found += _fuse_graph(part.graph, is_whole=part is module)
            part.recompile()
    return Captured(tuple(found))


def _fuse_graph(graph: fx.Graph, *, is_whole: bool) -> Iterator[CapturedRun]:
    _name_results_in_place(graph)
    inputs = [node for node in graph.nodes if node.op == "placeholder"] if is_whole else []
    for node in list(graph.nodes):
        if _is_convolution(node):
            match, run = _find(node)
            weight = conv_arguments(node)["weight"]
            yield dataclasses.replace(run, weight=inputs.index(weight) if weight in inputs else None)
            if run.reason is None:
                match.replace(graph)


def read_sequential(model: nn.Sequential) -> Iterator[CapturedRun]:
    """What `fuse` would find in a Sequential that was not called yet, as far as its layers tell."""
    graph = fx.Graph()
    node = graph.placeholder("input")
    for name, layer in _layers(model, ""):
        node = graph.create_node("call_module", name, (node,))
        node.meta = {"layer": layer, "nn_module_stack": {"": (name, type(layer))}, "example_value": ...}
    graph.output(node)
    for node in graph.nodes:
        if _is_convolution(node):
            yield _find(node)[1]


def _layers(model: nn.Sequential, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in model._modules.items():
        if type(layer) is nn.Sequential and not is_observed(layer):
            yield from _layers(layer, f"{prefix}{name}.")
        elif type(layer) is not nn.Identity:
            yield prefix + name, layer


def _find(node: fx.Node) -> tuple["_Match", CapturedRun]:
    """The run that starts with a convolution, or why it is left alone."""
    match = _Match([node])
    try:
        match.follow()
    except LeftAlone as why:
        return match, CapturedRun((_name(node),), None, str(why))
    names = [_name(node) for node in match.nodes]
    parts = [name for name, last in zip(names, [None, *names], strict=False) if name != last or name.endswith("()")]
    return match, CapturedRun(tuple(parts), None, None)


def _name_results_in_place(graph: fx.Graph) -> None:
    """What uses a tensor after ``tensor.relu_()`` is to use the call's result, which is that tensor."""
    for node in graph.nodes:
        if node.target in IN_PLACE and node.all_input_nodes:
            changed = node.all_input_nodes[0]
            later = set()
            follower = node.next
            while follower.op != "root":
                later.add(follower)
                follower = follower.next
            changed.replace_all_uses_with(node, delete_user_cb=later.__contains__)


@dataclass
class _Match:
    """A run found in a graph: its nodes in order, the options of the fused operator."""

    nodes: list[fx.Node]
    padding: int | str = 0
    activation: str = "identity"
    pool: str = "none"

    def follow(self) -> None:
        """Take in the activations and the pooling behind the convolution.

        Raises:
            LeftAlone: they do not make a run.
        """
        self.padding = _read(self.nodes[0]).value
        while self.pool == "none":
            kind, value = self._take_next()
            if kind == "pool":
                self.pool = value
            elif value != "identity":
                if self.activation != "identity":
                    raise LeftAlone("two activations come before the pooling")
                self.activation = value
        if self.pool == "max" and self.activation == "identity":
            with contextlib.suppress(LeftAlone):
                self._follow_pooling()
        _check_between(self.nodes)
        if any(label(node) == "_enter_dual_level()" for node in self.nodes[0].graph.nodes):
            raise LeftAlone("forward-mode gradients are computed within the forward")
        check_size(_weight(self.nodes[0]))

    def _follow_pooling(self) -> None:
        """Take in an activation behind a max pooling: it is nondecreasing, so it may as well come before.

        Raises:
            LeftAlone: there is none.
        """
        longer = _Match(list(self.nodes))
        value = "identity"
        while value == "identity":
            kind, value = longer._take_next()
            if kind != "activation":
                return
        _check_between(longer.nodes)
        self.nodes, self.activation = longer.nodes, value

    def _take_next(self) -> Part:
        node = _only_user(self.nodes[-1])
        self.nodes.append(node)
        if _is_product(node, reference.SCALED_TANH_SLOPE):
            tanh = self._take_next()
            scaled = _only_user(self.nodes[-1])
            self.nodes.append(scaled)
            if tanh == ("activation", "tanh") and _is_product(scaled, reference.SCALED_TANH_AMPLITUDE):
                return Part("activation", "scaled_tanh")
            raise Foreign(f"{call_text(node)} comes before any pooling")
        if _is_convolution(node):
            raise LeftAlone(NO_POOLING)
        return _read(node)

    def replace(self, graph: fx.Graph) -> None:
        """Put the fused operator in the place of the run."""
        convolution, last = self.nodes[0], self.nodes[-1]
        given = conv_arguments(convolution)
        with graph.inserting_before(convolution):
            fused = graph.call_function(
                functional.conv_act_pool,
                (given["input"], given["weight"], given.get("bias")),
                {"padding": self.padding, "activation": self.activation, "pool": self.pool},
            )
        fused.meta.update(last.meta)
        last.replace_all_uses_with(fused)
        for node in reversed(self.nodes):
            graph.erase_node(node)


def _is_convolution(node: fx.Node) -> bool:
    return isinstance(node.meta["layer"], nn.Conv2d) if node.op == "call_module" else node.target is torch.conv2d


def _read(node: fx.Node) -> Part:
    """What a node is to a run; raises LeftAlone if it is nothing."""
    if node.op == "call_module":
        layer = node.meta["layer"]
        if not _is_library_layer(type(layer)) or is_observed(layer):
            raise LeftAlone(NOT_CALLED)
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            if layer.training and layer.p:
                raise LeftAlone(f"{type(layer).__name__} in training mode comes before its pooling")
            return Part("activation", "identity")
        return read_layer(layer)
    try:
        return read_call(node)
    except Foreign:
        if layer := _layer(node):
            raise foreign_layer(layer[1]) from None
        raise


def _weight(convolution: fx.Node) -> Tensor:
    if convolution.op == "call_module":
        return convolution.meta["layer"].weight
    return example(conv_arguments(convolution)["weight"])


def _check_between(nodes: list[fx.Node]) -> None:
    """Nothing that computes no value (it switches gradients or autocast, say) may stand between the nodes of a run."""
    node = nodes[0]
    while node is not nodes[-1]:
        if node.op in ("call_function", "call_method") and node.meta.get("example_value") is None:
            raise LeftAlone(f"{call_text(node)} comes before its pooling")
        node = node.next


def _only_user(node: fx.Node) -> fx.Node:
    users = list(node.users)
    if len(users) != 1:
        what = "its result" if _is_convolution(node) else f"the result of {_name(node)}"
        raise LeftAlone(f"{what} is used {len(users)} times")
    if users[0].op == "output":
        raise LeftAlone(NO_POOLING)
    if users[0].kwargs.get("out") is not None:
        raise LeftAlone(f"{label(users[0])} writes into a tensor that it is given")
    return users[0]


def _is_product(node: fx.Node, factor: float) -> bool:
    return node.op == "call_function" and node.target in (operator.mul, torch.mul) and factor in node.args


def _layer(node: fx.Node) -> tuple[str, type] | None:
    """Where the layer is that a node belongs to, and its type, if it is one of PyTorch's or of this package."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path, kind = list(stack.values())[-1]
    if not _is_library_layer(kind) and not (_is_convolution(node) and issubclass(kind, nn.Conv2d)):
        return None
    return re.sub(r"^L\['\w+'\]\.?", "", path), kind


def _is_library_layer(kind: type) -> bool:
    return kind.__module__.startswith(_LIBRARIES) and not issubclass(kind, _CONTAINERS)


def _name(node: fx.Node) -> str:
    layer = _layer(node)
    return layer[0] if layer else label(node)
