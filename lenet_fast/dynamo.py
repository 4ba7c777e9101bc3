"""The backend of `torch.compile` that runs Conv2d -> activation -> 2x2 pooling fused, and calls of models with it.

PyTorch's Dynamo reads a forward as it runs and hands its graphs to a backend, with guards on all that it looked at.
This backend puts the fused operator in the place of each run, and leaves everything else of the graph as it is.
Importing this module imports no part of Dynamo, which takes a second: that happens when a model is first called.
"""

import collections
import functools
import inspect
import logging
import os
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook  # hooks of all modules, which Dynamo does not see

from .eager import is_intercepted
from .fusable import calls_its_layers, is_observed
from .runs import Captured, fuse

__all__ = ["Listener", "attached_call", "backend", "compiled_forward", "guard_modules"]

_log = logging.getLogger("lenet_fast.accelerate")  # the package's users know accelerate, not how it is made

_COMPILATIONS = 256  # of one class of models: for each architecture, mode, dtype, kind of batch, ...
_NEW_CALLS = 8  # calls of one model in a row that Dynamo has to read, until it is given up
_FAILURES = 8  # of Dynamo in the calls of one class of models, until it is not asked any more


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
    fuse(graph_module)
    guard_modules()
    if not with_inductor:
        return _forward(graph_module)
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph_module, example_inputs)


def _forward(graph_module: fx.GraphModule) -> Callable[..., Any]:
    """The graph's own function, which hooks of all modules do not see, as they do not see torch.compile's graphs."""
    graph_module.code  # noqa: B018  # until it is read, `forward` is one that calls the module
    return graph_module.forward


# --- guards that PyTorch leaves out ----------------------------------------------------------------------------------


def guard_modules() -> None:
    """Have the graph that is being compiled guarded against later hooks, and methods replaced on classes."""
    from torch._dynamo.guards import GuardBuilder
    from torch._dynamo.source import GlobalStateSource
    from torch._guards import TracingContext

    context = TracingContext.get()
    guards = context.guards_context.dynamo_guards
    for guard in list(guards):
        if guard.create_fn_name() == "EMPTY_NN_MODULE_HOOKS_DICT":
            guards.add(guard.originating_source.make_guard(GuardBuilder.SEQUENCE_LENGTH))
    if methods := _traced_methods(frozenset(context.traced_code)):
        guards.add(GlobalStateSource().make_guard(functools.partial(_guard_methods, methods)))


def _traced_methods(traced: frozenset[types.CodeType]) -> tuple[tuple[type, str, types.FunctionType], ...]:
    """The methods of modules in the frame that is being compiled whose code went into its graph."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    scope = InstructionTranslator.current_tx().output.local_scope
    kinds = {type(part) for value in scope.values() if isinstance(value, nn.Module) for part in value.modules()}
    return tuple(
        (kind, name, method)
        for kind in kinds
        for name in dir(kind)
        if isinstance(method := _function(inspect.getattr_static(kind, name, None)), types.FunctionType)
        and method.__code__ in traced
        and (method.__module__ or "").partition(".")[0] != "torch"
    )


def _function(attribute: Any) -> Any:
    """What a bound method, a staticmethod or a classmethod calls; anything else itself."""
    return getattr(attribute, "__func__", attribute)


def _guard_methods(methods: tuple[tuple[type, str, types.FunctionType], ...], builder: Any, guard: Any) -> None:
    """A guard as those of Dynamo's `GuardBuilder`."""
    references = tuple(
        (weakref.ref(kind), name, weakref.ref(method), method.__code__) for kind, name, method in methods
    )

    def hold() -> bool:
        for kind, name, method, code in references:
            now = _function(getattr(kind(), name, None))
            if now is None or now is not method() or now.__code__ is not code:
                return False
        return True

    told = ", ".join(f"{kind.__name__}.{name}" for kind, name, _ in methods)
    builder.add_python_lambda_leaf_guard_to_root(
        ["___methods_hold()"], [f"unchanged {told}"], {"___methods_hold": hold}
    )


# --- calls of models -------------------------------------------------------------------------------------------------


class Listener:
    """What the calls of one model ran, for a report and for `_call`."""

    def __init__(self) -> None:
        self.graphs: dict[Captured, Any] = {}
        self.breaks: dict[str, None] = {}  # why Dynamo left a part of the forward to Python
        self.called = False
        self.has_read = False  # whether Dynamo has read something in this call
        self.calls_read = 0  # how many of the last calls in a row it has
        self.is_given_up = False

    def add(self, graph: Captured, inputs: tuple[Any, ...]) -> None:
        """Take in a graph that was not in `graphs` when it ran on `inputs`."""
        self.graphs[graph] = None

    def take_first_call(self) -> None:
        """The first call has run in which no other tool looked on."""
        self.called = True

    def take_watched_call(self) -> None:
        """A call begins in which another tool looks on."""

    def take_call(self, name: str) -> None:
        """Give up a model of which every call is something new, a list that grows, say: reading takes very long."""
        if not self.has_read:
            self.calls_read = 0
            return
        self.has_read = False
        self.calls_read += 1
        if self.calls_read == _NEW_CALLS:
            self.is_given_up = True
            told = (
                "%s runs unfused from now on, apart from parts of it: its forward depends on what changes in every call"
            )
            _log.warning(told, name)


