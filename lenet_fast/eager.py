"""What a call has to know of its surroundings: who listens to operators, and whether a tensor has memory."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["PLAIN_TENSORS", "among_real_tensors", "check_memory", "in_plain_modes", "is_intercepted", "is_replaced"]

PLAIN_TENSORS = (Tensor, nn.Parameter)  # types without a dispatch of their own, as fake tensors have

# Of no public interface; each is a flag of this thread, which costs less than 0.1 us to read.
_are_functorch_transforms_active = torch._C._are_functorch_transforms_active  # torch.func: grad, vmap, ...
_is_tracing = torch._C._is_tracing  # torch.jit.trace
_len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack  # FakeTensorMode, make_fx, FlopCounterMode, ...


def is_intercepted() -> bool:
    """Whether someone records or replaces the operators called now: they need to see those that are public."""
    return _len_torch_dispatch_stack() > 0 or _is_tracing() or _are_functorch_transforms_active()


def is_replaced() -> bool:
    """Whether what happens now is recorded to be run another time, or happens to no real tensors."""
    if not is_intercepted():
        return False
    keys = torch._C._TorchDispatchModeKey
    modes = (torch._C._get_dispatch_mode(key) for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))
    return _is_tracing() or _are_functorch_transforms_active() or any(mode is not None for mode in modes)


def among_real_tensors() -> AbstractContextManager:
    """A context in which operators on real tensors give real results, whatever mode is on around it."""
    if torch.compiler.is_compiling() or not _len_torch_dispatch_stack():
        return nullcontext()  # the other imports much
    return _disable_current_modes()


@contextmanager
def in_plain_modes(device_type: str) -> Iterator[None]:
    """A context in which gradients are recorded and nothing is cast: what surrounds a training is not for its steps."""
    if torch.is_grad_enabled() and not (torch.is_inference_mode_enabled() or torch.is_autocast_enabled(device_type)):
        yield
        return
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type, enabled=False):
        yield


def check_memory(name: str, tensor: Tensor) -> None:
    """Raise where the memory of `tensor` ends before its last element, which PyTorch's operators do not all notice.

    It can be freed or cut while there are tensors in it, as FSDP does with ``untyped_storage().resize_(0)``. The native
    operators see to it themselves (csrc/operands.h).

    Raises:
        RuntimeError: it does.
    """
    if torch.compiler.is_compiling() or type(tensor) not in PLAIN_TENSORS or is_intercepted():
        return  # no memory to look at, perhaps
    if tensor.device.type == "meta" or tensor.layout != torch.strided or not tensor.numel():
        return
    if tensor.is_contiguous():
        count = tensor.numel()
    else:
        count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + count) * tensor.element_size()
    if (available := tensor.untyped_storage().nbytes()) < needed:
        raise RuntimeError(
            f"{name}: its memory was freed or cut, it has {available} bytes and shape {tuple(tensor.shape)} "
            f"needs {needed}"
        )
