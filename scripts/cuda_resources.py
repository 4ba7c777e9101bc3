"""What the CUDA kernels take of a multiprocessor, as ptxas reports it, against a committed table.

`python scripts/cuda_resources.py --write` writes tests/cuda_resources.csv anew; it refuses kernels that spill or use a
stack frame.
"""

import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path

import cuda_toolkit
from cuda_toolkit import NVCC_FLAGS, find_nvcc

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests" / "cuda_resources.csv"
CACHE = ROOT / "build" / "cuda_resources"
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90")
FLAGS = [*NVCC_FLAGS, "-Xptxas", "-v"]
TABLE_RELEASE = "13.0"  # of the nvcc that the table is of; another one allocates registers in another way
REGISTERS = 65536  # of a multiprocessor, on both architectures


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


def is_table_release() -> bool:
    return f"release {TABLE_RELEASE}," in nvcc_version()


@dataclass(frozen=True, order=True)
class Resources:
    """Of one kernel on one architecture. `blocks`: a multiprocessor should hold as many (__launch_bounds__)."""

    kernel: str
    architecture: str
    threads: int
    blocks: int
    registers: int  # a thread
    static_shared: int  # bytes a block; the launch adds the dynamic ones
    stack: int  # bytes a thread
    spills: int  # bytes a thread, stores and loads

    @property
    def key(self) -> tuple[str, str]:
        return self.kernel, self.architecture

    def problems(self) -> list[str]:
        found = []
        if self.stack or self.spills:
            found.append(f"stack frame of {self.stack} bytes, {self.spills} bytes of spills")
        allocated = -(-self.registers // 8) * 8 * -(-self.threads // 32) * 32 * self.blocks
        if allocated > REGISTERS:
            found.append(f"{self.blocks} blocks of {self.threads} threads take {allocated} registers of {REGISTERS}")
        return [f"{self.kernel} on {self.architecture}: {problem}" for problem in found]


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
        threads = re.search(r"\.maxntid (\d+), (\d+), (\d+)", bounds[1])
        blocks = re.search(r"\.minnctapersm (\d+)", bounds[1])
        kernels[name] = Resources(
            name,
            architecture,
            int(threads[1]) * int(threads[2]) * int(threads[3]) if threads else 1024,
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


def compile_all(sources: Iterable[Path] = SOURCES) -> list[Resources]:
    jobs = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        compiled = pool.map(lambda job: compile_kernels(*job), jobs)
    return sorted({resources for kernels in compiled for resources in kernels})  # several files may have the same


def read_rows(path: Path) -> list[Resources]:
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == [field.name for field in fields(Resources)], path
    return [Resources(row[0], row[1], *map(int, row[2:])) for row in rows[1:]]


def write_rows(path: Path, kernels: list[Resources]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Resources))
        writer.writerows(map(astuple, kernels))


def compare(kernels: list[Resources], table: list[Resources]) -> list[str]:
    """What differs from the table: kernels that only one of them has, other launch bounds, more registers or memory."""
    built, designed = ({resources.key: resources for resources in rows} for rows in (kernels, table))
    found = [f"{name} on {architecture}: not in the table" for name, architecture in built.keys() - designed.keys()]
    found += [f"{name} on {architecture}: only in the table" for name, architecture in designed.keys() - built.keys()]
    for key in built.keys() & designed.keys():
        now, then = built[key], designed[key]
        if (now.threads, now.blocks) != (then.threads, then.blocks):
            found.append(
                f"{now.kernel} on {now.architecture}: bounds of {now.threads} threads, {now.blocks} blocks; "
                f"{then.threads}, {then.blocks} in the table"
            )
        for resource in ("registers", "static_shared"):
            if getattr(now, resource) > getattr(then, resource):
                found.append(
                    f"{now.kernel} on {now.architecture}: {getattr(now, resource)} {resource}, "
                    f"{getattr(then, resource)} in the table"
                )
    return sorted(found)


def read_table() -> list[Resources]:
    return read_rows(TABLE)


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--write"]):
        print(__doc__)
        return 2
    reason = why_unavailable()
    if reason is None and arguments and not is_table_release():
        reason = f"the table is made with nvcc {TABLE_RELEASE}; {find_nvcc()} is another release"
    if reason:
        print(reason)
        return 1
    kernels = compile_all()
    problems = [problem for resources in kernels for problem in resources.problems()]
    if arguments and not problems:
        write_rows(TABLE, kernels)
        print(f"{TABLE.name}: {len(kernels)} rows")
    else:
        problems += compare(kernels, read_table())
    print(*problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
