"""Before and after the steps of gpu_run.sh: what the machine lacks, and what came of it.

python benchmarks/gpu_report.py before                 # the GPU's short name; 2 and the reason where there is none
python benchmarks/gpu_report.py after STEPS OUT GPU BEGIN    # the steps, and the rows in OUT newer than BEGIN
"""

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata, util
from pathlib import Path

import gpu_table
import rows
import torch
import train_table

_PACKAGES = {
    "pytest": "no tests, no sanitizers",
    "typer": "no benchmark",
    "rich": "no benchmark",
    "triton": "no Triton kernels, no torch.compile",
    "xdist": "the tests run one by one",
    "pytest_timeout": "a test that hangs takes its step's whole time",
    "jax": "no rival from JAX",
}
_SETUPTOOLS = 77  # reads pyproject.toml
_PROGRAMS = {
    "nvcc": "without a bundle no CUDA kernels are built",
    "compute-sanitizer": "no sanitizers",
    "ncu": "no profiles of single kernels",
}


def before() -> str:
    """The GPU's name as part of a file's name, its compute capability; prints what is missing and what that costs.

    Raises:
        SystemExit: no CUDA device.
    """
    if not torch.cuda.is_available():
        print(f"gpu_run: no CUDA device (PyTorch {torch.__version__})", file=sys.stderr)
        raise SystemExit(2)
    name = torch.cuda.get_device_name()
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("torch", "setuptools"))
    print(f"{name}, {torch.cuda.device_count()} of them, {versions}", file=sys.stderr)
    missing = {package: cost for package, cost in _PACKAGES.items() if util.find_spec(package) is None}
    missing |= {program: cost for program, cost in _PROGRAMS.items() if shutil.which(program) is None}
    if int(metadata.version("setuptools").partition(".")[0]) < _SETUPTOOLS:
        missing[f"setuptools {_SETUPTOOLS} or later"] = "nothing is built"
    for what, cost in missing.items():
        print(f"missing here: {what}: {cost}", file=sys.stderr)
    short = re.sub(r"\W+", "_", name.lower().removeprefix("nvidia ")).strip("_")
    return "{} {}.{}".format(short, *torch.cuda.get_device_capability())


def after(steps: Path, out: Path, gpu: str, begin: Path) -> str:
    """The summary: the steps as gpu_run.sh noted them, and a table of each file of rows in `out` newer than `begin`."""
    parts = [steps.read_text(errors="replace").rstrip()]

    def measured(name: str) -> list[dict[str, str]]:
        path = out / f"{name}_{gpu}.csv"
        is_new = path.exists() and path.stat().st_mtime >= begin.stat().st_mtime
        return rows.read(path) if is_new else []

    parts += [train_table.gpu_text([table]) for name in ("alone", "train", "train_more") if (table := measured(name))]
    if table := measured("phases"):
        parts.append(_phases(table))
    table = measured("gpu")
    parts += [gpu_table.section(table, one_pass) for one_pass in dict.fromkeys(row["pass"] for row in table)]
    return "\n\n".join(parts)


def _phases(table: Sequence[Mapping[str, str]]) -> str:
    """Cycles and share of each phase, a column for each network and batch."""
    runs: dict[tuple[str, str], dict[tuple[str, str], Mapping[str, str]]] = {}
    for row in table:
        runs.setdefault((row["network"], row["batch"]), {})[row["phase"], row["layer"]] = row
    lines = [["phase", "layer", *(f"{network}, {batch}" for network, batch in runs)]]
    lines.append(["---"] * len(lines[0]))
    for key in dict.fromkeys(key for run in runs.values() for key in run):
        cells = (run.get(key) for run in runs.values())
        figures = (f"{int(row['cycles']):,} ({float(row['share']):.1%})" if row else "" for row in cells)
        lines.append([*key, *figures])
    return "Clock cycles of a step's phases:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    if sys.argv[1] == "before":
        print(before())
    else:
        _, _, steps, out, gpu, begin = sys.argv
        print(after(Path(steps), Path(out), gpu, Path(begin)))
