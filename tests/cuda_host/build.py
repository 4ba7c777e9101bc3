"""Compiles CUDA sources for the host with the shim of this folder; caches what it has compiled.

A build has one of two checks in its .cu files, besides UBSan: `memory`, which is AddressSanitizer, or `races`, which is
ThreadSanitizer's instrumentation with the shim's own rules (race.cpp). One compilation cannot have both.
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import MappingProxyType

from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "cuda_host"
CHECKS = {"memory": ["-fsanitize=address,undefined"], "races": ["-fsanitize=thread,undefined"]}
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-sanitize-recover=all",
]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]  # #pragma unroll
RUNTIME = [HERE / name for name in ("fiber.cpp", "block.cpp", "launch.cpp", "graph.cpp", "race.cpp")]


def compiler() -> str:
    return os.environ.get("CXX", "g++")


@cache
def sanitizer_runtime() -> Path | None:
    """AddressSanitizer's shared library, which a Python that loads sanitised code must start with."""
    for name in ("libasan.so", "libclang_rt.asan-x86_64.so"):
        found = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True)
        path = Path(found.stdout.strip())
        if path.is_absolute() and path.exists():
            return path.resolve()
    return None


@cache
def why_unavailable() -> str | None:
    """Why CUDA sources cannot be executed here; None when they can."""
    if shutil.which(compiler()) is None:
        return f"no C++ compiler: {compiler()}"
    if sanitizer_runtime() is None:
        return f"{compiler()} has no AddressSanitizer (libasan)"
    return None


_INCLUDE = re.compile(r'^\s*#include ["<](.+)[">]', re.MULTILINE)


def _with_headers(source: Path) -> list[Path]:
    """`source` and the headers of this repository that it includes, by way of others too."""
    found: set[Path] = set()
    pending = [source]
    while pending:
        path = pending.pop()
        found.add(path)
        names = _INCLUDE.findall(path.read_text())
        headers = {(folder / name).resolve() for name in names for folder in (path.parent, HERE / "include")}
        pending += (header for header in headers - found if header.is_file())
    return sorted(found)


@cache
def _compiler_version() -> str:
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout


def _run(command: list) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"


def compiled(source: Path, flags: Iterable[str]) -> Path:
    """The object file of `source`; compiles it unless that was done before, in this folder or in another."""
    flags = list(flags)
    key = [_compiler_version(), *(flag.replace(str(ROOT), ".") for flag in flags)]
    key += [text for path in _with_headers(source.resolve()) for text in (path.name, path.read_text())]
    name = f"{source.stem}-{hashlib.sha256(chr(0).join(key).encode()).hexdigest()[:16]}.o"
    if not (CACHE / name).exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = CACHE / f"{name}.{os.getpid()}"
        _run([compiler(), *flags, "-x", "c++", "-c", source, "-o", unfinished])
        unfinished.rename(CACHE / name)
    return CACHE / name


def build(
    name: str,
    sources: list[Path],
    shared_memory: str,
    check: str = "memory",
    flags: Iterable[str] = (),
    own_flags: Mapping[str, Iterable[str]] = MappingProxyType({}),
    link_flags: Iterable[str] = (),
) -> Path:
    """Compile `sources` and the shim, and link them to the file `name`.

    Args:
        shared_memory: the mangled name of the sources' `extern __shared__` array, which becomes the shim's.
        own_flags: flags of single sources, by the file's name.
    """
    common = [*FLAGS, *WARNINGS, f"-I{HERE / 'include'}", *flags]

    def checked(source: Path) -> Path:
        checks = CHECKS[check if source.suffix == ".cu" else "memory"]
        return compiled(source, [*common, *checks, *own_flags.get(source.name, ())])

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(checked, [*sources, *RUNTIME]))
    link = [*CHECKS["memory"], f"-Wl,--defsym={shared_memory}=cuda_host_shared_memory", *link_flags]
    key = hashlib.sha256("\0".join([*link, *map(str, objects)]).encode()).hexdigest()[:16]
    target = CACHE / key / name
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        unfinished = target.with_name(f"{name}.{os.getpid()}")
        _run([compiler(), *objects, "-o", unfinished, *link])
        unfinished.rename(target)
    return target


def build_operators(check: str, own_flags: Mapping[str, Iterable[str]] = MappingProxyType({})) -> Path:
    """The package's CUDA operators for CPU tensors: the library that redirect.py loads."""
    csrc = ROOT / "csrc"
    return build(
        "lenet_fast_cuda_host.so",
        [*sorted((csrc / "cuda").glob("*.cu")), *sorted(csrc.glob("bind_*cuda.cpp")), HERE / "libtorch_cuda.cpp"],
        shared_memory="_ZN10lenet_fast4cuda17lenet_fast_sharedE",
        check=check,
        own_flags=own_flags,
        flags=[
            "-DLENET_FAST_LIBRARY=lenet_fast_cuda_host",
            "-DLENET_FAST_DISPATCH_KEY=CPU",
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
            "-DUSE_CUDA",
            *("-Wno-unused-parameter", "-Wno-psabi"),  # as setup.py
            *(f"-isystem{path}" for path in include_paths()),
        ],
        link_flags=["-shared", *(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"],
    )


# Before a module's arguments, in the command line of pytest, whose CPU operators become those of a library.
PYTEST_OPTIONS = ("-p", "cuda_host.redirect", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-x")


def environment(library: Path) -> dict[str, str]:
    """Of a process with PYTEST_OPTIONS: `library` is what `build_operators` made."""
    # The sanitizer must come first, and find the C++ library's exceptions behind it.
    standard = subprocess.run([compiler(), "-print-file-name=libstdc++.so.6"], capture_output=True, text=True)
    return os.environ | {
        "LD_PRELOAD": f"{sanitizer_runtime()}:{standard.stdout.strip()}",
        # All memory starts as NaN, with wide fences around it.
        "ASAN_OPTIONS": "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000:redzone=512",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "LENET_FAST_CUDA_HOST": str(library),
    }
