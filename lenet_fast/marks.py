"""Straight lines and connected pieces of a mask: bool (H, W), True where there is ink."""

from dataclasses import dataclass, replace

import numpy as np

_LINE_COLUMNS = 200  # a picture is searched for straight lines in so many columns
_LINE_COVERS = 0.85  # of the side along which it runs
_THICK_LINE = 0.08  # of its length: what is thicker is no line
_THICK_EDGE = 0.15  # the same along the border of the picture
_LINE_SLOPE = 0.12  # its rise over its length, at most: 7 degrees


# ---- Straight lines


@dataclass(frozen=True, eq=False)
class Line:
    """A straight line from one side of a picture to the opposite one: its pixels, and how thick it is in pixels.

    `place` is where it runs: 0 at the top or left border, 1 at the bottom or right border.
    """

    pixels: np.ndarray  # bool, as the picture
    thickness: float
    place: float
    at_border: bool  # begins at the border beside which it runs
    runs_down: bool = False

    def sticks_out(self, mark: "Mark", shape: tuple[int, int]) -> bool:
        """Whether it goes on beyond both ends of `mark`, by a twentieth of the picture or more."""
        side = shape[0 if self.runs_down else 1]
        first, past = (mark.top, mark.bottom) if self.runs_down else (mark.left, mark.right)
        return first >= side / 20 and side - past >= side / 20

    @property
    def along_a_side(self) -> bool:
        return not 0.2 < self.place < 0.8


def lines_of(mask: np.ndarray) -> tuple[list[Line], list[Line]]:
    """The lines of a picture that run from left to right, and those that run from top to bottom."""
    down = [replace(line, pixels=line.pixels.T, runs_down=True) for line in _lines_to_the_right(mask.T)]
    return _lines_to_the_right(mask), down


