"""Triton kernels of the dense layers: linear + activation, and the distances of the RBF output layer.

For N images, D inputs and O outputs: linear_act 2 N D O operations, rbf 3 N D O; each reads both operands and writes
the N O results once. These kernels take their sums in float64 for float64 and in float32 otherwise, never in TF32. The
gradients of linear_act's input and weight are PyTorch's own matrix products (`triton_dense.linear_act_backward`).
"""

import triton
import triton.language as tl

from .triton_kernels import activate, activation_derivative


@triton.jit
def linear_act_kernel(
    input, weight, bias, grad_output, output, batch, features, outputs,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, BACKWARD: tl.constexpr,
    IMAGES: tl.constexpr, OUTPUTS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """act(input @ weight.T + bias), or its derivative there times grad_output: (batch, outputs)."""
    DTYPE: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    image = tl.program_id(0).to(tl.int64) * IMAGES + tl.arange(0, IMAGES)[:, None]
    row = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    z = tl.zeros((IMAGES, OUTPUTS), DTYPE)
    start = 0
    while start < features:
        feature = start + tl.arange(0, FEATURES)
        values = tl.load(
            input + image * features + feature[None, :], mask=(image < batch) & (feature < features)[None, :], other=0
        )
        weights = tl.load(
            weight + row.to(tl.int64)[None, :] * features + feature[:, None],
            mask=(row < outputs)[None, :] & (feature < features)[:, None],
            other=0,
        )
        z += tl.dot(values.to(DTYPE), weights.to(DTYPE), input_precision="ieee", out_dtype=DTYPE)
        start += FEATURES
    if BIAS:
        z += tl.load(bias + row, mask=row < outputs, other=0).to(DTYPE)[None, :]
    target = image * outputs + row[None, :]
    valid = (image < batch) & (row < outputs)[None, :]
    if BACKWARD:
        value = activation_derivative(z, ACTIVATION) * tl.load(grad_output + target, mask=valid, other=0).to(DTYPE)
    else:
        value = activate(z, ACTIVATION)
    tl.store(output + target, value.to(output.dtype.element_ty), mask=valid)


@triton.jit
def rbf_kernel(input, codes, output, batch, features, classes, CLASSES: tl.constexpr, IMAGES: tl.constexpr):
    """Squared distances (batch, classes) of inputs (batch, features) to codes (classes, features)."""
    DTYPE: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    image = tl.program_id(0).to(tl.int64) * IMAGES + tl.arange(0, IMAGES)
    label = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    distances = tl.zeros((CLASSES, IMAGES), DTYPE)
    feature = 0
    while feature < features:
        values = tl.load(input + image * features + feature, mask=image < batch, other=0).to(DTYPE)
        code = tl.load(codes + label.to(tl.int64) * features + feature, mask=label < classes, other=0).to(DTYPE)
        difference = values[None, :] - code[:, None]  # expanding the square would cancel
        distances += difference * difference
        feature += 1
    valid = (label < classes)[:, None] & (image < batch)[None, :]
    target = image[None, :] * classes + label[:, None]
    tl.store(output + target, distances.to(output.dtype.element_ty), mask=valid)


@triton.jit
def rbf_input_gradient_kernel(grad_output, input, codes, grad_input, batch, features, classes, BLOCK: tl.constexpr):
    """2 * sum over classes of grad_output * (input - code): (batch, features)."""
    DTYPE: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    image = position // features
    feature = position % features
    values = tl.load(input + position, mask=image < batch, other=0).to(DTYPE)
    sums = tl.zeros((BLOCK,), DTYPE)
    label = 0
    while label < classes:
        grad = tl.load(grad_output + image * classes + label, mask=image < batch, other=0).to(DTYPE)
        code = tl.load(codes + tl.cast(label, tl.int64) * features + feature, mask=image < batch, other=0).to(DTYPE)
        sums += grad * (values - code)
        label += 1
    tl.store(grad_input + position, (2.0 * sums).to(grad_input.dtype.element_ty), mask=image < batch)
