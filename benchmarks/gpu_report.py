"""Before and after the steps of gpu_run.sh: what the machine lacks, and what came of it.

python benchmarks/gpu_report.py before                 # the GPU's short name; 2 and the reason where there is none
python benchmarks/gpu_report.py after STEPS RESULT     # the rows and the steps as RESULT.md, and on the screen
"""

import re
import shutil
import sys
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
}
_SETUPTOOLS = 77  # reads pyproject.toml
_PROGRAMS = {"nvcc": "no CUDA kernels are built", "compute-sanitizer": "no sanitizers"}


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


def after(steps: Path, result: Path) -> bool:
    """Write and print the summary; whether every step succeeded.

    Args:
        steps: a line for each step: name, exit status, seconds and last words, with tabs between.
        result: gpu_NAME, where the operators' rows are, without ".csv"; those of whole networks are in train_NAME.csv.
    """
    table = ["| step | | seconds | last words |", "| --- | --- | --- | --- |"]
    succeeded = True
    for line in steps.read_text().splitlines():
        name, status, seconds, words = line.split("\t")
        succeeded &= status == "0"
        outcome = {"0": "ok", "124": "OUT OF TIME", "137": "OUT OF TIME"}.get(status, f"FAILED ({status})")
        table.append(f"| {name} | {outcome} | {seconds} | {words[:90].replace('|', ' ').strip()} |")
    rows_file = result.with_suffix(".csv")
    if rows_file.exists():
        measured = rows.read(rows_file)
        for one_pass in dict.fromkeys(row["pass"] for row in measured):
            table += ["", gpu_table.section(measured, one_pass)]
    trained = result.with_name(f"train{result.name.removeprefix('gpu')}.csv")
    if trained.exists():
        table += ["", train_table.gpu_text([rows.read(trained)])]
    summary = "\n".join(table)
    result.with_suffix(".md").write_text(f"{summary}\n")
    print(summary)
    return succeeded


if __name__ == "__main__":
    if sys.argv[1] == "before":
        print(before())
    else:
        raise SystemExit(not after(*map(Path, sys.argv[2:])))
