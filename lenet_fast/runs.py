"""Runs of convolution, activation and pooling in a graph of Dynamo's, and the fused operator in the place of each."""

import contextlib
import operator
from dataclasses import dataclass

import torch
from torch import fx

from . import functional, reference
from .fusable import NO_POOLING, LeftAlone, Part, check_size, conv_arguments, label, read_call

__all__ = ["Match", "fuse"]


@dataclass
class Match:
    """A run found in a graph: its nodes in order, the options of the fused operator, or why it is left alone."""

    nodes: list[fx.Node]
    padding: int | str = 0
    activation: str = "identity"
    pool: str = "none"
    reason: str | None = None

    def follow(self) -> None:
        """Take in the activations and the pooling behind the convolution.

        Raises:
            LeftAlone: they do not make a run; those taken in stay in `nodes`.
        """
        while self.pool == "none":
            kind, value = self._take_next()
            if kind == "pool":
                self.pool = value
            elif value != "identity":
                if self.activation != "identity":
                    raise LeftAlone("two activations come before the pooling")
                self.activation = value
        if self.pool == "max" and self.activation == "identity":
            longer = Match(list(self.nodes))
            with contextlib.suppress(LeftAlone):
                value = "identity"
                while value == "identity":
                    kind, value = longer._take_next()
                if kind == "activation":
                    self.nodes, self.activation = longer.nodes, value
        _check_between(self.nodes)

    def _take_next(self) -> Part:
        node = _only_user(self.nodes[-1])
        self.nodes.append(node)
        if _is_product(node, reference.SCALED_TANH_SLOPE):
            tanh = self._take_next()
            scaled = _only_user(self.nodes[-1])
            self.nodes.append(scaled)
            if tanh == ("activation", "tanh") and _is_product(scaled, reference.SCALED_TANH_AMPLITUDE):
                return Part("activation", "scaled_tanh")
        part = read_call(node)
        if part.kind == "convolution":
            raise LeftAlone(NO_POOLING)
        return part

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
        fused.meta.update({key: last.meta[key] for key in ("example_value", "stack_trace") if key in last.meta})
        last.replace_all_uses_with(fused)
        for node in reversed(self.nodes):
            graph.erase_node(node)


def _check_between(nodes: list[fx.Node]) -> None:
    """Nothing that computes no value (it switches gradients or autocast, say) may stand between the nodes of a run."""
    node = nodes[0]
    while node is not nodes[-1]:
        if node.op in ("call_function", "call_method") and node.meta.get("example_value") is None:
            raise LeftAlone(f"{label(node)} comes before its pooling")
        node = node.next


def _only_user(node: fx.Node) -> fx.Node:
    users = [user for user in node.users if user.op != "output" or node in user.all_input_nodes]
    if len(users) == 1 and users[0].op == "output":
        raise LeftAlone(NO_POOLING)
    if len(users) != 1 or users[0].all_input_nodes.count(node) > 1:
        raise LeftAlone(f"the result of {label(node)} is used {len(users)} times")
    return users[0]


def _is_product(node: fx.Node, factor: float) -> bool:
    return node.op == "call_function" and node.target in (operator.mul, torch.mul) and factor in node.args


def fuse(graph: fx.Graph) -> list[Match]:
    """Put the fused operator in the place of every run in a graph of Dynamo's; returns every call of a convolution."""
    found = []
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not torch.conv2d:
            continue
        match = Match([node])
        try:
            match.follow()
            match.padding = read_call(node).value
            check_size(conv_arguments(node)["weight"].meta["example_value"])
        except LeftAlone as why:
            match.reason = str(why)
        else:
            match.replace(graph)
        found.append(match)
    return found
