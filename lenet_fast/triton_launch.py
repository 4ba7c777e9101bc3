"""Launching Triton kernels, eagerly or into a graph that is being traced."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from . import backends

INTERPRETED = backends.triton_is_interpreted()  # Triton decides when it is imported
TYPICAL_BATCH = 1024  # for the launch configuration where a graph is traced for any batch
PROGRAMS = 264  # at least, where the work suffices: two for each multiprocessor of an H100


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run the kernel on the device of its first argument, or put it into the graph that is being traced."""
    if not is_plain(args[0]):
        wrap_triton(kernel)[grid](*args, **options)
        return
    device: AbstractContextManager = torch.cuda.device(args[0].device) if args[0].is_cuda else nullcontext()
    with device:
        kernel[grid](*args, **options)


def is_plain(tensor: Tensor) -> bool:
    """Holds data, unlike the tensors with which graphs are traced."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def hint(size: int, typical: int) -> int:
    """The size, or a typical one where the graph is traced for any (a comparison would tie it to what it saw)."""
    return size if isinstance(size, int) else typical


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; also of symbolic sizes."""
    return -(-a // b)
