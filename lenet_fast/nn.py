"""Drop-in layers around the fused operators, with the parameters of the plain layers that they replace."""

import math

import torch
from torch import Tensor, nn

from . import functional, reference
from .tables import DIGIT_BITMAPS, Connections

__all__ = ["RBF", "ConvActPool2d", "ConvSubsample2d", "FusedConv2d", "MAPLoss", "ScaledTanh", "SparseConvActPool2d"]


class FusedConv2d(nn.Module):
    """What the fused layers share: options, a packed or dense weight, a bias, nn.Conv2d's initialisation.

    Not used itself. `backend` ("auto") may be set on a layer; "reference" makes it plain PyTorch.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        connections: Connections | None,
        padding: int | str,
        bias: bool,
        activation: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        functional.check_choice("activation", activation, reference.ACTIVATIONS)
        if isinstance(padding, str):
            functional.check_choice("padding", padding, ("valid", "same"))
        elif not isinstance(padding, int) or padding < 0:
            raise ValueError(f"padding: expected an int of at least 0, 'valid' or 'same', got {padding!r}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _square_kernel(kernel_size)
        self.connections = connections
        self.padding = padding
        self.activation = activation
        self.backend = "auto"
        maps = (out_channels, in_channels) if connections is None else (len(connections),)
        shape = (*maps, self.kernel_size, self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def fan_in(self) -> list[int]:
        """Inputs of a unit of each output map, without the bias: it differs from map to map in a sparse layer."""
        maps = [self.in_channels] * self.out_channels if self.connections is None else self.connections.fan_in()
        return [count * self.kernel_size**2 for count in maps]

    def init_uniform_(self, bounds: list[float]) -> None:
        """Draw each output map's weights and bias uniformly within +-its bound."""
        with torch.no_grad():
            sizes = 1 if self.connections is None else self.connections.fan_in()
            maps = self.weight.split(sizes)
            for weight, bound in zip(maps, bounds, strict=True):
                weight.uniform_(-bound, bound)
            if self.bias is not None:
                for value, bound in zip(self.bias.unbind(0), bounds, strict=True):
                    value.uniform_(-bound, bound)

    def reset_parameters(self) -> None:
        """nn.Conv2d's own initialisation: +-1 / sqrt(fan_in); for a dense layer the same random numbers."""
        if self.connections is not None:
            self.init_uniform_([1 / math.sqrt(max(1, fan_in)) for fan_in in self.fan_in()])
            return
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def dense_weight(self) -> Tensor:
        """The weight as (C_out, C_in, K, K), 0 where there is no connection; differentiable."""
        if self.connections is None:
            return self.weight
        return reference.dense_weight(self.weight, self.connections.indices, self.out_channels, self.in_channels)

    def to_conv2d(self) -> nn.Conv2d:
        """The convolution alone as an nn.Conv2d with the same values, 0 where there is no connection."""
        conv = nn.utils.skip_init(  # draws no random numbers: the values are copied in below
            nn.Conv2d,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            padding=self.padding,
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        for name, values in (("weight", self.dense_weight()), ("bias", self.bias)):
            if values is not None:
                getattr(conv, name).data.copy_(values.detach())
                getattr(conv, name).requires_grad_(getattr(self, name).requires_grad)
        return conv

    def extra_repr(self) -> str:
        sparse = "" if self.connections is None else f"connections={len(self.connections)}, "
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, {sparse}"
            f"padding={self.padding!r}, bias={self.bias is not None}, activation={self.activation!r}"
        )


