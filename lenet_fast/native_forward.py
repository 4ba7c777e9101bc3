"""The forward of a whole model in one native call, while the model stays as it was read."""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import backends
from .network import Network, NetworkError
from .nn import FusedConv2d
from .snapshot import FORWARD_HOOKS, Snapshot

__all__ = ["NativeForward"]

_are_functorch_transforms_active = torch._C._are_functorch_transforms_active


class NativeForward:
    """What one model needs for it; belongs to that model, a copy of the model starts with a new one.

    A batch of one image takes a few microseconds in native code, so that finding out whether the model is still as it
    was read must not take longer: it is a comparison of dictionaries in C.
    """

    def __init__(self) -> None:
        self._reading: _Reading | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "NativeForward":
        return NativeForward()

    def __reduce__(self) -> tuple:
        return NativeForward, ()

    def __call__(self, model: nn.Module, input: Tensor) -> Tensor | None:
        """Outputs (N, classes) of `input` (N, C, H, W); None where the layers have to do it one by one."""
        if (
            type(input) is not Tensor
            or _are_functorch_transforms_active()
            or torch.is_autocast_enabled("cpu")
            or _has_any_global_hook()
        ):
            return None
        reading = self._reading
        if reading is None or reading.model is not model or not reading.holds():
            self._reading = reading = _Reading(model)
        if reading.is_observed:
            return None
        shape, definition = reading.last
        if input.shape != shape:
            definition = reading.define(input)
        if definition is None:
            return None
        tensors = reading.tensors
        like = tensors[0]
        if input.dtype is not like.dtype or not input.is_cpu or not like.is_cpu:
            return None
        return torch.ops.lenet_fast.network_infer.default(definition, tensors, input.contiguous(), 0.0, 0.0)


class _Reading(Snapshot):
    """`model` as it is now, and the network in it, found when it is needed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, FORWARD_HOOKS)
        self.model = model
        self.last: tuple[torch.Size | None, int | None] = None, None
        self._definitions: dict[torch.Size, int | None] = {}
        self._network: Network | None = None
        self._is_ours = True
        self._lock = threading.Lock()

    def define(self, input: Tensor) -> int | None:
        """The native definition for images of this shape; None where there is none, or the layers have to say why."""
        with self._lock:
            definition = self._definitions.get(input.shape[1:])
            if definition is None:
                definition = self._define(input)
            if definition is not None:
                self._definitions[input.shape[1:]] = definition
                self.last = input.shape, definition
            return definition

    def _define(self, input: Tensor) -> int | None:
        if self._network is None and self._is_ours:
            self._find()
        if self._network is None or input.dim() != 4:
            return None
        if any(t.dtype not in (torch.float32, torch.float64) or not t.is_contiguous() for t in self.tensors):
            return None
        try:
            numbers = self._network.numbers(tuple(input.shape[1:]))
        except NetworkError:
            return None
        definition = torch.ops.lenet_fast.network_define(numbers)
        weakref.finalize(self._network, torch.ops.lenet_fast.network_release, definition)
        return definition

    def _find(self) -> None:
        """Read the network in the model, if it is one that runs natively."""
        layers = [module for module in self.model.modules() if isinstance(module, FusedConv2d)]
        if any(layer.backend not in ("auto", "native") for layer in layers) or backends.missing_native()["cpu"]:
            self._is_ours = False
            return
        try:
            network = Network.of(self.model)
        except NetworkError:  # another layer put in, say
            self._is_ours = False
            return
        self.tensors = network.tensors()
        self._network = network
