"""Whole networks, training steps or inference, against what a user would run instead; see benchmarks/README.md."""

import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import agreement
import command
import devices
import harness
import infer_contestants
import network_race
import rows
import torch
import train_contestants
import train_table
import typer
from devices import Device
from networks import NETWORKS, Task, flops
from rich import box
from rich.console import Console
from rich.table import Table
from unavailable import Unavailable

from lenet_fast import backends

DEVICES = {"cpu": devices.cpu, "cuda": devices.cuda}
BATCHES = {"cpu": "1,32,128,256,1024,8192", "cuda": "32,128,512,4096"}
EPOCH = 60_000  # images
_MOST_STEPS, _RESIDENT = 64, 512  # of a call on the CPU: as many as keep a call short


@dataclasses.dataclass(frozen=True)
class Measured:
    """A race on one network at one batch size."""

    task: Task
    race: harness.Race
    training: bool

    def as_rows(self, ours: str, contestants: dict[str, object], device: Device, settings: rows.Row) -> list[rows.Row]:
        """A row for each contestant."""
        batch = self.task.batch
        work = batch * flops(self.task.model, self.training)
        table = []
        for name in self.race.seconds:
            row = {"network": self.task.name, "batch": batch, "contestant": name, "dtype": contestants[name].dtype}
            row |= rows.measurement(self.race, name, to=ours, images=batch, flops=work, probe=device.probe)
            if self.training:
                row["epoch_ms"] = f"{1e3 * self.race.times(name).median * EPOCH / batch:.3f}"
            row["steps"] = self.task.steps
            table.append(row | settings)
        return table


def print_table(table: Iterable[rows.Row]) -> None:
    """The rows as a table, a section for every race."""
    printed = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("", "us a step", "images/s", "of peak", "time / fused"):
        printed.add_column(
            heading, justify="right" if heading else "left", no_wrap=True, min_width=0 if heading else 24
        )
    for (network, batch), group in itertools.groupby(table, key=lambda row: (row["network"], row["batch"])):
        printed.add_section()
        printed.add_row(f"[bold]{network} batch {batch}")
        for row in group:
            printed.add_row(
                f"  {row['contestant']}",
                f"{float(row['median_us']):.1f}",
                f"{int(row['images_per_s']):,}",
                f"{float(row['peak_share']):.0%}",
                "{:.2f} ({:.2f} to {:.2f})".format(*(float(row[f"ratio{q}"]) for q in ("", "_q1", "_q3"))),
            )
    Console().print(printed)


