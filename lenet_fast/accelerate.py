"""`accelerate` runs a model's Conv2d -> activation -> 2x2 pooling fused; `restore` makes a model plain PyTorch again.

No layer is replaced. A module whose forward contains such runs gets a second forward: its own, traced by torch.fx,
with one fused operator in place of each run, reading the parameters from the same layers. So parameters, state_dict,
optimizers, `model.conv1`, initialisation by layer type, single layers called by hand and hooks keep their meaning.
The traced forward runs only while what was traced still holds (see `plans.Plan.obstacle`); otherwise the module's own
forward runs, which is always right, and says so once.

`accelerate` the function hides this module's name in the package; `from lenet_fast.accelerate import report` works.
"""

import copyreg
import functools
import logging
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from .fusable import ACTIVATIONS, NO_POOLING, POOLS, LeftAlone, is_observed
from .nn import ConvActPool2d, FusedConv2d
from .plans import Plan, make_plans
from .tracing import original_class

__all__ = ["Report", "Run", "accelerate", "report", "restore"]

Model = TypeVar("Model", bound=nn.Module)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A convolution and what follows it, by the layers' dotted names; `reason` tells why it is left alone."""

    layers: tuple[str, ...]
    reason: str | None = None

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

    Finds runs in the forward of any module that torch.fx can trace, made of layers (`nn.ReLU`, `nn.Sigmoid`,
    `nn.Tanh`, `lenet_fast.nn.ScaledTanh`; `nn.MaxPool2d`, `nn.AvgPool2d`) or of functions and methods (`F.relu`,
    `torch.tanh`, `x.sigmoid()`, `1.7159 * torch.tanh(2 / 3 * x)`, `F.max_pool2d`, ...). The activation may be missing,
    and may follow a max pooling: every one of these functions is nondecreasing, so the order does not matter.

    Outputs and gradients agree with the plain model within float32 rounding. Parameters and layers stay the same
    objects under the same names. Call it again after changing the model's layers: a second call starts afresh. Logs
    what it fuses (INFO) and what it leaves alone and why (WARNING) to the logger "lenet_fast.accelerate"; `report`
    returns the same. The kernels take 16 images at a time: smaller batches gain little or lose.

    As under every torch.fx tool, a forward has to be a function of its inputs, parameters, layers, attributes and
    training mode; it is run once a mode on stand-ins for tensors. One that prints, assigns attributes, keeps
    intermediate results, switches gradients off or branches on its input is left alone; one that reads a global
    variable which changes later cannot be told apart.

    A convolution without pooling is left alone. Fused with its activation only, one of LeNet-5's size (below 2,500
    weights) trains 1.3-2.5x faster at batch 128, but one of more than 4,000 runs at 0.4-0.8 of the plain speed, and all
    do at batch 1; a 5x5 window on a 5x5 input (C5) would gain 3x, but the input's size is not known here.

    Raises:
        TypeError: `model` is no nn.Module.
    """
    _check_module(model)
    plans, found = _analyse(model)
    _set_plans(model, plans)
    for layer in model.modules():
        if isinstance(layer, FusedConv2d) and layer.backend == "reference":
            layer.backend = "auto"  # undoes `restore`
    for run in found.fused:
        _log.info("fused %s", run)
    if found.left_alone:
        _log.warning("left alone:\n%s", "\n".join(f"  {run}" for run in found.left_alone))
    return model


def report(model: nn.Module) -> Report:
    """What `accelerate` fuses in `model` and what it leaves alone and why; the model stays as it is.

    Raises:
        TypeError: `model` is no nn.Module.
    """
    _check_module(model)
    return _analyse(model)[1]


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
    _set_plans(model, {})
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


def _analyse(model: nn.Module) -> tuple[dict[nn.Module, dict[bool, Plan]], Report]:
    """The plans of every module that has runs, and the report on every Conv2d."""
    plans: dict[nn.Module, dict[bool, Plan]] = {}
    found: dict[Run, None] = {}
    called: set[nn.Module] = set()
    covered: set[nn.Module] = set()  # containers whose convolutions a parent's forward accounts for
    refused: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) or not any(isinstance(m, nn.Conv2d) for m in module.modules()):
            continue
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        try:
            own_plans, calls, inlined = make_plans(module)
        except LeftAlone as why:
            refused[path] = f"the forward of {type(module).__name__} {why}"
            continue
        if own_plans:
            plans[module] = own_plans
        covered.update(module.get_submodule(name) for name in inlined)
        for layers, reason in calls:
            called.add(module.get_submodule(layers[0]))
            if module not in covered:
                names = tuple(label if label.endswith("()") else _join(path, label) for label in layers)
                found[Run(names, reason)] = None
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and layer not in called:
            found[Run((path or type(layer).__name__,), _why_not_called(path, refused))] = None
    return plans, Report(tuple(r for r in found if not r.reason), tuple(r for r in found if r.reason))


def _why_not_called(path: str, refused: dict[str, str]) -> str:
    """The nearest module around a convolution whose forward could not be read is to blame."""
    around = path
    while around:
        around = around.rpartition(".")[0]
        if around in refused:
            return refused[around]
    return "no forward calls it" if path else NO_POOLING


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# --- modules with plans ----------------------------------------------------------------------------------------------


class _Accelerated:
    """First base of the class of a module with plans."""

    _lenet_fast_original: type[nn.Module]
    _lenet_fast_plans: Mapping[bool, Plan] = types.MappingProxyType({})

    def __init_subclass__(cls) -> None:
        """Keep the original class's own `__init_subclass__` (a registry, say) out of this."""

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _new_accelerated, (self._lenet_fast_original,), super().__reduce_ex__(max(protocol, 2))[2]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if None not in self._lenet_fast_plans.values():
            return
        try:
            self._lenet_fast_plans = make_plans(self)[0]
        except LeftAlone as why:
            self._lenet_fast_plans = {}
            _log.warning("%s was accelerated, but is not any more: its forward %s", type(self).__name__, why)

    def extra_repr(self) -> str:
        runs = dict.fromkeys(run for plan in self._lenet_fast_plans.values() for run in plan.runs)
        return "\n".join(filter(None, (super().extra_repr(), f"fused: {', '.join(runs)}")))


@functools.cache
def _accelerated_class(cls: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plan = self._lenet_fast_plans.get(self.training)
        if plan is not None and (inputs := plan.arguments(args, kwargs)) is not None:
            obstacle = plan.obstacle(self)
            if obstacle is None:
                return plan.run(self, *inputs)
            if not torch.compiler.is_compiling():
                plan.say_once(self, obstacle)
        return cls.forward(self, *args, **kwargs)

    body = {"_lenet_fast_original": cls, "forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return types.new_class(cls.__name__, (_Accelerated, cls), exec_body=lambda namespace: namespace.update(body))


def _new_accelerated(cls: type[nn.Module]) -> nn.Module:
    return copyreg.__newobj__(_accelerated_class(cls))


def _set_plans(model: nn.Module, plans: Mapping[nn.Module, dict[bool, Plan]]) -> None:
    """Give the modules of `model` these plans, and take away any other."""
    for module in model.modules():
        original = original_class(module)
        if module in plans:
            module.__class__ = _accelerated_class(original)
            module.__dict__["_lenet_fast_plans"] = plans[module]
        elif isinstance(module, _Accelerated):
            module.__class__ = original
            module.__dict__.pop("_lenet_fast_plans", None)


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
