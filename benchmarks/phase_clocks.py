"""Where a training step on a GPU spends its time: clock cycles of each phase, beside the phase's instructions.

    python benchmarks/phase_clocks.py --csv phases.csv

Needs `_C_cuda` built with LENET_FAST_CLOCKS=1: one thread of three blocks (the first, the middle one, the last) then
stores the multiprocessor's clock at the end of each phase (csrc/cuda/phase_clock.cuh) in the first steps of a run. A
phase's cycles are those between the clock before it and its own, summed over the images of the block. `--instructions`
is a file of scripts/phase_instructions.py, whose counts stand in a phase's first row.
"""

import ctypes
import importlib.util
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import command
import numpy as np
import rows
import torch
import typer
from networks import NETWORKS, Task
from rich import box
from rich.console import Console
from rich.table import Table

from lenet_fast import FusedTrainer

BLOCKS = ("first", "middle", "last")
BEGIN, SECOND_BARRIER = "begin", "second_barrier"
OF_IMAGES = ("load", "gradients")  # first and last phase of one image
WARM_UP = 2  # steps whose clocks do not count, where there are more


class Clocks:
    """The clocks in a library that was built with LENET_FAST_CLOCKS=1."""

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        try:
            names = self._library.lenet_fast_phase_names
        except AttributeError:
            raise SystemExit(f"phase_clocks: {Path(library).name} was not built with LENET_FAST_CLOCKS=1") from None
        names.restype = ctypes.c_char_p
        self.phases: list[str] = names().decode().split()
        shape = (ctypes.c_int64 * 5)()
        self._library.lenet_fast_phase_shape(shape)
        self._shape = tuple(shape)

    @property
    def steps(self) -> int:
        """Of a run, counted from its first, as many are clocked."""
        return self._shape[1]

    def take(self) -> np.ndarray:
        """Cycles (blocks, steps, rounds, phases, layers), 0 where a phase did not happen; then they are cleared."""
        values = np.zeros(self._shape, np.int64)
        if error := self._library.lenet_fast_take_phase_clocks(ctypes.c_void_p(values.ctypes.data)):
            raise RuntimeError(f"the clocks cannot be read: CUDA error {error}")
        return values


@dataclass(frozen=True)
class Phase:
    """One phase of one layer: cycles a step in each of the blocks, and how often it happens there in a step."""

    name: str
    layer: int
    cycles: tuple[float, ...]
    times: int


def durations(clocks: np.ndarray, names: Sequence[str]) -> list[Phase]:
    """Each phase of a step in the order in which the first block comes to them; medians over the steps.

    Raises:
        ValueError: nothing was clocked.
    """
    collected: dict[tuple[int, int], list[dict[int, int]]] = {}
    times: dict[tuple[int, int], int] = {}
    for block, of_block in enumerate(clocks):
        for step, stamps in enumerate(of_block):
            sums: dict[tuple[int, int], int] = {}
            for key, cycles in _differences(stamps):
                sums[key] = sums.get(key, 0) + cycles
                if (block, step) == (0, 0):
                    times[key] = times.get(key, 0) + 1
            for key, cycles in sums.items():
                collected.setdefault(key, [{} for _ in clocks])[block][step] = cycles
    if not collected:
        raise ValueError("no clock was stored: nothing was trained by this library")

    def median(of_steps: Mapping[int, int]) -> float:
        counted = [cycles for step, cycles in of_steps.items() if step >= WARM_UP] or list(of_steps.values())
        return statistics.median(counted) if counted else 0.0

    return [
        Phase(names[phase], layer, tuple(map(median, of_blocks)), times.get((phase, layer), 0))
        for (phase, layer), of_blocks in collected.items()
    ]


def _differences(stamps: np.ndarray) -> Iterator[tuple[tuple[int, int], int]]:
    """(phase, layer) and its cycles, as one block came to them in one step."""
    order = sorted((int(stamps[place]), *map(int, place[1:])) for place in zip(*stamps.nonzero(), strict=True))
    for (before, *_), (after, phase, layer) in itertools.pairwise(order):
        yield (phase, layer), after - before


