"""The fused operators against what a user would run instead, on LeNet-5's layers; see benchmarks/README.md."""

import itertools
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import agreement
import command
import devices
import harness
import rows
import torch
import typer
from devices import Device
from layers import LAYERS, ON_CUDA, OURS, TRITON, Case
from operator_race import PASSES, measure
from rich import box
from rich.console import Console
from rich.table import Table

from lenet_fast import backends

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}  # float64 is the judge
RACE_COLUMNS = ("layer", "activation", "pool", "pass")
DEVICES = {"cpu": devices.cpu, "cuda": devices.cuda}


def print_table(table: Iterable[rows.Row]) -> None:
    """The rows as a table, a section for every race."""
    printed = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("", "us a call", "of peak", "time / fused"):
        printed.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading))
    for race, group in itertools.groupby(table, key=_race_of):
        printed.add_section()
        printed.add_row(f"[bold]{' '.join(race)}")
        for row in group:
            printed.add_row(
                f"  {row['contestant']}",
                f"{float(row['median_us']):.1f}",
                f"{float(row['peak_share']):.0%}",
                "{:.2f} ({:.2f} to {:.2f})".format(*(float(row[f"ratio{q}"]) for q in ("", "_q1", "_q3"))),
            )
    Console().print(printed)


def _race_of(row: rows.Row) -> tuple[str, ...]:
    race = [str(row[column]) for column in RACE_COLUMNS]
    return *race, f"batch {row['batch']}", *([str(row["launch"])] if "launch" in row else [])


@dataclass(frozen=True)
class Measured:
    """A race on one layer, and what its calls had to do."""

    key: rows.Row  # RACE_COLUMNS
    batch: int
    launch: str
    race: harness.Race
    verdicts: Mapping[str, agreement.Verdict]
    flops: int
    bytes: int

    def as_rows(self, device: Device, settings: rows.Row) -> Iterable[rows.Row]:
        """A row for each contestant."""
        for contestant in self.race.seconds:
            row = {**self.key, "contestant": contestant}
            row |= rows.measurement(
                self.race, contestant, to=OURS, images=self.batch, flops=self.flops, probe=device.probe
            )
            if device.type != "cpu":
                least = device.roofline_seconds(self.flops, self.bytes)
                row |= {
                    "launch": self.launch,
                    "roofline_us": f"{1e6 * least:.2f}",
                    "roofline_share": f"{least / self.race.times(contestant).median:.4f}",
                    "copy_gbytes_per_s": f"{1e-9 * device.bandwidth:.0f}",
                }
            yield row | self.verdicts[contestant].columns() | {"batch": self.batch} | settings


def main(
    batch: Annotated[str, typer.Option(help="Images a call; several with commas between.")] = "128",
    threads: Annotated[int, typer.Option(min=1, max=os.cpu_count(), help="PyTorch's threads.")] = 2,
    layers: Annotated[str, typer.Option(help="Names with commas between.")] = ",".join(LAYERS),
    passes: Annotated[str, typer.Option(help="Names with commas between, raced in this order.")] = ",".join(PASSES),
    rivals: Annotated[
        str | None, typer.Option(help="Who competes with the fused operator.", show_default="all")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of every contestant.")] = 31,
    sample_ms: Annotated[float, typer.Option(min=0.01, help="About how long a sample takes.")] = 20.0,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    device: Annotated[str, typer.Option(help=f"One of {', '.join(DEVICES)}.")] = "cpu",
    seconds: Annotated[float | None, typer.Option(min=0, help="Start no race later than that; exits with 1.")] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Leave out who fails; exits with 1.")] = False,
    csv: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the rows here.")] = None,
) -> None:
    """Race the fused operators against PyTorch; refuses where results disagree."""
    start = time.monotonic()
    (dtype,) = command.some_of("--dtype", DTYPES, dtype)
    (device,) = command.some_of("--device", DEVICES, device)
    chosen_layers = {name: LAYERS[name] for name in command.some_of("--layers", LAYERS, layers)}
    chosen_passes = command.some_of("--passes", PASSES, passes)
    also = {} if device == "cpu" else ON_CUDA
    known = list(dict.fromkeys(itertools.chain(*(layer.contestants for layer in chosen_layers.values()), also)))
    chosen = known if rivals is None else [OURS, *command.some_of("--rivals", known, rivals)]
    batches = command.batches(batch)
    if csv is not None and not csv.parent.is_dir():
        raise typer.BadParameter(f"--csv: no such folder: {csv.parent}")
    missing = {name: backends.why_unavailable(name, device) for name in ("native", "triton")}
    if (kernels := next((name for name, reason in missing.items() if reason is None), None)) is None:
        raise SystemExit(f"bench_ops: there is no fused operator to time: {missing['native']}")
    if TRITON in chosen and missing["triton"] is not None:
        print(f"bench_ops: without {TRITON}: {missing['triton']}", file=sys.stderr)
        chosen.remove(TRITON)
    torch.set_num_threads(threads)
    try:
        device = DEVICES[device]()
    except RuntimeError as error:
        raise SystemExit(f"bench_ops: --device: {error}") from None
    settings = {"dtype": dtype, **rows.environment(), **device.facts}
    if device.type != "cpu":
        settings["kernels"] = kernels

    races: list[Measured] = []
    failures: list[str] = []
    cases = [(name, Case(layer, *variant)) for name, layer in chosen_layers.items() for variant in layer.variants]
    todo = list(itertools.product(chosen_passes, batches, cases))
    for done, (one_pass, size, (name, case)) in enumerate(todo):
        if seconds is not None and time.monotonic() - start > seconds:
            failures.append(f"the last {len(todo) - done} of {len(todo)} races: no time was left for them")
            break
        layer = case.layer
        key = dict(zip(RACE_COLUMNS, (name, case.activation, case.pool, one_pass), strict=True))
        title = " ".join([*key.values(), "batch", str(size)])
        print(title, "...", file=sys.stderr)

        def leave_out(contestant: str, error: Exception, title: str = title) -> None:
            failures.append(f"{title}: {command.outcome(contestant, error)}")

        try:
            races_of_case, verdicts = measure(
                case,
                one_pass,
                {who: entry for who, entry in {**layer.contestants, **also}.items() if who in chosen},
                batch=size,
                dtype=DTYPES[dtype],
                rounds=rounds,
                sample_seconds=1e-3 * sample_ms,
                device=device,
                left_out=leave_out if keep_going else None,
            )
        except Exception as error:
            if keep_going:
                failures.append(f"{title}: not raced: {command.explained(error)}")
                continue
            if isinstance(error, agreement.Disagreement):
                raise SystemExit(f"bench_ops: refusing to time {title}: {error}") from None
            raise
        flops, bytes = size * layer.flops(one_pass), size * layer.elements(one_pass) * DTYPES[dtype].itemsize
        races += [Measured(key, size, launch, race, verdicts, flops, bytes) for launch, race in races_of_case.items()]
        if csv is not None and keep_going:  # what was measured stays, whatever ends this process
            rows.write(csv, _table(races, device, settings))

    if races:
        table = _table(races, device, settings)
        print_table(table)
        command.print_conditions((measured.race for measured in races), device)
        if csv is not None:
            rows.write(csv, table)
    for failure in failures:
        print("FAILED", failure)
    if failures:
        raise SystemExit(1)


def _table(races: Iterable[Measured], device: Device, settings: rows.Row) -> list[rows.Row]:
    return [row for measured in races for row in measured.as_rows(device, settings)]


if __name__ == "__main__":
    typer.run(main)