class _Current(threading.local):
    listener: Listener | None = None
    converts = False


_current = _Current()


def compiled_forward(model: nn.Module) -> Callable[..., Any]:
    """A function that calls `model`, with its hooks, and with its runs fused, whatever is attached to it.

    A model of a class with a `__call__` of its own is called as it is.
    """
    if type(model).__call__ is not nn.Module.__call__:
        return model
    listener = Listener()

    def call(*args: Any, **kwargs: Any) -> Any:
        return _call(listener, model, args, kwargs)

    return call


def attached_call(model: nn.Module, listener: Listener) -> Callable[..., Any]:
    """What `nn.Module.__call__` is to call for `model`: it keeps no reference to it."""
    reference = weakref.ref(model)

    def call(*args: Any, **kwargs: Any) -> Any:
        model = reference()
        if torch.compiler.is_dynamo_compiling():
            return _call(listener, model, args, kwargs)
        caller = sys._getframe(1)
        if caller.f_code is _MODULE_CALL and (called := caller.f_locals["self"]) is not model:
            return called._call_impl(*args, **kwargs)  # it took over the model's __dict__: DataParallel's replicas
        if listener.called:
            return _call(listener, model, args, kwargs)
        if _is_watched():
            listener.take_watched_call()
            return _call(listener, model, args, kwargs)
        output = _call(listener, model, args, kwargs)
        listener.take_first_call()
        return output

    return call


_MODULE_CALL = nn.Module._wrapped_call_impl.__code__
_CALLS = compiled_forward(nn.Module()).__code__, attached_call(nn.Module(), None).__code__


def _is_watched() -> bool:
    """Whether other tools look on, which have to see PyTorch's own operators."""
    return (
        is_intercepted()
        or _has_any_global_hook()
        or forward_ad._current_level >= 0
        or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
        or torch.compiler.is_exporting()
    )


