"""Builds the native libraries: `_C` (CPU operators) always, `_C_cuda` where nvcc and a CUDA build of PyTorch are.

LENET_FAST_CUDA=0|1|auto|only (default auto): `_C_cuda` never; always, also for a PyTorch without CUDA (fails loudly
without nvcc); where it can be used (says why not); nothing else but the facts of the build. LENET_FAST_CLOCKS=1: with
phase clocks (csrc/cuda/phase_clock.cuh). TORCH_CUDA_ARCH_LIST: the GPUs to build for, else all of
scripts/cuda_toolkit.py that nvcc knows. No GPU is needed to build. LENET_FAST_WERROR=1 (CI): warnings are errors, of
g++ and nvcc; elsewhere a newer compiler may have new ones.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

sys.path.insert(0, str(Path(__file__).parent / "scripts"))
import cuda_toolkit

# The oldest PyTorch whose stable ABI the libraries use: one binary serves this version and every later one.
STABLE_ABI_FLAG = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11
CXX_FLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS += ["-ffp-contract=fast", "-fno-math-errno"]  # multiply-adds; square roots as vectors
CXX_FLAGS += ["-Werror"] if os.environ.get("LENET_FAST_WERROR") == "1" else []
CXX_FLAGS += ["-Wno-psabi", "-Wno-unused-parameter"]  # vectors by value; PyTorch's own headers
CXX_FLAGS += ["-g0"]  # torch asks for debug information: ten times the size
CPU_VARIANTS = ["cpu/variant_portable.cpp", "cpu/variant_avx2.cpp", "cpu/variant_avx512.cpp"]
CPU_SOURCES = ["bind_cpu.cpp", "bind_inference.cpp", "bind_training.cpp", *CPU_VARIANTS]
LONGEST = "csrc/cpu/variant_avx512.cpp"  # to compile: it takes as long as all others together
# Ninja would run two more compilers than there are cores, and the longest would share a core with them.
os.environ["MAX_JOBS"] = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)

CUDA_CHOICES = ("0", "1", "auto", "only")


def cuda_choice() -> str:
    choice = os.environ.get("LENET_FAST_CUDA", "auto")
    if choice not in CUDA_CHOICES:
        raise SystemExit(f"LENET_FAST_CUDA: expected one of {', '.join(CUDA_CHOICES)}, got {choice!r}")
    return choice


def wants_cuda() -> bool:
    choice = cuda_choice()
    reason = cuda_toolkit.why_unavailable()
    if choice in ("1", "only") and reason is not None:
        raise SystemExit(f"LENET_FAST_CUDA={choice}, but the CUDA kernels cannot be built: {reason}")
    if choice == "auto" and torch.version.cuda is None:
        reason = f"PyTorch {torch.__version__} is a CPU build"
    if choice == "auto" and reason is not None:
        print(f"lenet_fast: building without CUDA kernels: {reason}")
    return choice != "0" and reason is None


class Build(BuildExtension):
    """Compiles the .cu files of _C_cuda with nvcc itself: they know nothing of PyTorch, which may be a CPU build."""

    threads = 1

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # setuptools would compile everything anew, in a folder that it deletes afterwards
            self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"

    def swig_sources(self, sources: list[str], extension: CppExtension) -> list[str]:
        """What is compiled in this order, now that distutils has sorted it by name: the longest first."""
        return sorted(sources, key=lambda source: source != LONGEST)

    def build_extension(self, extension: CppExtension) -> None:
        if extension.name == "lenet_fast._C_cuda":
            kernels = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
            jobs = int(os.environ["MAX_JOBS"])
            self.threads = max(1, jobs // len(kernels))  # of one nvcc: architectures that it compiles at a time
            with ThreadPoolExecutor(jobs) as pool:
                extension.extra_objects = [*pool.map(self.compile_kernels, kernels), *extension.extra_objects]
        super().build_extension(extension)

    def compile_kernels(self, source: str) -> str:
        clocked = os.environ.get("LENET_FAST_CLOCKS") == "1" and Path(source).name == "train_network.cu"
        target = Path(self.build_temp).absolute() / f"{Path(source).stem}{'.clocks' if clocked else ''}.cuda.o"
        flags = [*cuda_toolkit.NVCC_FLAGS, *cuda_toolkit.architecture_flags(), f"--threads={self.threads}"]
        flags += [*cuda_toolkit.compression_flags(), *(["-DLENET_FAST_CLOCKS"] if clocked else [])]
        host_flags = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        command = [str(cuda_toolkit.find_nvcc()), *flags, *host_flags, "-c", source, "-o", str(target)]
        compiled_by = target.with_suffix(".command")  # what the object was compiled by: other flags make another object
        newest = max(path.stat().st_mtime for folder in ("csrc", "csrc/cuda") for path in Path(folder).glob("*.*"))
        is_current = target.exists() and target.stat().st_mtime >= newest
        if not is_current or not compiled_by.exists() or compiled_by.read_text() != " ".join(command):
            target.parent.mkdir(parents=True, exist_ok=True)
            compiled_by.unlink(missing_ok=True)
            if subprocess.run(command).returncode != 0:
                raise SystemExit(f"lenet_fast: {source} does not compile: {' '.join(command)}")
            compiled_by.write_text(" ".join(command))
        return str(target)


def csrc(sources: list[str]) -> list[str]:
    return [f"csrc/{source}" for source in sources]


def cuda_extension() -> CppExtension:
    return CppExtension(
        "lenet_fast._C_cuda",
        csrc(["bind_cuda.cpp", "bind_training_cuda.cpp", "bind_served_cuda.cpp"]),
        include_dirs=[str(cuda_toolkit.toolkit_root() / "include")],
        extra_compile_args={"cxx": [*CXX_FLAGS, STABLE_ABI_FLAG, "-DUSE_CUDA"]},
        extra_objects=[str(cuda_toolkit.find_cudart_static())],
        extra_link_args=[
            # Its own CUDA runtime, to itself: nothing of PyTorch's CUDA libraries is needed to load the kernels. As
            # cuBLAS's own it works in the context that PyTorch's made current.
            *("-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"),
            # Through libtorch the weak symbols of current_stream.h are found in libtorch_cuda, which is in no global
            # scope. Linkers drop it, as it defines nothing itself.
            *("-Wl,--no-as-needed", "-ltorch"),
        ],
        py_limited_api=True,
    )


def python_extension(name: str, source: str, strings: Mapping[str, str] = MappingProxyType({})) -> Extension:
    """A module of Python's stable C interface alone; PyTorch's BuildExtension defines Py_LIMITED_API for it."""
    return Extension(
        f"lenet_fast.{name}",
        csrc([source]),
        define_macros=[(key, f'"{value}"') for key, value in strings.items()],
        extra_compile_args={"cxx": CXX_FLAGS},
        language="c++",
        py_limited_api=True,
    )


def extensions() -> list:
    with_cuda = wants_cuda()
    facts = {
        "LENET_FAST_BUILD_FLAGS": " ".join(CXX_FLAGS),
        "LENET_FAST_BUILD_TORCH": torch.__version__,
        "LENET_FAST_BUILD_CUDA_ARCHITECTURES": cuda_toolkit.architectures() if with_cuda else "",
    }
    build_info = python_extension("_build_info", "build_info.cpp", facts)
    if cuda_choice() == "only":
        return [cuda_extension(), build_info]
    return [
        CppExtension(
            "lenet_fast._C",
            csrc(CPU_SOURCES),
            extra_compile_args={"cxx": [*CXX_FLAGS, STABLE_ABI_FLAG]},
            py_limited_api=True,
        ),
        build_info,
        python_extension("_snapshot", "snapshot.cpp"),
        *([cuda_extension()] if with_cuda else []),
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
