"""Which kernels this installation has: loads the compiled libraries and keeps the reason for each one missing."""

import importlib.util
import os
import warnings
from functools import cache
from pathlib import Path

import torch

BACKENDS = ("auto", "native", "triton", "reference")

_NATIVE_LIBRARIES = {"cpu": "_C", "cuda": "_C_cuda"}  # device type -> compiled library


def _load_library(name: str) -> str | None:
    """Load the compiled library `name`, which registers its kernels; returns why that was not possible, or None."""
    spec = importlib.util.find_spec(f"lenet_fast.{name}")
    if spec is None or spec.origin is None:
        return f"lenet_fast.{name} was not built"
    try:
        torch.ops.load_library(Path(spec.origin))
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


def why_unavailable(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run on tensors of `device_type`; None when it can."""
    if backend == "native":
        return missing_native().get(device_type, f"there are no native kernels for device type {device_type!r}")
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if device_type != "cuda" and not (device_type == "cpu" and triton_is_interpreted()):
            return (
                f"Triton kernels run on CUDA tensors, not on {device_type!r} ones; on the CPU there is only Triton's "
                "interpreter, for tests, with TRITON_INTERPRET=1 in the environment"
            )
    return None


def triton_is_interpreted() -> bool:
    """Triton runs kernels in Python, on tensors of any device: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def serving(device_type: str) -> str:
    """What runs the operators on tensors of `device_type`, and why nothing faster does."""
    if (native := why_unavailable("native", device_type)) is None:
        return "native"
    if device_type != "cuda":
        return f"plain PyTorch ({native})"
    if (triton := why_unavailable("triton", device_type)) is None:
        return f"Triton ({native})"
    return f"plain PyTorch ({native}; {triton})"


def why_untrained(device_type: str) -> str | None:
    """Why `FusedTrainer` has nothing that takes its steps on `device_type`; None when it has."""
    native = why_unavailable("native", device_type)
    if native is None or device_type != "cuda":
        return native
    triton = why_unavailable("triton", device_type)
    return None if triton is None else f"{native}; {triton}"


def training(device_type: str) -> str:
    """What takes the steps of `FusedTrainer` on `device_type`, and why nothing faster does."""
    if (reason := why_untrained(device_type)) is not None:
        return f"not possible ({reason})"
    if (native := why_unavailable("native", device_type)) is not None:
        return f"CUDA graphs of the operators ({native})"
    if device_type == "cuda":
        return "one launch a run; CUDA graphs of networks that are not float32 or too large for a multiprocessor"
    return "native"


@cache
def warn_fallback(device_type: str) -> None:
    """Say once per device type that the operators there do not run through compiled kernels."""
    warnings.warn(
        f"lenet_fast: operators on {device_type!r} tensors run through {serving(device_type)}. "
        "`lenet-fast env` shows what is installed.",
        RuntimeWarning,
        stacklevel=2,
    )
