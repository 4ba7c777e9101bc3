"""What must hold before anything is timed: results about as close to float64 as PyTorch's in the same dtype."""

from collections.abc import Mapping

import torch
from torch import Tensor

OUTPUT = "output"
OUTPUT_FACTOR = 2  # times PyTorch's own error
GRADIENT_FACTOR = 3
FLOOR = 4  # times the dtype's epsilon: where PyTorch happens to be all but exact
INDUCTOR_SLACK = 4  # its sums over a batch are less exact than eager's: seen were 17 epsilon where eager has 2

Results = Mapping[str, Tensor]  # OUTPUT and gradients by name


class Disagreement(Exception):
    """A contestant computes something else, or less exactly, than PyTorch does."""


def check(contestant: str, results: Results, *, truth: Results, own: Results, slack: int = 1) -> None:
    """Compare the results of a contestant with `truth` (float64), allowing for the error of PyTorch's `own`.

    `slack` multiplies what is allowed; never for an operator of ours.

    Raises:
        Disagreement: naming the contestant, the result, its error and what is allowed.
    """
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
                f"{slack} x ({factor} x PyTorch's own {own_error:.2e} + {FLOOR} epsilon)"
            )


def _error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, as a share of the largest expected magnitude."""
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()
