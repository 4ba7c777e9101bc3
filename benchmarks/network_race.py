"""A race of whole networks: the contestants made ready and checked against float64, the time of each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import agreement
import harness
import infer_contestants
import torch
import train_contestants
from devices import Device
from networks import Task, Trained
from unavailable import Unavailable

CHECKED_STEPS = 5  # later ones would amplify rounding
LOSSES = "losses"
LESS_EXACT = {"float32": 1, "bfloat16 autocast": 2**16}  # epsilon of bfloat16 by that of float32

Contestant = train_contestants.Contestant | infer_contestants.Contestant


@dataclass(frozen=True)
class Raced:
    """The times of the contestants, and how their results compare with float64's."""

    race: harness.Race
    verdicts: Mapping[str, agreement.Verdict]


def train(
    task: Task,
    contestants: Mapping[str, train_contestants.Contestant],
    *,
    device: Device,
    rounds: int,
    sample_seconds: float,
    left_out: agreement.Report,
    keep_going: bool = False,
) -> Raced:
    """Race training steps; a sample is whole passes over the task's batches, a time that of one step.

    Who is unavailable is left out and reported to `left_out`; with `keep_going`, every rival that fails or is wrong. On
    a GPU a contestant of ours that is wrong is reported, too, and timed all the same: its verdict says so.

    Raises:
        agreement.Disagreement: one of them is wrong; none was timed.
    """
    torch.compiler.reset()  # no guards of earlier races to check, no limit on recompilations reached
    first = task.first(CHECKED_STEPS)
    truth = {LOSSES: first_losses(train_contestants.JUDGE(first))}
    own = {LOSSES: first_losses(train_contestants.EAGER(first)).float()}

    def ready(name: str, contestant: train_contestants.Contestant) -> tuple[harness.Run, agreement.Results]:
        trained = contestant.prepare(task)
        found = {LOSSES: first_losses(trained).float()}
        trained.reset()
        return trained.run, found

    judge = agreement.Judge(truth, own, left_out, writes_down=train_contestants.OWN if device.type == "cuda" else ())
    runs = _made_ready(contestants, ready, judge, train_contestants.OURS[device.type], keep_going)
    options = {"timer": device.timer, "probe": device.probe, "repeats": task.steps}
    return Raced(harness.race(runs, rounds=rounds, sample_seconds=sample_seconds, **options), judge.verdicts)


def infer(
    task: Task,
    contestants: Mapping[str, infer_contestants.Contestant],
    *,
    device: Device,
    rounds: int,
    sample_seconds: float,
    left_out: agreement.Report,
    keep_going: bool = False,
) -> Raced:
    """Race the network's outputs for the one batch of `task`; otherwise as `train`."""
    torch.compiler.reset()
    with torch.inference_mode():
        truth, own = (
            {agreement.OUTPUT: prepare(task)()} for prepare in (infer_contestants.JUDGE, infer_contestants.EAGER)
        )

        def ready(name: str, contestant: infer_contestants.Contestant) -> tuple[harness.Run, agreement.Results]:
            run = contestant.prepare(task)
            return run, {agreement.OUTPUT: run().to(own[agreement.OUTPUT].dtype)}

        judge = agreement.Judge(truth, own, left_out)
        runs = _made_ready(contestants, ready, judge, infer_contestants.OURS, keep_going)
        options = {"timer": device.timer, "probe": device.probe}
        return Raced(harness.race(runs, rounds=rounds, sample_seconds=sample_seconds, **options), judge.verdicts)


def first_losses(trained: Trained) -> torch.Tensor:
    """Mean losses of the first steps from the initial weights, float64."""
    trained.reset()
    losses: list[float] = []
    while len(losses) < CHECKED_STEPS:
        losses += map(float, trained.run())
    return torch.tensor(losses[:CHECKED_STEPS], dtype=torch.float64)


def _slack(contestant: Contestant) -> int:
    return LESS_EXACT[contestant.dtype] * (agreement.INDUCTOR_SLACK if contestant.compiled else 1)


def _made_ready(
    contestants: Mapping[str, Contestant],
    ready: Callable[[str, Contestant], tuple[harness.Run, agreement.Results]],
    judge: agreement.Judge,
    ours: str,
    keep_going: bool,
) -> dict[str, harness.Run]:
    runs = {}
    for name, contestant in contestants.items():
        try:
            run, found = ready(name, contestant)
            judge(name, found, slack=_slack(contestant))
        except Exception as error:  # noqa: PERF203 (once a contestant)
            if not isinstance(error, Unavailable) and (name == ours or not keep_going):
                raise
            judge.report(name, error)
        else:
            runs[name] = run
    return runs
