"""The fused operators against what a user would run instead, on LeNet-5's layers; see benchmarks/README.md."""

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import agreement
import devices
import harness
import rows
import torch
import torch.nn.functional as F
import typer
from devices import Device
from layers import LAYERS, ON_CUDA, OURS, PLAIN, TRITON, Case, Contestant, Layer, Parameters, build_fused, store_dense
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lenet_fast import backends

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}  # float64 is the judge
PASSES = ("forward", "forward+backward")
RACE_COLUMNS = ("layer", "activation", "pool", "pass")
DEVICES = {"cpu": devices.cpu, "cuda": devices.cuda}


@dataclass(frozen=True)
class Operands:
    """The tensors that every contestant of a case gets, each in its own memory format."""

    input: Tensor
    parameters: Parameters  # of the fused layer
    grad_output: Tensor

    @classmethod
    def make(cls, case: Case, batch: int, dtype: torch.dtype, device: str = "cpu") -> "Operands":
        """The same random values at every call; no two maps alike, also where a layer starts with constants."""
        layer = case.layer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            starts = [parameter.detach() for parameter in build_fused(case).parameters()]
            parameters = [(start + 0.05 * torch.randn_like(start)).to(device, dtype) for start in starts]
            input = torch.rand(batch, layer.in_channels, layer.size, layer.size).to(device, dtype)
            weight, bias, *_ = (parameter.double() for parameter in store_dense(layer, parameters))
            stable = _stable(F.conv2d(input.double(), weight, bias, padding=layer.padding), case, dtype)
            return cls(input, parameters, torch.randn(stable.shape).to(device, dtype) * stable)

    def double(self) -> "Operands":
        return Operands(self.input.double(), [each.double() for each in self.parameters], self.grad_output.double())


