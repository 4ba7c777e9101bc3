"""What must hold before anything is timed: results about as close to float64 as PyTorch's in the same dtype."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

OUTPUT = "output"
OUTPUT_FACTOR = 2  # times PyTorch's own error
GRADIENT_FACTOR = 3
FLOOR = 4  # times the dtype's epsilon: where PyTorch happens to be all but exact
INDUCTOR_SLACK = 4  # its sums over a batch are less exact than eager's: seen were 17 epsilon where eager has 2

Results = Mapping[str, Tensor]  # OUTPUT and gradients by name


@dataclass(frozen=True)
class Verdict:
    """What a comparison found. `error` is the largest difference, as a share of the result's largest value."""

    agrees: bool
    error: float

    def columns(self) -> dict[str, str]:
        """As columns of a row."""
        return {"agrees": "yes" if self.agrees else "no", "error": f"{self.error:.2e}"}


class Disagreement(Exception):
    """A contestant computes something else, or less exactly, than PyTorch does.

    `verdict` is None where there is no error to write down: a result of another shape or dtype.
    """

    def __init__(self, message: str, verdict: Verdict | None = None) -> None:
        super().__init__(message)
        self.verdict = verdict


class WrittenDown(Exception):
    """A contestant disagrees, and is timed all the same: its verdict stands in its rows."""


Report = Callable[[str, Exception], None]  # (contestant, what became of it)


class Judge:
    """Compares contestants with the truth and keeps the verdicts.

    Args:
        truth, own: as of `check`.
        report: told of those that disagree and are timed all the same.
        writes_down: who they are. On a device that is lent for minutes, a figure with "agrees=no" is worth more than
            none.
    """

    def __init__(self, truth: Results, own: Results, report: Report | None, writes_down: Collection[str] = ()) -> None:
        self.truth, self.own, self.report, self.writes_down = truth, own, report, writes_down
        self.verdicts: dict[str, Verdict] = {}

    def __call__(self, contestant: str, results: Results, *, slack: int) -> None:
        """Keep the verdict; the worst one, when a contestant is judged several times.

        Raises:
            Disagreement: of a contestant that is not written down, or a result of another shape or dtype.
        """
        try:
            verdict = check(contestant, results, truth=self.truth, own=self.own, slack=slack)
        except Disagreement as error:
            if contestant not in self.writes_down or error.verdict is None:
                raise
            verdict = error.verdict
            if self.report is not None:
                self.report(contestant, WrittenDown(str(error)))
        before = self.verdicts.get(contestant, verdict)
        self.verdicts[contestant] = min(before, verdict, key=lambda one: (one.agrees, -one.error))


def check(contestant: str, results: Results, *, truth: Results, own: Results, slack: int = 1) -> Verdict:
    """Compare the results of a contestant with `truth` (float64), allowing for the error of PyTorch's `own`.

    `slack` multiplies what is allowed; never for an operator of ours.

    Raises:
        Disagreement: naming the contestant, the result, its error and what is allowed.
    """
    errors = []
    for name, expected in truth.items():
        actual, peer = results[name], own[name]
        if actual.shape != expected.shape or actual.dtype != peer.dtype:
            raise Disagreement(
                f"{contestant}: {name}: expected {peer.dtype} of shape {tuple(expected.shape)}, "
                f"got {actual.dtype} of shape {tuple(actual.shape)}"
            )
        factor = OUTPUT_FACTOR if name == OUTPUT else GRADIENT_FACTOR
        own_error = _error(peer, expected)
        bound = slack * (factor * own_error + FLOOR * torch.finfo(peer.dtype).eps)
        error = _error(actual, expected)
        if not error <= bound:  # also where it is NaN
            raise Disagreement(
                f"{contestant}: {name}: off by {error:.2e} of its largest value, allowed are {bound:.2e}: "
                f"{slack} x ({factor} x PyTorch's own {own_error:.2e} + {FLOOR} epsilon)",
                Verdict(False, error),
            )
        errors.append(error)
    return Verdict(True, max(errors))


def _error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, as a share of the largest expected magnitude."""
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()
