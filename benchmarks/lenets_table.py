"""The table of docs/public_lenets.md, drawn from tests/public_lenets/ and results/lenets_cpu.csv.

python benchmarks/lenets_table.py              # prints it
python benchmarks/lenets_table.py --write      # and puts it into the file
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import readme_section
import rows
from bench_lenets import ACCELERATED, EAGER, FUSED, LENETS

RESULTS = Path(__file__).parent / "results" / "lenets_cpu.csv"
DOCUMENT = Path(__file__).parent.parent / "docs" / "public_lenets.md"
HEADING = "## The table"
NOT_MEASURED = "Times are not yet measured: `benchmarks/bench_lenets.py` measures."

Row = dict[str, str]


def text(measured: Sequence[Row]) -> str:
    """The text below the heading: a line for every LeNet, its times where they were measured."""
    times = {
        name: {row["contestant"]: row for row in race}
        for name, race in itertools.groupby(measured, key=lambda row: row["lenet"])
    }
    lines = [["name", "modelled on", "fused", "a training step", "eager", "`accelerate`", "`FusedTrainer`"]]
    lines.append(["---"] * len(lines[0]))
    for name, entry in LENETS.items():
        fused = f"none: {entry.unfused}" if entry.unfused else str(entry.fused[0])
        way = f"by autograd: {entry.autograd}" if entry.autograd else "native"
        if entry.images > 1:
            way = f"not by this trainer: {entry.autograd}"
        row = times.get(name, {})
        eager = f"{float(row[EAGER]['median_us']):,.0f} us" if row else ""
        faster = [f"{1 / float(row[one]['ratio']):.1f}x" if row else "" for one in (ACCELERATED, FUSED)]
        lines.append([name, entry.origin, fused, way, eager, *faster])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{_summary(measured)}\n\n{table}"


def _summary(measured: Sequence[Row]) -> str:
    native = sum(not entry.autograd for entry in LENETS.values())
    counts = f"{len(LENETS)} networks, {native} of them trained by native steps."
    if not measured:
        return f"{counts} {NOT_MEASURED}"
    first, probed = measured[0], measured[:: len({row["contestant"] for row in measured})]
    disturbed = sum(int(row["disturbed_rounds"]) for row in probed) / sum(int(row["rounds"]) for row in probed)
    where = f"{first['cpu']}, {first['isa']}, {first['threads']} threads"
    return "\n".join(
        [
            counts,
            f"A training step at batch {first['batch']}; {where}, float32, PyTorch {first['torch']}, {first['date']}.",
            "The time of eager PyTorch, and how many times faster the others are, "
            f"medians of {first['rounds']} interleaved rounds ({disturbed:.0%} disturbed).",
        ]
    )


def main() -> None:
    measured = rows.read(RESULTS) if RESULTS.exists() else []
    readme_section.show({HEADING: text(measured)}, DOCUMENT)


if __name__ == "__main__":
    main()
