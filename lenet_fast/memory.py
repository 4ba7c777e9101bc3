"""Which errors say that memory is exhausted: every allocator has its own."""

import torch

__all__ = ["out_of_memory"]

_SIGNS = (  # in the texts of RuntimeErrors
    "can't allocate memory",  # PyTorch, on the CPU
    "not enough memory",  # the same on Windows
    "bad_alloc",  # C++
    "out of memory",  # CUDA
    "ALLOC_FAILED",  # cuBLAS, cuDNN
)


def out_of_memory(error: BaseException) -> str | None:
    """What `error` says of it, in one line, if memory is exhausted; else None."""
    is_it = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    )
    return (str(error).strip().partition("\n")[0] or type(error).__name__) if is_it else None
