"""A race of whole networks: the contestants made ready and checked against float64, the time of each."""

from collections.abc import Callable, Mapping

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

LeftOut = Callable[[str, Exception], None]


def train(
    task: Task,
    contestants: Mapping[str, train_contestants.Contestant],
    *,
    device: Device,
    rounds: int,
    sample_seconds: float,
    left_out: LeftOut,
    keep_going: bool = False,
) -> harness.Race:
    """Race training steps; a sample is whole passes over the task's batches, a time that of one step.

    Who is unavailable is left out and reported to `left_out`; with `keep_going`, every rival that fails or is wrong.

    Raises:
        agreement.Disagreement: one of them is wrong; none was timed.
    """
    torch.compiler.reset()  # no guards of earlier races to check, no limit on recompilations reached
    first = task.first(CHECKED_STEPS)
    truth = {LOSSES: first_losses(train_contestants.JUDGE(first))}
    own = {LOSSES: first_losses(train_contestants.EAGER(first)).float()}

    def ready(name: str, contestant: train_contestants.Contestant) -> harness.Run:
        trained = contestant.prepare(task)
        found = {LOSSES: first_losses(trained).float()}
        agreement.check(name, found, truth=truth, own=own, slack=_slack(contestant))
        trained.reset()
        return trained.run

    runs = _made_ready(contestants, ready, train_contestants.OURS[device.type], left_out, keep_going)
    options = {"timer": device.timer, "probe": device.probe, "repeats": task.steps}
    return harness.race(runs, rounds=rounds, sample_seconds=sample_seconds, **options)


def infer(
    task: Task,
    contestants: Mapping[str, infer_contestants.Contestant],
    *,
    device: Device,
    rounds: int,
    sample_seconds: float,
    left_out: LeftOut,
    keep_going: bool = False,
) -> harness.Race:
    """Race the network's outputs for the one batch of `task`; otherwise as `train`."""
    torch.compiler.reset()
    with torch.inference_mode():
        truth, own = (
            {agreement.OUTPUT: prepare(task)()} for prepare in (infer_contestants.JUDGE, infer_contestants.EAGER)
        )

        def ready(name: str, contestant: infer_contestants.Contestant) -> harness.Run:
            run = contestant.prepare(task)
            found = {agreement.OUTPUT: run().to(own[agreement.OUTPUT].dtype)}
            agreement.check(name, found, truth=truth, own=own, slack=_slack(contestant))
            return run

        runs = _made_ready(contestants, ready, infer_contestants.OURS, left_out, keep_going)
        options = {"timer": device.timer, "probe": device.probe}
        return harness.race(runs, rounds=rounds, sample_seconds=sample_seconds, **options)


def first_losses(trained: Trained) -> torch.Tensor:
    """Mean losses of the first steps from the initial weights, float64."""
    trained.reset()
    losses: list[float] = []
    while len(losses) < CHECKED_STEPS:
        losses += map(float, trained.run())
    return torch.tensor(losses[:CHECKED_STEPS], dtype=torch.float64)


def _slack(contestant: train_contestants.Contestant | infer_contestants.Contestant) -> int:
    return LESS_EXACT[contestant.dtype] * (agreement.INDUCTOR_SLACK if contestant.compiled else 1)


def _made_ready(
    contestants: Mapping[str, object],
    ready: Callable[[str, object], harness.Run],
    ours: str,
    left_out: LeftOut,
    keep_going: bool,
) -> dict[str, harness.Run]:
    runs = {}
    for name, contestant in contestants.items():
        try:
            runs[name] = ready(name, contestant)
        except Exception as error:  # noqa: PERF203 (once a contestant)
            if not isinstance(error, Unavailable) and (name == ours or not keep_going):
                raise
            left_out(name, error)
    return runs
