"""What the pictures of results share: rows of one run, a headline of where and when, a legend below, a command."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rows
import typer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = list[dict[str, str]]

_SAME_IN_ALL = ("threads", "cpu", "isa", "torch", "date", "commit", "sgemm_peak_gflops")


@contextmanager
def of_one_run(
    table: Table, path: Path, size: tuple[float, float], *, same: tuple[str, ...] = ()
) -> Iterator["Figure"]:
    """A figure of `size` inches, written to `path` when what is drawn in it is done.

    Args:
        same: columns, besides those of every benchmark, in which the rows must agree; the headline names them.

    Raises:
        ValueError: the rows are of several runs.
        ImportError: matplotlib is not installed.
    """
    rows.check_one_run(table, (*same, *_SAME_IN_ALL))
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is not installed; `pip install matplotlib` draws it") from error

    figure = Figure(figsize=size, layout="constrained")  # not pyplot: no window, no global state
    first = table[0]
    where = first.get("gpu") or f"{first['cpu']}, {first['isa']}, {first['threads']} threads"
    settings = "".join(f", {column} {first[column]}" for column in same)
    figure.suptitle(f"{where}{settings}, PyTorch {first['torch']}, {first['date']}")
    yield figure
    labelled = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=120)


def command(name: str, draw: Callable[[Table, Path], None]) -> Callable[[Path, Path], None]:
    """What the file `name` is as a command: rows in, picture out."""

    def main(
        csv: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What the benchmark's --csv wrote.")],
        picture: Annotated[Path, typer.Argument(dir_okay=False, help="PNG, PDF or SVG.")],
    ) -> None:
        try:
            draw(rows.read(csv), picture)
        except (ValueError, ImportError) as error:
            raise SystemExit(f"{name}: {error}") from None

    main.__doc__ = draw.__doc__
    return main
