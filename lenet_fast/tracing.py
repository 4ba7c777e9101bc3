"""A module's own forward as a graph, or why it cannot be one."""

import contextlib
import functools
import inspect
import io
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .fusable import LeftAlone, is_observed


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of `module` before `accelerate` derived one from it."""
    return vars(type(module)).get("_lenet_fast_original", type(module))


class _Proxy(fx.Proxy):
    """A traced value that passes for a Tensor where a forward asks isinstance, as the real one will."""

    __class__ = property(lambda self: Tensor)  # type: ignore[assignment]
    _is_param = _is_buffer = False


class _Tracer(fx.Tracer):
    """Records one module's own forward: its children stay calls, but for plain nn.Sequential containers."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.inlined: list[str] = []
        self.proxies: list[weakref.ref] = []
        self.context = _context()
        self.thread = threading.get_ident()

    def is_leaf_module(self, layer: nn.Module, name: str) -> bool:
        return original_class(layer).forward is not nn.Sequential.forward or is_observed(layer)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, layer: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if threading.get_ident() != self.thread:  # fx has every module of the process call this
            return forward(*args, **kwargs)
        name = self.path_of_module(layer)
        if not self.is_leaf_module(layer, name):
            self.inlined.append(name)
            forward = functools.partial(nn.Sequential.forward, layer)
        return super().call_module(layer, forward, args, kwargs)

    def create_arg(self, value: Any) -> Any:
        if type(value) is _Proxy:
            return value.node
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            raise LeftAlone("uses a tensor that is neither input, parameter nor buffer")
        return super().create_arg(value)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self.context:
            raise LeftAlone("switches gradients or autocast on or off")
        return super().create_node(kind, target, *args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = _Proxy(node, self)
        if node.op != "get_attr":  # fx itself keeps those of parameters
            self.proxies.append(weakref.ref(proxy))
        return proxy

    def trace(self, root: nn.Module) -> fx.Graph:
        graph = super().trace(root)
        if any(proxy() is not None for proxy in self.proxies):
            raise LeftAlone("keeps intermediate results")
        return graph


def _context() -> tuple[bool, ...]:
    """What a graph does not record, yet changes what its operators do."""
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


_MODULE_STATE = frozenset(vars(nn.Module()))
_CONSTANTS = (int, float, str, type(None), torch.dtype, torch.device, types.FunctionType, types.BuiltinFunctionType)


class _Probe:
    """First base of a traced copy's class: notes which attributes forward reads, refuses that it assigns one."""

    def __init_subclass__(cls) -> None:
        """Keep the traced class's own `__init_subclass__` (a registry, say) out of this."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in _MODULE_STATE or (name.startswith("__") and name.endswith("__")):
            return value
        if isinstance(value, _CONSTANTS) or (
            isinstance(value, tuple) and all(isinstance(v, _CONSTANTS) for v in value)
        ):
            super().__getattribute__("_attributes_read")[name] = value
        elif not isinstance(value, types.MethodType | type) and name != "_attributes_read":
            raise LeftAlone(f"reads self.{name}, a {type(value).__name__} that may change")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        raise LeftAlone(f"assigns self.{name}")

    def __delattr__(self, name: str) -> None:
        raise LeftAlone(f"deletes self.{name}")


@dataclass(frozen=True)
class Trace:
    """A module's forward as a graph, and what of the module went into it."""

    graph: fx.Graph
    inputs: tuple[str, ...]
    attributes: dict[str, Any]
    inlined: tuple[str, ...]


_tracing = threading.RLock()  # what is replaced meanwhile is the whole process's, and is put back in order


def trace_forward(module: nn.Module, training: bool) -> Trace:
    """The forward of `module` as it runs in one mode, called with its required arguments.

    Raises:
        LeftAlone: it cannot be traced, or does something that its graph would not do.
    """
    cls = original_class(module)
    inputs = _required_inputs(cls, module)
    names = ", ".join(("self", *inputs))
    forward = eval(f"lambda {names}: forward({names})", {"forward": cls.forward})  # fx reads the signature
    probe_class = types.new_class(cls.__name__, (_Probe, cls), exec_body=lambda body: body.update(forward=forward))
    probe = object.__new__(probe_class)  # what forward does to it does not reach the module
    attributes: dict[str, Any] = {}
    state = {key: dict(value) if key in _MODULE_STATE and isinstance(value, dict) else value
             for key, value in vars(module).items()}  # fmt: skip
    probe.__dict__.update(state, training=training, _attributes_read=attributes)
    tracer = None
    printed = io.StringIO()
    with (
        _tracing,
        _children_in_mode(module, training),
        torch.set_grad_enabled(training),  # so that a switch in either direction shows
        torch.random.fork_rng(devices=[]),
        contextlib.redirect_stdout(printed),
    ):
        try:
            tracer = _Tracer()
            graph = tracer.trace(probe)
        except LeftAlone:
            raise
        except Exception as error:  # a forward may raise anything on meeting a value that is not there yet
            first_line = (str(error).splitlines() or [""])[0]
            raise LeftAlone(f"cannot be traced ({type(error).__name__}: {first_line})") from None
    if printed.getvalue():
        raise LeftAlone("prints")
    return Trace(graph, inputs, attributes, tuple(dict.fromkeys(tracer.inlined)))


def _required_inputs(cls: type[nn.Module], module: nn.Module) -> tuple[str, ...]:
    """Names of forward's arguments without a default; those with one are traced at it."""
    if cls.__module__.partition(".")[0] == "torch" and not issubclass(cls, nn.Sequential):
        raise LeftAlone("is PyTorch's own")
    if "forward" in module.__dict__:
        raise LeftAlone("was replaced on the object")
    if cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__:
        raise LeftAlone("belongs to a class with its own way of being pickled")
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if not required or any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in required):
        raise LeftAlone("takes a variable number of inputs")
    return tuple(p.name for p in required)


@contextlib.contextmanager
def _children_in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """A forward may read the mode of its children."""
    modes = {child: child.training for child in module.modules()}
    try:
        for child in modes:
            child.training = training
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode
