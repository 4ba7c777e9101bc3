"""A forward that someone wrote by hand, read by Dynamo, PyTorch's own tracer, and asked again whether it still is so.

Dynamo puts guards on everything that a forward looked at: modes, attributes, globals, methods, hooks, shapes. So the
call of `read_forward` takes ten microseconds where nothing of that has changed, and reads the forward anew where
something has. Nothing of the forward runs meanwhile, and nothing is computed.
"""

import functools
import threading
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .calls import read_graph
from .dynamo import guard_modules
from .eager import in_plain_modes
from .fusable import LeftAlone
from .links import Link, NetworkError

__all__ = ["Reading", "read_forward"]

_KEPT = 64  # forwards that Dynamo keeps of one class of models: of each structure, dtype, mode and shape of an image
_MOST_EXAMPLES = 8  # shapes of a batch


@dataclass(frozen=True)
class Reading:
    """What a forward computes of a batch.

    Args:
        links: one behind the other; their tensors are positions in `tensors`.
        tensors: parameters and buffers, as they are now.
    """

    links: tuple[Link, ...]
    tensors: tuple[Tensor, ...]

    def same_as(self, other: "Reading") -> bool:
        """Whether both are the same network of the same tensors."""
        return (
            (self.links is other.links or self.links == other.links)
            and len(self.tensors) == len(other.tensors)
            and all(one is two for one, two in zip(self.tensors, other.tensors, strict=True))
        )


def read_forward(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Reading:
    """The forward of `model` for a batch of this shape, dtype and device, where it is a chain of links.

    Raises:
        NetworkError: it is something else, or does more than computing its result; names the part.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit  # which takes a second

    cls = type(model)
    _found.reading = None
    restore_settings = _settings()()
    try:
        with in_plain_modes(device.type):  # those of a training step
            example = _example(shape, dtype, device)
            try:
                outcome = _call_of(cls)(model, example)
            except FailOnRecompileLimitHit:
                _calls.pop(cls, None)
                outcome = _call_of(cls)(model, example)
    except Exception as error:  # whatever a forward or Dynamo raises
        raise NetworkError(_reason(cls, error)) from None
    finally:
        restore_settings()
    reading, _found.reading = _found.reading, None
    if outcome is _OFF:
        raise NetworkError(f"{cls.__name__}: PyTorch's Dynamo, which reads forwards, is switched off")
    if reading is None or outcome is not _MARKER:
        raise NetworkError(f"{cls.__name__}: its result is not that of its last layer alone")
    return reading


_MARKER = torch.empty(0)  # in the place of a graph's result
_OFF = object()  # where Dynamo is switched off
_found = threading.local()
_calls: "weakref.WeakKeyDictionary[type, Callable[..., Any]]" = weakref.WeakKeyDictionary()
_examples: dict[tuple, Tensor] = {}


def _call(model: nn.Module, images: Tensor) -> Any:
    if not torch.compiler.is_compiling():
        return _OFF  # nothing of the forward may run
    return model(images)


def _call_of(cls: type[nn.Module]) -> Callable[..., Any]:
    """The call of a model of this class as Dynamo runs it, which keeps what it compiled with the code object."""
    if cls not in _calls:
        function = types.FunctionType(_call.__code__.replace(co_name=f"read_{cls.__name__}"), globals())
        _calls[cls] = torch.compile(function, backend=_backend, fullgraph=True)
    return _calls[cls]


def _example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A batch whose values nobody reads; of its shape the number of images may be another one for the same graph."""
    key = shape, dtype, device
    example = _examples.get(key)
    if example is None:
        example = torch.empty(shape, dtype=dtype, device=device)
        torch._dynamo.maybe_mark_dynamic(example, 0)
        while len(_examples) >= _MOST_EXAMPLES:
            _examples.pop(next(iter(_examples)), None)
        _examples[key] = example
    return example


@functools.cache
def _settings() -> Callable[[], Callable[[], None]]:
    """What sets what Dynamo has to look at and to refuse, and returns what puts it back."""
    return torch._dynamo.config._make_closure_patcher(
        skip_nnmodule_hook_guards=False,  # hooks that are added later
        side_effect_replay_policy="error",
        automatic_dynamic_shapes=False,
        recompile_limit=_KEPT,
        accumulated_recompile_limit=2**20,
        suppress_errors=False,
    )


def _reason(cls: type[nn.Module], error: Exception) -> str:
    inner = getattr(error, "inner_exception", error)
    if isinstance(inner, LeftAlone):
        return str(inner)
    first, *lines = str(inner).splitlines() or [""]
    if "side effects" in first:
        return f"{cls.__name__}: its forward changes something besides computing its result"
    if "from user code:" in lines:
        lines = [line.strip(" ^~") for line in lines[lines.index("from user code:") :] if line.startswith("    ")]
        calls = [line for line in lines if line]
        first = f"{calls[-1]}: {first}" if calls else first
    return f"{cls.__name__}: its forward cannot be read as one piece: {first or type(inner).__name__}"


def _backend(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., tuple]:
    """What Dynamo hands a graph to: reads it, and computes nothing."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    links, places = read_graph(module.graph)
    if InstructionTranslator.current_tx().output.side_effects.tensor_hooks:
        raise LeftAlone("its forward gives tensors hooks, which native steps do not call")
    guard_modules()

    def found(*values: Any) -> tuple:
        _found.reading = Reading(links, tuple([values[place] for place in places]))
        return (_MARKER,)

    return found
