"""Plants faults, one at a time, and says which test catches each: a test that cannot fail would let one through.

    python scripts/planted_faults.py --write         # all, into docs/planted_faults.md
    python scripts/planted_faults.py --only "border" # those with this in their name or file
    python scripts/planted_faults.py --list

Works on a copy of the tree. What a fault changes is compiled anew, the rest is not: of the CPU kernels the portable
variant alone, at -O1, which stands for the other two there; the CUDA kernels with the shim of tests/cuda_host. Triton's
kernels run in its interpreter. The tests of a fault must pass without it; a compiler's error is not a catch.

All take about twenty minutes on two cores. No part of `make test`, but tests/test_planted_faults.py checks the table.
"""

import argparse
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from fault_table import FAULTS, PARTS, Fault

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "planted_faults.md"
LIMIT_SECONDS = 600  # for a fault's tests

CPU_SOURCES = ("bind_cpu.cpp", "bind_inference.cpp", "bind_training.cpp", "cpu/variant_portable.cpp")
CPU_FLAGS = ("-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno")
CPU_FLAGS += ("-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020b000000000000")  # as in setup.py


class Tree:
    """A copy of the working tree, with libraries of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "tests" / "cuda_host" / "build.py"
        spec = importlib.util.spec_from_file_location(f"build_of_{folder.name}", path)
        self.compiler = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.compiler)

    @classmethod
    def copy(cls, folder: Path) -> "Tree":
        """Of what is in the working tree now, whether committed or not, with libraries built in `folder`."""
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        for library in ("_build_info", "_snapshot"):
            for path in (ROOT / "lenet_fast").glob(f"{library}.*so"):
                shutil.copy2(path, folder / "lenet_fast")
        compiled = ROOT / "build" / "cuda_host"
        if compiled.is_dir():
            shutil.copytree(compiled, folder / "build" / "cuda_host", dirs_exist_ok=True)
        tree = cls(folder)
        tree.build_cpu()
        return tree

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        path = self.folder / fault.file
        text = path.read_text()
        if text.count(fault.text) != 1:
            raise SystemExit(f"{fault.name}: {fault.file} has its text {text.count(fault.text)} times, not once")
        path.write_text(text.replace(fault.text, fault.fault))
        try:
            yield
        finally:
            path.write_text(text)

    def build_cpu(self) -> None:
        """The CPU operators with one variant, under the names of all three."""
        from torch.utils.cpp_extension import include_paths, library_paths

        compiler, flags = self.compiler, [*CPU_FLAGS, *(f"-isystem{path}" for path in include_paths())]
        objects = [compiler.compiled(self.folder / "csrc" / source, flags) for source in CPU_SOURCES]
        kernels = "_ZN10lenet_fast3cpu{}7kernelsE"
        others = [f"-Wl,--defsym={kernels.format(isa)}={kernels.format('8portable')}" for isa in ("4avx2", "6avx512")]
        command = [compiler.compiler(), "-shared", *map(str, objects), *others]
        command += [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
        target = self.folder / "lenet_fast" / "_C.abi3.so"
        target.unlink(missing_ok=True)
        subprocess.run([*command, "-o", str(target)], check=True)

    def test(self, part: str, tests: str, check: str) -> "Outcome":
        """Build what `part` needs, and run the tests."""
        environment = dict(os.environ)
        options = ["-p", "no:cacheprovider", "-x"]
        try:
            if part == "CUDA":
                environment = self.compiler.environment(self.compiler.build_operators(check))
                options = list(self.compiler.PYTEST_OPTIONS)
            elif part == "C++":
                self.build_cpu()
        except AssertionError as error:
            return Outcome(None, f"does not compile: {str(error)[-2000:]}")
        environment |= {"PYTHONDONTWRITEBYTECODE": "1", "LENET_FAST_CPU_ISA": "portable", "OMP_NUM_THREADS": "2"}
        environment |= {"PYTHONPATH": f"{self.folder}:{self.folder / 'tests'}"}
        if part == "Triton":
            environment["TRITON_INTERPRET"] = "1"
            options += ["-W", "ignore::RuntimeWarning"]  # of NumPy, which computes there
        options += ["-o", "addopts=--strict-markers", "-v", "-rfE", "--tb=short"]
        command = [sys.executable, "-m", "pytest", *options, *shlex.split(tests)]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own children, too
            output, _ = process.communicate()
            return Outcome(running_test(output), "hangs", output)
        return outcome_of(process.returncode, output)


@dataclass(frozen=True)
class Outcome:
    """What the tests of a fault did.

    Args:
        test: the first that did not pass; None: all passed, or `how` says why none could.
        how: "passes", "fails", "hangs", "dies" (the process), or what is wrong with the fault or its tests.
        output: of pytest.
    """

    test: str | None
    how: str
    output: str = ""

    @property
    def catches(self) -> bool:
        return self.test is not None and self.how in ("fails", "hangs", "dies")

    def __str__(self) -> str:
        if self.test is None:
            return "nothing" if self.how == "passes" else self.how
        return f"`{self.test}`" + ("" if self.how == "fails" else f" ({self.how})")


def outcome_of(status: int, output: str) -> Outcome:
    """Of a run of pytest with -v and -rfE."""
    if status == 0:
        return Outcome(None, "passes", output)
    if failed := re.search(r"^(?:FAILED|ERROR) (tests/\S+\.py::.+?)(?: - .*)?$", output, re.MULTILINE):
        return Outcome(failed[1], "fails", output)
    if status in (1, 2, 3, 4, 5) and re.search(r"^=+ .*in [\d.]+s.* =+$", output, re.MULTILINE):
        return Outcome(None, f"pytest ended with status {status} and no failed test", output)
    return Outcome(running_test(output), "dies", output)


def running_test(output: str) -> str | None:
    """The last test that was begun."""
    begun = re.findall(r"^(tests/\S+\.py::\w+(?:\[.*?\])?)(?= |$)", output, re.MULTILINE)
    return begun[-1] if begun else None


def short(test: str) -> str:
    """Without the values of its parameters, which may be long."""
    return test.partition("[")[0]


def run(faults: list[Fault], folder: Path, jobs: int) -> list[tuple[Fault, Outcome]]:
    """Plant them, some at a time in trees of their own below `folder`."""
    trees: Queue[Tree] = Queue()
    first = Tree.copy(folder / "0")
    trees.put(first)
    for job in range(1, jobs):
        trees.put(Tree(shutil.copytree(first.folder, folder / str(job), dirs_exist_ok=True)))
    groups: dict[tuple[str, str, str], list[Fault]] = {}
    for fault in sorted(faults, key=lambda fault: fault.part, reverse=True):
        groups.setdefault((fault.part, fault.tests, fault.check), []).append(fault)

    def run_group(of: tuple[str, str, str]) -> list[tuple[Fault, Outcome]]:
        tree = trees.get()
        try:
            return list(run_one_by_one(tree, of, groups[of]))
        finally:
            trees.put(tree)

    with ThreadPoolExecutor(jobs) as pool:
        results = dict(itertools.chain(*pool.map(run_group, sorted(groups, key=lambda of: -len(groups[of])))))
    return [(fault, results[fault]) for fault in faults]


def run_one_by_one(tree: Tree, of: tuple[str, str, str], faults: list[Fault]) -> Iterator[tuple[Fault, Outcome]]:
    """Plant faults that have the same tests, which have to pass without them."""
    sound = tree.test(*of)
    for fault in faults:
        if sound.how == "passes":
            with tree.planted(fault):
                outcome = tree.test(*of)
        else:
            outcome = Outcome(None, f"without it: {sound.how}: {sound.test}", sound.output)
        print(f"{fault.part}: {fault.name}: {outcome}", flush=True)
        yield fault, outcome
    if of[0] == "C++":
        tree.build_cpu()


def written() -> dict[tuple[str, str], str]:
    """What caught a fault, by its name and file, as the table has it."""
    rows = re.findall(r"^\| (.+) \| `(.+)` \| (.+) \|$", TABLE.read_text() if TABLE.exists() else "", re.MULTILINE)
    return {(name, file): caught_by for name, file, caught_by in rows}


def write(results: list[tuple[Fault, Outcome]]) -> None:
    """Put these results into the table, and leave the rows of other faults as they are."""
    rows = written()
    for fault, outcome in results:
        shown = Outcome(outcome.test and short(outcome.test), outcome.how)
        rows[fault.name, fault.file] = str(shown)
    lines = [
        "# Planted faults",
        "",
        "Written by `python scripts/planted_faults.py --write`: each of these faults alone, and the first test that",
        "did not pass with it. Tests in `tests/cuda_host/` are run by `tests/test_cuda_host.py`; those of Triton's",
        "kernels by `tests/test_triton.py`, in Triton's interpreter.",
    ]
    for part in PARTS:
        lines += ["", f"## {part}", "", "| Fault | File | Caught by |", "| --- | --- | --- |"]
        for fault in FAULTS:
            if fault.part == part:
                lines.append(f"| {fault.name} | `{fault.file}` | {rows.get((fault.name, fault.file), 'not tried')} |")
    TABLE.write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="TEXT", help="faults with this in their name or file")
    parser.add_argument("--list", action="store_true", help="name the faults, plant none")
    parser.add_argument("--write", action="store_true", help=f"put the results into {TABLE.relative_to(ROOT)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time")
    parser.add_argument("--folder", type=Path, help="work there and keep it: what is compiled is compiled once")
    parser.add_argument("--output", action="store_true", help="show what pytest says of each fault")
    options: Any = parser.parse_args(arguments)
    faults = [fault for fault in FAULTS if options.only is None or options.only in fault.name + fault.file]
    if not faults:
        parser.error(f"--only: no fault has {options.only!r} in its name or file")
    if options.list:
        for fault in faults:
            print(f"{fault.part:6}  {fault.name} ({fault.file})")
        return 0
    with tempfile.TemporaryDirectory(prefix="planted_faults-") as temporary:
        results = run(faults, options.folder or Path(temporary), options.jobs)
    for fault, outcome in results:
        if options.output or not outcome.catches:
            print(f"\n--- {fault.name}\n{outcome.output[-6000:]}")
    if options.write:
        write(results)
    missed = [fault.name for fault, outcome in results if not outcome.catches]
    print(f"{len(results) - len(missed)} of {len(results)} faults caught", *missed, sep="\n  not: " if missed else "")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
