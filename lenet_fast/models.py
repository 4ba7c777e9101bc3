"""The LeNets: layers named as in LeCun et al. (1998), each model beside its twin of plain PyTorch layers."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .native_forward import NativeForward
from .nn import RBF, ConvActPool2d, ConvSubsample2d, FusedConv2d, MAPLoss, ScaledTanh, SparseConvActPool2d
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


@dataclass(frozen=True)
class InputSpec:
    """How 8-bit digits become an input: 0..255 linearly to background..foreground, padded to size x size.

    The padding has the background value, as in LeCun et al. (1998), section II.B.
    """

    size: int
    background: float
    foreground: float

    def prepare(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 images (N, H, W) to the model's input (N, 1, size, size), on the same device.

        Raises:
            TypeError: images that are not uint8.
            ValueError: another rank, or a height or width that cannot be padded evenly to `size`.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images: expected dtype torch.uint8, got {images.dtype}")
        if images.dim() != 3:
            raise ValueError(f"images: expected (N, H, W), got shape {tuple(images.shape)}")
        margins = [self.size - side for side in images.shape[1:]]
        if any(margin < 0 or margin % 2 for margin in margins):
            raise ValueError(
                f"images: height and width must be {self.size} or smaller by an even number, "
                f"got shape {tuple(images.shape)}"
            )
        top, left = (margin // 2 for margin in margins)
        scale = (self.foreground - self.background) / 255
        pixels = images.to(dtype).mul_(scale).add_(self.background)
        return F.pad(pixels, (left, left, top, top), value=self.background).unsqueeze(1)


class LeNet(nn.Sequential):
    """A sequence of named layers that knows its input format and its twin of plain PyTorch layers."""

    def __init__(self, layers: OrderedDict[str, nn.Module], *, input_spec: InputSpec) -> None:
        super().__init__(layers)
        self.input_spec = input_spec
        self._native_forward = NativeForward()

    def forward(self, input: Tensor) -> Tensor:
        """Layer by layer; in eval mode under `torch.inference_mode()` in one native call where that can be."""
        if not (self.training or torch.compiler.is_compiling()) and torch.is_inference_mode_enabled():
            output = self._native_forward(self, input)
            if output is not None:
                return output
        return super().forward(input)

    def __getitem__(self, index: int | slice) -> nn.Module:
        """A layer, or for a slice an nn.Sequential: some of the layers are not a LeNet any more."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def reference(self) -> nn.Sequential:
        """The same network in plain PyTorch: copies of the parameters, the same state_dict keys.

        A fused layer `c1` becomes a convolution `c1`, an activation `c1_act` and a pooling `s2`.
        """
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for name, layer in self.named_children():
            layers.update(_unfused(name, layer))
        return nn.Sequential(layers).train(self.training)


_ACTIVATIONS = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "scaled_tanh": ScaledTanh,
}
_POOLS = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}


def _unfused(name: str, layer: nn.Module) -> dict[str, nn.Module]:
    """The plain PyTorch layers that `layer`, named `name` (c1, c3, ...), computes in one; parameters copied.

    torch.nn has no sparse or subsampling convolution: those stay one layer, computed by their PyTorch definition.
    """
    if not isinstance(layer, ConvActPool2d):
        plain = copy.deepcopy(layer)
        if isinstance(plain, FusedConv2d | RBF):
            plain.backend = "reference"
        return {name: plain}
    layers = {name: layer.to_conv2d(), f"{name}_act": _ACTIVATIONS[layer.activation]()}
    if layer.pool != "none":
        layers[f"s{int(name[1:]) + 1}"] = _POOLS[layer.pool](2)
    return layers


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
            layers[f"{name}_act"] = _ACTIVATIONS[activation]()
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


def measures_distance(model: nn.Module) -> bool:
    """Whether the outputs of `model` (a LeNet or its twin) are distances, and not scores."""
    return isinstance(list(model.children())[-1], RBF)


def criterion(model: nn.Module) -> nn.Module:
    """The loss that `model` (a LeNet or its twin) is trained with: MAP for an RBF output, else cross-entropy."""
    return MAPLoss() if measures_distance(model) else nn.CrossEntropyLoss()


def classify(model: nn.Module, outputs: Tensor) -> Tensor:
    """Classes (N,) from outputs (N, C) of `model`: the smallest distance for an RBF output, else the largest score."""
    return outputs.argmin(-1) if measures_distance(model) else outputs.argmax(-1)