def _lines_to_the_right(mask: np.ndarray) -> list[Line]:
    height, width = mask.shape
    step = -(-width // _LINE_COLUMNS)
    coarse = np.pad(mask, ((step, step + -height % step), (0, -width % step)))
    coarse = coarse.reshape(coarse.shape[0] // step, step, -1, step).any((1, 3))
    if len(coarse) > _LINE_COLUMNS // 2:  # a line drawn by hand wavers by up to one row of so many
        coarse[1:-1] |= coarse[:-2] | coarse[2:]
    rows, columns = coarse.shape
    y, x = np.nonzero(coarse)
    position = x / max(1, columns - 1) - 0.5
    most = int(_LINE_SLOPE * columns)

    def covered(rise: int) -> np.ndarray:
        """Of a line of this rise through each row of the middle column: the share that is ink."""
        count = np.bincount((y - np.rint(rise * position)).astype(int) + columns, minlength=rows + 2 * columns)
        return count[columns : columns + rows] / columns

    rises = sorted(range(-most, most + 1), key=abs)
    coverage = [covered(rise) for rise in rises]
    best = int(np.argmax([share[share >= _LINE_COVERS].sum() for share in coverage]))
    found = np.flatnonzero(coverage[best] >= _LINE_COVERS)
    if not len(found):
        return []
    lengths = _run_lengths(mask.T).T
    shift = rises[best] * step * (np.arange(width) / max(1, width - 1) - 0.5)
    lines = []
    for group in np.split(found, np.flatnonzero(np.diff(found) > 1) + 1):
        first, last = (group[0] - 1) * step + shift, group[-1] * step + shift  # the padding is one step
        row = np.arange(height)[:, None]
        band = mask & (row >= first) & (row < last)
        thinnest = np.where(band, lengths, height + 1).min(0)
        if not (thinnest <= height).any():
            continue
        thickness = float(np.median(thinnest[thinnest <= height]))
        place = float((first + last).mean() / 2 / height)
        # A stroke that crosses the line is a longer run of ink in its column, and stays.
        wide = mask & (row >= first - thickness) & (row < last + thickness)
        pixels = wide & (lengths <= 1.5 * thickness + 1)
        at_border = min(first.min() / height, 1 - last.max() / height) < 0.02
        if at_border:  # beyond it nothing crosses
            pixels |= band
        line = Line(pixels, thickness, place, at_border)
        if thickness < (_THICK_EDGE if line.at_border else _THICK_LINE) * width:
            lines.append(line)
    return lines


def _run_lengths(mask: np.ndarray) -> np.ndarray:
    """Of every pixel with ink the length of the run of ink in its row, else 0."""
    _, start, end = _runs(mask)
    lengths = np.zeros(mask.shape, np.int64)
    lengths[mask] = np.repeat(end - start, end - start)
    return lengths


def _runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The runs of ink in the rows, in order: row, first column, column past the last."""
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    row, start = np.nonzero(steps == 1)
    return row, start, np.nonzero(steps == -1)[1]


def stroke_width(mask: np.ndarray) -> float:
    """How thick the ink is, in pixels: the median over its pixels of the shorter run, along the row or the column."""
    return float(np.median(np.minimum(_run_lengths(mask), _run_lengths(mask.T).T)[mask]))


# ---- Connected pieces


@dataclass(frozen=True, eq=False)
class Mark:
    """A connected piece of ink: its pixels, row by row, and its bounding box."""

    rows: np.ndarray
    columns: np.ndarray
    top: int
    left: int
    bottom: int  # past the last row
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    def on(self, shape: tuple[int, int]) -> np.ndarray:
        """Its pixels, as a mask of the picture."""
        mask = np.zeros(shape, bool)
        mask[self.rows, self.columns] = True
        return mask

    def gap(self, other: "Mark") -> int:
        """Pixels between the two bounding boxes, along the axis on which they are farther apart."""
        rows = max(self.top, other.top) - min(self.bottom, other.bottom)
        columns = max(self.left, other.left) - min(self.right, other.right)
        return max(rows, columns, 0)

    def surrounds(self, other: "Mark") -> bool:
        """Whether the bounding box of `other` lies within its own, and is another one."""
        inside = self.top <= other.top and other.bottom <= self.bottom
        return other is not self and inside and self.left <= other.left and other.right <= self.right

    def touches_border(self, shape: tuple[int, int]) -> bool:
        return self.top == 0 or self.left == 0 or self.bottom == shape[0] or self.right == shape[1]


def marks_of(mask: np.ndarray, diagonally: bool = True) -> list[Mark]:
    """The connected pieces of a mask, the largest first."""
    row, start, end = _runs(mask)
    if not len(row):
        return []
    # Runs of neighbouring rows touch where each begins before the other ends.
    stride = mask.shape[1] + 2
    below = (row + 1) * stride
    sides = ("left", "right") if diagonally else ("right", "left")
    first = np.searchsorted(row * stride + end, below + start, sides[0])
    past = np.searchsorted(row * stride + start, below + end, sides[1])
    count = (past - first).clip(0)
    upper = np.repeat(np.arange(len(row)), count)
    lower = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count) + np.repeat(first, count)
    # Every run takes the smallest label among those that it touches, until none changes.
    label = np.arange(len(row))
    while True:
        before = label.copy()
        smaller = np.minimum(label[upper], label[lower])
        np.minimum.at(label, before[upper], smaller)
        np.minimum.at(label, before[lower], smaller)
        label = label[label]
        if np.array_equal(label, before):
            break
    pixels = np.flatnonzero(mask)
    owner = np.repeat(label, end - start)
    order = np.argsort(owner, kind="stable")
    pieces = np.split(pixels[order], np.flatnonzero(np.diff(owner[order])) + 1)
    return sorted((_mark(piece, mask.shape[1]) for piece in pieces), key=lambda mark: -len(mark.rows))


def _mark(pixels: np.ndarray, width: int) -> Mark:
    rows, columns = pixels // width, pixels % width
    return Mark(rows, columns, int(rows[0]), int(columns.min()), int(rows[-1]) + 1, int(columns.max()) + 1)
