"""Where nvcc is, and how the CUDA sources are compiled: for setup.py and for the tests. Needs no GPU and no PyTorch."""

import importlib.util
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo"]
NVCC_FLAGS += ["-Werror", "all-warnings"] if os.environ.get("LENET_FAST_WERROR") == "1" else []
# Turing, Ampere (whose code Ada and the 8.6 GPUs run), Hopper, Blackwell in data centres, Blackwell elsewhere.
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")


@cache
def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, else of the PATH, else of the package nvidia-cuda-nvcc."""
    candidates = []
    if "CUDA_HOME" in os.environ:
        candidates.append(Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc")
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(Path(on_path))
    package = importlib.util.find_spec("nvidia")
    if package is not None:
        candidates += [Path(folder) / "cu13" / "bin" / "nvcc" for folder in package.submodule_search_locations or ()]
    return next((path.resolve() for path in candidates if path.exists()), None)


@cache
def toolkit_root() -> Path | None:
    """The folder with nvcc's include and lib; nvcc itself may be a wrapper elsewhere."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    plan = subprocess.run([str(nvcc), "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else nvcc.parent.parent


def find_cudart_static() -> Path | None:
    """The static CUDA runtime that belongs to nvcc."""
    root = toolkit_root()
    if root is None:
        return None
    return next((path for lib in ("lib64", "lib") if (path := root / lib / "libcudart_static.a").exists()), None)


def why_unavailable() -> str | None:
    """Why CUDA sources cannot be compiled and linked here; None when they can."""
    if find_nvcc() is None:
        return "no nvcc (in CUDA_HOME, on the PATH, or from the package nvidia-cuda-nvcc)"
    if find_cudart_static() is None:
        return f"no libcudart_static.a in {toolkit_root()}"
    return None


def architectures() -> str:
    """Those of TORCH_CUDA_ARCH_LIST, else of ARCHITECTURES what nvcc knows and, through PTX, whatever is newer."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or _default_architectures()


@cache
def _default_architectures() -> str:
    listed = subprocess.run([str(find_nvcc()), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = [entry for entry in ARCHITECTURES if f"sm_{entry.replace('.', '')}" in listed.split()]
    if not known:
        raise SystemExit(f"{find_nvcc()} compiles for none of {', '.join(ARCHITECTURES)}: set TORCH_CUDA_ARCH_LIST")
    return f"{';'.join(known)}+PTX"


def architecture_flags() -> list[str]:
    """nvcc's flags for `architectures()`, e.g. "8.0;9.0+PTX"."""
    flags = []
    for entry in architectures().replace(" ", ";").split(";"):
        if not entry:
            continue
        number = entry.removesuffix("+PTX").replace(".", "")
        if not number.rstrip("af").isdigit():
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0 or 9.0+PTX, got {entry!r}")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


@cache
def compression_flags() -> tuple[str, ...]:
    """nvcc's flags for code of a fifth of the size, line numbers included; none of an nvcc before CUDA 12.8."""
    text = subprocess.run([str(find_nvcc()), "--help"], capture_output=True, text=True, check=True).stdout
    return ("--compress-mode=size",) if "--compress-mode" in text else ()
