"""The operators as plain functions: they check the arguments, pick the back end and call the operator."""

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, ops, reference
from .tables import Connections


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

    The kernels, compiled or Triton's, on the CPU and on CUDA, compute on contiguous NCHW tensors. An input in another
    memory format (channels_last) is copied to NCHW in every call, forward and backward; outputs and gradients are
    NCHW. In a model that is channels_last otherwise, each fused layer so costs copies between the two.

    Args:
        input: (N, C_in, H, W) or (C_in, H, W); float32, float64, float16 or bfloat16. Fastest contiguous, see above.
        weight: (C_out, C_in, K, K), dtype and device of `input`.
        bias: (C_out,) or None.
        padding: zeros added on each side: an int >= 0, "valid" (0) or "same" (output as large as the input before
            pooling).
        activation: "identity", "relu", "sigmoid", "tanh" or "scaled_tanh" (1.7159 tanh(2x/3), LeCun et al. 1998,
            appendix A).
        pool: "avg", "max" (2x2, stride 2; a last odd row or column is dropped) or "none".
        backend: "auto" (the compiled kernels where they serve the device, else Triton's on CUDA, else plain PyTorch),
            "native" (compiled), "triton" or "reference" (plain PyTorch, which on a GPU may take TF32 for convolutions:
            `torch.backends.cudnn.allow_tf32`).

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
    out_channels, in_channels = _check_weight(weight, None)
    _check_maps("bias", bias, out_channels)
    batched, padding = _prepare_input(input, in_channels, padding, weight.shape[-1], pool)
    backend = _resolve_backend(backend, input)
    if backend == "auto" and pool == "none" and padding == 0 and batched.shape[2:] == weight.shape[2:]:
        # One window covers the input (LeNet-5's C5): a matrix product, several times faster (docs/kernels.md).
        product = F.linear(batched.flatten(1), weight.flatten(1), bias)
        output = reference.ACTIVATIONS[activation](product)[..., None, None]
    else:
        output = _operator("conv_act_pool", backend)(batched, weight, bias, padding, activation, pool)
    return output if input.dim() == 4 else output.squeeze(0)


def sparse_conv_act_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    table: Tensor | Connections,
    padding: int | str = 0,
    activation: str = "tanh",
    pool: str = "avg",
    backend: str = "auto",
) -> Tensor:
    """`conv_act_pool` with only the connections of `table`, as C3 of LeCun et al. (1998), section II.B.

    Absent connections cost neither memory nor arithmetic. An output map without any connection is act(bias).

    Args:
        input: (N, C_in, H, W) or (C_in, H, W); contiguous or copied, as in `conv_act_pool`.
        weight: (connections, K, K), the connections of output map 0 first, input maps ascending.
        bias: (C_out,) or None.
        table: bool (C_out, C_in), or `tables.Connections` (made once instead of at every call).
        padding: as in `conv_act_pool`; so are activation, pool and backend.

    Returns:
        (N, C_out, H_out, W_out) or (C_out, H_out, W_out), in the dtype of `input`; under autocast in its dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as `conv_act_pool`.
    """
    connections = Connections.of(table)
    _check_tensors(input=input, weight=weight, bias=bias)
    check_choice("activation", activation, reference.ACTIVATIONS)
    check_choice("pool", pool, reference.POOLS)
    _check_weight(weight, connections)
    _check_maps("bias", bias, connections.out_channels)
    batched, padding = _prepare_input(input, connections.in_channels, padding, weight.shape[-1], pool)
    run = _operator("sparse_conv_act_pool", _resolve_backend(backend, input))
    output = run(batched, weight, bias, connections.indices, connections.out_channels, padding, activation, pool)
    return output if input.dim() == 4 else output.squeeze(0)


