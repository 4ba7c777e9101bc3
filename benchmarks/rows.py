"""Rows of a results file: the columns that every benchmark writes, and reading and writing them as CSV."""

import csv
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from harness import Race, SgemmProbe

import lenet_fast

_ROOT = Path(__file__).resolve().parent.parent

Row = dict[str, object]


def measurement(race: Race, contestant: str, *, to: str, images: int, flops: float, probe: SgemmProbe) -> Row:
    """What `race` measured of one contestant; `images` and `flops` are of one call, ratios to contestant `to`."""
    seconds, ratio = race.times(contestant), race.ratios(contestant, to)
    gflops = 1e-9 * flops / seconds.median
    return {
        "median_us": f"{1e6 * seconds.median:.2f}",
        "q1_us": f"{1e6 * seconds.q1:.2f}",
        "q3_us": f"{1e6 * seconds.q3:.2f}",
        "images_per_s": f"{images / seconds.median:.0f}",
        "gflops": f"{gflops:.2f}",
        "peak_share": f"{gflops / probe.peak:.4f}",
        "ratio": f"{ratio.median:.3f}",
        "ratio_q1": f"{ratio.q1:.3f}",
        "ratio_q3": f"{ratio.q3:.3f}",
        "rounds": len(race.probes),
        "disturbed_rounds": race.disturbed_rounds(probe.best),
        "probe_gflops": f"{np.median(race.probes):.1f}",
        "probe_best_gflops": f"{probe.best:.1f}",
        "sgemm_peak_gflops": f"{probe.peak:.1f}",
    }


def environment() -> Row:
    """What the figures depend on besides the arguments; no host names, no paths."""
    try:
        from lenet_fast import _build_info

        built = {"compiler": _build_info.compiler, "isa": _build_info.selected_isa()}
    except ImportError:
        built = {"compiler": "unknown", "isa": "unknown"}
    return {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "lenet_fast": lenet_fast.__version__,
        "commit": _git("rev-parse", "HEAD") or os.environ.get("LENET_FAST_COMMIT", "unknown"),
        "dirty": _dirty(),
        "torch": torch.__version__,
        "compiler": built["compiler"],
        "cpu": _cpu_model(),
        "isa": built["isa"],
        "threads": torch.get_num_threads(),
    }


def _dirty() -> str:
    """Whether the checkout differs from the commit; results do not count."""
    status = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return "unknown" if status is None else "yes" if status else "no"


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            label, _, value = line.partition(":")
            if label.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write rows of equal columns as CSV. A process that is killed meanwhile leaves the file as it was before."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)


def read(path: Path) -> list[dict[str, str]]:
    """Read what `write` wrote."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def remark(row: Mapping[str, str]) -> str:
    """What a table says beside a time of ours whose results were wrong; files from before the column have none."""
    return f" (disagrees: {row['error']})" if row.get("agrees") == "no" else ""


def check_one_run(table: Sequence[Mapping[str, str]], columns: Iterable[str]) -> None:
    """Raise ValueError unless all rows agree in these columns."""
    for column in columns:
        if len(values := {row[column] for row in table}) != 1:
            raise ValueError(f"expected rows of one run, but {column} differs: {', '.join(sorted(values))}")
