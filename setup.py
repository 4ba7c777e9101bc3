"""Builds the native libraries: `_C` (CPU operators) always, `_C_cuda` where nvcc and a CUDA build of PyTorch are.

LENET_FAST_CUDA=0|1|auto (default auto): never, always (fails loudly where it cannot), or where possible (says why not).
"""

import os

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension

# The oldest PyTorch whose stable ABI the libraries use: one binary serves this version and every later one.
STABLE_ABI_FLAG = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11
CXX_FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
CXX_FLAGS += ["-Wno-psabi", "-Wno-unused-parameter"]  # vectors by value; PyTorch's own headers
CPU_SOURCES = ["bind_cpu.cpp", "cpu/variant_portable.cpp", "cpu/variant_avx2.cpp", "cpu/variant_avx512.cpp"]
CUDA_SOURCES: list[str] = []


def why_no_cuda() -> str | None:
    """Why `_C_cuda` cannot be built here; None when it can. Needs no GPU."""
    if not CUDA_SOURCES:
        return "this version has no CUDA kernels"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is a CPU build"
    if CUDA_HOME is None:
        return "no nvcc (CUDA_HOME is not set and nvcc is not on the PATH)"
    return None


def wants_cuda() -> bool:
    choice = os.environ.get("LENET_FAST_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"LENET_FAST_CUDA: expected 0, 1 or auto, got {choice!r}")
    reason = why_no_cuda()
    if choice == "1" and reason is not None:
        raise SystemExit(f"LENET_FAST_CUDA=1, but the CUDA kernels cannot be built: {reason}")
    if choice == "auto" and reason is not None:
        print(f"lenet_fast: building without CUDA kernels: {reason}")
    return choice != "0" and reason is None


def csrc(sources: list[str]) -> list[str]:
    return [f"csrc/{source}" for source in sources]


def extensions() -> list:
    wants_cuda()
    facts = {
        "LENET_FAST_BUILD_FLAGS": " ".join(CXX_FLAGS),
        "LENET_FAST_BUILD_TORCH": torch.__version__,
        "LENET_FAST_BUILD_CUDA_ARCHITECTURES": "",
    }
    return [
        CppExtension(
            "lenet_fast._C",
            csrc(CPU_SOURCES),
            extra_compile_args={"cxx": [*CXX_FLAGS, STABLE_ABI_FLAG]},
            py_limited_api=True,
        ),
        CppExtension(
            "lenet_fast._build_info",
            csrc(["build_info.cpp"]),
            extra_compile_args={"cxx": CXX_FLAGS},
            define_macros=[(name, f'"{value}"') for name, value in facts.items()],
        ),
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
