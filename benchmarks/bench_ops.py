"""The fused operators against what a user would run instead, on LeNet-5's layers; see benchmarks/README.md."""

import itertools
import operator
import os
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import agreement
import harness
import rows
import torch
import torch.nn.functional as F
import typer
from layers import LAYERS, OURS, PLAIN, Case, Contestant, Layer, Parameters, build_fused, store_dense
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lenet_fast import backends

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}  # float64 is the judge
PASSES = ("forward", "forward+backward")
RACE_COLUMNS = ("layer", "activation", "pool", "pass")


@dataclass(frozen=True)
class Operands:
    """The tensors that every contestant of a case gets, each in its own memory format."""

    input: Tensor
    parameters: Parameters  # of the fused layer
    grad_output: Tensor

    @classmethod
    def make(cls, case: Case, batch: int, dtype: torch.dtype) -> "Operands":
        """The same random values at every call; no two maps alike, also where a layer starts with constants."""
        layer = case.layer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            starts = [parameter.detach() for parameter in build_fused(case).parameters()]
            parameters = [(start + 0.05 * torch.randn_like(start)).to(dtype) for start in starts]
            input = torch.rand(batch, layer.in_channels, layer.size, layer.size).to(dtype)
            weight, bias, *_ = (parameter.double() for parameter in store_dense(layer, parameters))
            stable = _stable(F.conv2d(input.double(), weight, bias, padding=layer.padding), case, dtype)
            return cls(input, parameters, torch.randn(stable.shape).to(dtype) * stable)

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


def prepare(contestant: Contestant, case: Case, operands: Operands, passes: str) -> harness.Run:
    """The call to be timed; it returns the output, after "forward+backward" followed by its own gradients."""
    module = contestant.build(case).to(operands.input.dtype)
    with torch.no_grad():
        values = contestant.store(case.layer, operands.parameters)
        for parameter, value in zip(module.parameters(), values, strict=True):
            parameter.copy_(value.view_as(parameter))
    module.to(memory_format=contestant.memory_format)
    input = operands.input.clone(memory_format=contestant.memory_format)
    input.requires_grad_(case.layer.needs_input_grad)
    wanted = [*([input] if case.layer.needs_input_grad else []), *module.parameters()]
    layer = module
    if contestant.compiled:
        options = {"freezing": passes == "forward"}  # weights as constants: Inductor's best for inference
        layer = torch.compile(module, fullgraph=True, dynamic=False, options=options)
    if passes == "forward":
        return lambda: layer(input)

    grad_output = torch.empty_like(layer(input).detach()).copy_(operands.grad_output)  # strided as the output is

    def forward_and_backward() -> tuple[Tensor, ...]:
        output = layer(input)
        return output, *torch.autograd.grad(output, wanted, grad_output)

    return forward_and_backward


def results(run: harness.Run, contestant: Contestant, case: Case, passes: str) -> agreement.Results:
    """Call once; the results by name, the gradients of parameters in the layout of the fused layer."""
    if passes == "forward":
        return {agreement.OUTPUT: run()}
    output, *gradients = run()
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
    contestants: Iterable[str],
    *,
    batch: int,
    dtype: torch.dtype,
    rounds: int,
    sample_seconds: float,
    probe: harness.Probe,
) -> harness.Race:
    """Check the named contestants against float64, then race them.

    Raises:
        agreement.Disagreement: one of them is wrong; none was timed.
    """
    torch.compiler.reset()  # no guards of earlier races to check, no limit on recompilations reached
    operands = Operands.make(case, batch, dtype)
    chosen = {name: case.layer.contestants[name] for name in contestants}
    runs = {name: prepare(contestant, case, operands, passes) for name, contestant in chosen.items()}
    judge, own = (prepare(PLAIN, case, each, passes) for each in (operands.double(), operands))
    with torch.inference_mode() if passes == "forward" else nullcontext():
        truth, own_results = (results(run, PLAIN, case, passes) for run in (judge, own))
        for name, run in runs.items():
            found = results(run, chosen[name], case, passes)
            slack = agreement.INDUCTOR_SLACK if chosen[name].compiled else 1
            agreement.check(name, found, truth=truth, own=own_results, slack=slack)
        return harness.race(runs, rounds=rounds, sample_seconds=sample_seconds, probe=probe)