def _call(listener: Listener, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call `model` with its runs fused, where nothing is against it."""
    if torch.compiler.is_dynamo_compiling():  # `torch.compile` of the model, say
        from torch._dynamo.comptime import comptime

        comptime(_fuse_before_other_backends)
        return model._call_impl(*args, **kwargs)
    if listener.is_given_up or _is_watched():
        return model._call_impl(*args, **kwargs)
    cls = type(model)
    is_chain = len(args) == 1 and not kwargs and calls_its_layers(cls) and not is_observed(model)
    layers = tuple(model._modules) if is_chain else None
    compiled = _compiled.get(cls, _NONE).get(layers) or _compile(cls, layers)
    outer = _current.listener
    _current.listener = listener
    try:
        output = compiled(model, *args, **kwargs)
    finally:
        _current.listener = outer
    if listener.has_read or listener.calls_read:
        listener.take_call(cls.__name__)
    return output


def _plain_call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model._call_impl(*args, **kwargs)


def _chain_call(layers: tuple[str, ...]) -> types.FunctionType:
    """A call of a Sequential without its loop: Dynamo reads no part of a loop in which a layer breaks the graph."""
    lines = [f"value = model._modules[{name!r}](value)" for name in layers]
    scope: dict[str, Any] = {}
    exec("\n    ".join(["def call(model, value):", *lines, "return value"]), scope)
    return scope["call"]


# By the class of the models, and the names of the layers of those that `_chain_call` calls.
_Calls = dict[tuple[str, ...] | None, Callable[..., Any]]
_compiled: weakref.WeakKeyDictionary[type, _Calls] = weakref.WeakKeyDictionary()
_NONE: _Calls = {}


def _is_wanted(record: logging.LogRecord) -> bool:
    """Whether PyTorch may log a record: what it says of frames that run as they are is a matter of `report`."""
    return not _current.converts or "TORCH_LOGS" in os.environ


@functools.cache
def _quieten() -> None:
    for name in ("torch._subclasses.fake_tensor", "torch._dynamo.variables.tensor", "torch._dynamo.convert_frame"):
        logging.getLogger(name).addFilter(_is_wanted)


def _compile(cls: type[nn.Module], layers: tuple[str, ...] | None) -> Callable[..., Any]:
    """The call of a model of this class, compiled; Dynamo keeps what it compiles with the function's code object."""
    import torch._dynamo

    _quieten()
    call = _plain_call if layers is None else _chain_call(layers)
    code = call.__code__.replace(co_name=f"call_{cls.__name__}")
    function = types.FunctionType(code, call.__globals__, code.co_name)
    try:
        context = torch._dynamo.optimize(_fuse_and_tell)
        if not hasattr(context, "callback"):
            raise RuntimeError("TORCHDYNAMO_DISABLE is set")
        converter = _Converter(context.callback._torchdynamo_orig_backend, code, cls.__name__)
    except RuntimeError as error:  # or Dynamo does not support this Python
        _log.warning("%s runs unfused: PyTorch's Dynamo cannot be used here (%s)", cls.__name__, error)
        compiled = function
    else:
        context.callback._torchdynamo_orig_backend = converter
        compiled = context(function)
    return _compiled.setdefault(cls, {}).setdefault(layers, compiled)


def _fuse_and_tell(graph_module: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
    """As `backend`; tells the listener of each call."""
    graph = fuse(graph_module)
    guard_modules()
    forward = _forward(graph_module)

    def run(*inputs: Any) -> Any:
        listener = _current.listener
        if listener is not None and graph not in listener.graphs:
            listener.add(graph, inputs)
        return forward(*inputs)

    return run


def _fuse_before_other_backends(context: Any) -> None:
    """Have the backend that Dynamo is reading a graph for get it with its runs fused."""
    output = context._ComptimeContext__tx.output
    compile_graph = output.compiler_fn

    def fuse_and_compile(graph_module: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        fuse(graph_module)
        return compile_graph(graph_module, example_inputs)

    output.compiler_fn = fuse_and_compile


class _Converter:
    """Dynamo's conversion of a frame, for calls that must not fail where the plain forward does not."""

    def __init__(self, convert: Callable[..., Any], code: types.CodeType, name: str) -> None:
        self._torchdynamo_orig_backend = convert._torchdynamo_orig_backend  # type: ignore[attr-defined]
        self._convert = convert
        self._code = code
        self._name = name
        self._failures: collections.Counter[types.CodeType] = collections.Counter()

    def _clone_with_backend(self, backend: Callable[..., Any]) -> "_Converter":
        """Without the backend that splits graphs for DistributedDataParallel: here autograd's hooks run as ever."""
        return self

    def __call__(self, frame: Any, cache_entry: Any, hooks: Any, frame_state: Any, skip: int = 0) -> Any:
        from torch._dynamo import config
        from torch._dynamo.types import ConvertFrameReturn, FrameAction, FrameExecStrategy
        from torch._dynamo.utils import graph_break_reasons

        if frame.f_code in _CALLS:  # of a part, by a model that Dynamo runs in pieces: it is compiled on its own
            as_it_is = FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP)
            return ConvertFrameReturn(frame_exec_strategy=as_it_is, apply_to_code=False)
        breaks = len(graph_break_reasons)
        outer, _current.converts = _current.converts, True
        limit = max(_COMPILATIONS, config.recompile_limit)
        settings = config.patch(
            skip_nnmodule_hook_guards=False,
            use_recursive_dict_tags_for_guards=False,  # PyTorch 2.11 would miss that a layer gets another class
            recompile_limit=limit,
            accumulated_recompile_limit=max(limit, config.accumulated_recompile_limit),
        )
        try:
            with settings, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # those of Dynamo's own code; what the forward warns of comes later
                result = self._convert(frame, cache_entry, hooks, frame_state, skip=skip + 1)
        except Exception as error:
            error = getattr(error, "inner_exception", error)
            self._tell_break(f"{type(error).__name__}: {error}")
            result = ConvertFrameReturn(apply_to_code=False)
        finally:
            _current.converts = outer
        for reason in graph_break_reasons[breaks:]:
            self._tell_break(reason.reason)
        if result.frame_exec_strategy.cur_action == FrameAction.RUN_ONLY:
            _log.warning("%s: new kinds of calls run unfused, %d are compiled", self._name, limit)
        elif result.guarded_code is None:
            self._take_failure(frame.f_code, result)
        elif _current.listener is not None:
            _current.listener.has_read = True
        return result

    def _take_failure(self, code: types.CodeType, result: Any) -> None:
        """Dynamo would have all later calls of the function run as this one, whatever their arguments."""
        from torch._dynamo.types import FrameAction, FrameExecStrategy

        self._failures[code] += 1
        if self._failures[code] < _FAILURES:
            result.apply_to_code = False
        elif code is self._code:
            _log.warning("%s: new kinds of calls run unfused, Dynamo failed %d times", self._name, _FAILURES)
            result.frame_exec_strategy = FrameExecStrategy(FrameAction.RUN_ONLY, FrameAction.RUN_ONLY)
            result.apply_to_code = True

    def _tell_break(self, reason: str) -> None:
        if _current.listener is not None:
            _current.listener.breaks[_first_sentence(reason)] = None


def _first_sentence(reason: str) -> str:
    """Dynamo's explanation of a break, or else the first line of what it says."""
    lines = reason.strip().splitlines() or [""]
    explained = [line for line in lines if line.strip().startswith("Explanation:")]
    return (explained or lines)[0].strip().removeprefix("Explanation:").strip()
