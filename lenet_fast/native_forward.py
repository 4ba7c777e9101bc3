"""The forward of a whole model in one native call, while the model stays as it was read."""

import contextlib
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import backends
from .eager import PLAIN_TENSORS, check_memory, is_intercepted
from .memory import out_of_memory
from .network import Network, NetworkError
from .nn import FusedConv2d
from .snapshot import FORWARD_HOOKS, Snapshot

__all__ = ["NativeForward"]


class NativeForward:
    """What one model needs for it; belongs to that model, a copy of the model starts with a new one.

    A batch of one image takes a few microseconds in native code, so that finding out whether the model is still as it
    was read must not take longer. It is a comparison of dictionaries in C, and the native call itself looks at dtypes
    and shapes of parameters that stay the same objects. Where anything is not as it was, the model is read again, and
    what the native code does not take the layers compute, or say what is wrong with it.
    """

    def __init__(self) -> None:
        self._reading: _Reading | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "NativeForward":
        return NativeForward()

    def __reduce__(self) -> tuple:
        return NativeForward, ()

    def __call__(self, model: nn.Module, input: Tensor) -> Tensor | None:
        """Outputs (N, classes) of `input` (N, C, H, W); None where the layers have to do it one by one."""
        if type(input) is not Tensor or is_intercepted() or torch.is_autocast_enabled("cpu") or _has_any_global_hook():
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
        try:
            return torch.ops.lenet_fast.network_infer.default(definition, tensors, input, 0.0, 0.0)
        except RuntimeError as error:
            if out_of_memory(error) is not None:
                raise
            reading.refuse(input, definition)
            return None


_abandoned: list[int] = []  # definitions whose network is gone


def _release(definition: int) -> None:
    """Release a native definition: later, where the garbage collector asks for it while a graph is being traced.

    The graph would record the operator.
    """
    _abandoned.append(definition)
    if not is_intercepted():
        with contextlib.suppress(IndexError):  # another thread has taken the last one
            while _abandoned:
                torch.ops.lenet_fast.network_release(_abandoned.pop())


class _Reading(Snapshot):
    """`model` as it is now, and the network in it, found when it is needed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, FORWARD_HOOKS)
        self.model = model
        self.last: tuple[torch.Size | None, int | None] = None, None
        self._definitions: dict[torch.Size, int] = {}  # by shape of an image
        self._releases: list[weakref.finalize] = []  # of the definitions
        self._refused: dict[torch.Size, list[tuple]] = {}  # by shape of an image: the tensors as they were then
        self._network: Network | None = None
        self._is_ours = True
        self._lock = threading.Lock()

    def define(self, input: Tensor) -> int | None:
        """The native definition for images of this shape; None where there is none, or the layers have to say why."""
        with self._lock:
            shape = input.shape[1:]
            definition = self._definitions.get(shape)
            if definition is None and not (shape in self._refused and self._refused[shape] == self._marks()):
                definition = self._define(input)
            if definition is not None:
                self._definitions[shape] = definition
                self.last = input.shape, definition
            return definition

    def refuse(self, input: Tensor, definition: int) -> None:
        """The native code raised: a parameter has another dtype or shape than when it was defined, say.

        The layers compute this input. Whatever was defined is defined again for the next one, but for this shape only
        when a tensor has changed.
        """
        with self._lock:
            if definition not in self._definitions.values():
                return  # another thread has refused the definition, and so released it, meanwhile
            self.last = None, None
            self._definitions.clear()
            while self._releases:
                self._releases.pop()()
            self._refused[input.shape[1:]] = self._marks()

    def _marks(self) -> list[tuple]:
        """What of the tensors may be why the native code refused them.

        Raises:
            RuntimeError: the memory of one was freed, which not all layers would notice.
        """
        for name, tensor in zip(self._names, self.tensors, strict=True):
            check_memory(name, tensor)
        return [
            (tensor.dtype, tensor.device, tensor.shape, tensor.untyped_storage().nbytes()) for tensor in self.tensors
        ]

    def _define(self, input: Tensor) -> int | None:
        if self._network is None and self._is_ours:
            self._find()
        if self._network is None or input.dim() != 4:
            return None
        if any(
            type(t) not in PLAIN_TENSORS or t.dtype not in (torch.float32, torch.float64) or not t.is_cpu
            for t in self.tensors
        ):
            return None
        try:
            definition = torch.ops.lenet_fast.network_define(self._network.numbers(tuple(input.shape[1:])))
        except (NetworkError, RuntimeError):
            return None
        self._releases.append(weakref.finalize(self._network, _release, definition))
        return definition

    def _find(self) -> None:
        """Read the network in the model, if it is one that runs natively."""
        from .lenet import LeNet  # which has a NativeForward

        layers = [module for module in self.model.modules() if isinstance(module, FusedConv2d)]
        if (
            # What the forward of a derived class adds it adds to what it is given here.
            type(self.model).forward is not LeNet.forward
            or any(layer.backend not in ("auto", "native") for layer in layers)
            or backends.missing_native()["cpu"]
        ):
            self._is_ours = False
            return
        try:
            network = Network.of(self.model)
        except NetworkError:  # another layer put in, say
            self._is_ours = False
            return
        self.tensors = network.tensors()
        self._names = [name for name, _ in network.named_tensors()]
        self._network = network
