"""The LeNets, layers named as in LeCun et al. (1998), and what users do with them; see lenet.py for what each is."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .lenet import ACTIVATION_LAYERS, InputSpec, LeNet, classify, criterion, measures_distance
from .nn import RBF, ConvActPool2d, ConvSubsample2d, FusedConv2d, ScaledTanh, SparseConvActPool2d
from .summary import connection_counts, describe
from .tables import LENET5_C3, Connections

__all__ = [
    "MODELS",
    "InputSpec",
    "LeNet",
    "classify",
    "connection_counts",
    "criterion",
    "describe",
    "lenet1",
    "lenet5",
    "lenet5_1998",
    "lenet5_d2l",
    "measures_distance",
]


def _flatten() -> nn.Flatten:
    return nn.Flatten(start_dim=-3)  # the last three dimensions: a single image (C, H, W) passes too


def _per_block(name: str, value: int | str | Sequence, blocks: int) -> list:
    """One value for each convolution block, from one for all or a sequence."""
    values = list(value) if isinstance(value, list | tuple) else [value] * blocks
    if len(values) != blocks:
        raise ValueError(f"{name}: expected one value or one for each of the {blocks} convolutions, got {value!r}")
    return values


def _build(
    size: int,
    *,
    channels: Sequence[int],
    kernel_size: int | Sequence[int],
    padding: int | Sequence[int],
    activation: str,
    pool: str | Sequence[str],
    dense: Sequence[int],
    connections: Tensor | Connections | None,
    dense_as_convolution: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> OrderedDict[str, nn.Module]:
    """Convolution blocks c1, c3, ..., then dense layers, then the output layer of 10.

    Layers are numbered as in the paper, where each block counts as two (C and S): with two blocks the dense ones are
    c5 and f6. `dense_as_convolution` makes the first of them a convolution over the whole remaining map.
    """
    factory = {"device": device, "dtype": dtype}
    blocks = len(channels)
    if blocks == 0 or (connections is not None and blocks < 2):
        raise ValueError(
            f"channels: expected at least {1 if connections is None else 2} convolutions, got {channels!r}"
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    maps = 1
    settings = zip(
        channels,
        _per_block("kernel_size", kernel_size, blocks),
        _per_block("padding", padding, blocks),
        _per_block("pool", pool, blocks),
        strict=True,
    )
    for block, (out_maps, kernel, pad, pooling) in enumerate(settings):
        name = f"c{2 * block + 1}"
        options = {"padding": pad, "activation": activation, "pool": pooling, **factory}
        if block == 1 and connections is not None:
            table = Connections.of(connections)
            if (table.out_channels, table.in_channels) != (out_maps, maps):
                raise ValueError(
                    f"connections: expected a table ({out_maps}, {maps}) for {name}, "
                    f"got ({table.out_channels}, {table.in_channels})"
                )
            layers[name] = SparseConvActPool2d(table, kernel, **options)
        else:
            layers[name] = ConvActPool2d(maps, out_maps, kernel, **options)
        size = (size + 2 * pad - kernel + 1) // (1 if pooling == "none" else 2)
        if size < 1:
            raise ValueError(f"channels: nothing is left of the image after {name}; fewer or smaller convolutions")
        maps = out_maps
    features = maps * size * size
    for index, width in enumerate(dense):
        name = f"{'c' if index == 0 else 'f'}{2 * blocks + 1 + index}"
        if index == 0 and dense_as_convolution:
            layers[name] = ConvActPool2d(maps, width, size, activation=activation, pool="none", **factory)
        else:
            if index == 0:
                layers["flatten"] = _flatten()
            layers[name] = nn.Linear(features, width, **factory)
            layers[f"{name}_act"] = ACTIVATION_LAYERS[activation]()
        if index == 0 and dense_as_convolution:
            layers["flatten"] = _flatten()
        features = width
    layers.setdefault("flatten", _flatten())
    layers["output"] = nn.Linear(features, 10, **factory)
    return layers


_MNIST_MEAN, _MNIST_STD = 0.1307, 0.3081  # of the 60,000 training images, pixels in 0..1
_NORMALISED = {"background": -_MNIST_MEAN / _MNIST_STD, "foreground": (1 - _MNIST_MEAN) / _MNIST_STD}


def lenet5_d2l(
    *,
    channels: Sequence[int] = (6, 16),
    kernel_size: int | Sequence[int] = 5,
    padding: int | Sequence[int] | None = None,
    activation: str = "sigmoid",
    pool: str | Sequence[str] = "avg",
    dense: Sequence[int] = (120, 84),
    connections: Tensor | Connections | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LeNet:
    """LeNet-5 as in "Dive into Deep Learning", section 7.6: input (N, 1, 28, 28), output (N, 10).

    As it stands: sigmoids, average pooling, Xavier-uniform initial weights; 61,706 parameters.

    Args:
        channels: output maps of each convolution; more than two make it deeper.
        kernel_size: side of the windows, for all convolutions or one each.
        padding: of each convolution; None keeps the first one's output as large as its input, the others unpadded.
        activation: of every layer but the last; see `functional.conv_act_pool`.
        pool: "avg", "max" or "none", for all convolutions or one each.
        dense: widths of the hidden dense layers.
        connections: a table for the second convolution, e.g. `tables.LENET5_C3`; None connects all maps.

    Raises:
        ValueError: options that do not fit each other or leave nothing of the image.
    """
    if padding is None:
        sides = _per_block("kernel_size", kernel_size, len(channels))
        padding = [(side - 1) // 2 if block == 0 else 0 for block, side in enumerate(sides)]
    layers = _build(
        28,
        channels=channels,
        kernel_size=kernel_size,
        padding=padding,
        activation=activation,
        pool=pool,
        dense=dense,
        connections=connections,
        device=device,
        dtype=dtype,
    )
    for layer in layers.values():
        if isinstance(layer, ConvActPool2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
        elif isinstance(layer, SparseConvActPool2d):  # Xavier of each map with its own fan-in
            area = layer.kernel_size**2
            fan_out = area * len(layer.connections) / layer.in_channels
            bias = None if layer.bias is None else layer.bias.detach().clone()
            layer.init_uniform_([math.sqrt(6 / (fan_in + fan_out)) for fan_in in layer.fan_in()])
            if bias is not None:
                layer.bias.data.copy_(bias)
    return LeNet(layers, input_spec=InputSpec(size=28, background=0.0, foreground=1.0))


def lenet5(
    *,
    channels: Sequence[int] = (6, 16),
    kernel_size: int | Sequence[int] = 5,
    padding: int | Sequence[int] = 0,
    activation: str = "relu",
    pool: str | Sequence[str] = "max",
    dense: Sequence[int] = (120, 84),
    connections: Tensor | Connections | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LeNet:
    """LeNet-5 as it is commonly taught: input (N, 1, 32, 32), output (N, 10).

    As it stands: ReLU, max pooling, all 96 connections in C3, C5 as a 5x5 convolution, PyTorch's default initial
    weights; 61,706 parameters. The first of the `dense` layers is that convolution over the whole map; the other
    arguments are those of `lenet5_d2l`.

    Raises:
        ValueError: options that do not fit each other or leave nothing of the image.
    """
    layers = _build(
        32,
        channels=channels,
        kernel_size=kernel_size,
        padding=padding,
        activation=activation,
        pool=pool,
        dense=dense,
        connections=connections,
        dense_as_convolution=True,
        device=device,
        dtype=dtype,
    )
    return LeNet(layers, input_spec=InputSpec(size=32, **_NORMALISED))


def lenet1(
    *,
    activation: str = "tanh",
    pool: str = "avg",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LeNet:
    """LeNet-1: input (N, 1, 28, 28), 4 and 12 maps, 192 features to 10 outputs; 3,246 parameters.

    LeCun et al. (1998), section III.C, with all maps connected as in its tutorials.
    """
    layers = _build(
        28,
        channels=(4, 12),
        kernel_size=5,
        padding=0,
        activation=activation,
        pool=pool,
        dense=(),
        connections=None,
        device=device,
        dtype=dtype,
    )
    return LeNet(layers, input_spec=InputSpec(size=28, **_NORMALISED))


def lenet5_1998(
    *,
    output: str = "rbf",
    connections: Tensor | Connections | None = LENET5_C3,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LeNet:
    """LeNet-5 exactly as in LeCun et al. (1998), section II.B: input (N, 1, 32, 32).

    Sparse C3, trainable subsampling, 1.7159 tanh(2x/3) everywhere up to F6, initial weights uniform in +-2.4 / fan-in
    of the unit; 60,000 trainable parameters, 340,908 connections.

    Args:
        output: "rbf": distances (N, 10) to the digit bitmaps, the smallest is the class, trained with `nn.MAPLoss`;
            "linear": a dense layer, trained with cross-entropy.
        connections: table of C3, bool (16, 6); None connects all maps.

    Raises:
        ValueError: an unknown output, a table of another size.
    """
    factory = {"device": device, "dtype": dtype}
    if output not in ("rbf", "linear"):
        raise ValueError(f"output: expected 'rbf' or 'linear', got {output!r}")
    last = RBF(84, 10, **factory) if output == "rbf" else nn.Linear(84, 10, **factory)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        c1=ConvSubsample2d(1, 6, 5, **factory),
        c3=ConvSubsample2d(6, 16, 5, table=connections, **factory),
        c5=ConvActPool2d(16, 120, 5, activation="scaled_tanh", pool="none", **factory),
        flatten=_flatten(),
        f6=nn.Linear(120, 84, **factory),
        f6_act=ScaledTanh(),
        output=last,
    )
    for layer in layers.values():
        _init_lecun(layer)
    return LeNet(layers, input_spec=InputSpec(size=32, background=-0.1, foreground=1.175))


def _init_lecun(layer: nn.Module) -> None:
    """Weights and biases uniform in +-2.4 / fan-in of their unit: LeCun et al. (1998), appendix A."""
    if isinstance(layer, FusedConv2d):
        layer.init_uniform_([2.4 / max(1, fan_in) for fan_in in layer.fan_in()])
    if isinstance(layer, ConvSubsample2d):  # a subsampling unit has four inputs
        nn.init.uniform_(layer.coefficient, -2.4 / 4, 2.4 / 4)
        nn.init.uniform_(layer.pool_bias, -2.4 / 4, 2.4 / 4)
    if isinstance(layer, nn.Linear):
        nn.init.uniform_(layer.weight, -2.4 / layer.in_features, 2.4 / layer.in_features)
        nn.init.uniform_(layer.bias, -2.4 / layer.in_features, 2.4 / layer.in_features)


MODELS: dict[str, Callable[..., LeNet]] = {  # by command-line name
    "lenet1": lenet1,
    "lenet5": lenet5,
    "lenet5-d2l": lenet5_d2l,
    "lenet5-1998": lenet5_1998,
}
