"""The layers of LeNet-5 that are raced, and every way to run each of them."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lenet_fast.nn import ConvActPool2d, ConvSubsample2d, ScaledTanh, SparseConvActPool2d
from lenet_fast.tables import LENET5_C3, Connections

OURS = "fused"
TRITON = "fused-triton"
OWN = (OURS, TRITON)  # all that are this package's
SUBSAMPLE = "subsample"  # LeCun's trainable pooling, with an activation of its own

_ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "tanh": nn.Tanh, "scaled_tanh": ScaledTanh}
_POOLS = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d, "none": nn.Identity}


@dataclass(frozen=True)
class Layer:
    """The shape of a layer, the pairs (activation, pool) it is run with, and who competes on it."""

    in_channels: int
    out_channels: int
    size: int  # height and width of the input
    padding: int
    needs_input_grad: bool
    variants: Sequence[tuple[str, str]]
    contestants: Mapping[str, "Contestant"]
    connections: Connections | None = None  # None: all
    kernel_size: int = 5

    def flops(self, passes: str) -> int:
        """Of the convolution per image, its gradients included; without absent connections and recomputation."""
        side = self.size + 2 * self.padding - self.kernel_size + 1
        pairs = len(self.connections) if self.connections else self.in_channels * self.out_channels
        forward = 2 * pairs * self.kernel_size**2 * side**2
        return forward if passes == "forward" else forward * (2 + self.needs_input_grad)

    def elements(self, passes: str) -> int:
        """Of an image's input, output and their gradients: what has to be read or written once, whoever computes."""
        side = (self.size + 2 * self.padding - self.kernel_size + 1) // 2
        input, output = self.in_channels * self.size**2, self.out_channels * side**2
        return input + output if passes == "forward" else (1 + self.needs_input_grad) * input + 2 * output


@dataclass(frozen=True)
class Case:
    """A layer with its activation and pooling."""

    layer: Layer
    activation: str
    pool: str


Parameters = Sequence[Tensor]
Sizes = Callable[[Layer], list[int]]


def as_they_are(layer: Layer, parameters: Parameters) -> Parameters:
    return parameters


@dataclass(frozen=True)
class Contestant:
    """One way to run a layer.

    `build` makes the module. `store` takes the parameters of the fused layer (weight, packed where it is sparse, bias,
    ...) to those of the module: in the module's order, of any shape, each element in one place, 0 elsewhere.
    """

    build: Callable[[Case], nn.Module]
    store: Callable[[Layer, Parameters], Parameters] = as_they_are
    memory_format: torch.memory_format = torch.contiguous_format
    compiled: bool = False
    compile_options: Mapping[str, object] = field(default_factory=dict)


# ---- Our operators


def build_fused(case: Case) -> nn.Module:
    layer = case.layer
    options = {"padding": layer.padding, "activation": case.activation}
    channels = (layer.in_channels, layer.out_channels)
    if case.pool == SUBSAMPLE:
        return ConvSubsample2d(*channels, layer.kernel_size, layer.connections, **options)
    if layer.connections is not None:
        return SparseConvActPool2d(layer.connections, layer.kernel_size, pool=case.pool, **options)
    return ConvActPool2d(*channels, layer.kernel_size, pool=case.pool, **options)


def build_fused_dense(case: Case) -> nn.Module:
    """All connections computed, absent ones with weight 0: what the table saves (training would change these)."""
    return build_fused(replace(case, layer=replace(case.layer, connections=None)))


def build_fused_triton(case: Case) -> nn.Module:
    module = build_fused(case)
    module.backend = "triton"
    return module


# ---- Plain PyTorch


class MaskedConv2d(nn.Conv2d):
    """A dense convolution whose weight is masked in every call, and with it the gradient."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)
        self.register_buffer("mask", layer.connections.table()[..., None, None].to(self.weight.dtype))

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight * self.mask, self.bias)


class GatheredConv2d(nn.Module):
    """`sizes[0]` output maps by one grouped convolution, the next `sizes[1]` by another, ...; then `torch.cat`.

    Each convolution gets copies of the input maps of its output maps, so these must have equally many.
    """

    def __init__(self, layer: Layer, sizes: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        for index, rows in enumerate(layer.connections.table().split(sizes)):
            inputs = rows.nonzero()[:, 1]  # those of the first row come first
            self.register_buffer(f"inputs{index}", inputs)
            options = {"padding": layer.padding, "groups": len(rows)}
            self.convs.append(nn.Conv2d(len(inputs), len(rows), layer.kernel_size, **options))

    def forward(self, input: Tensor) -> Tensor:
        gathered = (input.index_select(1, inputs) for inputs in self.buffers())
        return torch.cat([conv(maps) for conv, maps in zip(self.convs, gathered, strict=True)], dim=1)


def one_by_one(layer: Layer) -> list[int]:
    return [1] * layer.out_channels


def by_fan_in(layer: Layer) -> list[int]:
    """Neighbouring output maps of the same number of input maps: in LENET5_C3 6 of 3, 9 of 4 and 1 of 6."""
    return [len(list(maps)) for _, maps in itertools.groupby(layer.connections.fan_in())]


class Subsample(nn.Module):
    """coefficient * (sum over 2x2) + pool_bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.coefficient = nn.Parameter(torch.ones(channels, 1, 1))
        self.pool_bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.average = nn.AvgPool2d(2)

    def forward(self, input: Tensor) -> Tensor:
        return (4 * self.coefficient) * self.average(input) + self.pool_bias  # 4: on the small tensor


