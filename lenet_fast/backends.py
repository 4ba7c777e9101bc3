"""Which kernels this installation has: loads the compiled libraries and keeps the reason for each one missing.

A device is named as PyTorch names it, "cuda" meaning the current one: the GPUs of a machine may differ.
"""

import ctypes
import importlib.util
import os
import warnings
from functools import cache
from pathlib import Path

import torch

BACKENDS = ("auto", "native", "triton", "reference")

_NATIVE_LIBRARIES = {"cpu": "_C", "cuda": "_C_cuda"}  # device type -> compiled library


def _library_path(name: str) -> Path | None:
    """Where the compiled library `name` is; None: it was not built."""
    spec = importlib.util.find_spec(f"lenet_fast.{name}")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _load_library(name: str) -> str | None:
    """Load the compiled library `name`, which registers its kernels; returns why that was not possible, or None."""
    path = _library_path(name)
    if path is None:
        return f"lenet_fast.{name} was not built"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"lenet_fast.{name} could not be loaded: {error}"
    return None


@cache
def missing_native() -> dict[str, str | None]:
    """Device type -> why it has no native kernels, None where it has. Loads the libraries at the first call."""
    return {device: _load_library(name) for device, name in _NATIVE_LIBRARIES.items()}


def cpu_isa() -> str | None:
    """The instruction set of the native CPU kernels, None where nothing is compiled.

    Raises:
        ValueError: $LENET_FAST_CPU_ISA names one that this machine does not run.
    """
    if importlib.util.find_spec("lenet_fast._build_info") is None:
        return None
    try:
        return importlib.import_module("lenet_fast._build_info").selected_isa()
    except RuntimeError as error:
        raise ValueError(str(error)) from None


@cache
def _why_unserved(index: int) -> str | None:
    """Why the compiled CUDA kernels cannot run on this GPU: none of their code is for it, or its driver is too old.

    Asked once of each, when it is first used: this initialises CUDA, after which a process cannot be forked.
    """
    if not torch.cuda.is_available():
        return None  # they are installed, for whatever is to be shown without a GPU
    reason = ctypes.create_string_buffer(1024)
    # The library is loaded already, by torch.ops.load_library; ctypes lets other threads go on during the call.
    library = ctypes.CDLL(str(_library_path(_NATIVE_LIBRARIES["cuda"])))
    library.lenet_fast_why_unserved(ctypes.c_int32(index), reason, ctypes.c_size_t(len(reason)))
    return reason.value.decode() or None


@cache
def _why_without_triton(index: int) -> str | None:
    """Why Triton cannot compile for this GPU."""
    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability(index)) < (7, 0):
        return "Triton needs compute capability 7.0, this GPU has {}.{}".format(*capability)
    return None


def _index(device: torch.device) -> int:
    """Of a CUDA device among all."""
    if device.index is not None:
        return device.index
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def why_unavailable(backend: str, device: str | torch.device) -> str | None:
    """Why `backend` cannot run on tensors of `device`; None when it can.

    Where there is no GPU, "cuda" asks only whether the kernels are installed.
    """
    device = torch.device(device)
    if backend == "native":
        reason = missing_native().get(device.type, f"there are no native kernels for device type {device.type!r}")
        return _why_unserved(_index(device)) if reason is None and device.type == "cuda" else reason
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if device.type != "cuda" and not (device.type == "cpu" and triton_is_interpreted()):
            return (
                f"Triton kernels run on CUDA tensors, not on {device.type!r} ones; on the CPU there is only Triton's "
                "interpreter, for tests, with TRITON_INTERPRET=1 in the environment"
            )
        return _why_without_triton(_index(device)) if device.type == "cuda" else None
    return None


# As torch.compiler.assume_constant_result does, which would import Dynamo: a traced graph shall not look for libraries.
why_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def triton_is_interpreted() -> bool:
    """Triton runs kernels in Python, on tensors of any device: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def serving(device: str | torch.device) -> str:
    """What runs the operators on tensors of `device`, and why nothing faster does."""
    if (native := why_unavailable("native", device)) is None:
        return "native"
    if torch.device(device).type != "cuda":
        return f"plain PyTorch ({native})"
    if (triton := why_unavailable("triton", device)) is None:
        return f"Triton ({native})"
    return f"plain PyTorch ({native}; {triton})"


def why_untrained(device: str | torch.device) -> str | None:
    """Why `FusedTrainer` has nothing that takes its steps on `device`; None when it has."""
    native = why_unavailable("native", device)
    if native is None or torch.device(device).type != "cuda":
        return native
    triton = why_unavailable("triton", device)
    return None if triton is None else f"{native}; {triton}"


def training(device: str | torch.device) -> str:
    """What takes the steps of `FusedTrainer` on `device`, and why nothing faster does."""
    if (reason := why_untrained(device)) is not None:
        return f"not possible ({reason})"
    if (native := why_unavailable("native", device)) is not None:
        return f"CUDA graphs of the operators ({native})"
    if torch.device(device).type == "cuda":
        return "one launch a run; CUDA graphs of networks that are not float32 or too large for a multiprocessor"
    return "native"


@cache
def fall_back(device: torch.device) -> str:
    """What runs the operators on `device` instead of compiled kernels, "triton" or "reference"; says so once."""
    warnings.warn(
        f"lenet_fast: operators on {str(device)!r} tensors run through {serving(device)}. "
        "`lenet-fast env` shows what is installed.",
        RuntimeWarning,
        stacklevel=2,
    )
    return "triton" if device.type == "cuda" and why_unavailable("triton", device) is None else "reference"
