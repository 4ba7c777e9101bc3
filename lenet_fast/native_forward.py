"""The forward of a whole model in one native call, while the model stays as it was read."""

import weakref
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import backends
from .network import Network, NetworkError
from .nn import FusedConv2d

__all__ = ["NativeForward"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OWNED = ("_parameters", "_buffers", "_modules")
_PLAIN = (int, float, str, tuple, type(None))  # compared by value, everything else by identity


class NativeForward:
    """What one model needs for it; belongs to that model, a copy of the model starts with a new one.

    A batch of one image takes a few microseconds in native code, so that finding out whether the model is still as it
    was read must not take longer: it is a few comparisons of lists.
    """

    def __init__(self) -> None:
        self._model: nn.Module | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "NativeForward":
        return NativeForward()

    def __reduce__(self) -> tuple:
        return NativeForward, ()

    def __call__(self, model: nn.Module, input: Tensor) -> Tensor | None:
        """Outputs (N, classes) of `input` (N, C, H, W); None where the layers have to do it one by one."""
        if torch._C._are_functorch_transforms_active() or torch.is_autocast_enabled("cpu") or _has_any_global_hook():
            return None
        if self._model is not model or not self._holds():
            self._note(model)
        if any(self._hooks) or type(input) is not Tensor:
            return None
        if (definition := self._definitions.get(input.shape[1:])) is None:
            definition = self._define(input)
            if definition is None:
                return None
        tensors = self._tensors
        like = tensors[0]
        if input.dtype is not like.dtype or not input.is_cpu or not like.is_cpu:
            return None
        return torch.ops.lenet_fast.network_infer.default(definition, tensors, input.contiguous(), 0.0, 0.0)

    def _holds(self) -> bool:
        return (
            [len(state) for state in self._dicts] == self._lengths
            and [get(state) for get, state in self._plain] == self._values
            and all(map(is_, [owner[name] for owner, name in self._places], self._objects))
        )

    def _note(self, model: nn.Module) -> None:
        """Note what of `model` its forward depends on; the network in it is found when it is needed."""
        self._model = model
        modules = list(model.modules())
        states = [vars(module) for module in modules]
        self._hooks = [state[name] for state in states for name in _HOOKS]
        self._dicts = states + [state[name] for state in states for name in _OWNED]
        self._lengths = [len(state) for state in self._dicts]
        self._plain, self._places = [], []
        for state in states:
            public = [name for name in state if name[0] != "_" and name != "training"]
            names = [name for name in public if isinstance(state[name], _PLAIN)]
            if names:
                self._plain.append((itemgetter(*names), state))
            self._places += [(state, name) for name in public if name not in names]
            self._places += [(state[owned], name) for owned in _OWNED for name in state[owned]]
        self._values = [get(state) for get, state in self._plain]
        self._objects = [owner[name] for owner, name in self._places]
        self._network: Network | None = None
        self._is_ours = True
        self._definitions: dict[torch.Size, int | None] = {}

    def _find(self) -> None:
        """Read the network in the model, if it is one that runs natively."""
        layers = [module for module in self._model.modules() if isinstance(module, FusedConv2d)]
        if any(layer.backend not in ("auto", "native") for layer in layers) or backends.missing_native()["cpu"]:
            self._is_ours = False
            return
        try:
            self._network = Network.of(self._model)
        except NetworkError:  # another layer put in, say
            self._is_ours = False
            return
        self._tensors = self._network.tensors()

    def _define(self, input: Tensor) -> int | None:
        """The native definition for images of this shape; None where there is none, or the layers have to say why."""
        if self._network is None and self._is_ours:
            self._find()
        if self._network is None or input.dim() != 4:
            return None
        if any(t.dtype not in (torch.float32, torch.float64) or not t.is_contiguous() for t in self._tensors):
            return None
        try:
            numbers = self._network.numbers(tuple(input.shape[1:]))
        except NetworkError:
            return None
        definition = torch.ops.lenet_fast.network_define(numbers)
        weakref.finalize(self._network, torch.ops.lenet_fast.network_release, definition)
        self._definitions[input.shape[1:]] = definition
        return definition
