"""Instructions of the training kernel's phases, counted in its machine code (SASS). Needs nvcc, no GPU.

    python scripts/phase_instructions.py [--architecture sm_90] [--write PATH]

Prints (or writes) a CSV with a row for each phase of csrc/cuda/phase_clock.cuh. These are instructions of the program,
each counted once: how often a thread executes one depends on the network. A phase's code for all layers is the same, so
a phase has one row. Instructions that belong to no phase (the launch's start and end, functions without line numbers)
are in the row `other`.
"""

import argparse
import csv
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import cuda_toolkit

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
KERNEL = "train_steps<5, false>"  # of the kernel that trains LeNets without dropout: all windows are 5x5
_MANGLED = "11train_stepsILi5ELb0EEE"
OTHER = "other"
KINDS = {  # column -> what an instruction's name begins with
    "multiply_adds": ("FFMA",),
    "other_float": ("FADD", "FMUL", "FSETP", "FSEL", "FMNMX", "DADD", "DMUL", "DFMA", "MUFU"),
    "shared": ("LDS", "STS"),
    "global": ("LDG", "LD.", "STG", "ST.", "ATOM", "RED"),
    "shuffles": ("SHFL",),
    "barriers": ("BAR",),
}
COLUMNS = ("phase", "instructions", *KINDS, "rest")

Frame = tuple[str, int]  # a source file's name, a line


def find_nvdisasm() -> Path | None:
    """NVIDIA's disassembler: on the PATH, beside nvcc, or in the package triton."""
    candidates = [shutil.which("nvdisasm")]
    if (nvcc := cuda_toolkit.find_nvcc()) is not None:
        candidates.append(str(nvcc.parent / "nvdisasm"))
    spec = util.find_spec("triton")
    folders = (spec.submodule_search_locations or ()) if spec is not None else ()
    candidates += [f"{folder}/backends/nvidia/bin/nvdisasm" for folder in folders]
    return next((Path(path) for path in candidates if path is not None and Path(path).exists()), None)


def why_unavailable() -> str | None:
    """Why nothing can be counted here; None when it can."""
    if cuda_toolkit.find_nvcc() is None:
        return cuda_toolkit.why_unavailable()
    return None if find_nvdisasm() is not None else "no nvdisasm (on the PATH, beside nvcc, or in the package triton)"


def phases() -> list[str]:
    """The phases' names in their order."""
    return re.findall(r"^\s*X\((\w+)\)", (CUDA / "phase_clock.cuh").read_text(), re.MULTILINE)


def phase_lines() -> dict[Frame, str]:
    """The phase that each line of code belongs to: the one whose end comes next in its function."""
    found = {}
    for path in sorted({*CUDA.glob("*.cuh"), *CUDA.glob("*.cu")} - {CUDA / "phase_clock.cuh"}):
        pending: list[int] = []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            pending.append(number)
            if ends := re.search(r"clock\.(?:end|stamp)\(.*?Phase::(\w+)", line):
                found |= {(path.name, earlier): ends[1] for earlier in pending}
                pending = []
            elif line.startswith("}") or "PhaseClock clock(" in line:  # a function's end; before its first phase
                pending = []
    return found


def count(disassembly: str) -> dict[str, Counter]:
    """Instructions of each phase by kind, from nvdisasm's listing with source lines."""
    lines = phase_lines()
    counts: dict[str, Counter] = defaultdict(Counter)
    for instruction, frames in _instructions(disassembly):
        phase = next((lines[frame] for frame in frames if frame in lines), OTHER)
        kind = next((kind for kind, names in KINDS.items() if instruction.startswith(names)), "rest")
        counts[phase].update({"instructions": 1, kind: 1})
    return counts


def _instructions(disassembly: str) -> Iterator[tuple[str, list[Frame]]]:
    """Name and source lines, the innermost function's first, of each instruction of the kernel."""
    inside, frames, is_new = False, [], True
    for line in disassembly.splitlines():
        if line.startswith("//-----"):
            inside = ".text." in line and _MANGLED in line
        elif inside and (place := re.search(r'^\s*//## File "([^"]+)", line (\d+)', line)):
            frames = [] if is_new else frames
            frames.append((Path(place[1]).name, int(place[2])))
            is_new = False
        elif inside and (found := re.search(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)):
            is_new = True
            if found[1] != "NOP":
                yield found[1], frames


def disassemble(architecture: str) -> str:
    """nvdisasm's listing of csrc/cuda/train_network.cu."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/train_network.cubin"
        flags = [*cuda_toolkit.NVCC_FLAGS, "-lineinfo", f"-arch={architecture}", "-cubin", "-o", cubin]
        subprocess.run([str(cuda_toolkit.find_nvcc()), *flags, str(CUDA / "train_network.cu")], check=True)
        command = [str(find_nvdisasm()), "-c", "-gi", cubin]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def table(counts: dict[str, Counter]) -> list[dict[str, object]]:
    """A row for each phase, and one for the rest of the kernel."""
    return [
        {"phase": phase, **{column: counts[phase][column] for column in COLUMNS[1:]}} for phase in [*phases(), OTHER]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architecture", default="sm_90", help="e.g. sm_90")
    parser.add_argument("--write", type=Path, help="write the CSV here instead of printing it")
    options = parser.parse_args()
    if (reason := why_unavailable()) is not None:
        raise SystemExit(f"phase_instructions: {reason}")
    rows = table(count(disassemble(options.architecture)))
    with options.write.open("w", newline="") if options.write else sys.stdout as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
