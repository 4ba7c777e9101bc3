"""The LeNets: layers named as in LeCun et al. (1998), each model beside its twin of plain PyTorch layers."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nn import ConvActPool2d

__all__ = ["MODELS", "InputSpec", "LeNet", "describe", "lenet5", "lenet5_d2l"]


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

    def __getitem__(self, index: int | slice) -> nn.Module:
        """A layer, or for a slice an nn.Sequential: some of the layers are not a LeNet any more."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def reference(self) -> nn.Sequential:
        """The same network of torch.nn layers only: copies of the parameters, the same state_dict keys.

        A fused layer `c1` becomes a convolution `c1`, an activation `c1_act` and a pooling `s2`.
        """
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for name, layer in self.named_children():
            if isinstance(layer, ConvActPool2d):
                layers.update(_unfused(name, layer))
            else:
                layers[name] = copy.deepcopy(layer)
        return nn.Sequential(layers).train(self.training)


_ACTIVATIONS = {"identity": nn.Identity, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
_POOLS = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}


def _unfused(name: str, layer: ConvActPool2d) -> dict[str, nn.Module]:
    """The torch.nn layers that `layer`, named `name` (c1, c3, ...), computes in one; parameters copied."""
    if layer.activation not in _ACTIVATIONS:
        raise ValueError(f"{name}: torch.nn has no layer for activation {layer.activation!r}")
    conv = nn.utils.skip_init(  # draws no random numbers: the values are copied in below
        nn.Conv2d,
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        padding=layer.padding,
        bias=layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    for own, copied in zip(layer.parameters(), conv.parameters(), strict=True):
        copied.data.copy_(own.data)
        copied.requires_grad_(own.requires_grad)
    layers = {name: conv, f"{name}_act": _ACTIVATIONS[layer.activation]()}
    if layer.pool != "none":
        layers[f"s{int(name[1:]) + 1}"] = _POOLS[layer.pool](2)
    return layers


def lenet5_d2l(*, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LeNet:
    """LeNet-5 as in "Dive into Deep Learning", section 7.6: input (N, 1, 28, 28), output (N, 10).

    Sigmoids, average pooling, Xavier-uniform initial weights; 61,706 parameters.
    """
    factory = {"device": device, "dtype": dtype}
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        c1=ConvActPool2d(1, 6, 5, padding=2, activation="sigmoid", pool="avg", **factory),
        c3=ConvActPool2d(6, 16, 5, activation="sigmoid", pool="avg", **factory),
        flatten=_flatten(),
        c5=nn.Linear(16 * 5 * 5, 120, **factory),
        c5_act=nn.Sigmoid(),
        f6=nn.Linear(120, 84, **factory),
        f6_act=nn.Sigmoid(),
        output=nn.Linear(84, 10, **factory),
    )
    for layer in layers.values():
        if isinstance(layer, ConvActPool2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return LeNet(layers, input_spec=InputSpec(size=28, background=0.0, foreground=1.0))


_MNIST_MEAN, _MNIST_STD = 0.1307, 0.3081  # of the 60,000 training images, pixels in 0..1
_NORMALISED = {"background": -_MNIST_MEAN / _MNIST_STD, "foreground": (1 - _MNIST_MEAN) / _MNIST_STD}


def lenet5(*, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LeNet:
    """LeNet-5 as it is commonly taught: input (N, 1, 32, 32), output (N, 10).

    ReLU, max pooling, all 96 connections in C3, C5 as a 5x5 convolution, PyTorch's default initial weights;
    61,706 parameters.
    """
    factory = {"device": device, "dtype": dtype}
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        c1=ConvActPool2d(1, 6, 5, activation="relu", pool="max", **factory),
        c3=ConvActPool2d(6, 16, 5, activation="relu", pool="max", **factory),
        c5=ConvActPool2d(16, 120, 5, activation="relu", pool="none", **factory),
        flatten=_flatten(),
        f6=nn.Linear(120, 84, **factory),
        f6_act=nn.ReLU(),
        output=nn.Linear(84, 10, **factory),
    )
    return LeNet(layers, input_spec=InputSpec(size=32, **_NORMALISED))


def _flatten() -> nn.Flatten:
    return nn.Flatten(start_dim=-3)  # the last three dimensions: a single image (C, H, W) passes too


MODELS: dict[str, Callable[..., LeNet]] = {"lenet5": lenet5, "lenet5-d2l": lenet5_d2l}  # by command-line name


def describe(model: nn.Module, input_shape: Sequence[int]) -> str:
    """Print a table of the layers of `model`, in the order they run on such an input; returns it too.

    A line for each call of a layer: name, type, output shape, own parameters. Runs a copy in evaluation mode:
    `model`, its statistics and the random number generators stay as they are.

    Raises:
        ValueError: `input_shape` is no sequence of positive ints.
    """
    shape = tuple(input_shape)
    if not shape or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(f"input_shape: expected positive ints such as (1, 1, 28, 28), got {input_shape!r}")
    rows = [("layer", "type", "output shape", "parameters"), ("", "input", str(shape), "")]
    probe = copy.deepcopy(model).eval()

    def add_row(name: str, layer: nn.Module, output: object) -> None:
        own = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
        rows.append((name, type(layer).__name__, _shapes(output), f"{own:,}" if own else ""))

    for name, layer in probe.named_modules():
        is_leaf = next(layer.children(), None) is None
        if is_leaf or next(layer.parameters(recurse=False), None) is not None:
            layer.register_forward_hook(lambda layer, _, output, name=name: add_row(name, layer, output))
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []), torch.no_grad():
        probe(torch.zeros(shape, device=like.device, dtype=like.dtype))
    rows.append(("total", "", "", f"{sum(parameter.numel() for parameter in probe.parameters()):,}"))

    name, kind, shape, own = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = (f"{row[0]:{name}}  {row[1]:{kind}}  {row[2]:{shape}}  {row[3]:>{own}}" for row in rows)
    table = "\n".join(line.rstrip() for line in lines)
    print(table)
    return table


def _shapes(output: object) -> str:
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    if isinstance(output, tuple | list):
        return ", ".join(map(_shapes, output))
    return type(output).__name__
