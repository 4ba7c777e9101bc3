"""What a differentiable operator is: schema, fallback, fake, autograd, vmap and autocast, made from one declaration.

An operator is a `torch.autograd.Function` around the raw, dispatched kernel rather than `register_autograd`, because
only the former works under torch.func (grad, vmap, jacrev) and refuses forward mode instead of returning a zero
tangent. The same Function serves direct calls and the dispatcher's autograd key, so both routes agree.

Every operator has its gradients as a second operator, `<name>_backward`, whose own derivative is that of the plain
PyTorch definition: double backward is right at any order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # as torch.compiler.disable, but imports Dynamo (and Triton) when called
from torch._subclasses.functional_tensor import FunctionalTensorMode

from . import backends, reference

__all__ = ["DifferentiableOperator", "TritonOperator", "library"]

_NAMESPACE = "lenet_fast"
library = torch.library.Library(_NAMESPACE, "DEF")
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


class _Function(torch.autograd.Function):
    """A Function whose arguments are always complete and positional."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        # Function.apply binds the arguments to forward's signature: 15 us a call that complete arguments don't need.
        return super(torch.autograd.Function, cls).apply(*args)


class DifferentiableOperator:
    """Declares `name` and `name_backward`, and calls them.

    The first `len(tensors)` arguments are differentiable tensors, the first of them batched along dimension 0 like the
    output; the rest are options. A tensor whose name ends in "?" may be None.

    Args:
        name: the operator, also the name of its plain PyTorch definition in `reference`.
        tensors: names of the tensor arguments.
        options: the other arguments as the schema declares them, e.g. "int padding, str pool".
        fake: output without data from the same arguments.
        general: for a convolution, its arguments as those of the general one, which the native `_conv_recording` and
            the Triton kernels compute: input, weight, bias, coefficient, pool_bias, connections, out_channels, padding,
            activation, pool. A dense weight tells its out_channels itself; a coefficient means subsampling.
    """

    suffix = ""
    can_record = True

    def __init__(
        self,
        name: str,
        tensors: Sequence[str],
        options: str,
        fake: Callable[..., Tensor],
        general: Callable[..., tuple] | None = None,
    ) -> None:
        self.name = name + self.suffix
        self.kernel = name
        self.general = general
        self.num_tensors = len(tensors)
        self.definition: Callable[..., Tensor] = getattr(reference, name)
        self.backward_function = self._backward_function()
        self.function = self._forward_function()
        self.recording_function = self._recording_function()

        declared = [f"Tensor{'?' * t.endswith('?')} {t.removesuffix('?')}" for t in tensors]
        needs = [f"bool need_{t.removesuffix('?')}" for t in tensors]
        results = ", ".join(["Tensor"] * len(tensors))
        declared += [options] * bool(options)
        schema = f"({', '.join(declared)}) -> Tensor"
        backward_schema = f"({', '.join(['Tensor grad_output', *declared, *needs])}) -> ({results})"
        self._declare("", schema, self.function, fake)
        self._declare("_backward", backward_schema, self.backward_function, self._fake_gradients)
        for device_type, key in _AUTOCAST_KEYS.items():
            library.impl(self.name, _disable_dynamo(self._under_autocast(device_type, key)), key)

    def __call__(self, *args: Any) -> Tensor:
        """Run on checked arguments: as one node of the graph when compiling, else straight into the Function."""
        if torch.compiler.is_compiling():
            if torch._C._are_functorch_transforms_active():  # Dynamo cannot trace a Function under torch.func
                return self.definition(*args)
            return self._packet(self.name)(*args)
        device_type = args[0].device.type
        if device_type in _AUTOCAST_KEYS and torch.is_autocast_enabled(device_type):
            args = self._cast(device_type, args)
        return (self.recording_function if self._records(args) else self.function).apply(*args)

    def _records(self, args: tuple) -> bool:
        """Whether forward should keep what spares backward a second forward: the native CPU kernels can."""
        return (
            self.can_record
            and self.general is not None
            and args[0].device.type == "cpu"
            and torch.is_grad_enabled()
            and any(t is not None and t.requires_grad for t in args[: self.num_tensors])
            and not torch._C._are_functorch_transforms_active()
            and backends.why_unavailable("native", "cpu") is None
        )

    @staticmethod
    def _packet(name: str) -> Any:
        return getattr(torch.ops.lenet_fast, name).default

    def _kernel(self, name: str) -> Callable[..., Any]:
        """The dispatched kernel, below autograd."""

        def run(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return self._packet(name)(*args)

        return run

    def _declare(self, direction: str, schema: str, function: type[_Function], fake: Callable[..., Any]) -> None:
        name = self.name + direction

        def run_autograd(*args: Any) -> Any:
            if torch._C._are_functorch_transforms_active():
                raise RuntimeError(
                    f"torch.ops.lenet_fast.{name} is the raw operator: under torch.func, call "
                    f"lenet_fast.functional.{self.kernel} instead"
                )
            return function.apply(*args)

        def run_fake(*args: Any) -> Any:
            devices = {arg.device for arg in args if isinstance(arg, Tensor)}
            if len(devices) > 1:  # a real tensor among meta ones would get a result that nobody computes
                raise RuntimeError(
                    f"lenet_fast.{name}: expected all tensors on one device, got {sorted(map(str, devices))}"
                )
            return fake(*args)

        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Dynamo must not trace into a kernel that a compiled graph calls.
        library.impl(name, _disable_dynamo(run_autograd), "Autograd")
        torch.library.register_fake(f"{_NAMESPACE}::{name}", run_fake, lib=library)
        self._implement(name, schema, is_backward=bool(direction))

    def _implement(self, name: str, schema: str, *, is_backward: bool) -> None:
        """Register what runs where no compiled library has kernels.

        Under the operator's own name where none was loaded, and as `_<name>_fallback` for a library whose kernels
        cannot run on the device at hand (csrc/served_device.h).
        """

        def run_fallback(*args: Any) -> Any:
            if backends.fall_back(args[0].device) == "triton":
                return (self.run_triton_backward if is_backward else self.run_triton)(*args)
            # Contiguous as `fake` says, and as the kernels': PyTorch's convolutions keep the input's memory format.
            if is_backward:
                return tuple(grad.contiguous() for grad in self._gradients(*args))
            return self.definition(*args).contiguous()

        library.define(f"_{name}_fallback{schema}")
        for each in (name, f"_{name}_fallback"):
            library.impl(each, _disable_dynamo(run_fallback), "CompositeExplicitAutograd")

    def run_triton(self, *args: Any) -> Tensor:
        """On the Triton kernels."""
        from . import triton_conv, triton_dense  # imports Triton

        if self.general is None:
            return getattr(triton_dense, self.kernel)(*args)
        return triton_conv.Convolution(*self.general(*args)).forward()

    def run_triton_backward(self, grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """Its gradients on the Triton kernels; an empty tensor for each that is not needed."""
        from . import triton_conv, triton_dense

        if self.general is None:
            return getattr(triton_dense, f"{self.kernel}_backward")(grad_output, *args)
        tensors, options, needs = self._split(args)
        return triton_conv.Convolution(*self.general(*tensors, *options)).backward(grad_output, needs)

    # --- autograd ----------------------------------------------------------------------------------------------------

    def _forward_function(self) -> type[_Function]:
        operator, kernel = self, self._kernel(self.name)

        class Forward(_Function):
            @staticmethod
            def forward(*args: Any) -> Tensor:
                return kernel(*args)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
                ctx.save_for_backward(*inputs[: operator.num_tensors])
                ctx.options = inputs[operator.num_tensors :]

            @staticmethod
            def backward(ctx: Any, grad_output: Tensor) -> tuple:
                needs = ctx.needs_input_grad[: operator.num_tensors]
                grads = operator.backward_function.apply(grad_output, *ctx.saved_tensors, *ctx.options, *needs)
                wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
                return *wanted, *(None for _ in ctx.options)

            @staticmethod
            def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
                if _batched(args[1:], in_dims[1:]):
                    return _vmap_by_loop(Forward, info, in_dims, args)
                batched = args[0].movedim(in_dims[0], 0)
                output = Forward.apply(batched.flatten(0, 1), *args[1:])
                return output.unflatten(0, batched.shape[:2]), 0

        Forward.__name__ = self.name
        return Forward

    def _recording_function(self) -> type[_Function]:
        operator, forward, backward = self, self._kernel("_conv_recording"), self._kernel("_conv_recorded_backward")

        class Recording(_Function):
            """`Forward` for plain autograd on the CPU."""

            @staticmethod
            def forward(ctx: Any, *args: Any) -> Tensor:
                output, record = forward(*operator.general(*args))
                ctx.save_for_backward(record, *args[: operator.num_tensors])
                ctx.options = args[operator.num_tensors :]
                return output

            @staticmethod
            def backward(ctx: Any, grad_output: Tensor) -> tuple:
                record, *tensors = ctx.saved_tensors
                args, needs = (*tensors, *ctx.options), ctx.needs_input_grad[: operator.num_tensors]
                if torch.is_grad_enabled():  # create_graph: the gradients must be differentiable themselves
                    grads = operator.backward_function.apply(grad_output, *args, *needs)
                else:
                    needs_all = needs + (False,) * (5 - len(needs))
                    grads = backward(grad_output, record, *operator.general(*args), *needs_all)
                wanted = (grad if need else None for grad, need in zip(grads, needs, strict=False))
                return *wanted, *(None for _ in ctx.options)

        Recording.__name__ = self.name
        return Recording

    def _backward_function(self) -> type[_Function]:
        operator, kernel = self, self._kernel(f"{self.name}_backward")

        class Backward(_Function):
            @staticmethod
            def forward(*args: Any) -> tuple[Tensor, ...]:
                return kernel(*args)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
                ctx.save_for_backward(*inputs[: operator.num_tensors + 1])
                ctx.options = inputs[operator.num_tensors + 1 :]

            @staticmethod
            def backward(ctx: Any, *grad_grads: Tensor) -> tuple:
                def gradients(*tensors: Tensor | None) -> tuple[Tensor, ...]:
                    return operator._gradients(*tensors, *ctx.options)

                grads = _vector_jacobian_product(gradients, ctx.saved_tensors, grad_grads)
                return *grads, *(None for _ in ctx.options)

            @staticmethod
            def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
                return _vmap_by_loop(Backward, info, in_dims, args)

        Backward.__name__ = f"{self.name}_backward"
        return Backward

    def _gradients(self, grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """`name_backward` by differentiating the plain definition; an empty tensor for each gradient not needed."""
        tensors, options, needs = self._split(args)

        def forward(*tensors: Tensor | None) -> Tensor:
            return self.definition(*tensors, *options)

        grads = _vector_jacobian_product(forward, tensors, grad_output)
        return tuple(
            grad if need and grad is not None else grad_output.new_empty(0)
            for grad, need in zip(grads, needs, strict=True)
        )

    def _fake_gradients(self, grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
        tensors, _, needs = self._split(args)
        return tuple(
            torch.empty_like(tensor, memory_format=torch.contiguous_format)
            if need and tensor is not None
            else grad_output.new_empty(0)
            for tensor, need in zip(tensors, needs, strict=True)
        )

    def _split(self, args: tuple) -> tuple[tuple, tuple, tuple]:
        """Tensors, options and needs of `name_backward`'s arguments after grad_output."""
        return args[: self.num_tensors], args[self.num_tensors : -self.num_tensors], args[-self.num_tensors :]

    # --- autocast ----------------------------------------------------------------------------------------------------

    def _cast(self, device_type: str, args: tuple) -> tuple:
        """The tensors as torch.autocast hands them to a convolution: in the lower precision, float64 left alone."""
        dtype = torch.get_autocast_dtype(device_type)
        tensors = (
            t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)
            for t in args[: self.num_tensors]
        )
        return *tensors, *args[self.num_tensors :]

    def _under_autocast(self, device_type: str, key: str) -> Callable[..., Tensor]:
        key_set = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def cast_and_call(*args: Any) -> Tensor:
            with torch._C._ExcludeDispatchKeyGuard(key_set):
                return self._packet(self.name)(*self._cast(device_type, args))

        return cast_and_call


class TritonOperator(DifferentiableOperator):
    """`name` as `<name>_triton`: on the Triton kernels, whatever else is there; compiled graphs see these kernels.

    As torch.library.triton_op has it, which however takes the autograd key for itself.
    """

    suffix = "_triton"
    can_record = False

    def _implement(self, name: str, schema: str, *, is_backward: bool) -> None:
        def run(*args: Any) -> Any:  # no bound method: _disable_dynamo sets an attribute of it
            return (self.run_triton_backward if is_backward else self.run_triton)(*args)

        def decompose(mode: FunctionalTensorMode, operator: Any, types: tuple, args: tuple, kwargs: Any = None) -> Any:
            # An exported program keeps the operator; a graph cannot hold what Triton's interpreter runs.
            if torch.compiler.is_exporting() or backends.triton_is_interpreted():
                return mode.__torch_dispatch__(operator, types, args, kwargs or {})
            with mode:
                return run(*args)

        library.impl(name, _disable_dynamo(run), "CompositeExplicitAutograd")
        torch.library.register_torch_dispatch(f"{_NAMESPACE}::{name}", FunctionalTensorMode, decompose, lib=library)


def _batched(args: tuple, in_dims: tuple) -> list[int]:
    """Which arguments vmap maps over; an option's dimension is None, or a structure of None."""
    return [
        i for i, (arg, dim) in enumerate(zip(args, in_dims, strict=True)) if isinstance(arg, Tensor) and dim is not None
    ]


def _vmap_by_loop(function: type[_Function], info: Any, in_dims: tuple, args: tuple) -> tuple:
    """One call a slice: the rule for whatever cannot be folded into the batch."""
    batched = _batched(args, in_dims)

    def one_slice(index: int) -> Any:
        values = list(args)
        for i in batched:
            values[i] = args[i].select(in_dims[i], index)
        return function.apply(*values)

    slices = [one_slice(index) for index in range(info.batch_size)]
    if isinstance(slices[0], Tensor):
        return torch.stack(slices), 0
    return tuple(map(torch.stack, zip(*slices, strict=True))), (0,) * len(slices[0])


def _vector_jacobian_product(function: Callable, tensors: Sequence[Tensor | None], grads: Any) -> list[Tensor | None]:
    """Gradients of a plain PyTorch function for those of its arguments that are there; differentiable themselves."""
    present = [i for i, t in enumerate(tensors) if t is not None]

    def of_present(*values: Tensor) -> Any:
        arguments = list(tensors)
        for i, value in zip(present, values, strict=True):
            arguments[i] = value
        return function(*arguments)

    _, pull_back = torch.func.vjp(of_present, *(tensors[i] for i in present))
    result: list[Tensor | None] = [None] * len(tensors)
    for i, grad in zip(present, pull_back(grads), strict=True):
        result[i] = grad
    return result
