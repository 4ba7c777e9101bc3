"""A training step of the published LeNets of the tests: eager, accelerated, by `FusedTrainer`; see README.md here."""

import logging
import os
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import agreement
import command
import devices
import harness
import rows
import torch
import torch.nn.functional as F
import typer
from devices import Device
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lenet_fast as lf

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from public_lenets import LENETS, PublicLeNet

WARM_UPS = 12  # a forward that differs in every call is read anew in some of the first ones
CHECKED_STEPS = 3  # later ones would amplify rounding
LR = 1e-3  # small: the race takes thousands of steps on one batch
LOSSES = "losses"
RANDOM_SLACK = 4  # where eager PyTorch in float32 is the judge, because float64 draws other numbers

Step = Callable[[], Tensor | float]  # takes one step and returns the loss before it


@dataclass(frozen=True)
class Task:
    """One LeNet and one batch for it."""

    entry: PublicLeNet
    batch: int

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """In training mode, returning scores; the same values at every call."""
        return self.entry.trainable(self.entry.model(dtype)).train()

    def data(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        return self.entry.inputs(self.batch, dtype)[0], self.entry.labels(self.batch)

    @property
    def draws(self) -> bool:
        """Whether the forward depends on random numbers."""
        model, (images, _) = self.model(), self.data()
        with torch.no_grad():
            return not torch.equal(*(_seeded(lambda: model(images), seed) for seed in (0, 1)))

    @property
    def flops(self) -> int:
        """Of a step's convolutions and matrix products, with their gradients."""
        step = eager(self)
        with FlopCounterMode(display=False) as counter:
            step()
        return counter.get_total_flops()


def _seeded(run: Callable[[], Tensor | float], seed: int) -> Tensor | float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        return run()


# ---- Contestants


def eager(task: Task, dtype: torch.dtype = torch.float32) -> Step:
    return _by_autograd(task.model(dtype), *task.data(dtype))


def accelerated(task: Task) -> Step:
    return _by_autograd(lf.accelerate(task.model()), *task.data())


def fused_step(task: Task) -> Step:
    trainer = _trainer(task)
    images, labels = task.data()
    return lambda: trainer.step(images, labels)


def _by_autograd(model: nn.Module, images: Tensor, labels: Tensor) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _trainer(task: Task) -> lf.FusedTrainer:
    return lf.FusedTrainer(task.model(), "sgd", lr=LR)


EAGER, ACCELERATED, FUSED = "eager", "accelerate", "fused-step"
CONTESTANTS: Mapping[str, Callable[[Task], Step]] = {EAGER: eager, ACCELERATED: accelerated, FUSED: fused_step}

# ---- The race


def measure(
    name: str, batch: int, *, device: Device, rounds: int, sample_seconds: float
) -> tuple[list[rows.Row], harness.Race]:
    """Race the contestants on one LeNet: a row for each.

    Raises:
        agreement.Disagreement: one of them trains otherwise; none was timed.
    """
    torch.compiler.reset()
    task = Task(LENETS[name], batch)
    steps = {contestant: prepare(task) for contestant, prepare in CONTESTANTS.items()}
    draws = task.draws
    own = {LOSSES: _first_losses(eager(task)).float()}
    truth = {LOSSES: own[LOSSES].double() if draws else _first_losses(eager(task, torch.float64))}
    judge = agreement.Judge(truth, own, report=None)
    for contestant, step in steps.items():
        losses = _first_losses(step).float()
        if not (draws and contestant == FUSED):  # native steps draw their own numbers: the tests compare these
            judge(contestant, {LOSSES: losses}, slack=RANDOM_SLACK if draws else 1)
    for step in steps.values():
        for _ in range(WARM_UPS):
            step()
    race = harness.race(steps, rounds=rounds, sample_seconds=sample_seconds, probe=device.probe, timer=device.timer)
    flops, how = task.flops, _trainer(task).how(task.data()[0])
    table = []
    for contestant in steps:
        verdict = judge.verdicts.get(contestant)
        table.append(
            {"lenet": name, "contestant": contestant}
            | rows.measurement(race, contestant, to=EAGER, images=batch, flops=flops, probe=device.probe)
            | (verdict.columns() if verdict else {"agrees": "not comparable", "error": ""})
            | {"fused": task.entry.fused[0], "how": how, "batch": batch}
        )
    return table, race


def _first_losses(step: Step) -> Tensor:
    """Losses of the first steps, float64; random numbers are the same for everyone."""
    losses = _seeded(lambda: [float(step()) for _ in range(CHECKED_STEPS)], 0)
    return torch.tensor(losses, dtype=torch.float64)


def main(
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 64,
    threads: Annotated[int, typer.Option(min=1, max=os.cpu_count(), help="For every contestant.")] = 2,
    lenets: Annotated[str | None, typer.Option(help="Names with commas between.", show_default="all")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of every contestant.")] = 31,
    sample_ms: Annotated[float, typer.Option(min=0.01, help="About how long a sample takes.")] = 20.0,
    csv: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the rows here.")] = None,
) -> None:
    """Race a training step of published LeNets: eager, accelerated, by the fused trainer; refuses a wrong one."""
    known = [name for name, entry in LENETS.items() if entry.images == 1]
    chosen = known if lenets is None else command.some_of("--lenets", known, lenets)
    if csv is not None and not csv.parent.is_dir():
        raise typer.BadParameter(f"--csv: no such folder: {csv.parent}")
    torch.set_num_threads(threads)
    device = devices.cpu()
    table, races = [], []
    for name in chosen:
        print(name, "...", file=sys.stderr)
        try:
            measured, race = measure(name, batch, device=device, rounds=rounds, sample_seconds=1e-3 * sample_ms)
        except agreement.Disagreement as error:
            raise SystemExit(f"bench_lenets: refusing to time {name}: {error}") from None
        table += measured
        races.append(race)
        print(f"{name}: " + ", ".join(f"{row['contestant']} {float(row['median_us']):,.0f} us" for row in measured))
    if csv is not None:
        environment = rows.environment()
        rows.write(csv, [row | environment for row in table])
    command.print_conditions(races, device)


if __name__ == "__main__":
    logging.getLogger("lenet_fast").setLevel(logging.ERROR)  # what is left alone: the table says it
    typer.run(main)
