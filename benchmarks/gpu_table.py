"""The README's section on GPUs, drawn from results/gpu_*.csv.

python benchmarks/gpu_table.py              # prints it
python benchmarks/gpu_table.py --write      # and puts it into README.md
"""

import itertools
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path

import readme_section
import rows

RESULTS = Path(__file__).parent / "results"
HEADING = "### Operators on a GPU"
NOT_MEASURED = (
    "Not yet measured. `benchmarks/gpu_run.sh` measures on a machine with a GPU, and `benchmarks/gpu_table.py` writes "
    "this\nsection."
)
LAUNCHES = {
    "graph": "In CUDA graphs, ours and theirs: forward and backward captured whole",
    "calls": "Launched by Python, call by call",
}
CONTESTANTS = {
    "fused-triton": "our Triton kernels",
    "eager": "eager",
    "eager-channels-last": "eager, channels_last",
    "compile": "torch.compile",
    "compile-channels-last": "compile, channels_last",
    "compile-max-autotune": "compile, max-autotune",
}

Row = dict[str, str]


def text(results: Iterable[Sequence[Row]]) -> str:
    """The section's text for the rows of any number of GPUs."""
    return "\n\n".join(section(measured, "forward+backward") for measured in results) or NOT_MEASURED


def section(measured: Sequence[Row], one_pass: str) -> str:
    """What was measured on one GPU of one pass: conditions, and a table for each way to launch."""
    measured = [row for row in measured if row["pass"] == one_pass]
    if not measured:
        return f"{one_pass}: nothing was measured."
    first = measured[0]
    races = {tuple(row[column] for column in ("layer", "activation", "pool", "batch", "launch")) for row in measured}
    fused = [row for row in measured if row["contestant"] == "fused"]
    disturbed = sum(int(row["disturbed_rounds"]) for row in fused) / sum(int(row["rounds"]) for row in fused)
    assert len(fused) == len(races)
    peak, bandwidth = float(first["sgemm_peak_gflops"]), float(first["copy_gbytes_per_s"])
    words = (
        f"{first['gpu']}, {one_pass.replace('+', ' and ')}, {first['dtype']} without TF32, our {first['kernels']} "
        f"kernels, PyTorch {first['torch']}, {first['date']}.\nTime of the alternative divided by the time of ours, "
        f"medians of {first['rounds']} interleaved rounds ({disturbed:.0%} disturbed). Roofline: the least\ntime that "
        f"the measured ceilings allow, {peak / 1e3:.1f} TFLOP/s (a float32 matrix product) and {bandwidth:,.0f} GB/s "
        "(a copy),\ndivided by the time of ours."
    )
    tables = [
        f"{title}:\n\n{_table([row for row in measured if row['launch'] == launch])}"
        for launch, title in LAUNCHES.items()
        if any(row["launch"] == launch for row in measured)
    ]
    return "\n\n".join([words, *tables])


def _table(measured: Sequence[Row]) -> str:
    rivals = [name for name in CONTESTANTS if any(row["contestant"] == name for row in measured)]
    headings = ["layer", "batch", "ours", "roofline", *(CONTESTANTS[name] for name in rivals)]
    lines = [headings, ["---"] * len(headings)]
    for (layer, activation, pool, batch), race in itertools.groupby(
        measured, key=itemgetter("layer", "activation", "pool", "batch")
    ):
        by_name = {row["contestant"]: row for row in race}
        ours = by_name["fused"]
        ratios = (f"{float(by_name[name]['ratio']):.1f}x" if name in by_name else "" for name in rivals)
        cells = [f"{layer}, {activation} + {pool}", batch, f"{float(ours['median_us']):.1f} us{rows.remark(ours)}"]
        lines.append([*cells, f"{float(ours['roofline_share']):.0%}", *ratios])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    readme_section.show({HEADING: text(rows.read(path) for path in sorted(RESULTS.glob("gpu_*.csv")))})


if __name__ == "__main__":
    main()
