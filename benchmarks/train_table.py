"""The README's sections on whole networks, drawn from results/train_*.csv and results/inference_cpu.csv.

python benchmarks/train_table.py              # prints them
python benchmarks/train_table.py --write      # and puts them into README.md
"""

import itertools
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path

import readme_section
import rows

RESULTS = Path(__file__).parent / "results"
CPU, GPU = "### Whole networks", "### Whole networks on a GPU"
NOT_MEASURED = (
    "Not yet measured. `benchmarks/bench_train.py` measures, and `benchmarks/train_table.py` writes this section."
)
TYPICAL = ("lenet5-d2l", "128")  # network and batch
RIVALS = {  # column of each contestant; where several share one, the fastest of them stands there
    "fused-run": "ours, all steps in a call",
    "fused-step": "ours, a call each step",
    "fused-phases": "ours, two launches a step",
    "eager": "eager",
    "eager-channels-last": "eager, channels_last",
    "compile": "torch.compile, its fastest form",
    "compile-fused-sgd": "torch.compile, its fastest form",
    "compile-channels-last": "torch.compile, its fastest form",
    "compile-update": "torch.compile, its fastest form",
    "compile-max-autotune": "torch.compile, its fastest form",
    "compile-max-autotune-update": "torch.compile, its fastest form",
    "compile-graph": "compile in a CUDA graph",
    "compile-bfloat16": "compile, bfloat16 (less exact)",
    "jax": "JAX",
    "jax-scan": "JAX, scan",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}

Row = dict[str, str]


def is_shown(network: str, batch: str) -> bool:
    """Whether the README shows this race on the CPU: one network at every batch, every network at one."""
    return network == TYPICAL[0] or batch == TYPICAL[1]


def section(measured: Sequence[Row], what: str) -> str:
    """What was measured in one run of `what`: conditions and a table."""
    first = measured[0]
    probed = [row for _, race in itertools.groupby(measured, key=_race) for row in itertools.islice(race, 1)]
    disturbed = sum(int(row["disturbed_rounds"]) for row in probed) / sum(int(row["rounds"]) for row in probed)
    where = first.get("gpu") or f"{first['cpu']}, {first['isa']}, {first['threads']} threads"
    lines = [
        f"{what}; {where}, float32, PyTorch {first['torch']}, {first['date']}.",
        "Time of the alternative divided by the time of ours, "
        f"medians of {first['rounds']} interleaved rounds ({disturbed:.0%} disturbed).",
        f"Peak: the fastest float32 matrix product of the run, {float(first['sgemm_peak_gflops']):,.0f} GFLOP/s.",
    ]
    return "\n".join([*lines, "", _table(measured)])


def _race(row: Row) -> tuple[str, str]:
    return itemgetter("network", "batch")(row)


def _table(measured: Sequence[Row]) -> str:
    first = measured[0]
    judged = "fused" if "epoch_ms" not in first else "fused-run" if "gpu" in first else "fused-step"
    present = {row["contestant"] for row in measured} - {judged}
    rivals = list(dict.fromkeys(heading for name, heading in RIVALS.items() if name in present))
    lasts = ["epoch"] if "gpu" in first else []
    headings = ["network", "batch", "ours", "images/s", "of peak", *lasts, *rivals]
    lines = [headings, ["---"] * len(headings)]
    for (network, batch), race in itertools.groupby(measured, key=_race):
        by_name = {row["contestant"]: row for row in race}
        ours = by_name.pop(judged)
        ratios: dict[str, float] = {}
        for name, row in by_name.items():
            heading, ratio = RIVALS[name], float(row["ratio"])
            ratios[heading] = min(ratio, ratios.get(heading, ratio))
        cells = [
            network,
            batch,
            f"{float(ours['median_us']):,.0f} us{rows.remark(ours)}",
            f"{int(ours['images_per_s']):,}",
        ]
        cells.append(f"{float(ours['peak_share']):.0%}")
        cells += [f"{float(ours['epoch_ms']):,.1f} ms" for _ in lasts]
        lines.append([*cells, *(f"{ratios[heading]:.1f}x" if heading in ratios else "" for heading in rivals)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cpu_text(training: Sequence[Row], inference: Sequence[Row]) -> str:
    """The section on the CPU."""
    parts = []
    for what, measured in (("A training step", training), ("Inference", inference)):
        shown = [row for row in measured if is_shown(row["network"], row["batch"])]
        if shown:
            parts.append(section(shown, what))
    return "\n\n".join(parts) or NOT_MEASURED


def gpu_text(results: Iterable[Sequence[Row]]) -> str:
    """The section on any number of GPUs."""
    return "\n\n".join(section(measured, "Training, whole epochs") for measured in results) or NOT_MEASURED


def main() -> None:
    def read(name: str) -> list[Row]:
        path = RESULTS / f"{name}.csv"
        return rows.read(path) if path.exists() else []

    gpus = sorted(path for path in RESULTS.glob("train_*.csv") if path.stem != "train_cpu")
    drawn = {CPU: cpu_text(read("train_cpu"), read("inference_cpu")), GPU: gpu_text(map(rows.read, gpus))}
    readme_section.show(drawn)


if __name__ == "__main__":
    main()
