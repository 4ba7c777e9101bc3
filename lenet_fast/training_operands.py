"""What the native training steps take of a model and its optimizer, checked; looked up again only after a change.

A step on one image takes tens of microseconds in native code, and so does walking through the modules in Python.
"""

import itertools
import operator
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import backends
from .eager import check_memory, is_replaced
from .network import Network, NetworkError
from .snapshot import Record, Snapshot, items_of

__all__ = ["TrainingOperands"]

_QUEUES = {"cuda"}  # device types
_REFUSED = "cannot be trained by the CUDA kernels"  # csrc/bind_training_cuda.cpp


class TrainingOperands:
    """The network in `model`, its parameters, and their state in an optimizer.

    Args:
        model: read here, and again by `refresh` when it has changed.

    Raises:
        NetworkError: a model or parameters that the native steps do not take; names the part.
        RuntimeError: hooks on all modules, or a surrounding that cannot follow native steps.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.version = 0  # of all tensors and of the network
        self._said: set[str] = set()
        _refuse_surroundings()
        self._read()

    def __reduce__(self) -> tuple:
        return TrainingOperands, (self.model,)  # a copy looks at the dictionaries of its own model

    @property
    def parameter(self) -> nn.Parameter:
        """One for all: they agree in dtype and device."""
        return self.parameters[0]

    def numbers(self, image: tuple[int, int, int]) -> list[int]:
        """The network for images (C, H, W), see `Network.numbers`."""
        if image not in self._numbers:
            self._numbers[image] = self.network.numbers(image)
        return self._numbers[image]

    @property
    def device_queues(self) -> bool:
        """Whether native steps are only queued when a call returns, in one launch, if it does not refuse them."""
        return self.parameter.device.type in _QUEUES

    def refusal(self, image: tuple[int, int, int]) -> str | None:
        """Why there are no native steps on images (C, H, W); None: there are. A reason is said once, as a warning.

        Raises:
            NetworkError: as `numbers`.
        """
        if not self.device_queues:
            return None
        if image not in self._refusals:
            reason = self._refusals[image] = self._try_on_nothing(image)
            if reason is not None and reason not in self._said:
                self._said.add(reason)
                warnings.warn(
                    f"lenet_fast: no training in one launch: {reason}. The steps are CUDA graphs of the operators, "
                    "autograd and torch.optim.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return self._refusals[image]

    def _try_on_nothing(self, image: tuple[int, int, int]) -> str | None:
        """What the native steps say of the network when they are given no images."""
        numbers = self.numbers(image)
        if (missing := backends.why_unavailable("native", self.parameter.device)) is not None:
            return missing
        images = self.parameter.new_empty((0, *image))
        data = images, images.new_empty(0, dtype=torch.int64), None, 1, 0.0, 0.0, "sgd", [0.0] * 6, [], 0.0
        regularisation = [], 0, 0, 0.0
        frozen = [0] * len(self.parameters)
        try:
            torch.ops.lenet_fast.network_train(numbers, self.tensors, [], [], [], frozen, *data, *regularisation)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if _REFUSED not in reason:
                raise
            return reason
        return None

    def refresh(self, optimizer: torch.optim.Optimizer, moments: tuple[str, ...], *, counts_steps: bool) -> None:
        """Bring everything up to date with the model and the optimizer, and make the state that is missing.

        Args:
            optimizer: of one group of parameters.
            moments: names of the tensors like it that the optimizer has of a parameter.
            counts_steps: whether it has a number of steps of each.

        Raises:
            NetworkError: as when made; a parameter that the optimizer does not have.
            RuntimeError: as when made.
        """
        _refuse_surroundings()
        if not self._snapshot.holds():
            self._read()
        elif self._marks_now() != self._marks:
            self._check_parameters()
        owned = optimizer.param_groups[0]["params"]
        if (
            self._state is not optimizer.state
            or self._moments != moments
            or len(owned) != len(self._owned)
            or not all(map(operator.is_, owned, self._owned))
            or not self._state_record.holds()
        ):
            self._look_up_state(optimizer, moments, counts_steps)

    def _read(self) -> None:
        self.network = Network.of(self.model)
        self._snapshot = Snapshot(self.model)
        self.names, self.parameters = zip(*self.network.named_parameters(), strict=True)
        self.tensors = self.network.tensors()
        self._check_parameters()

    # --- parameters --------------------------------------------------------------------------------------------------

    def _marks_now(self) -> list[tuple]:
        """What can change of tensors that stay the same objects, and their number of values for their shape."""
        return [
            (
                t.data_ptr(),
                t.dtype,
                t.numel(),
                t.stride(),
                t.requires_grad,
                bool(t._backward_hooks or t._post_accumulate_grad_hooks),
            )
            for t in self.tensors
        ]

    def _check_parameters(self) -> None:
        """Raise unless the native step can write to all of them, and read the codes of an RBF layer."""
        self._marks: list[tuple] | None = None
        self._state = None  # of the optimizer: to look up again
        self._numbers: dict[tuple[int, int, int], list[int]] = {}
        self._refusals: dict[tuple[int, int, int], str | None] = {}
        ranges = []
        first = self.parameter
        for name, tensor in zip((*self.names, "codes of the RBF layer"), self.tensors, strict=False):
            if torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python):
                raise NetworkError(f"{name}: a {type(tensor).__name__}, whose operators are not PyTorch's own")
            if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != first.dtype:
                raise NetworkError(f"{name}: expected float32 or float64, one for all, got {tensor.dtype}")
            if (reason := backends.why_untrained(tensor.device)) is not None:
                raise NetworkError(f"{name}: on {tensor.device}, where the fused trainer cannot run: {reason}")
            if tensor.device != first.device:
                raise NetworkError(f"{name}: on {tensor.device}, {self.names[0]} is on {first.device}")
            if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
                raise NetworkError(f"{name}: has gradient hooks, which the fused trainer would not call")
            if not tensor.is_contiguous():
                raise NetworkError(f"{name}: not contiguous, strides {tensor.stride()} for {tuple(tensor.shape)}")
            check_memory(name, tensor)
            begin = tensor.data_ptr()
            ranges.append((begin, begin + tensor.numel() * tensor.element_size(), name))
        ranges.sort()
        for (_, end, name), (begin, _, other) in itertools.pairwise(ranges):
            if begin < end:
                raise NetworkError(f"{other}: shares memory with {name}")
        self.trained = [p for p in self.parameters if p.requires_grad]
        self.trains = [int(p.requires_grad) for p in self.parameters]
        self._marks = self._marks_now()

    # --- the optimizer's state ---------------------------------------------------------------------------------------

    def _look_up_state(self, optimizer: torch.optim.Optimizer, moments: tuple[str, ...], counts_steps: bool) -> None:
        """Moments and step counts of the parameters, made where they are missing; frozen ones get stand-ins."""
        owned = list(optimizer.param_groups[0]["params"])
        known = set(map(id, owned))
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if id(parameter) not in known:
                raise NetworkError(f"{name}: was replaced after the trainer was made; make a new one")
        first: list[Tensor] = []
        second: list[Tensor] = []
        counts: list[Tensor] = []
        items: list[Any] = []  # dict, its items, ...: see csrc/snapshot.cpp
        for owner, parameter in zip(self.names, self.parameters, strict=True) if moments else ():
            state = optimizer.state[parameter] if parameter.requires_grad else {}
            for name, tensors in zip(moments, (first, second), strict=False):
                if state.get(name) is None:
                    state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
                if state[name].dtype != parameter.dtype or state[name].shape != parameter.shape:
                    raise ValueError(
                        f"optimizer: its {name} of {owner} is {state[name].dtype} {tuple(state[name].shape)}, the "
                        f"parameter {parameter.dtype} {tuple(parameter.shape)} now; make a new trainer"
                    )
                tensors.append(state[name])
            if counts_steps:
                if "step" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                counts.append(state["step"])
            if parameter.requires_grad:
                items += [state, items_of(state)]
        items += [optimizer.state, items_of(optimizer.state)]
        self.first_moments, self.second_moments, self.step_counts = first, second, counts
        self.version += 1
        self._state, self._moments, self._owned = optimizer.state, moments, owned
        self._state_record = Record((), tuple(items))


def _refuse_surroundings() -> None:
    if _has_any_global_hook():
        raise RuntimeError("hooks on all modules are set: the fused trainer would not call them")
    if is_replaced():
        raise RuntimeError(
            "fake tensors, make_fx, torch.jit.trace and torch.func cannot follow the fused trainer, which changes its "
            "model in native code: train with autograd there"
        )
