"""The operators as plain functions: they check the arguments, pick the back end and call the operator."""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, ops, reference


def conv_act_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int | str = 0,
    activation: str = "sigmoid",
    pool: str = "avg",
    backend: str = "auto",
) -> Tensor:
    """Fused 2-D convolution, activation and 2x2 pooling; differentiable.

    Equals ``pool(act(F.conv2d(input, weight, bias, padding=padding)))`` with one read of the input and one write of
    the pooled output.

    Args:
        input: (N, C_in, H, W) or (C_in, H, W); float32, float64, float16 or bfloat16.
        weight: (C_out, C_in, K, K), dtype and device of `input`.
        bias: (C_out,) or None.
        padding: zeros added on each side: an int >= 0, "valid" (0) or "same" (output as large as the input before
            pooling).
        activation: "identity", "relu", "sigmoid", "tanh" or "scaled_tanh" (1.7159 tanh(2x/3), LeCun et al. 1998,
            appendix A).
        pool: "avg", "max" (2x2, stride 2; a last odd row or column is dropped) or "none".
        backend: "auto", "native", "triton" or "reference" (plain PyTorch).

    Returns:
        (N, C_out, H_out, W_out) or (C_out, H_out, W_out), in the dtype of `input`; under autocast in its dtype.

    Raises:
        ValueError: a size, shape or name that cannot be, named with what was given.
        TypeError: an argument of the wrong type or dtype.
        RuntimeError: `backend` names one that cannot run here, with the reason.
    """
    _check_tensors(input=input, weight=weight, bias=bias)
    check_choice("activation", activation, reference.ACTIVATIONS)
    check_choice("pool", pool, reference.POOLS)
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or 0 in weight.shape:
        raise ValueError(f"weight: expected (C_out, C_in, K, K) with a square kernel, got shape {_shape(weight)}")
    _check_bias(bias, weight.shape[0])
    batched = _batched(input, weight.shape[1])
    batched, padding = _resolve_padding(batched, padding, weight.shape[-1], pool)
    backend = _resolve_backend(backend, input)
    if backend == "auto" and pool == "none" and padding == 0 and batched.shape[2:] == weight.shape[2:]:
        # One window covers the input (LeNet-5's C5): a matrix product, several times faster (docs/kernels.md).
        product = F.linear(batched.flatten(1), weight.flatten(1), bias)
        output = reference.ACTIVATIONS[activation](product)[..., None, None]
    else:
        run = reference.conv_act_pool if backend == "reference" else ops.conv_act_pool
        output = run(batched, weight, bias, padding, activation, pool)
    return output if input.dim() == 4 else output.squeeze(0)


_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of the names in `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_tensors(*, input: Tensor, **others: Tensor | None) -> None:
    """Every tensor dense and floating, and of the input's device and dtype (autocast takes any mix of dtypes)."""
    for name, tensor in {"input": input, **others}.items():
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{name}: expected a floating dtype (float32, float64, float16, bfloat16), got {tensor.dtype}"
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {tensor.layout}")
        if tensor.device != input.device:
            raise ValueError(f"{name}: expected on the device of input, {input.device}, got {tensor.device}")
        if tensor.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
            raise TypeError(f"{name}: expected the dtype of input, {input.dtype}, got {tensor.dtype}")


def _check_bias(bias: Tensor | None, out_channels: int) -> None:
    if bias is not None and _shape(bias) != (out_channels,):
        raise ValueError(f"bias: expected shape ({out_channels},), one value an output channel, got {_shape(bias)}")


def _batched(input: Tensor, in_channels: int) -> Tensor:
    if input.dim() not in (3, 4):
        raise ValueError(f"input: expected (N, C, H, W) or (C, H, W), got {input.dim()} dimensions: {_shape(input)}")
    if input.shape[-3] != in_channels:
        raise ValueError(
            f"input: expected {in_channels} channels as weight has, got {input.shape[-3]} in shape {_shape(input)}"
        )
    return input if input.dim() == 4 else input.unsqueeze(0)


def _resolve_padding(input: Tensor, padding: int | str, kernel_size: int, pool: str) -> tuple[Tensor, int]:
    """Padding as an int; where an even kernel's "same" is one-sided, the extra row and column join the input."""
    if padding == "valid":
        padding = 0
    elif padding == "same":
        padding = (kernel_size - 1) // 2
        if kernel_size % 2 == 0:
            input = F.pad(input, (0, 1, 0, 1))
    elif isinstance(padding, str):
        raise ValueError(f"padding: expected an int, 'valid' or 'same', got {padding!r}")
    elif not isinstance(padding, int) or isinstance(padding, bool):
        raise TypeError(f"padding: expected an int, 'valid' or 'same', got {padding!r}")
    if padding < 0:
        raise ValueError(f"padding: expected at least 0, got {padding}")
    for axis, size in zip(("height", "width"), input.shape[-2:], strict=True):
        if size + 2 * padding < kernel_size:
            raise ValueError(
                f"weight: kernel size {kernel_size} is larger than the padded input: {axis} {size} with padding "
                f"{padding} on both sides"
            )
        if ops.output_size(size, kernel_size, padding, pool) < 1:
            raise ValueError(f"pool: {pool!r} needs a convolution output of at least 2x2, its {axis} here is 1")
    return input, padding


def _resolve_backend(backend: str, input: Tensor) -> str:
    check_choice("backend", backend, backends.BACKENDS)
    if backend != "auto" and (reason := backends.why_unavailable(backend, input.device.type)) is not None:
        raise RuntimeError(f"backend: {backend!r} cannot run here: {reason}")
    return backend
