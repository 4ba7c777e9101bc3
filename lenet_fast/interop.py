"""Weights to and from Flax: HWIO kernels, dense layers after an NHWC flatten, other names. Imports no Flax or JAX.

    from_flax(variables["params"], models.lenet5())              # linen
    from_flax(nnx.state(network, nnx.Param), models.lenet5())    # nnx

A Flax tree is any nested mapping of arrays. A layer in it is a mapping of a `kernel` and, unless built without, a
`bias`. Which layer of the tree belongs to which layer of the model (in the order of its `named_modules()`) is told by
`names`, {"c1": "encoder/conv1", ...}; without it by the names themselves where both sides use the same; else by their
order: in the tree convolutions come before dense layers, and conv2 before conv10.

A layer may be a convolution on one side and dense on the other where that is the same: LeNet-5's C5 is either.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .nn import ConvActPool2d

__all__ = ["from_flax", "to_flax"]

_STYLES = {"linen": ("Conv_{}", "Dense_{}", 0), "nnx": ("conv{}", "linear{}", 1)}  # convolution, dense, first number

FlaxTree = Mapping[Any, Any]


def from_flax(tree: FlaxTree, model: nn.Module, *, names: Mapping[str, str] | None = None) -> None:
    """Load the weights of a Flax network into `model`, in place; all or, if anything raises, nothing.

    Args:
        tree: Flax parameters, floating-point; converted to the dtype and device of the model's.
        model: convolutions (nn.Conv2d, nn.ConvActPool2d) and dense layers (nn.Linear) that run in the order in which
            they are registered, as in any nn.Sequential. The input rows of the dense layer that follows a convolution
            are reordered: Flax flattens (H, W, C), PyTorch (C, H, W).
        names: layer of the model -> layer of the tree; needed only where names and order do not tell.

    Raises:
        TypeError: `tree` is not a mapping, or an array in it is not floating-point.
        ValueError: a layer or array without counterpart, another shape, an order that names and shapes leave open,
            or a layer of `model` with parameters or buffers that Flax's Conv and Dense do not have.
    """
    layers = _layers_of(model)
    values: list[tuple[nn.Parameter, Tensor]] = []
    for layer, flax in _match(layers, _layers_in(tree), names):
        kernel = _numpy(flax.kernel, f"{flax.name}/kernel")
        values.append((layer.weight, torch.from_numpy(kernel.reshape(-1, layer.in_maps, layer.out)).permute(2, 1, 0)))
        if layer.bias is not None:
            values.append((layer.bias, torch.from_numpy(_numpy(flax.bias, f"{flax.name}/bias"))))
    with torch.no_grad():
        for parameter, value in values:
            parameter.copy_(value.reshape(parameter.shape))


def to_flax(
    model: nn.Module, like: FlaxTree | str = "linen", *, names: Mapping[str, str] | None = None
) -> dict[Any, Any]:
    """The weights of `model` as a tree of NumPy arrays, copies, that a Flax network takes.

    linen: `network.apply({"params": tree}, images)`; nnx: `nnx.update(network, tree)`.

    Args:
        model: as for `from_flax`. bfloat16 parameters come as float32, since NumPy lacks bfloat16.
        like: the names, either those of Flax's tutorials, "linen" (Conv_0, Dense_0) or "nnx" (conv1, linear1), or
            those of the network that is to take the weights: its own tree, whose structure and shapes are kept.
        names: as for `from_flax`; only beside a tree.

    Raises:
        TypeError, ValueError: as `from_flax`; also an unknown `like`, or `names` without a tree.
    """
    layers = _layers_of(model)
    if isinstance(like, str):
        if like not in _STYLES:
            raise ValueError(f"like: expected a tree or one of {', '.join(_STYLES)}; got {like!r}")
        if names is not None:
            raise ValueError(f"names: expected None with like={like!r}, which names the layers itself; got {names!r}")
        matches = list(zip(layers, _layers_named(layers, like), strict=True))
    else:
        matches = _match(layers, _layers_in(like), names)
    tree: dict[Any, Any] = {}
    for layer, flax in matches:
        branch = tree
        for key in flax.path:
            branch = branch.setdefault(key, {})
        kernel = layer.weight.detach().reshape(layer.out, layer.in_maps, -1).permute(2, 1, 0)
        branch["kernel"] = _copied(kernel.reshape(flax.shape))
        if layer.bias is not None:
            branch["bias"] = _copied(layer.bias.detach())
    return tree


@dataclass(frozen=True)
class _Layer:
    """A layer of the model. As (out, in_maps, positions) its weight is a Flax kernel transposed, dense or not."""

    name: str
    weight: nn.Parameter  # (O, I, K, K) or (O, I)
    bias: nn.Parameter | None
    in_maps: int  # of a dense layer after a convolution: that one's output maps; else all inputs

    @property
    def out(self) -> int:
        return self.weight.shape[0]

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Of the same kind of layer in Flax."""
        return (*self.weight.shape[2:], *self.weight.shape[1::-1])

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether a Flax kernel of this shape computes what this layer can compute."""
        if shape == self.kernel_shape or shape == (math.prod(self.weight.shape[1:]), self.out):
            return True
        maps = (*shape[:2], self.in_maps, self.out)
        return self.weight.dim() == 2 and shape == maps and math.prod(shape) == self.weight.numel()


@dataclass(frozen=True)
class _FlaxLayer:
    path: tuple[Any, ...]
    shape: tuple[int, ...]  # of the kernel
    kernel: Any = None
    bias: Any = None

    @property
    def name(self) -> str:
        return "/".join(map(str, self.path)).removeprefix("params/")


def _layers_of(model: nn.Module) -> list[_Layer]:
    """The layers of the model with parameters, in order."""
    layers: list[_Layer] = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        if not own:
            continue
        kinds = nn.Conv2d | ConvActPool2d | nn.Linear
        if not isinstance(module, kinds) or not {"weight"} <= own.keys() <= {"weight", "bias"}:
            raise ValueError(
                f"model: expected weight and bias of Conv2d, ConvActPool2d and Linear layers only, got "
                f"{', '.join(own)} of {name or 'the model itself'} ({type(module).__name__})"
            )
        in_maps = own["weight"].shape[1]
        if isinstance(module, nn.Linear) and layers and layers[-1].weight.dim() == 4:
            inputs, in_maps = in_maps, layers[-1].out
            if inputs % in_maps:
                raise ValueError(
                    f"model: {name} follows the {in_maps} maps of {layers[-1].name}: expected in_features to be a "
                    f"multiple of {in_maps}, got {inputs}"
                )
        layers.append(_Layer(name, own["weight"], own.get("bias"), in_maps))
    parameters = [id(p) for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    if len(set(parameters)) < len(parameters):
        raise ValueError("model: expected every layer to have parameters of its own, got some shared between layers")
    return layers


def _layers_named(layers: list[_Layer], style: str) -> Iterator[_FlaxLayer]:
    """The Flax layers of these, named as in the tutorials."""
    *patterns, first = _STYLES[style]
    counts = [first, first]
    for layer in layers:
        is_dense = layer.weight.dim() == 2
        yield _FlaxLayer((patterns[is_dense].format(counts[is_dense]),), layer.kernel_shape)
        counts[is_dense] += 1


def _layers_in(tree: FlaxTree) -> list[_FlaxLayer]:
    """The layers of a Flax tree, convolutions first, each kind in the order of its names and numbers."""
    if not isinstance(tree, Mapping):
        raise TypeError(f"tree: expected a nested mapping of arrays, got {type(tree).__name__}")
    layers = list(_walk(tree, ()))
    return sorted(layers, key=lambda layer: (len(layer.shape) == 2, _natural(layer.name)))


def _walk(tree: FlaxTree, path: tuple[Any, ...]) -> Iterator[_FlaxLayer]:
    leaves = {key: leaf for key, leaf in tree.items() if leaf is not None and not isinstance(leaf, Mapping)}
    if leaves:
        if "kernel" not in leaves or not leaves.keys() <= {"kernel", "bias"}:
            raise ValueError(
                f"tree: expected layers of kernel and bias only, got {', '.join(map(str, leaves))} in "
                f"{'/'.join(map(str, path)) or 'the tree itself'} (of an nnx model pass nnx.state(model, nnx.Param))"
            )
        yield _FlaxLayer(path, np.shape(leaves["kernel"]), leaves["kernel"], leaves.get("bias"))
    for key, branch in tree.items():
        if isinstance(branch, Mapping):
            yield from _walk(branch, (*path, key))


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _match(
    layers: list[_Layer], flax_layers: list[_FlaxLayer], names: Mapping[str, str] | None
) -> list[tuple[_Layer, _FlaxLayer]]:
    """Pair every layer with one of the tree, shapes checked."""
    own, given = [layer.name for layer in layers], {flax.name: flax for flax in flax_layers}
    if len(own) != len(given):
        raise ValueError(
            f"tree: expected {len(own)} layers, for {', '.join(own)}; got {len(given)}: {', '.join(given) or 'none'}"
        )
    if names is None and set(own) == given.keys():
        names = {name: name for name in own}
    if names is not None:
        if set(own) != names.keys() or sorted(names.values()) != sorted(given):
            raise ValueError(
                f"names: expected each of {', '.join(own)} with one of {', '.join(given)}; got {dict(names)!r}"
            )
        flax_layers = [given[names[name]] for name in own]
    else:
        _check_order(flax_layers)
    for layer, flax in zip(layers, flax_layers, strict=True):
        if not layer.takes(flax.shape):
            raise ValueError(
                f"tree: expected a kernel of shape {layer.kernel_shape} for {layer.name}, got {flax.shape} in "
                f"{flax.name}" + (" (if another layer is meant, pass names=)" if names is None else "")
            )
        expected = None if layer.bias is None else tuple(layer.bias.shape)
        found = None if flax.bias is None else np.shape(flax.bias)
        if expected != found:
            raise ValueError(
                f"tree: expected {f'a bias of shape {expected}' if expected else 'no bias'} for {layer.name}, "
                f"got {'none' if found is None else found} in {flax.name}"
            )
    return list(zip(layers, flax_layers, strict=True))


def _check_order(flax_layers: list[_FlaxLayer]) -> None:
    """Layers of one shape could be swapped unnoticed, so their names must be numbered."""
    for i, first in enumerate(flax_layers):
        for second in flax_layers[i + 1 :]:
            if first.shape == second.shape and re.sub(r"\d+", "", first.name) != re.sub(r"\d+", "", second.name):
                raise ValueError(
                    f"names: needed, as {first.name} and {second.name} of the tree have the same kernel shape "
                    f"{first.shape} and no number to tell which comes first"
                )


def _numpy(leaf: Any, name: str) -> np.ndarray:
    """As float64, which holds each of the narrower types exactly, bfloat16 included."""
    array = np.asarray(leaf)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise TypeError(f"tree: expected a floating-point array as {name}, got dtype {array.dtype}")
    return array.astype(np.float64)


def _copied(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.cpu().clone(memory_format=torch.contiguous_format).numpy()
