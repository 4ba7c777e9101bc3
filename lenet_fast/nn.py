"""Drop-in layers around the fused operators, with the parameters of the plain layers that they replace."""

import math

import torch
from torch import Tensor, nn

from . import functional, reference

__all__ = ["ConvActPool2d"]


class ConvActPool2d(nn.Module):
    """Convolution, activation and 2x2 pooling in one operator.

    `weight` (C_out, C_in, K, K) and `bias` (C_out,) are named, shaped and initialised as nn.Conv2d's, so the state of
    a Conv2d loads as it is. Input (N, C_in, H, W) or (C_in, H, W); see `functional.conv_act_pool` for the options.

    Raises:
        ValueError: a size below 1, a kernel that is not square, an unknown padding, activation or pool.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        padding: int | str = 0,
        bias: bool = True,
        activation: str = "sigmoid",
        pool: str = "avg",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kernel_size = _square_kernel(kernel_size)
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        _check_options(padding, activation, pool)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.padding = padding
        self.activation = activation
        self.pool = pool
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """nn.Conv2d's own initialisation, drawing the same random numbers."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return functional.conv_act_pool(
            input, self.weight, self.bias, padding=self.padding, activation=self.activation, pool=self.pool
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, padding={self.padding!r}, "
            f"bias={self.bias is not None}, activation={self.activation!r}, pool={self.pool!r}"
        )


def _square_kernel(kernel_size: int | tuple[int, int]) -> int:
    sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
    if len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int) or sides[0] < 1:
        raise ValueError(f"kernel_size: expected an int of at least 1 (square kernels only), got {kernel_size!r}")
    return sides[0]


def _check_options(padding: int | str, activation: str, pool: str) -> None:
    """Raise where the layer is built rather than at its first call."""
    functional.check_choice("activation", activation, reference.ACTIVATIONS)
    functional.check_choice("pool", pool, reference.POOLS)
    if isinstance(padding, str):
        functional.check_choice("padding", padding, ("valid", "same"))
    elif not isinstance(padding, int) or padding < 0:
        raise ValueError(f"padding: expected an int of at least 0, 'valid' or 'same', got {padding!r}")
