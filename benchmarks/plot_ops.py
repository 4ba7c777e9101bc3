"""Draws the rows that bench_ops.py wrote: a panel for each pass, a bar for each contestant."""

from operator import itemgetter
from pathlib import Path

import numpy as np
import picture
import typer


def draw(table: picture.Table, path: Path) -> None:
    """Bars of GFLOP/s, each with how many times longer than the fused operator it took."""
    passes, contestants, layers = (
        list(dict.fromkeys(map(key, table))) for key in (itemgetter("pass"), itemgetter("contestant"), _layer)
    )
    size = (2 + 1.6 * len(layers), 4 * len(passes))
    peak = float(table[0]["sgemm_peak_gflops"])
    with picture.of_one_run(table, path, size, same=("batch", "dtype")) as figure:
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


def _layer(row: dict[str, str]) -> str:
    return f"{row['layer']}\n{row['activation']}\n{row['pool']}"


main = picture.command("plot_ops", draw)

if __name__ == "__main__":
    typer.run(main)
