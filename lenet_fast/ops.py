"""The operators' one declaration: schema, fallback, fake, autograd, vmap and autocast of torch.ops.lenet_fast.*.

An operator is a `torch.autograd.Function` around the raw, dispatched kernel rather than `register_autograd`, because
only the former works under torch.func (grad, vmap, jacrev) and refuses forward mode instead of returning a zero
tangent. The same Function serves direct calls and the dispatcher's autograd key, so both routes agree.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends, reference

_NAMESPACE = "lenet_fast"
_library = torch.library.Library(_NAMESPACE, "DEF")
_AUTOCAST_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


class _Operator(torch.autograd.Function):
    """A Function whose arguments are always complete and positional."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        # Function.apply binds the arguments to forward's signature: 15 us a call that complete arguments don't need.
        return super(torch.autograd.Function, cls).apply(*args)


def _declare(schema: str, operator: type[_Operator], fallback: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define one operator: `fallback` (plain PyTorch) serves every device without a kernel of its own."""
    name = schema.partition("(")[0]

    def run_fallback(input: Tensor, *args: Any) -> Any:
        backends.warn_reference(input.device.type)
        return fallback(input, *args)

    def run_autograd(*args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(f"torch.ops.lenet_fast.{name} is the raw operator: under torch.func, call "
                               f"lenet_fast.functional.{name.removesuffix('_backward')} instead")
        return operator.apply(*args)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    # Dynamo must not trace into a kernel that a compiled graph calls.
    _library.impl(name, torch.compiler.disable(run_fallback), "CompositeExplicitAutograd")
    _library.impl(name, torch.compiler.disable(run_autograd), "Autograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_library)


def _raw(name: str, *args: Any) -> Any:
    """Call the kernel of operator `name` below autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.lenet_fast, name).default(*args)


def _under_autocast(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as torch.autocast hands them to a convolution: in the lower precision, float64 left alone."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def _declare_autocast(name: str, num_tensors: int) -> None:
    """Under autocast, cast the operator's first `num_tensors` arguments."""
    for device_type, key in _AUTOCAST_DEVICES.items():

        def cast_and_call(*args: Any, device_type: str = device_type, key: str = key) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
                tensors = _under_autocast(device_type, *args[:num_tensors])
                return getattr(torch.ops.lenet_fast, name).default(*tensors, *args[num_tensors:])

        _library.impl(name, torch.compiler.disable(cast_and_call), key)


def _call(operator: type[_Operator], name: str, tensors: tuple[Tensor | None, ...], *options: Any) -> Any:
    """Run an operator: as one node of the graph when compiling or exporting, else straight into its Function."""
    if torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():  # Dynamo cannot trace a Function under torch.func
            return getattr(reference, name)(*tensors, *options)
        return getattr(torch.ops.lenet_fast, name).default(*tensors, *options)
    device_type = tensors[0].device.type
    if device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type):
        tensors = _under_autocast(device_type, *tensors)
    return operator.apply(*tensors, *options)


def _unstack(value: Any, dim: int | None, index: int) -> Any:
    return value if dim is None else value.select(dim, index)


