"""A module's own forward, traced, with its runs fused: how it is made, and what has to hold for it to be used."""

import copy
import dataclasses
import itertools
import linecache
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from .fusable import CONV_OPTIONS, POOL_OPTIONS, POOLS, LeftAlone, is_observed, matches
from .snapshot import HOOKS
from .tracing import Trace, trace_forward

__all__ = ["Plan", "make_plans"]

_log = logging.getLogger("lenet_fast.accelerate")  # the package's users know accelerate, not how it is made


@dataclass(frozen=True)
class _LayerState:
    """A layer of a run as it was when the run was found, in a form that is quick to compare."""

    path: tuple[str, ...]
    kind: type[nn.Module]
    names: tuple[str, ...]  # of what in the layer's __dict__ decides on the fusion
    values: tuple[Any, ...]

    @classmethod
    def of(cls, module: nn.Module, path: tuple[str, ...]) -> "_LayerState":
        layer = _at(module, path)
        kind = type(layer)
        options = ("kernel_size", "padding", *CONV_OPTIONS) if kind is nn.Conv2d else POOL_OPTIONS.get(POOLS.get(kind))
        names = ("forward", *HOOKS, *(options or ()))
        return cls(path, kind, names, tuple(copy.copy(layer.__dict__.get(name)) for name in names))

    def holds(self, module: nn.Module) -> bool:
        layer = _at(module, self.path)
        return type(layer) is self.kind and tuple(map(layer.__dict__.get, self.names)) == self.values


@dataclass(frozen=True)
class Plan:
    """A module's forward with its runs fused, for one mode, and what has to hold for it; it belongs to one module."""

    run: Callable[..., Any]
    inputs: tuple[str, ...]
    runs: tuple[str, ...]
    layers: tuple["_LayerState", ...]
    containers: tuple[tuple[tuple[str, ...], tuple[tuple[str, nn.Module], ...]], ...]
    attributes: tuple[tuple[str, Any], ...]
    said: list[str] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Plan":
        return dataclasses.replace(self, containers=copy.deepcopy(self.containers, memo), said=[])

    def __reduce__(self) -> tuple:
        return _forgotten, ()  # generated code is not pickled: see _Accelerated.__setstate__

    def arguments(self, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """The tensors of a call as the traced forward takes them; None when it is another kind of call."""
        if len(args) + len(kwargs) != len(self.inputs):
            return None
        args = (*args, *(kwargs.get(name) for name in self.inputs[len(args) :]))
        return args if all(isinstance(value, Tensor) for value in args) else None

    def obstacle(self, module: nn.Module) -> str | None:
        """What of `module` is not as it was, so that its own forward has to run; None if nothing."""
        if _has_any_global_hook():
            return "hooks on all modules"
        for path, children in self.containers:
            container = _at(module, path)
            if not _same_children(container, children) or (path and is_observed(container)):
                return f"layers in {'.'.join(path) or 'the module itself'}, or its hooks"
        for state in self.layers:
            if not state.holds(module):
                return f"options or hooks of {'.'.join(state.path)}"
        for name, value in self.attributes:
            if getattr(module, name, None) != value:
                return f"self.{name}"
        return None

    def say_once(self, module: nn.Module, obstacle: str) -> None:
        if obstacle not in self.said:
            self.said.append(obstacle)
            name = type(module).__name__
            _log.warning("%s runs unfused while this is not as when it was accelerated: %s", name, obstacle)


def _forgotten() -> None:
    """What a pickled plan becomes."""


def _at(module: nn.Module, path: tuple[str, ...]) -> nn.Module:
    for name in path:
        module = module._modules[name]
    return module


def _same_children(container: nn.Module, children: tuple[tuple[str, nn.Module], ...]) -> bool:
    now = container._modules
    return len(now) == len(children) and all(
        name == then_name and child is then
        for (name, child), (then_name, then) in zip(now.items(), children, strict=True)
    )


def make_plans(module: nn.Module) -> tuple[dict[bool, Plan], list[tuple[tuple[str, ...], str | None]], tuple[str, ...]]:
    """Plans by training mode, each convolution call's layers with why it is not fused, and inlined containers.

    Raises:
        LeftAlone: nothing is known of this module's forward.
    """
    traces = {mode: trace_forward(module, mode) for mode in (True, False)}
    plans: dict[bool, Plan] = {}
    calls: dict[tuple[tuple[str, ...], str | None], None] = {}
    for mode, trace in traces.items():
        walked = {path: tuple(_at(module, path)._modules.items()) for path in _walked(module, trace)}
        fused = []
        for match, reason in list(matches(module, trace.graph)):
            calls[match.labels() if reason is None else match.labels()[:1], reason] = None
            if reason is None:
                fused.append((" + ".join(match.labels()), match.layers))
                match.replace(trace.graph)
        if fused:
            layers = dict.fromkeys(name for _, parts in fused for name in parts)
            plans[mode] = Plan(
                run=_compile(trace.graph, type(module)),
                inputs=trace.inputs,
                runs=tuple(dict.fromkeys(run for run, _ in fused)),
                layers=tuple(_LayerState.of(module, _split(name)) for name in layers),
                containers=tuple(walked.items()),
                attributes=tuple(trace.attributes.items()),
            )
    return plans, list(calls), tuple(name for trace in traces.values() for name in trace.inlined)


def _split(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")) if name else ()


def _walked(module: nn.Module, trace: Trace) -> Iterator[tuple[str, ...]]:
    """Paths of the modules whose list of children a forward may depend on: itself, the lists, those it reaches into."""
    yield ()
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield (name,)
    for node in trace.graph.nodes:
        if node.op == "call_module":
            path = _split(node.target)
            yield from (path[:length] for length in range(1, len(path)))
    yield from map(_split, trace.inlined)


_compiled = itertools.count(1)


def _compile(graph: fx.Graph, cls: type) -> Callable[..., Any]:
    """The Python function forward(self, ...) that a graph stands for; tracebacks show its lines while it is there."""
    try:
        code = graph.python_code("self")
    except Exception as error:  # an argument that has no literal, say
        raise LeftAlone(f"cannot be turned into code ({type(error).__name__}: {error})") from None
    filename = f"<forward of {cls.__name__} with runs fused by lenet_fast, {next(_compiled)}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)
    forward = namespace["forward"]
    weakref.finalize(forward, linecache.cache.pop, filename, None).atexit = False
    return forward
