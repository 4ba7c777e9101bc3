"""The operators' one declaration: torch.ops.lenet_fast.*, and what their outputs' shapes are.

`torch.ops.lenet_fast.<name>` runs the best kernels of the tensors' device: compiled ones where their library is there
and can run on that device, else Triton's on CUDA, else the plain definition. `<name>_triton` is the same operator on
the Triton kernels alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .differentiable import DifferentiableOperator, TritonOperator, library

__all__ = ["dispatched", "output_size", "triton"]


def output_size(size: Any, kernel_size: Any, padding: Any, pool: str) -> Any:
    """Output height (or width) of convolution and pooling; int or SymInt."""
    size = size + 2 * padding - kernel_size + 1
    return size if pool == "none" else size // 2


def _fake_conv_act_pool(
    input: Tensor, weight: Tensor, bias: Tensor | None, padding: int, activation: str, pool: str
) -> Tensor:
    height, width = (output_size(size, weight.shape[-1], padding, pool) for size in input.shape[-2:])
    return input.new_empty((input.shape[0], weight.shape[0], height, width))


def _fake_sparse_conv_act_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    connections: Sequence[int],
    out_channels: int,
    padding: int,
    activation: str,
    pool: str,
) -> Tensor:
    height, width = (output_size(size, weight.shape[-1], padding, pool) for size in input.shape[-2:])
    return input.new_empty((input.shape[0], out_channels, height, width))


def _fake_conv_subsample(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficient: Tensor,
    pool_bias: Tensor,
    connections: Sequence[int] | None,
    padding: int,
    activation: str,
) -> Tensor:
    height, width = (output_size(size, weight.shape[-1], padding, "avg") for size in input.shape[-2:])
    return input.new_empty((input.shape[0], coefficient.shape[0], height, width))


def _fake_linear_act(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return input.new_empty((input.shape[0], weight.shape[0]))


def _fake_rbf(input: Tensor, codes: Tensor) -> Tensor:
    return input.new_empty((input.shape[0], codes.shape[0]))


_CONVOLUTIONS = {
    "conv_act_pool": (
        ("input", "weight", "bias?"),
        "int padding, str activation, str pool",
        _fake_conv_act_pool,
        lambda input, weight, bias, *options: (input, weight, bias, None, None, None, -1, *options),
    ),
    "sparse_conv_act_pool": (
        ("input", "weight", "bias?"),
        "int[] connections, int out_channels, int padding, str activation, str pool",
        _fake_sparse_conv_act_pool,
        lambda input, weight, bias, *options: (input, weight, bias, None, None, *options),
    ),
    "conv_subsample": (
        ("input", "weight", "bias?", "coefficient", "pool_bias"),
        "int[]? connections, int padding, str activation",
        _fake_conv_subsample,
        lambda input, weight, bias, coefficient, pool_bias, connections, *options: (
            *(input, weight, bias, coefficient, pool_bias, connections, coefficient.shape[0], *options, "none"),
        ),
    ),
}
_DENSE = {  # on the Triton kernels only
    "linear_act": (("input", "weight", "bias?"), "str activation", _fake_linear_act),
    "rbf": (("input", "codes"), "", _fake_rbf),
}
dispatched = {name: DifferentiableOperator(name, *declaration) for name, declaration in _CONVOLUTIONS.items()}
triton = {name: TritonOperator(name, *declaration) for name, declaration in (_CONVOLUTIONS | _DENSE).items()}

# Whole networks, see csrc/network_operands.h. `network_train` takes steps of training in place and returns of each the
# mean loss (float64) and the number of images right; one whose loss is not finite is the last, and is not taken. On
# CUDA, where it only queues them, `watch` is for the host meanwhile, pinned float64 (1 + steps,): not 0 in the first
# asks to stop before the next step, the others receive the loss of each step as soon as it is known. `dropout` is empty
# or has two probabilities for the input of each layer, convolutions before dense layers, and two for the output of the
# last: of dropping a single value, and of dropping a whole map (of the first dense layer's input: a map of the last
# convolution; behind it a map is one value). The masks are those of `dropout_masks` for `seed` and the steps from
# `first_step` on. `label_smoothing` is that of cross-entropy; with distances it has to be 0.
# `network_infer` returns scores or distances of a network that `network_define` has read, until `network_release`.
# None of them is differentiable: `trainer` and `native_forward` call them.
for _schema in (
    "network_train(int[] network, Tensor(a!)[] parameters, Tensor(b!)[] first_moments, Tensor(c!)[] second_moments, "
    "Tensor(d!)[] step_counts, int[] trains, Tensor images, Tensor labels, Tensor? order, int batch_size, float scale, "
    "float background, str optimizer, float[] settings, float[] learning_rates, float j, float[] dropout, int seed, "
    "int first_step, float label_smoothing, Tensor(e!)? watch=None) -> (Tensor, Tensor)",
    "network_define(int[] network) -> int",
    "network_release(int network) -> ()",
    "network_infer(int network, Tensor[] parameters, Tensor images, float scale, float background) -> Tensor",
):
    library.define(_schema)
    library.impl(_schema.partition("(")[0], torch.library.fallthrough_kernel, "Autograd")

backends.missing_native()  # loads the compiled kernels, which register themselves on the operators declared above
