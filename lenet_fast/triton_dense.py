"""The dense layers on the Triton kernels. Importing this imports Triton."""

import torch
from torch import Tensor
from triton import next_power_of_2

from . import triton_dense_kernels as kernels
from .triton_launch import INTERPRETED, cdiv, launch


def linear_act(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """As `reference.linear_act`."""
    return _linear_act(input.contiguous(), weight.contiguous(), bias, activation, None)


def linear_act_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, *needs: bool
) -> tuple[Tensor, ...]:
    """Gradients of input, weight and bias; an empty tensor for each that is not needed.

    Those of input and weight are products by cuBLAS. In float32 they are taken in TF32 only where PyTorch has been told
    that its own may be: `torch.set_float32_matmul_precision`, `torch.backends.cuda.matmul.allow_tf32`.
    """
    need_input, need_weight, need_bias = needs
    grad = _linear_act(input.contiguous(), weight.contiguous(), bias, activation, grad_output.contiguous())
    empty = input.new_empty(0)
    return (
        grad @ weight if need_input else empty,
        grad.mT @ input if need_weight else empty,
        grad.sum(0) if need_bias and bias is not None else empty,
    )


def _linear_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, grad_output: Tensor | None
) -> Tensor:
    _check(input, weight, "weight")
    (batch, features), outputs = input.shape, weight.shape[0]
    tile = 64 if INTERPRETED else 32
    result = input.new_empty((batch, outputs))
    launch(
        kernels.linear_act_kernel,
        (cdiv(batch, tile), cdiv(outputs, 32)),
        input,
        weight,
        weight if bias is None else bias.contiguous(),
        input if grad_output is None else grad_output,
        result,
        batch,
        features,
        outputs,
        ACTIVATION=activation,
        BIAS=bias is not None,
        BACKWARD=grad_output is not None,
        IMAGES=tile,
        OUTPUTS=32,
        FEATURES=32,
    )
    return result


def rbf(input: Tensor, codes: Tensor) -> Tensor:
    """As `reference.rbf`."""
    _check(input, codes, "codes")
    (batch, features), classes = input.shape, codes.shape[0]
    tile = min(16, next_power_of_2(int(classes)))
    output = input.new_empty((batch, classes))
    launch(
        kernels.rbf_kernel,
        (cdiv(batch, 64), cdiv(classes, tile)),
        input.contiguous(),
        codes.contiguous(),
        output,
        batch,
        features,
        classes,
        CLASSES=tile,
        IMAGES=64,
        num_warps=2,
    )
    return output


def rbf_backward(grad_output: Tensor, input: Tensor, codes: Tensor, *needs: bool) -> tuple[Tensor, ...]:
    """Gradients of input and codes; an empty tensor for each that is not needed."""
    _check(input, codes, "codes")
    need_input, need_codes = needs
    (batch, features), classes = input.shape, codes.shape[0]
    empty = input.new_empty(0)
    grad_input = grad_codes = empty
    if need_input:
        grad_input = torch.empty_like(input, memory_format=torch.contiguous_format)
        launch(
            kernels.rbf_input_gradient_kernel,
            (cdiv(batch * features, 128),),
            grad_output.contiguous(),
            input.contiguous(),
            codes.contiguous(),
            grad_input,
            batch,
            features,
            classes,
            BLOCK=128,
        )
    if need_codes:  # they are constants in every model here
        difference = codes - input.unsqueeze(1)
        grad_codes = 2 * (difference * grad_output.unsqueeze(2)).sum(0)
    return grad_input, grad_codes


def _check(input: Tensor, other: Tensor, name: str) -> None:
    fits = input.dim() == 2 and other.dim() == 2 and input.shape[1] == other.shape[1]
    if not fits or other.dtype != input.dtype or other.device != input.device:
        raise RuntimeError(
            f"{name}: expected (rows, {input.shape[-1]}) {input.dtype} on {input.device}, "
            f"got {tuple(other.shape)} {other.dtype} on {other.device}"
        )
