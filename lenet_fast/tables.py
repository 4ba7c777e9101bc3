"""Connection tables of sparse layers, LeCun's for C3, and the digit bitmaps of the RBF output layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .eager import among_real_tensors

__all__ = ["DIGIT_BITMAPS", "LENET5_C3", "Connections"]


@dataclass(frozen=True)
class Connections:
    """A connection table as constants: hashable, and known to a compiled graph.

    `indices` are the positions of the connections in the row-major (out_channels, in_channels) table, ascending; so
    the connections of output map 0 come first, its input maps ascending.
    """

    out_channels: int
    in_channels: int
    indices: tuple[int, ...]

    @classmethod
    def of(cls, table: "Tensor | Connections") -> "Connections":
        """From a bool tensor (C_out, C_in): does output map o see input map i?

        Raises:
            TypeError: not a tensor of dtype bool.
            ValueError: not two-dimensional, or without rows or columns.
        """
        if isinstance(table, Connections):
            return table
        if not isinstance(table, Tensor) or table.dtype != torch.bool:
            got = table.dtype if isinstance(table, Tensor) else type(table).__name__
            raise TypeError(f"table: expected a tensor of dtype bool, got {got}")
        if table.dim() != 2 or 0 in table.shape:
            raise ValueError(f"table: expected (C_out, C_in), got shape {tuple(table.shape)}")
        with among_real_tensors():  # LENET5_C3 is one
            return cls(*table.shape, tuple(table.flatten().nonzero().flatten().tolist()))

    def __len__(self) -> int:
        return len(self.indices)

    def fan_in(self) -> list[int]:
        """Number of input maps of each output map."""
        counts = [0] * self.out_channels
        for index in self.indices:
            counts[index // self.in_channels] += 1
        return counts

    def table(self) -> Tensor:
        """The bool tensor (C_out, C_in)."""
        flat = torch.zeros(self.out_channels * self.in_channels, dtype=torch.bool)
        flat[list(self.indices)] = True
        return flat.view(self.out_channels, self.in_channels)


def _table(rows: str, in_channels: int) -> Tensor:
    """A table from its rows, each naming its input maps by digit."""
    return torch.tensor([[str(channel) in row for channel in range(in_channels)] for row in rows.split()])


LENET5_C3 = _table(
    "012 123 234 345 045 015 0123 1234 2345 0345 0145 0125 0134 1245 0235 012345",
    in_channels=6,
)
"""LeCun et al. (1998), table I: which of S2's 6 maps each of C3's 16 maps sees; bool (16, 6), 60 connections."""

_DRAWINGS = """
..###..  ...#...  .#####.  .#####.  ....##.  #######  ..####.  #######  .#####.  .#####.
.##.##.  ..##...  ##...##  ##...##  ...###.  ##.....  .##....  ##...##  ##...##  ##...##
##...##  .###...  ##...##  .....##  ..####.  ##.....  ##.....  .....##  ##...##  ##...##
##...##  ####...  .....##  .....##  .##.##.  ##.....  ##.....  ....##.  ##...##  ##...##
##...##  ..##...  .....##  ....##.  ##..##.  ######.  ##.###.  ....##.  .##.##.  ##...##
##...##  ..##...  ....##.  ..###..  ##..##.  ##...##  ###..##  ...##..  ..###..  .######
##...##  ..##...  ...##..  ....##.  #######  .....##  ##...##  ...##..  .##.##.  ..##.##
##...##  ..##...  ..##...  .....##  #######  .....##  ##...##  ..##...  ##...##  .....##
##...##  ..##...  .##....  .....##  ....##.  .....##  ##...##  ..##...  ##...##  .....##
##...##  ..##...  ##.....  ##...##  ....##.  ##...##  ##...##  ..##...  ##...##  .....##
.##.##.  ..##...  ##.....  ##...##  ....##.  ##...##  .##.##.  ..##...  ##...##  ....##.
..###..  ######.  #######  .#####.  ....##.  .#####.  ..###..  ..##...  .#####.  .####..
"""


def _bitmaps(drawings: str) -> Tensor:
    """Drawings side by side to (number, height * width) of +1 (ink) and -1."""
    lines = [line.split() for line in drawings.split("\n") if line]
    digits = zip(*lines, strict=True)
    return torch.tensor([[1.0 if pixel == "#" else -1.0 for row in rows for pixel in row] for rows in digits])


def digit_bitmaps() -> Tensor:
    """`DIGIT_BITMAPS` made anew, which is a fake tensor where tensors are."""
    return _bitmaps(_DRAWINGS)


DIGIT_BITMAPS = digit_bitmaps()
"""Target codes of the output layer: 7x12 drawings of the digits, row by row, +1 ink and -1 background; (10, 84).

Our own drawings: LeCun et al. (1998), figure 3, shows those of the paper as a picture only.
"""