def conv_subsample(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficient: Tensor,
    pool_bias: Tensor,
    *,
    table: Tensor | Connections | None = None,
    padding: int | str = 0,
    activation: str = "scaled_tanh",
    backend: str = "auto",
) -> Tensor:
    """A convolution and a trainable subsampling layer in one: a C+S pair of LeCun et al. (1998), section II.B.

    ``act(coefficient[c] * (sum over the 2x2 window of act(conv2d(input, weight, bias))) + pool_bias[c])``.

    Args:
        input: (N, C_in, H, W) or (C_in, H, W); contiguous or copied, as in `conv_act_pool`.
        weight: (C_out, C_in, K, K), or with a table (connections, K, K) as in `sparse_conv_act_pool`.
        bias: (C_out,) or None.
        coefficient: (C_out,), the trainable factor of the sum.
        pool_bias: (C_out,), the trainable bias of the subsampling.
        table: bool (C_out, C_in), `tables.Connections`, or None for all connections.
        padding: as in `conv_act_pool`; so are activation and backend.

    Returns:
        (N, C_out, H_out, W_out) or (C_out, H_out, W_out), in the dtype of `input`; under autocast in its dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as `conv_act_pool`.
    """
    connections = None if table is None else Connections.of(table)
    _check_tensors(input=input, weight=weight, bias=bias, coefficient=coefficient, pool_bias=pool_bias)
    check_choice("activation", activation, reference.ACTIVATIONS)
    out_channels, in_channels = _check_weight(weight, connections)
    for name, tensor in (("bias", bias), ("coefficient", coefficient), ("pool_bias", pool_bias)):
        _check_maps(name, tensor, out_channels)
    batched, padding = _prepare_input(input, in_channels, padding, weight.shape[-1], "avg")
    run = _operator("conv_subsample", _resolve_backend(backend, input))
    indices = None if connections is None else connections.indices
    output = run(batched, weight, bias, coefficient, pool_bias, indices, padding, activation)
    return output if input.dim() == 4 else output.squeeze(0)


def linear_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "sigmoid",
    backend: str = "auto",
) -> Tensor:
    """A dense layer and its activation: ``act(F.linear(input, weight, bias))``.

    The Triton kernel never takes TF32. Plain PyTorch, and the gradients of `input` and `weight` with either, are
    PyTorch's matrix products: in TF32 only where it has been told so (`torch.set_float32_matmul_precision`,
    `torch.backends.cuda.matmul.allow_tf32`).

    Args:
        input: (N, D) or (D,), floating.
        weight: (O, D), dtype and device of `input`.
        bias: (O,) or None.
        activation: as in `conv_act_pool`.
        backend: "auto" and "reference" are plain PyTorch, "triton" is one kernel (on a GPU not measured yet).

    Returns:
        (N, O) or (O,), in the dtype of `input`.

    Raises:
        ValueError, TypeError, RuntimeError: as `conv_act_pool`.
    """
    _check_tensors(input=input, weight=weight, bias=bias)
    check_choice("activation", activation, reference.ACTIVATIONS)
    batched = _prepare_features(input, weight, "weight")
    _check_maps("bias", bias, weight.shape[0])
    output = _dense_operator("linear_act", backend, input)(batched, weight, bias, activation)
    return output if input.dim() == 2 else output.squeeze(0)


def rbf(input: Tensor, codes: Tensor, *, backend: str = "auto") -> Tensor:
    """Squared Euclidean distances: LeCun et al. (1998), equation (7), the output layer of LeNet-5.

    Args:
        input: (N, D) or (D,), floating.
        codes: (C, D), the code of each class; dtype and device of `input`.
        backend: "auto" and "reference" are plain PyTorch, "triton" is one kernel (on a GPU not measured yet).

    Returns:
        (N, C) or (C,), in the dtype of `input`.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: a dtype that is not floating, or not the same.
        RuntimeError: `backend` names one that cannot run here, with the reason.
    """
    _check_tensors(input=input, codes=codes)
    batched = _prepare_features(input, codes, "codes")
    output = _dense_operator("rbf", backend, input)(batched, codes)
    return output if input.dim() == 2 else output.squeeze(0)


