"""Draws the rows that bench_ops.py wrote: a panel for each pass, a bar for each contestant."""

from operator import itemgetter
from pathlib import Path
from typing import Annotated

import numpy as np
import rows
import typer

_SAME_IN_ALL = ("batch", "dtype", "threads", "cpu", "isa", "torch", "date", "commit", "sgemm_peak_gflops")


def draw(table: list[dict[str, str]], path: Path) -> None:
    """Bars of GFLOP/s, each with how many times longer than the fused operator it took.

    Raises:
        ValueError: the rows are of several runs.
        ImportError: matplotlib is not installed.
    """
    rows.check_one_run(table, _SAME_IN_ALL)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is not installed; `pip install matplotlib` draws it") from error

    passes, contestants, layers = (
        list(dict.fromkeys(map(key, table))) for key in (itemgetter("pass"), itemgetter("contestant"), _layer)
    )
    size = (2 + 1.6 * len(layers), 4 * len(passes))
    figure = Figure(figsize=size, layout="constrained")  # not pyplot: no window, no global state
    first = table[0]
    peak = float(first["sgemm_peak_gflops"])
    figure.suptitle(
        f"{first['cpu']}, {first['isa']}, {first['threads']} threads, batch {first['batch']}, {first['dtype']}, "
        f"PyTorch {first['torch']}, {first['date']}"
    )
    width = 0.85 / len(contestants)
    for axes, one_pass in zip(np.ravel(figure.subplots(len(passes), 1)), passes, strict=True):
        shown = [row for row in table if row["pass"] == one_pass]
        groups = [[row for row in shown if _layer(row) == layer] for layer in layers]
        for contestant in contestants:
            bars = [
                (place + (index - (len(group) - 1) / 2) * width, row)  # a group has no gap for who is not in it
                for place, group in enumerate(groups)
                for index, row in enumerate(group)
                if row["contestant"] == contestant
            ]
            places, heights = [place for place, _ in bars], [float(row["gflops"]) for _, row in bars]
            drawn = axes.bar(places, heights, width, label=contestant)
            axes.bar_label(drawn, [f"{float(row['ratio']):.1f}" for _, row in bars], fontsize=6)
        axes.axhline(peak, color="gray", linestyle="--", label="fastest matrix product")
        axes.set_xticks(range(len(layers)), layers)
        axes.set(ylabel="GFLOP/s", title=f"{one_pass} (on the bars: time / fused)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=120)


def _layer(row: dict[str, str]) -> str:
    return f"{row['layer']}\n{row['activation']}\n{row['pool']}"


def main(
    csv: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What bench_ops.py --csv wrote.")],
    picture: Annotated[Path, typer.Argument(dir_okay=False, help="PNG, PDF or SVG.")],
) -> None:
    """Draw the bars of an operator benchmark."""
    try:
        draw(rows.read(csv), picture)
    except (ValueError, ImportError) as error:
        raise SystemExit(f"plot_ops: {error}") from None


if __name__ == "__main__":
    typer.run(main)
