"""Draws the rows that bench_train.py wrote: a panel for each network, images a second over the batch size."""

from operator import itemgetter
from pathlib import Path
from typing import Annotated

import numpy as np
import rows
import typer

_SAME_IN_ALL = ("threads", "cpu", "isa", "torch", "date", "commit", "sgemm_peak_gflops")


def draw(table: list[dict[str, str]], path: Path) -> None:
    """A line for each contestant, and where the arithmetic alone would end at the speed of a matrix product.

    Raises:
        ValueError: the rows are of several runs.
        ImportError: matplotlib is not installed.
    """
    rows.check_one_run(table, _SAME_IN_ALL)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is not installed; `pip install matplotlib` draws it") from error

    networks, contestants = (list(dict.fromkeys(map(itemgetter(key), table))) for key in ("network", "contestant"))
    columns = min(3, len(networks))
    lines = -(-len(networks) // columns)
    figure = Figure(figsize=(5 * columns, 4 * lines + 1.5), layout="constrained")  # not pyplot: no global state
    first = table[0]
    where = first.get("gpu") or f"{first['cpu']}, {first['isa']}, {first['threads']} threads"
    figure.suptitle(f"{where}, PyTorch {first['torch']}, {first['date']}")
    grid = figure.subplots(lines, columns, squeeze=False)
    for spare in np.ravel(grid)[len(networks) :]:
        spare.remove()
    drawn = {}
    for axes, network in zip(np.ravel(grid), networks, strict=False):
        shown = [row for row in table if row["network"] == network]
        for index, contestant in enumerate(contestants):
            points = [row for row in shown if row["contestant"] == contestant]
            places, heights = ([float(row[key]) for row in points] for key in ("batch", "images_per_s"))
            style = "s-" if contestant.startswith("fused") else ".--"
            (drawn[contestant],) = axes.plot(places, heights, style, color=f"C{index % 10}", label=contestant)
        gflop = float(shown[0]["gflops"]) / float(shown[0]["images_per_s"])  # of one image
        ceiling = float(first["sgemm_peak_gflops"]) / gflop
        drawn["ceiling"] = axes.axhline(ceiling, color="gray", linestyle=":", label="fastest matrix product")
        axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="images/s", title=network)
    figure.legend(handles=list(drawn.values()), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=120)


def main(
    csv: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What bench_train.py --csv wrote.")],
    picture: Annotated[Path, typer.Argument(dir_okay=False, help="PNG, PDF or SVG.")],
) -> None:
    """Draw the speeds of a benchmark of whole networks."""
    try:
        draw(rows.read(csv), picture)
    except (ValueError, ImportError) as error:
        raise SystemExit(f"plot_train: {error}") from None


if __name__ == "__main__":
    typer.run(main)