def _vmap_by_loop(operator: type[_Operator], info: Any, in_dims: tuple[int | None, ...], args: tuple) -> tuple:
    """One call a slice: the rule for whatever cannot be folded into the batch."""
    slices = [
        operator.apply(*(_unstack(a, d, i) for a, d in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(slices[0], Tensor):
        return torch.stack(slices), 0
    return tuple(torch.stack(s) for s in zip(*slices, strict=True)), (0,) * len(slices[0])


def output_size(size: Any, kernel_size: Any, padding: Any, pool: str) -> Any:
    """Output height (or width) of convolution and pooling; int or SymInt."""
    size = size + 2 * padding - kernel_size + 1
    return size if pool == "none" else size // 2


# --- conv_act_pool ---------------------------------------------------------------------------------------------------


class ConvActPool(_Operator):
    """pool(act(conv2d(input, weight, bias))): (input, weight, bias, padding, activation, pool) -> output."""

    @staticmethod
    def forward(input, weight, bias, padding, activation, pool):
        return _raw("conv_act_pool", input, weight, bias, padding, activation, pool)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, *ctx.options = inputs
        ctx.save_for_backward(input, weight, bias)

    @staticmethod
    def backward(ctx, grad_output):
        needs = ctx.needs_input_grad[:3]
        grads = ConvActPoolBackward.apply(grad_output, *ctx.saved_tensors, *ctx.options, *needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        if in_dims[1:] != (None,) * 5:
            return _vmap_by_loop(ConvActPool, info, in_dims, args)
        input = args[0].movedim(in_dims[0], 0)
        output = ConvActPool.apply(input.flatten(0, 1), *args[1:])
        return output.unflatten(0, input.shape[:2]), 0


class ConvActPoolBackward(_Operator):
    """Gradients of `ConvActPool`; recomputes the pre-activation from its inputs. Empty tensors where not needed."""

    @staticmethod
    def forward(grad_output, input, weight, bias, padding, activation, pool, need_input, need_weight, need_bias):
        return _raw(
            "conv_act_pool_backward",
            *(grad_output, input, weight, bias, padding, activation, pool, need_input, need_weight, need_bias),
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:]

    @staticmethod
    def backward(ctx, *grad_grads):
        def gradients(*tensors):
            return _conv_act_pool_backward_reference(*tensors, *ctx.options)

        return *_pull_back(gradients, ctx.saved_tensors, grad_grads), *(None,) * 6

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap_by_loop(ConvActPoolBackward, info, in_dims, args)


def _pull_back(function: Callable, tensors: tuple[Tensor | None, ...], grads: Any) -> list[Tensor | None]:
    """Vector-Jacobian product of plain PyTorch `function`, for those of its arguments that are tensors."""
    present = [i for i, t in enumerate(tensors) if t is not None]

    def of_present(*values):
        arguments = list(tensors)
        for i, value in zip(present, values, strict=True):
            arguments[i] = value
        return function(*arguments)

    _, pull = torch.func.vjp(of_present, *(tensors[i] for i in present))
    result: list[Tensor | None] = [None] * len(tensors)
    for i, grad in zip(present, pull(grads), strict=True):
        result[i] = grad
    return result


def _conv_act_pool_backward_reference(
    grad_output, input, weight, bias, padding, activation, pool, need_input, need_weight, need_bias
):
    def forward(*tensors):
        return reference.conv_act_pool(*tensors, padding, activation, pool)

    grads = _pull_back(forward, (input, weight, bias), grad_output)
    needs = (need_input, need_weight, need_bias and bias is not None)
    return tuple(g if need else input.new_empty(0) for g, need in zip(grads, needs, strict=True))


def _conv_act_pool_fake(input, weight, bias, padding, activation, pool):
    kernel_size = weight.shape[-1]
    height, width = (output_size(s, kernel_size, padding, pool) for s in input.shape[-2:])
    return input.new_empty((input.shape[0], weight.shape[0], height, width))


def _conv_act_pool_backward_fake(
    grad_output, input, weight, bias, padding, activation, pool, need_input, need_weight, need_bias
):
    return (
        input.new_empty(input.shape if need_input else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias and bias is not None else 0),
    )


_declare(
    "conv_act_pool(Tensor input, Tensor weight, Tensor? bias, int padding, str activation, str pool) -> Tensor",
    ConvActPool,
    reference.conv_act_pool,
    _conv_act_pool_fake,
)
_declare(
    "conv_act_pool_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, int padding, "
    "str activation, str pool, bool need_input, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    ConvActPoolBackward,
    _conv_act_pool_backward_reference,
    _conv_act_pool_backward_fake,
)
_declare_autocast("conv_act_pool", num_tensors=3)


def conv_act_pool(
    input: Tensor, weight: Tensor, bias: Tensor | None, padding: int, activation: str, pool: str
) -> Tensor:
    """The operator on checked arguments; see `functional.conv_act_pool`."""
    return _call(ConvActPool, "conv_act_pool", (input, weight, bias), padding, activation, pool)


backends.missing_native()  # registers the compiled kernels on the operators declared above
