"""`accelerate` runs a model's Conv2d -> activation -> 2x2 pooling fused; `restore` makes a model plain PyTorch again.

No layer is replaced, and the model's class stays as it is: `accelerate` attaches the backend of `dynamo` to the model
in the way of `nn.Module.compile`. So parameters, state_dict, optimizers, `model.conv1`, initialisation by layer type,
single layers called by hand and hooks keep their meaning, and PyTorch's guards see to it that what runs is what the
model is now.

`accelerate` the function hides this module's name in the package; `from lenet_fast.accelerate import report` works.
"""

import collections
import copy
import copyreg
import logging
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .dynamo import Listener, attached_call
from .fusable import ACTIVATIONS, NO_POOLING, POOLS, is_observed
from .nn import ConvActPool2d, FusedConv2d
from .runs import NOT_CALLED, WATCHED, Captured, CapturedRun, read_sequential

__all__ = ["Report", "Run", "accelerate", "report", "restore"]

Model = TypeVar("Model", bound=nn.Module)
NOTHING_COMPILED = (
    "Dynamo compiled nothing in its calls: is it switched off (TORCHDYNAMO_DISABLE, torch.compiler.set_stance, "
    "torch.compiler.disable)?"
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A convolution and what follows it, by the layers' dotted names; `reason` tells why it is left alone."""

    layers: tuple[str, ...]
    reason: str | None = None

    def within(self, path: str) -> "Run":
        """The same as seen from a module that contains this one under `path`."""
        layers = (name if name.endswith("()") or not path else f"{path}.{name}" for name in self.layers)
        return Run(tuple(layers), self.reason)

    def __str__(self) -> str:
        return " + ".join(self.layers) + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Report:
    """Every Conv2d of a model: the runs that `accelerate` fuses, and those it leaves alone with the reason."""

    fused: tuple[Run, ...]
    left_alone: tuple[Run, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} fused, {len(self.left_alone)} left alone"]
        lines += [f"  fused       {run}" for run in self.fused]
        lines += [f"  left alone  {run}" for run in self.left_alone]
        return "\n".join(lines)


def accelerate(model: Model) -> Model:
    """Run every Conv2d -> activation -> 2x2 pooling in `model` through the fused operator; returns `model` itself.

    Finds runs in whatever PyTorch's Dynamo reads, made of layers (`nn.ReLU`, `nn.Sigmoid`, `nn.Tanh`,
    `lenet_fast.nn.ScaledTanh`; `nn.MaxPool2d`, `nn.AvgPool2d`) or of functions and methods (`F.relu`, `torch.tanh`,
    `x.sigmoid()`, `1.7159 * torch.tanh(2 / 3 * x)`, `F.max_pool2d`, ...). The activation may be missing, and may follow
    a max pooling: every one of these functions is nondecreasing, so the order does not matter. Dropout in between is no
    obstacle in evaluation mode. Everything else of the forward runs as it does without `accelerate`, in one piece or in
    several: it may print, draw random numbers, branch on its input and change the model.

    Outputs and gradients agree with the plain model within float32 rounding. Parameters and layers stay the same
    objects under the same names, and may change at any time. The first call imports Dynamo (about a second) and reads
    the forward (about half a second); so does the first call of another kind: another mode, dtype or number of
    dimensions, the second batch size. Every later one checks that what was read still holds. Models of one class share
    what was read.

    Plain PyTorch runs where other tools look on: under `torch.jit.trace`, `torch.export`, `torch.func`'s transforms,
    forward-mode gradients, hooks of all modules, `FakeTensorMode`, other dispatch modes, and within `torch.compile`,
    whose own backend gets the graph.

    Logs what is fused (INFO) and what is left alone and why (WARNING) to the logger "lenet_fast.accelerate" in the
    first call; `report` returns the same. The kernels take 16 images at a time: smaller batches gain little or lose.

    A convolution without pooling is left alone. Fused with its activation only, one of LeNet-5's size (below 2,500
    weights) trains 1.3-2.5x faster at batch 128, but one of more than 4,000 runs at 0.4-0.8 of the plain speed, and all
    do at batch 1; a 5x5 window on a 5x5 input (C5) would gain 3x, but the input's size is not known here.

    Raises:
        TypeError: `model` is no nn.Module.
    """
    _check_module(model)
    for module in model.modules():
        if _may_attach(module):
            _attach(module)
        if isinstance(module, FusedConv2d) and module.backend == "reference":
            module.backend = "auto"  # undoes `restore`
    return model


def report(model: nn.Module, *example_inputs: Any, **example_options: Any) -> Report:
    """What runs fused in `model`, and what is left alone and why: every Conv2d is in the report, the model stays as is.

    Of an accelerated model it tells what was compiled for the calls until now; a convolution that runs fused in one of
    them and not in another (in training mode, say) is told of twice. Of any other model, or before the first call, it
    knows nn.Sequential alone, unless there are example inputs.

    Args:
        model: accelerated or not.
        example_inputs, example_options: positional and keyword arguments of a call. A deep copy of the model is called
            with them, without gradients: layers and random generators stay as they are, while what the forward does
            elsewhere (it prints, say) happens.

    Raises:
        TypeError: `model` is no nn.Module.
    """
    _check_module(model)
    if example_inputs or example_options:
        model = _called_copy(model, example_inputs, example_options)
    found: dict[Run, None] = {}
    for path, module in model.named_modules():
        if record := _attached(module):
            found.update((run.within(path), None) for run in record.runs())
    record = _attached(model)
    is_new = not record or not (record.called or record.was_watched)
    if is_new and not found and type(model).forward is nn.Sequential.forward and not is_observed(model):
        found.update((Run(run.parts, run.reason), None) for run in read_sequential(model))
    seen = {run.layers[0] for run in found}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and path not in seen:
            found[Run((path or type(layer).__name__,), _why_not_seen(model, path))] = None
    return Report(tuple(r for r in found if not r.reason), tuple(r for r in found if r.reason))


def _called_copy(model: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> nn.Module:
    model = accelerate(copy.deepcopy(model))
    devices = {tensor.device.index for tensor in model.parameters() if tensor.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(sorted(devices)):
        model(*copy.deepcopy(inputs), **copy.deepcopy(options))
    return model


def _why_not_seen(model: nn.Module, path: str) -> str:
    """Why no graph that was compiled contains a convolution."""
    if not path:
        return NO_POOLING
    called = compiled = watched = False
    while path:
        path = path.rpartition(".")[0]
        record = _attached(model.get_submodule(path))
        if record and record.breaks:
            return f"PyTorch runs its forward, as Dynamo says: {next(iter(record.breaks))}"
        if record:
            called |= record.called
            compiled |= bool(record.graphs)
            watched |= record.was_watched
    if called:
        return "no call has reached it" if compiled else NOTHING_COMPILED
    return WATCHED if watched else NOT_CALLED


def restore(model: Model) -> Model:
    """Make `model` plain PyTorch, for other tools (ONNX) and for readers; returns `model` itself.

    Undoes `accelerate` exactly. A `ConvActPool2d` in an nn.Sequential becomes an nn.Conv2d of the same name and
    Parameters, followed by its activation and pooling as layers named `<name>_act` and `<name>_pool`. Fused layers that
    torch.nn has no counterpart for (the sparse ones, or one that another module's forward calls, or with hooks) stay
    and compute with PyTorch's own operators. The keys of the state_dict stay the same.

    Raises:
        TypeError: `model` is no nn.Module.
    """
    _check_module(model)
    for module in model.modules():
        if _attached(module):
            del module.__dict__[_SLOT]
    for parent in list(model.modules()):
        if type(parent).forward is nn.Sequential.forward:
            _unfuse_children(parent, model)
    for layer in model.modules():
        if isinstance(layer, FusedConv2d):
            layer.backend = "reference"
    return model


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


# --- attaching -------------------------------------------------------------------------------------------------------

_accelerated: collections.Counter[type] = collections.Counter()  # how many modules of each class live
_SLOT = "_compiled_call_impl"  # where nn.Module.compile puts what calls of the module run instead


class _Record(Listener):
    """What was read of an accelerated module's forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = weakref.ref(model)
        self.graphs: dict[Captured, tuple[Run, ...]] = {}
        self.was_watched = False

    def take_first_call(self) -> None:
        """Warn of what no graph of the first call contains."""
        super().take_first_call()
        _warn(run for run in report(self._model()).left_alone if run not in self.runs())

    def take_watched_call(self) -> None:
        """Warn once, of the whole model."""
        if not self.was_watched:
            model = self._model()
            for module in model.modules():
                if record := _attached(module):
                    record.was_watched = True
            _log.warning("%s: %s", type(model).__name__, WATCHED)

    def runs(self) -> dict[Run, None]:
        return {run: None for runs in self.graphs.values() for run in runs}

    def add(self, graph: Captured, inputs: tuple[Any, ...]) -> None:
        known = self.runs()
        self.graphs[graph] = tuple(self._named(run, inputs) for run in graph.runs)
        new = [run for run in self.graphs[graph] if run not in known]
        for run in new:
            if not run.reason:
                _log.info("fused %s", run)
        _warn(run for run in new if run.reason)

    def _named(self, run: CapturedRun, inputs: tuple[Any, ...]) -> Run:
        """The run with its layers' names in the model, which may be other than those where the graph starts."""
        seen = run.parts[0].split(".")
        weight = None if run.weight is None else inputs[run.weight]
        own: list[str] = []
        most = (False, 0)
        for name, layer in self._model().named_modules():
            path = name.split(".")
            same = next(
                (i for i, (a, b) in enumerate(zip(seen[::-1], path[::-1], strict=False)) if a != b),
                min(len(seen), len(path)),
            )
            fits = weight is not None and layer._parameters.get("weight") is weight, same
            if same and fits > most:
                own, most = path[:-same], fits
        start = "".join(f"{name}." for name in seen[: len(seen) - most[1]])
        prefix = "".join(f"{name}." for name in own)
        parts = (part if part.endswith("()") else prefix + part.removeprefix(start) for part in run.parts)
        return Run(tuple(parts), run.reason)


def _warn(left_alone: Iterable[Run]) -> None:
    if lines := [f"  {run}" for run in left_alone]:
        _log.warning("left alone:\n%s", "\n".join(lines))


def _attached(module: nn.Module) -> _Record | None:
    return getattr(module.__dict__.get(_SLOT), "lenet_fast_record", None)


def _may_attach(module: nn.Module) -> bool:
    """Whether `module` has a forward that may contain runs, and nothing of another's in the place of ours."""
    author = getattr(type(module).forward, "__module__", None) or ""
    if author.partition(".")[0] == "torch" and not isinstance(module, nn.Sequential | torch.fx.GraphModule):
        return False
    return _SLOT not in module.__dict__ and any(map(_may_convolve, module.modules()))


def _may_convolve(layer: nn.Module) -> bool:
    """Whether it is a convolution, or has parameters of its own that a forward may call `F.conv2d` with."""
    if isinstance(layer, nn.Conv2d | FusedConv2d):
        return isinstance(layer, nn.Conv2d)
    return any(not is_lazy(parameter) and parameter.dim() == 4 for parameter in layer.parameters(recurse=False))


def _attach(module: nn.Module) -> None:
    record = _Record(module)
    call = attached_call(module, record)
    call.lenet_fast_record = record  # type: ignore[attr-defined]  # a function, which torch.jit.script lets be
    module.__dict__[_SLOT] = call
    _copy_accelerated(module)


def _copy_accelerated(module: nn.Module) -> None:
    """Have modules of the class of `module` copied and pickled by `_reduce` as long as `module` lives."""
    kind = type(module)
    _accelerated[kind] += 1
    copyreg.dispatch_table.setdefault(kind, _reduce)
    weakref.finalize(module, _forget, kind).atexit = False


def _forget(kind: type) -> None:
    """One accelerated module of this class is gone: the table keeps the class alive no longer than the last one."""
    _accelerated[kind] -= 1
    if not _accelerated[kind]:
        del _accelerated[kind]
        if copyreg.dispatch_table.get(kind) is _reduce:
            del copyreg.dispatch_table[kind]


def _reduce(module: nn.Module) -> Any:
    """How modules of a class that has accelerated ones are copied and pickled: accelerated ones stay so."""
    reduced = module.__reduce_ex__(2)
    if not _attached(module) or not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:
        return reduced
    _, arguments, state, *rest = reduced
    if isinstance(state, dict):
        state = {name: value for name, value in state.items() if name != _SLOT}
    return _new_accelerated, arguments, state, *rest


def _new_accelerated(cls: type[nn.Module], *args: Any) -> nn.Module:
    module = cls.__new__(cls, *args)
    _attach(module)
    return module


# --- plain equivalents of the fused layers ---------------------------------------------------------------------------

_ACTIVATION_LAYERS = {name: cls for cls, name in ACTIVATIONS.items() if isinstance(cls, type)}
_POOL_LAYERS = {name: cls for cls, name in POOLS.items() if isinstance(cls, type)}


def _unfuse_children(parent: nn.Sequential, model: nn.Module) -> None:
    """Replace each ConvActPool2d of `parent` by a convolution, an activation and a pooling layer."""
    children = dict(parent._modules)
    uses = [child for module in model.modules() for child in module._modules.values()]
    parent._modules.clear()
    for name, layer in children.items():
        added = f"{name}_act", f"{name}_pool"
        if (
            type(layer) is not ConvActPool2d
            or is_observed(layer)
            or sum(layer is other for other in uses) != 1
            or not children.keys().isdisjoint(added)
        ):
            parent._modules[name] = layer
            continue
        parent._modules[name] = _convolution(layer)
        if layer.activation != "identity":
            parent._modules[added[0]] = _ACTIVATION_LAYERS[layer.activation]().train(layer.training)
        if layer.pool != "none":
            parent._modules[added[1]] = _POOL_LAYERS[layer.pool](2).train(layer.training)


def _convolution(layer: ConvActPool2d) -> nn.Conv2d:
    """The convolution alone, with the Parameters of `layer`."""
    size = layer.in_channels, layer.out_channels, layer.kernel_size
    conv = nn.Conv2d(*size, padding=layer.padding, bias=layer.bias is not None, device="meta")
    conv.weight, conv.bias = layer.weight, layer.bias
    return conv.train(layer.training)