def steps_of_a_call(batch: int, device: str, epoch_images: int) -> int:
    """On a GPU an epoch, since some contestants launch it whole; a last smaller batch is left out."""
    if device == "cuda":
        return max(1, epoch_images // batch)
    return max(1, min(_MOST_STEPS, _RESIDENT // batch))


def main(
    batch: Annotated[str | None, typer.Option(help="Images a step; several with commas between.")] = None,
    threads: Annotated[int, typer.Option(min=1, max=os.cpu_count(), help="For every contestant.")] = 2,
    networks: Annotated[str, typer.Option(help="Names with commas between.")] = ",".join(NETWORKS),
    inference: Annotated[bool, typer.Option("--inference", help="Outputs in eval mode instead of steps.")] = False,
    only_shown: Annotated[bool, typer.Option("--only-shown", help="Only the races that the README shows.")] = False,
    rivals: Annotated[str | None, typer.Option(help="Who competes with ours.", show_default="all")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of every contestant.")] = 31,
    sample_ms: Annotated[float, typer.Option(min=0.01, help="About how long a sample takes.")] = 50.0,
    device: Annotated[str, typer.Option(help=f"One of {', '.join(DEVICES)}.")] = "cpu",
    epoch_images: Annotated[int, typer.Option(min=1, help="Images of an epoch on a GPU.")] = EPOCH,
    seconds: Annotated[float | None, typer.Option(min=0, help="Start no race later than that; exits with 1.")] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Leave out who fails; exits with 1.")] = False,
    csv: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the rows here.")] = None,
) -> None:
    """Race whole networks against what a user would run instead; refuses where results disagree."""
    start = time.monotonic()
    (device,) = command.some_of("--device", DEVICES, device)
    chosen_networks = command.some_of("--networks", NETWORKS, networks)
    if inference and device != "cpu":
        raise typer.BadParameter(f"--inference: expected with --device cpu, got {device!r}")
    known = infer_contestants.CONTESTANTS if inference else train_contestants.CONTESTANTS[device]
    ours = infer_contestants.OURS if inference else train_contestants.OURS[device]
    chosen = list(known) if rivals is None else [ours, *command.some_of("--rivals", known, rivals)]
    contestants = {name: contestant for name, contestant in known.items() if name in chosen}
    batches = command.batches(BATCHES[device] if batch is None else batch)
    if csv is not None and not csv.parent.is_dir():
        raise typer.BadParameter(f"--csv: no such folder: {csv.parent}")
    if (reason := backends.why_untrained(device)) is not None:
        raise SystemExit(f"bench_train: there is nothing of ours to time: {reason}")
    if (reason := backends.why_unavailable("native", device)) is not None:
        print(f"bench_train: {ours} takes CUDA graphs of the operators: {reason}", file=sys.stderr)
    if device == "cpu":
        _keep_to(threads)
        torch._inductor.config.compile_threads = 1  # no workers that are forked from JAX's threads and stay
    torch.set_num_threads(threads)
    try:
        device = DEVICES[device]()
    except RuntimeError as error:
        raise SystemExit(f"bench_train: --device: {error}") from None
    if device.type != "cpu":
        device = dataclasses.replace(device, timer=harness.time_synchronised)
    settings = {**rows.environment(), **device.facts}

    races: list[Measured] = []
    failures: list[str] = []
    unavailable: set[str] = set()
    todo = list(itertools.product(chosen_networks, batches))
    if only_shown:
        todo = [(network, size) for network, size in todo if train_table.is_shown(network, str(size))]
    for done, (network, size) in enumerate(todo):
        if seconds is not None and time.monotonic() - start > seconds:
            failures.append(f"the last {len(todo) - done} of {len(todo)} races: no time was left for them")
            break
        title = f"{network} {'inference' if inference else 'training'} batch {size}"
        print(title, "...", file=sys.stderr)

        def left_out(contestant: str, error: Exception, network: str = network, title: str = title) -> None:
            if isinstance(error, Unavailable):
                unavailable.add(f"{network}: without {contestant}: {error}")
            else:
                failures.append(f"{title}: without {contestant}: {command.explained(error)}")

        steps = 1 if inference else steps_of_a_call(size, device.type, epoch_images)
        try:
            task = Task.make(network, size, steps, device.type)
            race = (network_race.infer if inference else network_race.train)(
                task,
                contestants,
                device=device,
                rounds=rounds,
                sample_seconds=1e-3 * sample_ms,
                left_out=left_out,
                keep_going=keep_going,
            )
        except Exception as error:
            if keep_going:
                failures.append(f"{title}: not raced: {command.explained(error)}")
                continue
            if isinstance(error, agreement.Disagreement):
                raise SystemExit(f"bench_train: refusing to time {title}: {error}") from None
            raise
        races.append(Measured(task, race, training=not inference))
        table = [row for measured in races for row in measured.as_rows(ours, contestants, device, settings)]
        if csv is not None and (keep_going or done == len(todo) - 1):  # what was measured stays
            rows.write(csv, table)

    if races:
        print_table(table)
        command.print_conditions((measured.race for measured in races), device)
    for line in sorted(unavailable):
        print(line)
    for failure in failures:
        print("FAILED", failure)
    if failures:
        raise SystemExit(1)


def _keep_to(threads: int) -> None:
    """No more processors than threads, where the system can: libraries that count processors obey too."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


if __name__ == "__main__":
    typer.run(main)
