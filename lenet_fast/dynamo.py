"""The backend of `torch.compile` that runs Conv2d -> activation -> 2x2 pooling fused, and what calls a model with it.

PyTorch's Dynamo reads a forward as it runs and hands its graphs to a backend, with guards on all that it looked at.
This backend puts the fused operator in the place of each run, and leaves everything else of the graph as it is.
Importing this module imports no part of Dynamo, which takes a second: that happens when a model is first called.
"""

import functools
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from .eager import is_intercepted
from .runs import fuse

__all__ = ["backend", "compiled_forward"]

# Compilations of one function that Dynamo keeps: one for each architecture, mode, dtype, ... of a class of models.
_RECOMPILE_LIMIT = 256


def backend(
    graph_module: fx.GraphModule,
    example_inputs: list[Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="lenet_fast")``: what PyTorch calls with each graph of a model.

    Args:
        graph_module: the graph that Dynamo captured.
        example_inputs: its inputs.
        mode: has to be None; it is Inductor's.
        options: ``{"inductor": True}`` gives the graph, with its runs fused, to Inductor, PyTorch's own compiler.
            Otherwise PyTorch's operators run one by one, as without `torch.compile`.

    Returns:
        A function of the graph's inputs that returns the tuple of its outputs.

    Raises:
        ValueError: a `mode`, or an option that does not exist.
    """
    options = dict(options or {})
    with_inductor = options.pop("inductor", False)
    if mode is not None:
        raise ValueError(f"mode: expected none for the backend lenet_fast, got {mode!r}")
    if options:
        raise ValueError(f"options: expected 'inductor' alone, got {', '.join(map(repr, options))}")
    fuse(graph_module.graph)
    graph_module.recompile()
    if not with_inductor:
        return graph_module.forward
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph_module, example_inputs)


def compiled_forward(model: nn.Module) -> Callable[..., Any]:
    """A function that calls `model`, with its hooks, and with its runs fused, whatever is attached to it."""
    return functools.partial(_call, model)


def _call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling() or is_intercepted():
        return model._call_impl(*args, **kwargs)
    return _compiled_call(type(model))(model, *args, **kwargs)


def _plain_call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model._call_impl(*args, **kwargs)


_compiled: weakref.WeakKeyDictionary[type, Callable[..., Any]] = weakref.WeakKeyDictionary()


def _compiled_call(cls: type[nn.Module]) -> Callable[..., Any]:
    """The call of a model of this class, compiled; Dynamo keeps what it compiled with the function's code object."""
    compiled = _compiled.get(cls)
    if compiled is None:
        code = _plain_call.__code__.replace(co_name=f"call_{cls.__name__}")
        function = types.FunctionType(code, globals(), code.co_name)
        compiled = _compiled[cls] = torch.compile(function, backend=backend)
    return compiled