def print_table(table: Iterable[rows.Row]) -> None:
    """The rows as a table, a section for every race."""
    printed = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("", "us a call", "of peak", "time / fused"):
        printed.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading))
    for race, group in itertools.groupby(table, key=operator.itemgetter(*RACE_COLUMNS)):
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


def _some_of(option: str, known: Iterable[str], given: str) -> list[str]:
    names = given.split(",")
    if wrong := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{option}: expected some of {','.join(known)}, got {wrong[0]!r}")
    return names


def main(
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 128,
    threads: Annotated[int, typer.Option(min=1, max=os.cpu_count(), help="PyTorch's threads.")] = 2,
    layers: Annotated[str, typer.Option(help="Names with commas between.")] = ",".join(LAYERS),
    rivals: Annotated[
        str | None, typer.Option(help="Who competes with the fused operator.", show_default="all")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of every contestant.")] = 31,
    sample_ms: Annotated[float, typer.Option(min=0.01, help="About how long a sample takes.")] = 20.0,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    csv: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the rows here.")] = None,
) -> None:
    """Race the fused operators against PyTorch; refuses where results disagree."""
    chosen_layers = {name: LAYERS[name] for name in _some_of("--layers", LAYERS, layers)}
    known = list(dict.fromkeys(itertools.chain(*(layer.contestants for layer in chosen_layers.values()))))
    chosen = known if rivals is None else [OURS, *_some_of("--rivals", known, rivals)]
    (dtype,) = _some_of("--dtype", DTYPES, dtype)
    if csv is not None and not csv.parent.is_dir():
        raise typer.BadParameter(f"--csv: no such folder: {csv.parent}")
    if (reason := backends.why_unavailable("native", "cpu")) is not None:
        raise SystemExit(f"bench_ops: there is no fused operator to time: {reason}")
    torch.set_num_threads(threads)
    settings = {"batch": batch, "dtype": dtype, **rows.environment()}
    probe = harness.SgemmProbe()

    races = []
    cases = [(name, Case(layer, *variant)) for name, layer in chosen_layers.items() for variant in layer.variants]
    for (name, case), passes in itertools.product(cases, PASSES):
        layer = case.layer
        key = dict(zip(RACE_COLUMNS, (name, case.activation, case.pool, passes), strict=True))
        print(*key.values(), "...", file=sys.stderr)
        try:
            race = measure(
                case,
                passes,
                [contestant for contestant in layer.contestants if contestant in chosen],
                batch=batch,
                dtype=DTYPES[dtype],
                rounds=rounds,
                sample_seconds=1e-3 * sample_ms,
                probe=probe,
            )
        except agreement.Disagreement as error:
            raise SystemExit(f"bench_ops: refusing to time {' '.join(key.values())}: {error}") from None
        races.append((key, race, batch * layer.flops(passes)))

    table = [
        {
            **key,
            "contestant": contestant,
            **rows.measurement(race, contestant, to=OURS, images=batch, flops=flops, probe=probe),
            **settings,
        }
        for key, race, flops in races
        for contestant in race.seconds
    ]
    print_table(table)
    disturbed = sum(race.disturbed_rounds(probe.best) for _, race, _ in races)
    limit = harness.DISTURBED_BELOW * probe.best
    print(f"peak: {probe.peak:.0f} GFLOP/s, the fastest float32 matrix product seen ({threads} threads)")
    print(f"disturbed: {disturbed} of {rounds * len(races)} rounds had a probe below {limit:.0f} GFLOP/s")
    if disturbed > rounds * len(races) / 10:
        print("WARNING: more than a tenth: the machine was busy, do not use these figures")
    if csv is not None:
        rows.write(csv, table)


if __name__ == "__main__":
    typer.run(main)