def _followed(conv: nn.Module, case: Case) -> nn.Sequential:
    """`conv`, then activation and pooling."""
    activation = _ACTIVATIONS[case.activation]
    if case.pool == SUBSAMPLE:
        return nn.Sequential(conv, activation(), Subsample(case.layer.out_channels), activation())
    return nn.Sequential(conv, activation(), _POOLS[case.pool](2))


def build_plain(case: Case) -> nn.Sequential:
    layer = case.layer
    if layer.connections is not None:
        return _followed(MaskedConv2d(layer), case)
    return _followed(nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding), case)


def store_dense(layer: Layer, parameters: Parameters) -> Parameters:
    """The weight with 0 where there is no connection."""
    weight, *others = parameters
    if layer.connections is not None:
        table = layer.connections.table()
        dense = weight.new_zeros(*table.shape, *weight.shape[1:])
        dense[table] = weight
        weight = dense
    return weight, *others


def gathered(sizes_of: Sizes) -> Contestant:
    """`GatheredConv2d`, split as `sizes_of(layer)`."""

    def build(case: Case) -> nn.Module:
        return _followed(GatheredConv2d(case.layer, sizes_of(case.layer)), case)

    def store(layer: Layer, parameters: Parameters) -> Parameters:
        weight, bias, *others = parameters
        sizes = sizes_of(layer)
        connections = [int(rows.sum()) for rows in layer.connections.table().split(sizes)]
        pairs = zip(weight.split(connections), bias.split(sizes), strict=True)
        return *itertools.chain.from_iterable(pairs), *others

    return Contestant(build, store)


# ---- Who competes where

PLAIN = Contestant(build_plain, store_dense)  # also the judge of the results, in float64
EVERYWHERE = {
    OURS: Contestant(build_fused),
    "eager": PLAIN,
    "eager-channels-last": replace(PLAIN, memory_format=torch.channels_last),
    "compile": replace(PLAIN, compiled=True),
    "compile-channels-last": replace(PLAIN, memory_format=torch.channels_last, compiled=True),
}
SPARSE = {
    **EVERYWHERE,
    "fused-dense": Contestant(build_fused_dense, store_dense),
    "sliced": gathered(one_by_one),
    "grouped": gathered(by_fan_in),
    "grouped-channels-last": replace(gathered(by_fan_in), memory_format=torch.channels_last),
}
ON_CUDA = {  # in addition, whatever the layer
    TRITON: Contestant(build_fused_triton),
    "compile-max-autotune": replace(
        PLAIN, compiled=True, compile_options={"max_autotune": True, "coordinate_descent_tuning": True}
    ),
}

_POOLED = (("sigmoid", "avg"), ("relu", "max"))  # as in lenet5_d2l and in lenet5
_SUBSAMPLED = (("scaled_tanh", SUBSAMPLE),)  # as in lenet5_1998

# Nobody asks for the gradient of the images, so in training the first layer computes none.
_C1 = Layer(1, 6, size=28, padding=2, needs_input_grad=False, variants=_POOLED, contestants=EVERYWHERE)
_C3 = Layer(6, 16, size=14, padding=0, needs_input_grad=True, variants=_POOLED, contestants=EVERYWHERE)
_SPARSE_C3 = replace(
    _C3, variants=(("tanh", "avg"), ("relu", "max")), contestants=SPARSE, connections=Connections.of(LENET5_C3)
)
LAYERS = {
    "c1": _C1,
    "c3": _C3,
    "sparse-c3": _SPARSE_C3,
    "c1s2": replace(_C1, size=32, padding=0, variants=_SUBSAMPLED),
    "c3s4": replace(_SPARSE_C3, variants=_SUBSAMPLED),
}
