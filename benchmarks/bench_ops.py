"""The fused operators against what a user would run instead, on LeNet-5's layers; see benchmarks/README.md."""

import itertools
import operator
import os
import sys
from collections.abc import Callable, Iterable, Mapping
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
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lenet_fast import backends
from lenet_fast.nn import ConvActPool2d

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}  # float64 is the judge
VARIANTS = (("sigmoid", "avg"), ("relu", "max"))  # as in lenet5_d2l and in lenet5
PASSES = ("forward", "forward+backward")
OURS = "fused"
RACE_COLUMNS = ("layer", "activation", "pool", "pass")

_ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU}
_POOLS = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}


@dataclass(frozen=True)
class Contestant:
    """One way to run a layer. `build` makes a module with the parameters weight, bias in this order."""

    build: Callable[["Case"], nn.Module]
    memory_format: torch.memory_format = torch.contiguous_format
    compiled: bool = False


@dataclass(frozen=True)
class Layer:
    """A layer of LeNet-5 and who competes on it."""

    in_channels: int
    out_channels: int
    size: int  # height and width of the input
    padding: int
    needs_input_grad: bool
    contestants: Mapping[str, Contestant]
    kernel_size: int = 5

    def flops(self, passes: str) -> int:
        """Of the convolution per image, its gradients included; nothing counted twice that is recomputed."""
        side = self.size + 2 * self.padding - self.kernel_size + 1
        forward = 2 * self.in_channels * self.out_channels * self.kernel_size**2 * side**2
        return forward if passes == "forward" else forward * (2 + self.needs_input_grad)


@dataclass(frozen=True)
class Case:
    """A layer with its activation and pooling."""

    layer: Layer
    activation: str
    pool: str


def build_fused(case: Case) -> nn.Module:
    layer = case.layer
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.padding)
    return ConvActPool2d(*sizes, activation=case.activation, pool=case.pool)


def build_plain(case: Case) -> nn.Sequential:
    layer = case.layer
    conv = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)
    return nn.Sequential(conv, _ACTIVATIONS[case.activation](), _POOLS[case.pool](2))


DENSE = {
    OURS: Contestant(build_fused),
    "eager": Contestant(build_plain),
    "eager-channels-last": Contestant(build_plain, memory_format=torch.channels_last),
    "compile": Contestant(build_plain, compiled=True),
    "compile-channels-last": Contestant(build_plain, memory_format=torch.channels_last, compiled=True),
}
LAYERS = {
    # Nobody asks for the gradient of the images, so in training the first layer computes none.
    "c1": Layer(1, 6, size=28, padding=2, needs_input_grad=False, contestants=DENSE),
    "c3": Layer(6, 16, size=14, padding=0, needs_input_grad=True, contestants=DENSE),
}


@dataclass(frozen=True)
class Operands:
    """The tensors that every contestant of a case gets, each in its own memory format."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    grad_output: Tensor

    @classmethod
    def make(cls, case: Case, batch: int, dtype: torch.dtype) -> "Operands":
        """The same random values at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            weight, bias = (parameter.detach().to(dtype) for parameter in build_plain(case).parameters())
            input = torch.rand(batch, case.layer.in_channels, case.layer.size, case.layer.size).to(dtype)
            conv = F.conv2d(input.double(), weight.double(), bias.double(), padding=case.layer.padding)
            stable = _stable(conv, case, dtype)
            return cls(input, weight, bias, torch.randn(stable.shape).to(dtype) * stable)

    def double(self) -> "Operands":
        return Operands(*(tensor.double() for tensor in vars(self).values()))


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
    """The call to be timed; it returns the output, after "forward+backward" followed by the gradients."""
    module = contestant.build(case).to(operands.input.dtype)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), (operands.weight, operands.bias), strict=True):
            parameter.copy_(value)
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


def results(run: harness.Run, case: Case, passes: str) -> agreement.Results:
    """Call once; the results by name."""
    values = run() if passes != "forward" else (run(),)
    names = [agreement.OUTPUT]
    if passes != "forward":
        inputs = ["input"] if case.layer.needs_input_grad else []
        names += [f"gradient of {name}" for name in (*inputs, "weight", "bias")]
    return dict(zip(names, values, strict=True))


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
    plain = Contestant(build_plain)
    runs = {name: prepare(case.layer.contestants[name], case, operands, passes) for name in contestants}
    judge, own = (prepare(plain, case, each, passes) for each in (operands.double(), operands))
    with torch.inference_mode() if passes == "forward" else nullcontext():
        truth, own_results = (results(run, case, passes) for run in (judge, own))
        for name, run in runs.items():
            agreement.check(name, results(run, case, passes), truth=truth, own=own_results)
        return harness.race(runs, rounds=rounds, sample_seconds=sample_seconds, probe=probe)


def print_table(table: Iterable[rows.Row]) -> None:
    """The rows as a table, a section for every race."""
    printed = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("", "us a call", "of peak", "time / fused"):
        printed.add_column(heading, justify="right" if heading else "left", no_wrap=True)
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
    chosen_layers = _some_of("--layers", LAYERS, layers)
    known = list(dict.fromkeys(itertools.chain(*(layer.contestants for layer in LAYERS.values()))))
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
    for name, (activation, pool), passes in itertools.product(chosen_layers, VARIANTS, PASSES):
        layer = LAYERS[name]
        key = dict(zip(RACE_COLUMNS, (name, activation, pool, passes), strict=True))
        print(*key.values(), "...", file=sys.stderr)
        try:
            race = measure(
                Case(layer, activation, pool),
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