def as_rows(
    phases: Sequence[Phase], order: Sequence[str], in_flight: int, instructions: Mapping[str, rows.Row]
) -> Iterator[rows.Row]:
    """A row for each phase.

    Args:
        order: all phases' names as a step goes through them.
        in_flight: images that the device works on at a time.
        instructions: phase -> its columns of instruction counts.
    """
    total = [sum(phase.cycles[block] for phase in phases) for block in range(len(BLOCKS))]
    begin, end = map(order.index, OF_IMAGES)
    told: set[str] = set()
    for phase in phases:
        cycles = statistics.mean(phase.cycles)
        counts = {name: value if phase.name not in told else "" for name, value in instructions[phase.name].items()}
        told.add(phase.name)
        yield {
            "phase": phase.name,
            "layer": phase.layer,
            "cycles": f"{cycles:.0f}",
            "share": f"{cycles / statistics.mean(total):.4f}",
            **{f"cycles_{name}_block": f"{value:.0f}" for name, value in zip(BLOCKS, phase.cycles, strict=True)},
            "times_a_step": phase.times,
            "images_in_flight": in_flight if begin <= order.index(phase.name) <= end else "",
            **counts,
        }


def read_instructions(path: Path | None, phases: Sequence[str]) -> dict[str, rows.Row]:
    """The columns of instruction counts of each phase; none without a file."""
    table = {row.pop("phase"): row for row in rows.read(path)} if path is not None else {}
    return {name: table.get(name, {}) for name in phases}


def measure(clocks: Clocks, network: str, batch: int, device: str) -> list[Phase]:
    """Train as many steps as are clocked, once to warm up and once with the clocks."""
    task = Task.make(network, batch, clocks.steps, device)
    trainer = FusedTrainer(task.model.to(device), "sgd", lr=task.lr)
    order = torch.arange(len(task.labels), device=device)
    for _ in range(2):
        clocks.take()
        trainer.run_epoch(task.pixels, task.labels, order, batch)
    return durations(clocks.take(), clocks.phases)


def print_table(table: Sequence[rows.Row]) -> None:
    """The rows, a section for each network and batch."""
    printed = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("", "cycles", "share", "times", "instructions"):
        printed.add_column(heading, justify="right" if heading else "left")
    for (network, batch), group in itertools.groupby(table, key=lambda row: (row["network"], row["batch"])):
        race = list(group)
        printed.add_section()
        printed.add_row(f"[bold]{network} batch {batch}", f"[bold]{sum(int(row['cycles']) for row in race):,}")
        for row in race:
            name = f"  {row['phase']} {row['layer']}"
            counts = str(row.get("instructions", ""))
            printed.add_row(
                name, f"{int(row['cycles']):,}", f"{float(row['share']):.1%}", str(row["times_a_step"]), counts
            )
    Console().print(printed)


def main(
    networks: Annotated[str, typer.Option(help="Names with commas between.")] = "lenet5-d2l,lenet5,lenet5-1998",
    batch: Annotated[str, typer.Option(help="Images a step; several with commas between.")] = "128,4096",
    instructions: Annotated[Path | None, typer.Option(exists=True, help="Of scripts/phase_instructions.py.")] = None,
    csv: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the rows here.")] = None,
) -> None:
    """Clock the phases of training steps on the current CUDA device."""
    spec = importlib.util.find_spec("lenet_fast._C_cuda")
    if spec is None or spec.origin is None:
        raise SystemExit("phase_clocks: lenet_fast._C_cuda was not built")
    clocks = Clocks(spec.origin)
    counts = read_instructions(instructions, clocks.phases)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    settings = {"gpu": properties.name, **rows.environment()}
    table: list[rows.Row] = []
    for network, size in itertools.product(command.some_of("--networks", NETWORKS, networks), command.batches(batch)):
        phases = measure(clocks, network, size, "cuda")
        in_flight = min(size, properties.multi_processor_count)
        table += [
            {"network": network, "batch": size, **row, **settings}
            for row in as_rows(phases, clocks.phases, in_flight, counts)
        ]
        if csv is not None:  # what was clocked stays, whatever ends this process
            rows.write(csv, table)
    print_table(table)


if __name__ == "__main__":
    typer.run(main)
