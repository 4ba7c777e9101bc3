"""Looking at a model: the shapes, parameters and connections of its layers."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .nn import RBF, ConvSubsample2d, FusedConv2d

_Call = tuple[str, nn.Module, Any, Any]  # name, layer, input, output


def connection_counts(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """Connections of each layer as LeCun et al. (1998) count them, biases included; pooling layers by their own name.

    `input_shape` is that of one batch, e.g. (1, 1, 32, 32). Fused layers count as the two they are: c1 and s2. An
    average or subsampling unit has four inputs and a bias; a maximum and an activation have no connections.
    """
    counts: dict[str, int] = {}
    for name, layer, input, output in _trace(model, input_shape)[1]:
        units = output[0].numel()
        if isinstance(layer, FusedConv2d):
            height, width = (side + 2 * layer.padding - layer.kernel_size + 1 for side in input.shape[-2:])
            biases = 0 if layer.bias is None else layer.out_channels
            counts[name] = (sum(layer.fan_in()) + biases) * height * width
            if isinstance(layer, ConvSubsample2d) or layer.pool == "avg":
                counts[f"s{int(name[1:]) + 1}"] = 5 * units
        elif isinstance(layer, nn.Linear):
            counts[name] = layer.weight.numel() + (0 if layer.bias is None else units)
        elif isinstance(layer, RBF):
            counts[name] = layer.codes.numel()
    return counts


def describe(model: nn.Module, input_shape: Sequence[int]) -> str:
    """Print a table of the layers of `model`, in the order they run on such an input; returns it too.

    A line for each call of a layer: name, type, output shape, own parameters. `model`, its statistics and the random
    number generators stay as they are.

    Raises:
        ValueError: `input_shape` is no sequence of positive ints.
    """
    rows = [("layer", "type", "output shape", "parameters"), ("", "input", str(tuple(input_shape)), "")]
    probe, calls = _trace(model, input_shape)
    for name, layer, _, output in calls:
        own = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
        rows.append((name, type(layer).__name__, _shapes(output), f"{own:,}" if own else ""))
    rows.append(("total", "", "", f"{sum(parameter.numel() for parameter in probe.parameters()):,}"))

    name, kind, shape, own = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = (f"{row[0]:{name}}  {row[1]:{kind}}  {row[2]:{shape}}  {row[3]:>{own}}" for row in rows)
    table = "\n".join(line.rstrip() for line in lines)
    print(table)
    return table


def _trace(model: nn.Module, input_shape: Sequence[int]) -> tuple[nn.Module, list[_Call]]:
    """Run a copy of `model` in evaluation mode on zeros: the copy, and every call of a layer in order."""
    shape = tuple(input_shape)
    if not shape or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(f"input_shape: expected positive ints such as (1, 1, 28, 28), got {input_shape!r}")
    probe = copy.deepcopy(model).eval()
    calls: list[_Call] = []
    for name, layer in probe.named_modules():
        is_leaf = next(layer.children(), None) is None
        if is_leaf or next(layer.parameters(recurse=False), None) is not None:
            layer.register_forward_hook(
                lambda layer, inputs, output, name=name: calls.append(
                    (name, layer, inputs[0] if inputs else None, output)
                )
            )
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []), torch.no_grad():
        probe(torch.zeros(shape, device=like.device, dtype=like.dtype))
    return probe, calls


def _shapes(output: object) -> str:
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    if isinstance(output, tuple | list):
        return ", ".join(map(_shapes, output))
    return type(output).__name__