def _stable(conv: Tensor, case: Case, dtype: torch.dtype) -> Tensor:
    """Pooled positions whose gradient does not hang on rounding; at the others grad_output is 0.

    Near a tie of the maximum, or near the kink of a ReLU, two right results can differ wholly.
    """
    height, width = (side // 2 for side in conv.shape[-2:])
    blocks = (
        conv[..., : 2 * height, : 2 * width]
        .unflatten(-2, (height, 2))
        .unflatten(-1, (width, 2))
        .transpose(-2, -3)
        .flatten(-2)
    )
    distances = [torch.ones_like(blocks[..., 0])]
    if case.pool == "max":
        first, second = blocks.topk(2).values.unbind(-1)
        distances.append(first - second)
    if case.activation == "relu":
        distances.append(blocks.abs().amin(-1))
    margin = 8 * torch.finfo(dtype).eps * conv.abs().max()
    return torch.stack(distances).amin(0) > margin


def prepare(contestant: Contestant, case: Case, operands: Operands, passes: str, copies: int = 1) -> harness.Run:
    """The call to be timed, once on each of so many copies of input and incoming gradient.

    It returns a list: for each copy the output, after "forward+backward" followed by its own gradients. All of them
    live until the next call, so that no copy's results are written where another's are in the cache.
    """
    module = contestant.build(case).to(operands.input.device, operands.input.dtype)
    with torch.no_grad():
        values = contestant.store(case.layer, operands.parameters)
        for parameter, value in zip(module.parameters(), values, strict=True):
            parameter.copy_(value.view_as(parameter))
    module.to(memory_format=contestant.memory_format)
    inputs = [operands.input.clone(memory_format=contestant.memory_format) for _ in range(copies)]
    layer = module
    if contestant.compiled:
        options = {"freezing": passes == "forward", **contestant.compile_options}  # weights as constants: its best
        layer = torch.compile(module, fullgraph=True, dynamic=False, options=options)
    if passes == "forward":
        return lambda: [layer(input) for input in inputs]

    needed = case.layer.needs_input_grad
    for input in inputs:
        input.requires_grad_(needed)
    like = layer(inputs[0]).detach()  # strided as the output is
    grad_outputs = [torch.empty_like(like).copy_(operands.grad_output) for _ in inputs]
    parameters = list(module.parameters())

    def forward_and_backward(input: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
        output = layer(input)
        return output, *torch.autograd.grad(output, [input, *parameters] if needed else parameters, grad_output)

    return lambda: [forward_and_backward(*copy) for copy in zip(inputs, grad_outputs, strict=True)]


def results(run: harness.Run, contestant: Contestant, case: Case, passes: str) -> agreement.Results:
    """Call once; the last results by name, the gradients of parameters in the layout of the fused layer."""
    *_, last = run()
    if passes == "forward":
        return {agreement.OUTPUT: last}
    output, *gradients = last
    named = {agreement.OUTPUT: output}
    if case.layer.needs_input_grad:
        named["gradient of input"] = gradients.pop(0)
    parameters = dict(build_fused(case).named_parameters())
    gradients = _as_in_the_fused_layer(gradients, contestant, case.layer, list(parameters.values()))
    return named | {f"gradient of {name}": each for name, each in zip(parameters, gradients, strict=True)}


def _as_in_the_fused_layer(
    gradients: Parameters, contestant: Contestant, layer: Layer, parameters: Parameters
) -> Parameters:
    """Gradients of a contestant's parameters as gradients of `parameters`, the fused layer's.

    Their elements are numbered from 1 and the numbers stored: where number n went, the gradient of element n is.
    """
    sizes = [parameter.numel() for parameter in parameters]
    numbers = torch.arange(1, sum(sizes) + 1).split(sizes)
    numbers = [number.view_as(parameter) for number, parameter in zip(numbers, parameters, strict=True)]
    flat = gradients[0].new_zeros(1 + sum(sizes))  # 0 takes those of absent connections
    for stored, gradient in zip(contestant.store(layer, numbers), gradients, strict=True):
        flat[stored.flatten()] = gradient.flatten()
    return [part.view_as(parameter) for part, parameter in zip(flat[1:].split(sizes), parameters, strict=True)]


def measure(
    case: Case,
    passes: str,
    contestants: Mapping[str, Contestant],
    *,
    batch: int,
    dtype: torch.dtype,
    rounds: int,
    sample_seconds: float,
    device: Device,
    left_out: Callable[[str, Exception], None] | None = None,
) -> dict[str, harness.Race]:
    """Check the contestants against float64, then race them: a race for each way to launch that the device has.

    A rival that fails or is wrong is left out and reported to `left_out`; without that, the exception is raised.

    Raises:
        agreement.Disagreement: one of them is wrong; none was timed.
    """
    torch.compiler.reset()  # no guards of earlier races to check, no limit on recompilations reached
    mode = torch.inference_mode if passes == "forward" else nullcontext
    operands = Operands.make(case, batch, dtype, device.type)
    copies = device.copies(batch * case.layer.elements(passes) * dtype.itemsize)
    judge, own = (prepare(PLAIN, case, each, passes) for each in (operands.double(), operands))
    with mode():
        truth, own_results = (results(run, PLAIN, case, passes) for run in (judge, own))
    runs: dict[str, dict[str, harness.Run]] = {launch: {} for launch in device.launches}
    for name, contestant in contestants.items():
        try:
            run = prepare(contestant, case, operands, passes, copies)
            for launch, launched in device.launches.items():
                with mode():
                    ready = launched(run)
                    slack = agreement.INDUCTOR_SLACK if contestant.compiled else 1
                    found = results(ready, contestant, case, passes)
                    agreement.check(name, found, truth=truth, own=own_results, slack=slack)
                runs[launch][name] = ready
        except Exception as error:  # noqa: PERF203 (once a contestant)
            if left_out is None or name == OURS:
                raise
            left_out(name, error)
    with mode():
        options = {"probe": device.probe, "timer": device.timer, "repeats": copies}
        return {
            launch: harness.race(ready, rounds=rounds, sample_seconds=sample_seconds, **options)
            for launch, ready in runs.items()
        }


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


def _some_of(option: str, known: Iterable[str], given: str) -> list[str]:
    names = given.split(",")
    if wrong := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{option}: expected some of {','.join(known)}, got {wrong[0]!r}")
    return names


def _batches(given: str) -> list[int]:
    if not all(size.isdecimal() and int(size) for size in given.split(",")):
        raise typer.BadParameter(f"--batch: expected numbers of at least 1 with commas between, got {given!r}")
    return [int(size) for size in given.split(",")]


@dataclass(frozen=True)
class Measured:
    """A race on one layer, and what its calls had to do."""

    key: rows.Row  # RACE_COLUMNS
    batch: int
    launch: str
    race: harness.Race
    flops: int
    bytes: int

    def rows(self, device: Device, settings: rows.Row) -> Iterable[rows.Row]:
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
            yield row | {"batch": self.batch} | settings


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
    (dtype,) = _some_of("--dtype", DTYPES, dtype)
    (device,) = _some_of("--device", DEVICES, device)
    chosen_layers = {name: LAYERS[name] for name in _some_of("--layers", LAYERS, layers)}
    chosen_passes = _some_of("--passes", PASSES, passes)
    also = {} if device == "cpu" else ON_CUDA
    known = list(dict.fromkeys(itertools.chain(*(layer.contestants for layer in chosen_layers.values()), also)))
    chosen = known if rivals is None else [OURS, *_some_of("--rivals", known, rivals)]
    batches = _batches(batch)
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
            failures.append(f"{title}: without {contestant}: {type(error).__name__}: {error}")

        try:
            measured = measure(
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
                failures.append(f"{title}: not raced: {type(error).__name__}: {error}")
                continue
            if isinstance(error, agreement.Disagreement):
                raise SystemExit(f"bench_ops: refusing to time {title}: {error}") from None
            raise
        flops, bytes = size * layer.flops(one_pass), size * layer.elements(one_pass) * DTYPES[dtype].itemsize
        races += [Measured(key, size, launch, race, flops, bytes) for launch, race in measured.items()]
        if csv is not None and keep_going:  # what was measured stays, whatever ends this process
            rows.write(csv, _table(races, device, settings))

    if races:
        table = _table(races, device, settings)
        print_table(table)
        _print_conditions(races, device)
        if csv is not None:
            rows.write(csv, table)
    for failure in failures:
        print("FAILED", failure)
    if failures:
        raise SystemExit(1)


def _table(races: Iterable[Measured], device: Device, settings: rows.Row) -> list[rows.Row]:
    return [row for measured in races for row in measured.rows(device, settings)]


def _print_conditions(races: Sequence[Measured], device: Device) -> None:
    probe = device.probe
    rounds = sum(len(measured.race.probes) for measured in races)
    disturbed = sum(measured.race.disturbed_rounds(probe.best) for measured in races)
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else device.facts["gpu"]
    print(f"peak: {probe.peak:.0f} GFLOP/s, the fastest float32 matrix product seen ({where})")
    if device.type != "cpu":
        print(f"bandwidth: {1e-9 * device.bandwidth:.0f} GB/s, a large copy, bytes read and written")
    limit = harness.DISTURBED_BELOW * probe.best
    print(f"disturbed: {disturbed} of {rounds} rounds had a probe below {limit:.0f} GFLOP/s")
    if disturbed > rounds / 10:
        print("WARNING: more than a tenth: the machine was busy, do not use these figures")


if __name__ == "__main__":
    typer.run(main)