def map_loss(distances: Tensor, target: Tensor, *, j: float) -> Tensor:
    """LeCun's discriminative criterion ("MAP"): LeCun et al. (1998), equation (9), mean over the batch.

    ``mean(y_D + log(exp(-j) + sum_i exp(-y_i)))`` with y the distances and D the target: pulls the right class near
    and pushes the wrong ones away, with exp(-j) standing for a rubbish class. No distance overflows.

    Args:
        distances: (N, C), floating; e.g. from `rbf`.
        target: (N,), the classes as integers in [0, C).
        j: positive or 0; the smaller, the less wrong classes matter once they are far.

    Returns:
        A scalar of the dtype of `distances`.

    Raises:
        ValueError: shapes that do not fit, a negative or non-finite j.
        TypeError: dtypes other than floating and integer.
    """
    _check_tensors(input=distances)
    if distances.dim() != 2 or _shape(target) != _shape(distances)[:1]:
        raise ValueError(f"target: expected (N,) for distances (N, C), got {_shape(target)} for {_shape(distances)}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target: expected an integer dtype, got {target.dtype}")
    if not (isinstance(j, int | float) and 0 <= j < float("inf")):
        raise ValueError(f"j: expected a finite number of at least 0, got {j!r}")
    rubbish = torch.full_like(distances[:, :1], -j)
    penalty = torch.logsumexp(torch.cat([-distances, rubbish], dim=1), dim=1)
    return (distances.gather(1, target.long().unsqueeze(1)).squeeze(1) + penalty).mean()


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


def _check_weight(weight: Tensor, connections: Connections | None) -> tuple[int, int]:
    """Output and input channels of the weight, dense or packed."""
    shape = _shape(weight)
    if connections is None:
        if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
            raise ValueError(f"weight: expected (C_out, C_in, K, K) with a square kernel, got shape {shape}")
        return shape[0], shape[1]
    if len(shape) != 3 or shape[0] != len(connections) or shape[1] != shape[2] or shape[2] == 0:
        raise ValueError(
            f"weight: expected ({len(connections)}, K, K), a square kernel for each connection of table, got {shape}"
        )
    return connections.out_channels, connections.in_channels


def _check_maps(name: str, tensor: Tensor | None, out_channels: int) -> None:
    if tensor is not None and _shape(tensor) != (out_channels,):
        raise ValueError(f"{name}: expected shape ({out_channels},), one value an output map, got {_shape(tensor)}")


def _prepare_input(
    input: Tensor, in_channels: int, padding: int | str, kernel_size: int, pool: str
) -> tuple[Tensor, int]:
    """The input with a batch dimension, and the padding as an int."""
    if input.dim() not in (3, 4):
        raise ValueError(f"input: expected (N, C, H, W) or (C, H, W), got {input.dim()} dimensions: {_shape(input)}")
    if input.shape[-3] != in_channels:
        raise ValueError(
            f"input: expected {in_channels} channels as weight has, got {input.shape[-3]} in shape {_shape(input)}"
        )
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    return _resolve_padding(batched, padding, kernel_size, pool)


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
    if not 0 <= padding < 2**31:
        raise ValueError(f"padding: expected at least 0 and below 2**31, got {padding}")
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
    if backend != "auto" and (reason := backends.why_unavailable(backend, input.device)) is not None:
        raise RuntimeError(f"backend: {backend!r} cannot run here: {reason}")
    return backend


def _operator(name: str, backend: str) -> Callable[..., Tensor]:
    if backend == "reference":
        return getattr(reference, name)
    return (ops.triton if backend == "triton" else ops.dispatched)[name]


def _prepare_features(input: Tensor, rows: Tensor, name: str) -> Tensor:
    """The input of a dense layer with a batch dimension."""
    if input.dim() not in (1, 2) or rows.dim() != 2 or input.shape[-1] != rows.shape[1]:
        raise ValueError(f"{name}: expected (rows, D) for an input (N, D), got {_shape(rows)} for {_shape(input)}")
    return input if input.dim() == 2 else input.unsqueeze(0)


def _dense_operator(name: str, backend: str, input: Tensor) -> Callable[..., Tensor]:
    check_choice("backend", backend, ("auto", "triton", "reference"))
    if _resolve_backend(backend, input) == "triton":
        return ops.triton[name]
    return getattr(reference, name)
