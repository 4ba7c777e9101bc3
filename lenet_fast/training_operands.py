"""What the native training steps take of a model and its optimizer, checked; looked up again only after a change.

A step on one image takes tens of microseconds in native code, and so does walking through the modules in Python.
"""

import itertools
import operator
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import backends
from .eager import check_memory
from .network import Network, NetworkError
from .reader import Reader
from .snapshot import Record, items_of

__all__ = ["TrainingOperands", "device_queues"]

_QUEUES = {"cuda"}  # device types
_REFUSED = "cannot be trained by the CUDA kernels"  # csrc/bind_training_cuda.cpp


def device_queues(device: torch.device) -> bool:
    """Whether native steps on it are only queued, in one launch, when a call returns, if it does not refuse them."""
    return device.type in _QUEUES


class TrainingOperands:
    """The network in a model, its parameters, and their state in an optimizer, as they were when last looked at."""

    def __init__(self, model: nn.Module) -> None:
        self.reader = Reader(model)
        self.network: Network | None = None
        self.version = 0  # of all tensors and of the network
        self._said: set[str] = set()

    def __reduce__(self) -> tuple:
        return TrainingOperands, (self.reader.model,)  # a copy looks at the dictionaries of its own model

    @property
    def parameter(self) -> Tensor:
        """One for all: they agree in dtype and device."""
        return self.parameters[0]

    def numbers(self, image: tuple[int, int, int]) -> list[int]:
        """The network for images (C, H, W), see `Network.numbers`."""
        if image not in self._numbers:
            self._numbers[image] = self.network.numbers(image)
        return self._numbers[image]

    def refusal(self, image: tuple[int, int, int]) -> str | None:
        """Why there are no native steps on images (C, H, W), but CUDA graphs; None: there are.

        Raises:
            NetworkError: as `numbers`.
        """
        if not device_queues(self.parameter.device):
            return None
        if image not in self._refusals:
            self._refusals[image] = self._try_on_nothing(image)
        return self._refusals[image]

    def warn_of(self, refusal: str | None) -> None:
        """Say once that the steps are CUDA graphs, and why."""
        if refusal is not None and refusal not in self._said:
            self._said.add(refusal)
            warnings.warn(
                f"lenet_fast: no training in one launch: {refusal}. The steps are CUDA graphs of the operators, "
                "autograd and torch.optim.",
                RuntimeWarning,
                stacklevel=2,
            )

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

    def look(self, shapes: Iterable[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        """Bring the network and its parameters up to date with the model.

        Args:
            shapes, dtype, device: of the batches that come.

        Raises:
            NetworkError: a model or parameters that the native steps do not take; names the part.
        """
        if _has_any_global_hook():
            raise NetworkError("hooks on all modules are set, which native steps would not call")
        network = self.reader.network(shapes, dtype, device)
        if network is not self.network:
            self.network = None
            self.names, self.parameters = zip(*network.named_parameters(), strict=True)
            self.tensor_names, self.tensors = zip(*network.named_tensors(), strict=True)
            self.tensors = list(self.tensors)
            self.dropout = network.dropout()
            self._check_parameters()
            self.network = network
        elif self._marks_now() != self._marks:
            self._check_parameters()

    def refresh(self, optimizer: torch.optim.Optimizer, moments: tuple[str, ...], *, counts_steps: bool) -> None:
        """Bring the optimizer's state up to date, and make what is missing.

        Args:
            optimizer: of one group of parameters.
            moments: names of the tensors like it that the optimizer has of a parameter.
            counts_steps: whether it has a number of steps of each.

        Raises:
            NetworkError: a parameter that the optimizer does not have.
            ValueError: state that is not that of the parameters.
        """
        owned = optimizer.param_groups[0]["params"]
        if (
            self._state is not optimizer.state
            or self._moments != moments
            or len(owned) != len(self._owned)
            or not all(map(operator.is_, owned, self._owned))
            or not self._state_record.holds()
        ):
            self._look_up_state(optimizer, moments, counts_steps)

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
        for name, tensor in zip(self.tensor_names, self.tensors, strict=True):
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
