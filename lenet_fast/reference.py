"""Plain PyTorch definitions of every operator: what the kernels are checked against, and what runs where none exists.

Each function is composed of differentiable PyTorch operators only, so it works on every device and dtype and under
every transform (autograd of any order, torch.func, forward mode, compile).
"""

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
