"""What kernels take of a multiprocessor, against a committed table: the table of any compiler, and its command line."""

import csv
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).parent.parent
REGISTERS = 65536  # of a multiprocessor, on every architecture that is compiled for


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


@dataclass(frozen=True)
class ResourceTable:
    """The committed table of what one compiler makes of the kernels.

    Args:
        path: of the CSV file.
        compiler: its name.
        release: which one of it made the table; another one allocates registers in another way.
        found_release: which one is here.
        why_unavailable: why there is none here, None where there is.
        compile_all: what every kernel takes now.
    """

    path: Path
    compiler: str
    release: str
    found_release: Callable[[], str]
    why_unavailable: Callable[[], str | None]
    compile_all: Callable[[], list[Resources]]

    def read(self) -> list[Resources]:
        return read_rows(self.path)

    def is_of_release_here(self) -> bool:
        return self.found_release() == self.release

    def main(self, arguments: list[str], usage: str | None) -> int:
        """Compare with the table, or write it anew unless a kernel has problems; the exit code."""
        if arguments not in ([], ["--write"]):
            print(usage)
            return 2
        reason = self.why_unavailable()
        if reason is None and arguments and not self.is_of_release_here():
            reason = f"the table is made with {self.compiler} {self.release}, not {self.found_release()}"
        if reason:
            print(reason)
            return 1
        kernels = self.compile_all()
        problems = [problem for resources in kernels for problem in resources.problems()]
        if not arguments:
            problems += compare(kernels, self.read())
        elif not problems:
            write_rows(self.path, kernels)
            print(f"{self.path.name}: {len(kernels)} rows")
        print(*problems, sep="\n")
        return 1 if problems else 0
