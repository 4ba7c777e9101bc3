"""What every LeNet is: a sequence of layers with its input format, its plain PyTorch twin, its loss and its answers."""

import copy
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .native_forward import NativeForward
from .nn import RBF, ConvActPool2d, FusedConv2d, MAPLoss, ScaledTanh

__all__ = ["ACTIVATION_LAYERS", "InputSpec", "LeNet", "classify", "criterion", "measures_distance"]


@dataclass(frozen=True)
class InputSpec:
    """How 8-bit digits become an input: 0..255 linearly to background..foreground, padded to size x size.

    The padding has the background value, as in LeCun et al. (1998), section II.B.
    """

    size: int
    background: float
    foreground: float

    def prepare(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 images (N, H, W) or (N, C, H, W) to the model's input (N, C, size, size), on the same device.

        Raises:
            TypeError: images that are not uint8.
            ValueError: another rank, or a height or width that cannot be padded evenly to `size`.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images: expected dtype torch.uint8, got {images.dtype}")
        if images.dim() not in (3, 4):
            raise ValueError(f"images: expected (N, H, W) or (N, C, H, W), got shape {tuple(images.shape)}")
        margins = [self.size - side for side in images.shape[-2:]]
        if any(margin < 0 or margin % 2 for margin in margins):
            raise ValueError(
                f"images: height and width must be {self.size} or smaller by an even number, "
                f"got shape {tuple(images.shape)}"
            )
        images = images.unsqueeze(1) if images.dim() == 3 else images
        top, left = (margin // 2 for margin in margins)
        scale = (self.foreground - self.background) / 255
        pixels = images.to(dtype).mul_(scale).add_(self.background)
        return F.pad(pixels, (left, left, top, top), value=self.background)


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


ACTIVATION_LAYERS = {
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
    layers = {name: layer.to_conv2d(), f"{name}_act": ACTIVATION_LAYERS[layer.activation]()}
    if layer.pool != "none":
        layers[f"s{int(name[1:]) + 1}"] = _POOLS[layer.pool](2)
    return layers


def measures_distance(model: nn.Module) -> bool:
    """Whether the outputs of `model` (a LeNet or its twin) are distances, and not scores."""
    return isinstance(list(model.children())[-1], RBF)


def criterion(model: nn.Module) -> nn.Module:
    """The loss that `model` (a LeNet or its twin) is trained with: MAP for an RBF output, else cross-entropy."""
    return MAPLoss() if measures_distance(model) else nn.CrossEntropyLoss()


def classify(model: nn.Module, outputs: Tensor) -> Tensor:
    """Classes (N,) from outputs (N, C) of `model`: the smallest distance for an RBF output, else the largest score."""
    return outputs.argmin(-1) if measures_distance(model) else outputs.argmax(-1)