class ConvActPool2d(FusedConv2d):
    """Convolution, activation and 2x2 pooling in one operator.

    `weight` (C_out, C_in, K, K) and `bias` (C_out,) are named, shaped and initialised as nn.Conv2d's, so the state of
    a Conv2d loads as it is. Input (N, C_in, H, W) or (C_in, H, W); see `functional.conv_act_pool` for the options. An
    input in channels_last is copied to NCHW in every call, and the output is NCHW, as those of all layers here.

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
        super().__init__(in_channels, out_channels, kernel_size, None, padding, bias, activation, device, dtype)
        functional.check_choice("pool", pool, reference.POOLS)
        self.pool = pool
        self.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        options = {"padding": self.padding, "activation": self.activation, "pool": self.pool, "backend": self.backend}
        return functional.conv_act_pool(input, self.weight, self.bias, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pool={self.pool!r}"


class SparseConvActPool2d(FusedConv2d):
    """`ConvActPool2d` with only some connections between input and output maps: C3 of LeCun et al. (1998).

    `weight` (connections, K, K) holds the connections of output map 0 first, input maps ascending; absent ones cost no
    memory, no arithmetic and no optimizer state. Initialised as nn.Conv2d with each map's own fan-in. Inputs in
    channels_last are copied, as by `ConvActPool2d`.

    Args:
        table: bool (C_out, C_in), e.g. `tables.LENET5_C3`; a row may be empty.
        kernel_size: side of the square kernel; the other arguments as for `ConvActPool2d`.
    """

    def __init__(
        self,
        table: Tensor | Connections,
        kernel_size: int | tuple[int, int],
        padding: int | str = 0,
        bias: bool = True,
        activation: str = "tanh",
        pool: str = "avg",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        connections = Connections.of(table)
        channels = connections.in_channels, connections.out_channels
        super().__init__(*channels, kernel_size, connections, padding, bias, activation, device, dtype)
        functional.check_choice("pool", pool, reference.POOLS)
        self.pool = pool
        self.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        options = {"padding": self.padding, "activation": self.activation, "pool": self.pool, "backend": self.backend}
        return functional.sparse_conv_act_pool(input, self.weight, self.bias, table=self.connections, **options)

    @classmethod
    def from_conv2d(
        cls, conv: nn.Conv2d, table: Tensor | Connections, activation: str = "tanh", pool: str = "avg"
    ) -> "SparseConvActPool2d":
        """A layer with the weights that `conv` has for the connections of `table`; the others are dropped.

        Raises:
            ValueError: channels that do not fit the table, or a stride, dilation, grouping or padding mode that the
                operator does not have.
        """
        connections = Connections.of(table)
        if (conv.out_channels, conv.in_channels) != (connections.out_channels, connections.in_channels):
            raise ValueError(
                f"table: expected ({conv.out_channels}, {conv.in_channels}) for this convolution, "
                f"got ({connections.out_channels}, {connections.in_channels})"
            )
        plain = {"stride": (1, 1), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        for name, expected in plain.items():
            if getattr(conv, name) != expected:
                raise ValueError(f"conv: expected {name}={expected!r}, got {getattr(conv, name)!r}")
        padding = conv.padding
        if not isinstance(padding, str):
            if padding[0] != padding[1]:
                raise ValueError(f"conv: expected the same padding on both axes, got {padding}")
            padding = padding[0]
        layer = cls(
            connections,
            conv.kernel_size,
            padding,
            conv.bias is not None,
            activation,
            pool,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        with torch.no_grad():
            layer.weight.copy_(conv.weight.flatten(0, 1)[list(connections.indices)])
            if conv.bias is not None:
                layer.bias.copy_(conv.bias)
        return layer

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pool={self.pool!r}"


class ConvSubsample2d(FusedConv2d):
    """A convolution and a trainable subsampling, each with its activation: a C+S pair of LeCun et al. (1998), II.B.

    Parameters: `weight` and `bias` of the convolution, `coefficient` and `pool_bias` (C_out,) of the subsampling, which
    start at 1/4 (the average) and 0. See `functional.conv_subsample`. Inputs in channels_last are copied, as by
    `ConvActPool2d`.

    Args:
        table: bool (C_out, C_in) for a sparse layer, whose weight is then (connections, K, K); None for a dense one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        table: Tensor | Connections | None = None,
        padding: int | str = 0,
        bias: bool = True,
        activation: str = "scaled_tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        connections = None if table is None else Connections.of(table)
        if connections is not None and (out_channels, in_channels) != (
            connections.out_channels,
            connections.in_channels,
        ):
            raise ValueError(
                f"table: expected ({out_channels}, {in_channels}), "
                f"got ({connections.out_channels}, {connections.in_channels})"
            )
        super().__init__(in_channels, out_channels, kernel_size, connections, padding, bias, activation, device, dtype)
        self.coefficient = nn.Parameter(torch.full((out_channels,), 0.25, device=device, dtype=dtype))
        self.pool_bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        return functional.conv_subsample(
            input,
            self.weight,
            self.bias,
            self.coefficient,
            self.pool_bias,
            table=self.connections,
            padding=self.padding,
            activation=self.activation,
            backend=self.backend,
        )


class RBF(nn.Module):
    """Squared distances to fixed +-1 codes, one a class: the output layer of LeNet-5, LeCun et al. (1998), II.B.

    Args:
        in_features: D, the length of a code.
        num_classes: C.
        codes: (C, D); None takes `tables.DIGIT_BITMAPS` for 84 features and 10 classes, random +-1 otherwise.

    `backend` ("auto") may be set on a layer; see `functional.rbf`.
    """

    codes: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        codes: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (num_classes, in_features)
        if codes is not None and tuple(codes.shape) != shape:
            raise ValueError(f"codes: expected shape {shape}, got {tuple(codes.shape)}")
        if codes is None and shape == tuple(DIGIT_BITMAPS.shape):
            codes = DIGIT_BITMAPS
        self.in_features = in_features
        self.num_classes = num_classes
        self.backend = "auto"
        self.register_buffer("codes", torch.empty(shape, device=device, dtype=dtype))
        if codes is None:
            self.codes.bernoulli_().mul_(2).sub_(1)
        else:
            self.codes.copy_(codes)

    def forward(self, input: Tensor) -> Tensor:
        """(N, in_features) to distances (N, num_classes); the class is the smallest."""
        return functional.rbf(input, self.codes, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.num_classes}"


class ScaledTanh(nn.Module):
    """1.7159 tanh(2x/3), the squashing function of LeCun et al. (1998), appendix A."""

    def forward(self, input: Tensor) -> Tensor:
        return reference.ACTIVATIONS["scaled_tanh"](input)


class MAPLoss(nn.Module):
    """LeCun's discriminative criterion on the distances of an `RBF` layer; see `functional.map_loss`."""

    def __init__(self, j: float = 0.0) -> None:
        super().__init__()
        self.j = j

    def forward(self, distances: Tensor, target: Tensor) -> Tensor:
        """Distances (N, C) and classes (N,) to a scalar."""
        return functional.map_loss(distances, target, j=self.j)

    def extra_repr(self) -> str:
        return f"j={self.j}"


def _square_kernel(kernel_size: int | tuple[int, int]) -> int:
    sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
    if len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int) or sides[0] < 1:
        raise ValueError(f"kernel_size: expected an int of at least 1 (square kernels only), got {kernel_size!r}")
    return sides[0]
