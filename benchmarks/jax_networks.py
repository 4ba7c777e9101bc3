"""The networks in JAX: channels last, parameters copied from the plain PyTorch layers, everything jitted."""

import os
from collections.abc import Callable
from typing import Any

import layers
import torch
from networks import Task, Trained, plain
from torch import Tensor, nn
from unavailable import Unavailable

from lenet_fast.nn import RBF

Function = Callable[[list, Any], Any]  # (parameters, input) -> output


def _import_jax() -> Any:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of the device's memory
    try:
        import jax
    except ImportError:
        raise Unavailable("jax is not installed") from None
    jax.config.update("jax_default_matmul_precision", "highest")  # no TF32
    return jax


def _translated(model: nn.Sequential) -> tuple[list, Function]:
    """Parameters, and a function of them and of images (N, H, W, C); a masked weight is masked in every call."""
    import jax
    import jax.numpy as jnp

    parameters: list = []
    calls: list[Function] = []
    maps = 0  # of what a flattening saw last: dense weights behind it are for (H, W, C)

    def add(*values: Tensor) -> list[int]:
        parameters.extend(jnp.asarray(value.detach().numpy(force=True).copy()) for value in values)
        return list(range(len(parameters) - len(values), len(parameters)))

    def pooled(x: Any, start: float, combine: Callable) -> Any:
        return jax.lax.reduce_window(x, start, combine, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    for layer in _leaves(model):
        if isinstance(layer, nn.Conv2d):
            weight, bias = add(layer.weight.permute(2, 3, 1, 0), layer.bias)
            mask = None
            if isinstance(layer, layers.MaskedConv2d):
                mask = jnp.asarray(layer.mask.permute(2, 3, 1, 0).numpy(force=True))
            padding = [(side, side) for side in layer.padding]

            def convolve(p, x, weight=weight, bias=bias, mask=mask, padding=padding):  # noqa: ANN001, ANN202
                kernel = p[weight] if mask is None else p[weight] * mask
                dimensions = ("NHWC", "HWIO", "NHWC")
                return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=dimensions) + p[bias]

            calls.append(convolve)
            maps = layer.out_channels
        elif isinstance(layer, nn.Linear):
            weight = layer.weight
            if maps:
                weight = weight.unflatten(1, (maps, -1)).transpose(1, 2).flatten(1)
            weight, bias = add(weight.T, layer.bias)
            calls.append(lambda p, x, weight=weight, bias=bias: x @ p[weight] + p[bias])
            maps = 0
        elif isinstance(layer, nn.AvgPool2d):
            calls.append(lambda p, x: 0.25 * pooled(x, 0.0, jax.lax.add))
        elif isinstance(layer, nn.MaxPool2d):
            calls.append(lambda p, x: pooled(x, -jnp.inf, jax.lax.max))
        elif isinstance(layer, nn.Flatten):
            calls.append(lambda p, x: x.reshape(len(x), -1))
        elif type(layer) in (nn.Sigmoid, nn.ReLU, nn.Tanh):
            function = {nn.Sigmoid: jax.nn.sigmoid, nn.ReLU: jax.nn.relu, nn.Tanh: jnp.tanh}[type(layer)]
            calls.append(lambda p, x, function=function: function(x))
        elif not isinstance(layer, nn.Identity):
            raise Unavailable(f"{type(layer).__name__} is not written in JAX")

    def apply(p: list, x: Any) -> Any:
        for call in calls:
            x = call(p, x)
        return x

    return parameters, apply


def _leaves(model: nn.Module) -> list[nn.Module]:
    """Layers in the order of their calls; those with a forward of their own stay whole."""
    if not isinstance(model, nn.Sequential):
        return [model]
    return [leaf for layer in model.children() for leaf in _leaves(layer)]


def _array(tensor: Tensor) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(tensor.numpy(force=True))


def _nhwc(images: Tensor) -> Any:
    return _array(images.movedim(-3, -1).contiguous())


# ---- Training


def _step(task: Task) -> tuple[list, Callable]:
    """Initial parameters; one step of SGD: (parameters, (images, labels)) -> (parameters, loss)."""
    jax = _import_jax()
    model = plain(task.model)
    if isinstance(list(model.children())[-1], RBF):
        raise Unavailable("the RBF layer and its loss are not written in JAX")
    parameters, apply = _translated(model)

    def loss_of(p: list, images: Any, labels: Any) -> Any:
        scores = jax.nn.log_softmax(apply(p, images))
        return -jax.numpy.take_along_axis(scores, labels[:, None], 1).mean()

    def step(p: list, batch: tuple) -> tuple:
        loss, gradients = jax.value_and_grad(loss_of)(p, *batch)
        return [value - task.lr * gradient for value, gradient in zip(p, gradients, strict=True)], loss

    return parameters, step


def train_step_by_step(task: Task) -> Trained:
    """A jitted call for each step: XLA's convolutions on the CPU have one thread inside a scan."""
    jax = _import_jax()
    initial, step = _step(task)
    step = jax.jit(step, donate_argnums=0)
    batches = [(_nhwc(images), _array(labels)) for images, labels in task.batches()]

    def steps(p: list) -> tuple[list, list]:
        losses = []
        for batch in batches:
            p, loss = step(p, batch)
            losses.append(loss)
        return p, losses

    return _trained(initial, steps)


def train_in_a_scan(task: Task) -> Trained:
    """All steps in one jitted `lax.scan`, the data on the device."""
    jax = _import_jax()
    initial, step = _step(task)
    shape = (task.steps, task.batch)
    batches = _nhwc(task.images.unflatten(0, shape)), _array(task.labels.unflatten(0, shape))
    epoch = jax.jit(lambda p, batches: jax.lax.scan(step, p, batches), donate_argnums=0)
    return _trained(initial, lambda p: epoch(p, batches))


def _trained(initial: list, steps: Callable[[list], tuple]) -> Trained:
    import jax

    state: dict[str, list] = {}

    def reset() -> None:
        state["parameters"] = [value.copy() for value in initial]  # for they are donated

    def run() -> Any:
        state["parameters"], losses = steps(state["parameters"])
        jax.block_until_ready(state["parameters"])
        return losses

    reset()
    return Trained(run, reset)


# ---- Inference


def infer(task: Task) -> Callable[[], Tensor]:
    """One jitted call for the task's images; returns the outputs."""
    jax = _import_jax()
    parameters, apply = _translated(plain(task.model))
    images = _nhwc(task.images)
    call = jax.jit(apply)
    return lambda: torch.from_dlpack(jax.block_until_ready(call(parameters, images)))
