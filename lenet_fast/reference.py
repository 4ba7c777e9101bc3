"""Plain PyTorch definitions of every operator: what the kernels are checked against, and what runs where none exists.

Each function is composed of differentiable PyTorch operators only, so it works on every device and dtype and under
every transform (autograd of any order, torch.func, forward mode, compile).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SCALED_TANH_AMPLITUDE = 1.7159  # LeCun et al. (1998), section II.B and appendix A: f(a) = A tanh(S a)
SCALED_TANH_SLOPE = 2.0 / 3.0

ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "scaled_tanh": lambda z: SCALED_TANH_AMPLITUDE * torch.tanh(SCALED_TANH_SLOPE * z),
}

POOLS = {
    "avg": lambda y: F.avg_pool2d(y, 2),
    "max": lambda y: F.max_pool2d(y, 2),
    "none": lambda y: y,
}


def conv_act_pool(
    input: Tensor, weight: Tensor, bias: Tensor | None, padding: int, activation: str, pool: str
) -> Tensor:
    """pool(activation(conv2d(input, weight, bias, padding))), input (N, C_in, H, W), weight (C_out, C_in, K, K)."""
    return POOLS[pool](ACTIVATIONS[activation](F.conv2d(input, weight, bias, padding=padding)))


def dense_weight(weight: Tensor, connections: Sequence[int], out_channels: int, in_channels: int) -> Tensor:
    """Packed weights (connections, K, K) to (out_channels, in_channels, K, K), 0 where there is no connection."""
    index = torch.tensor(connections, dtype=torch.int64, device=weight.device)
    dense = weight.new_zeros(out_channels * in_channels, *weight.shape[1:]).index_copy(0, index, weight)
    return dense.unflatten(0, (out_channels, in_channels))


def sparse_conv_act_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    connections: Sequence[int],
    out_channels: int,
    padding: int,
    activation: str,
    pool: str,
) -> Tensor:
    """conv_act_pool of the dense weight that packed `weight` (connections, K, K) stands for."""
    dense = dense_weight(weight, connections, out_channels, input.shape[1])
    return conv_act_pool(input, dense, bias, padding, activation, pool)


def conv_subsample(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficient: Tensor,
    pool_bias: Tensor,
    connections: Sequence[int] | None,
    padding: int,
    activation: str,
) -> Tensor:
    """act(coefficient * (sum over 2x2 of act(conv2d)) + pool_bias): a C and an S layer, LeCun et al. (1998), II.B."""
    act = ACTIVATIONS[activation]
    if connections is not None:
        weight = dense_weight(weight, connections, coefficient.shape[0], input.shape[1])
    sums = 4 * F.avg_pool2d(act(F.conv2d(input, weight, bias, padding=padding)), 2)
    return act(coefficient.view(-1, 1, 1) * sums + pool_bias.view(-1, 1, 1))


def linear_act(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """activation(linear(input, weight, bias)), input (N, D), weight (O, D)."""
    return ACTIVATIONS[activation](F.linear(input, weight, bias))


def rbf(input: Tensor, codes: Tensor) -> Tensor:
    """Squared distances (N, C) of input (N, D) to codes (C, D): LeCun et al. (1998), equation (7)."""
    return (input.unsqueeze(-2) - codes).square().sum(-1)  # expanding the square would cancel
