"""Draws the rows that bench_train.py wrote: a panel for each network, images a second over the batch size."""

from operator import itemgetter
from pathlib import Path

import numpy as np
import picture
import typer


def draw(table: picture.Table, path: Path) -> None:
    """A line for each contestant, and where the arithmetic alone would end at the speed of a matrix product."""
    networks, contestants = (list(dict.fromkeys(map(itemgetter(key), table))) for key in ("network", "contestant"))
    columns = min(3, len(networks))
    lines = -(-len(networks) // columns)
    with picture.of_one_run(table, path, (5 * columns, 4 * lines + 1.5)) as figure:
        from matplotlib import colormaps

        pairs = colormaps["tab20"].colors  # dark, light, dark, ...
        colors = pairs[::2] + pairs[1::2]
        grid = figure.subplots(lines, columns, squeeze=False)
        for spare in np.ravel(grid)[len(networks) :]:
            spare.remove()
        for axes, network in zip(np.ravel(grid), networks, strict=False):
            shown = [row for row in table if row["network"] == network]
            for index, contestant in enumerate(contestants):
                points = [row for row in shown if row["contestant"] == contestant]
                places, heights = ([float(row[key]) for row in points] for key in ("batch", "images_per_s"))
                style = "s-" if contestant.startswith("fused") else ".--"
                axes.plot(places, heights, style, color=colors[index % len(colors)], label=contestant)
            gflop = float(shown[0]["gflops"]) / float(shown[0]["images_per_s"])  # of one image
            ceiling = float(table[0]["sgemm_peak_gflops"]) / gflop
            axes.axhline(ceiling, color="gray", linestyle=":", label="fastest matrix product")
            axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="images/s", title=network)


main = picture.command("plot_train", draw)

if __name__ == "__main__":
    typer.run(main)
