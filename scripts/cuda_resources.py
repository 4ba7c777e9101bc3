"""What the CUDA kernels take of a multiprocessor, as ptxas reports it, against a committed table.

`python scripts/cuda_resources.py` compiles every kernel for every architecture, in six minutes of one core, and
compares; with `--write` it writes tests/cuda_resources.csv anew, and refuses kernels that spill or use a stack frame.
"""

import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import cache
from pathlib import Path

import cuda_toolkit
from cuda_toolkit import NVCC_FLAGS, find_nvcc
from resource_table import ROOT, Resources, ResourceTable, read_rows, write_rows

CACHE = ROOT / "build" / "cuda_resources"
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = tuple(f"sm_{entry.replace('.', '')}" for entry in cuda_toolkit.ARCHITECTURES)
JOBS = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
# What the tests compile, as an architecture takes a minute of one core: all for Hopper; for Blackwell, where kernels
# come nearest to spilling, the trainer with the largest ones, and the operators' of one dtype.
# tests/test_cuda_build.py compiles all for Turing.
TESTED_JOBS = [
    (source, architecture)
    for source, architecture in JOBS
    if architecture == "sm_90"
    or source.stem == "served"
    or (source.stem == "train_network" and architecture in ("sm_100", "sm_120"))
    or (architecture, source.stem) == ("sm_120", "conv_act_pool_float")
]
FLAGS = [*NVCC_FLAGS, "-Xptxas", "-v"]


@cache
def why_unavailable() -> str | None:
    """Why CUDA sources cannot be compiled here; None when they can."""
    if find_nvcc() is None:
        return cuda_toolkit.why_unavailable()
    if shutil.which("c++filt") is None:
        return "no c++filt (binutils)"
    return None


@cache
def nvcc_version() -> str:
    return subprocess.run([str(find_nvcc()), "--version"], capture_output=True, text=True, check=True).stdout


def nvcc_release() -> str:
    found = re.search(r"release ([\d.]+),", nvcc_version())
    return found[1] if found else "unknown"


def _parse(report: str, ptx: str, architecture: str) -> list[Resources]:
    kernels = {}
    for block in report.split("Compiling entry function '")[1:]:
        name = block.split("'")[0]
        numbers = [
            re.search(pattern, block)
            for pattern in (
                r"Used (\d+) registers",
                r"(\d+) bytes smem",
                r"(\d+) bytes stack frame",
                r"(\d+) bytes spill stores",
                r"(\d+) bytes spill loads",
            )
        ]
        registers, shared, stack, stores, loads = (int(n[1]) if n else 0 for n in numbers)
        # Names end where `name(` opens the parameters, in PTX too.
        bounds = re.search(rf"\.entry {re.escape(name)}\((.*?)\{{", ptx, re.DOTALL)
        assert bounds, name
        threads = re.search(r"\.maxntid ([\d, ]+)", bounds[1])
        blocks = re.search(r"\.minnctapersm (\d+)", bounds[1])
        kernels[name] = Resources(
            name,
            architecture,
            math.prod(map(int, threads[1].split(","))) if threads else 1024,
            int(blocks[1]) if blocks else 1,
            registers,
            shared,
            stack,
            stores + loads,
        )
    plain = subprocess.run(["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True).stdout
    return [
        Resources(short_name(name), *astuple(resources)[1:])
        for name, resources in zip(plain.splitlines(), kernels.values(), strict=True)
    ]


def short_name(name: str) -> str:
    """A demangled kernel without return type, parameters and our namespaces."""
    name = re.sub(r"lenet_fast::(cuda::)?|\(anonymous namespace\)::", "", name).removeprefix("void ")
    depth = 0
    for position, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return name[:position]
    return name


def compile_kernels(source: Path, architecture: str) -> list[Resources]:
    """Compile one file for one architecture; the report of each of its kernels."""
    headers = sorted(path for folder in {source.parent, ROOT / "csrc"} for path in folder.iterdir())
    key = hashlib.sha256(repr((nvcc_version(), FLAGS, architecture, source.name)).encode())
    for path in headers:
        if path.suffix in (".h", ".cuh") or path == source:
            key.update(path.read_bytes())
    cached = CACHE / f"{source.stem}-{architecture}-{key.hexdigest()[:16]}.csv"
    if not cached.exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [str(find_nvcc()), *FLAGS, f"-arch={architecture}", "-cubin", "--keep", "--keep-dir", folder]
            command += [str(source), "-o", f"{folder}/out.cubin"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
            ptx = next(Path(folder).glob("*.ptx")).read_text()
            CACHE.mkdir(parents=True, exist_ok=True)
            write_rows(cached, _parse(done.stdout + done.stderr, ptx, architecture))
    return read_rows(cached)


def compile_all(jobs: Iterable[tuple[Path, str]] = JOBS) -> list[Resources]:
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        compiled = pool.map(lambda job: compile_kernels(*job), jobs)
    return sorted({resources for kernels in compiled for resources in kernels})  # several files may have the same


TABLE = ResourceTable(
    path=ROOT / "tests" / "cuda_resources.csv",
    compiler="nvcc",
    release="13.0",
    found_release=nvcc_release,
    why_unavailable=why_unavailable,
    compile_all=compile_all,
)

if __name__ == "__main__":
    sys.exit(TABLE.main(sys.argv[1:], __doc__))
