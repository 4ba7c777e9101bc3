"""Which part of a picture is the digit: ink told from paper, and the digit's ink from frames, lines, specks and boxes.

Everything is NumPy on a picture of moderate size; lengths are in pixels or in shares of the picture's sides.
"""

from dataclasses import dataclass

import numpy as np

from .marks import Line, Mark, lines_of, marks_of, stroke_width

_LEAST_CONTRAST = 25  # of 255, between ink and paper
_IS_INK = 0.2  # of the strongest ink: blur and faint dirt are no ink
_WIDEST_STROKE = 0.5  # of the longer side: what is wider is paper, a shadow or the table

_THIN = 0.6  # of the digit's strokes: a single line that is so thin, or so faint, is no stroke of a digit

_SPECK = 0.03  # of the digit's ink
_DUST = 0.003  # of the digit's ink: noise, of which nothing is said
_NEAR = 0.12  # of the digit's longer side: a piece that is no farther away is part of it
_INSIDE = 0.3  # of the height of what surrounds it: what is so tall in a box or ring is the digit
_FAINTEST = 0.12  # of what was left out: what stands out less beside it is its halo, in a JPEG
_LEAST_SIDE = 0.05  # of the picture's: less is no digit, if there is something else
_RIVAL = 0.5  # of the digit's height: another mark that is so tall may be a digit itself


@dataclass(frozen=True, eq=False)
class Digit:
    """A digit's ink, float32 (H, W) from 0 to 1, cut to its bounding box, and notes on what was left out of it."""

    ink: np.ndarray
    notes: tuple[str, ...]


def find_digit(rgb: np.ndarray) -> Digit | None:
    """The digit in a picture, uint8 (H, W, 3); None where nothing stands out from the paper.

    Ink is what is darker than the paper around it, or lighter, and narrower than half the picture: shadows and
    gradients are paper. Left out, and noted, are lines along the border, lines from border to border, a box or ring
    with the digit in it, and marks that are small or far from the largest one. Nothing is left out if nothing like a
    digit remains: a stroke from border to border, alone, is a 1.
    """
    contrast = _contrast(rgb)
    mask = _mask(contrast)
    if mask is None:
        return None
    notes: list[str] = []
    while found := _clutter(contrast, mask):
        pixels, note = found
        rest, smaller = _without(contrast, mask, pixels)
        if smaller is None:
            break
        contrast, mask = rest, smaller
        notes.append(note)
    kept = _digit(mask, notes)
    rows, columns = (np.flatnonzero(kept.any(axis)) for axis in (1, 0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    # The blurred rim of the digit's strokes is part of it, what else is near is not.
    rim = _grown(kept[box], 1 + max(kept[box].shape) // 50)
    ink = np.where(rim, contrast[box] / contrast[kept].max(), 0).clip(0, 1).astype(np.float32)
    return Digit(ink, tuple(dict.fromkeys(notes)))


# ---- Ink and paper


def _contrast(rgb: np.ndarray) -> np.ndarray:
    """By how many grey levels each pixel stands out from the paper around it, beyond noise: float32 (H, W)."""
    if (rgb == rgb[..., :1]).all():
        rgb = rgb[..., :1]  # grey, in a third of the time
    rgb = np.where(_is_light_on_dark(rgb), 255 - rgb, rgb)
    reach = max(1, int(_WIDEST_STROKE / 2 * max(rgb.shape)))
    contrast = (_closing(rgb, reach) - rgb).max(-1).astype(np.float32)
    # At least a quarter of a picture is paper; its noise shows in how neighbouring pixels differ.
    steps = np.abs(np.diff(contrast, axis=1, prepend=contrast[:, :1]))
    noise = np.quantile(steps, 0.25) / 0.45  # of a normal distribution, the standard deviation
    return (contrast - np.quantile(contrast, 0.25) - 5 * noise).clip(0).astype(np.float32)


def _is_light_on_dark(rgb: np.ndarray) -> np.ndarray:
    """Of each colour, bool (C,): whether what is narrow is lighter than what is around it, rather than darker."""
    step = -(-max(rgb.shape) // 200)
    whole = np.pad(rgb, ((0, -rgb.shape[0] % step), (0, -rgb.shape[1] % step), (0, 0)), mode="edge")
    blocks = whole.reshape(whole.shape[0] // step, step, whole.shape[1] // step, step, -1)
    small = blocks.mean((1, 3)).astype(np.uint8)
    clear = (small.max((0, 1)) - small.min((0, 1))) // 3  # beyond noise
    balance = np.zeros(rgb.shape[2])
    for reach in sorted({max(1, max(small.shape) // share) for share in (200, 64, 32, 16, 8, 5)}):
        for sign, image in ((-1.0, small), (1.0, 255 - small)):
            stands_out = _closing(image, reach) - image
            # The narrowest counts most: lines and specks, not the paper between them. Exponents from 2.2 to 2.25 are
            # right for bold digits, whose holes are narrower than their strokes, and for hundreds of specks alike.
            balance += sign * np.where(stands_out > clear, stands_out, 0).sum((0, 1)) / reach**2.2
    return balance > 0


def _closing(image: np.ndarray, reach: int) -> np.ndarray:
    """The picture with the lighter surroundings spread over all that is narrower than 2 reach + 1 pixels."""
    return _spread(_spread(image, reach, np.maximum), reach, np.minimum)


def _spread(image: np.ndarray, reach: int, largest: np.ufunc) -> np.ndarray:
    """The largest (or smallest) value of (H, W, C) within `reach` pixels to each side of every pixel."""
    window = 2 * reach + 1
    fill = 0 if largest is np.maximum else 255
    for axis in (0, 1):
        image = np.pad(image.swapaxes(0, axis), ((reach, reach), (0, 0), (0, 0)), constant_values=fill)
        covered = 1  # pixels by every value so far; doubled, until the rest of the window is less
        while 2 * covered <= window:
            image = largest(image[:-covered], image[covered:])
            covered *= 2
        if rest := window - covered:
            image = largest(image[:-rest], image[rest:])
        image = image.swapaxes(0, axis)
    return image


def _grown(mask: np.ndarray, by: int) -> np.ndarray:
    return _spread(mask[..., None].astype(np.uint8), by, np.maximum)[..., 0].astype(bool)


def _mask(contrast: np.ndarray) -> np.ndarray | None:
    """The pixels with ink; None where there is none."""
    strongest = contrast.max()
    return contrast > _IS_INK * strongest if strongest >= _LEAST_CONTRAST else None


# ---- What is no digit


def _clutter(contrast: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, str] | None:
    """Pixels that are no digit's, and what they are; None where no more are found."""
    across, down = lines_of(mask)
    lines = [line for line in across + down if line.at_border]
    if (pixels := _foreign(contrast, mask, lines, across + down)) is not None:
        return pixels, "the frame or edge along the border"
    for direction in (across, down):
        lines = [line for line in direction if not line.at_border]
        if (pixels := _foreign(contrast, mask, lines, across + down)) is not None:
            return pixels, f"{_counted(len(lines), 'line')} across the picture"
    return _box(mask)


def _foreign(contrast: np.ndarray, mask: np.ndarray, lines: list[Line], every: list[Line]) -> np.ndarray | None:
    """The pixels of `lines`, where they are no strokes of the digit; what is left without `every` line decides.

    A stroke does not go on at both ends where the rest of the digit stops. A line that does, but is alone, as thick
    and as dark as the rest, may be a 1 beside something small.
    """
    if not lines:
        return None
    pixels = np.logical_or.reduce([line.pixels for line in lines])
    _, rest = _without(contrast, mask, np.logical_or.reduce([line.pixels for line in every]))
    if rest is None:
        return None
    digit = marks_of(rest)[0]
    if len(lines) < 3 and not all(line.sticks_out(digit, mask.shape) for line in lines):
        return None
    if len(lines) == 1 and digit.height < _INSIDE * max(mask.shape):
        like_a_stroke = _THIN < lines[0].thickness / stroke_width(rest) < 1 / _THIN
        as_dark = np.median(contrast[pixels]) > _THIN * np.median(contrast[rest])
        if like_a_stroke and as_dark:
            return None
    return pixels


def _without(contrast: np.ndarray, mask: np.ndarray, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Contrast and mask without these pixels and their blurred rim; no mask where nothing like a digit is left."""
    rest = np.where(_grown(pixels, 2) & ~(mask & ~pixels), 0, contrast)
    smaller = _mask(rest) if rest.max() > _FAINTEST * contrast.max() else None
    if smaller is not None:
        largest = marks_of(smaller)[0]
        if max(largest.height, largest.width) < max(_LEAST_SIDE * max(mask.shape), 5):
            smaller = None
    return rest, smaller


def _box(mask: np.ndarray) -> tuple[np.ndarray, str] | None:
    """What surrounds the digit: closed, as a box or a ring, or straight along the sides of its bounding box."""
    marks = marks_of(mask)
    for outer in marks[:5]:
        pixels = outer.on(mask.shape)
        box = np.s_[outer.top : outer.bottom, outer.left : outer.right]
        # The digit may be small on a sheet that lies on a dark table; a 0 has nothing but specks in it.
        least = (_INSIDE / 3 if outer.touches_border(mask.shape) else _INSIDE) * outer.height
        inner = [mark for mark in marks if outer.surrounds(mark) and mark.height >= least]
        if not any(_is_enclosed(mark, outer, pixels[box]) for mark in inner):
            lines = [line for direction in lines_of(pixels[box]) for line in direction if line.along_a_side]
            if len(lines) < (2 if inner else 4):
                continue
            pixels[box] = np.logical_or.reduce([line.pixels for line in lines])
            rest = marks_of(mask & ~pixels)
            if not rest or rest[0].height < _INSIDE * outer.height:
                continue
        return pixels, "the box, ring or ground round the digit"
    return None


def _is_enclosed(mark: Mark, outer: Mark, crop: np.ndarray) -> bool:
    """Whether no way leads from `mark` out of `outer`, whose bounding box `crop` shows."""
    free = np.pad(~crop, 1, constant_values=True)
    outside = next(region for region in marks_of(free, diagonally=False) if region.top == region.left == 0)
    return not outside.on(free.shape)[mark.rows[0] - outer.top + 1, mark.columns[0] - outer.left + 1]


def _digit(mask: np.ndarray, notes: list[str]) -> np.ndarray:
    """The ink of the largest mark and of the pieces that belong to it; notes what is left out."""
    marks = marks_of(mask)
    free = [mark for mark in marks if not mark.touches_border(mask.shape)]
    main = free[0] if free and free[0].height >= _INSIDE * marks[0].height else marks[0]
    kept, rivals, others = [main], 0, 0
    for mark in marks:
        if mark is main or len(mark.rows) < _DUST * len(main.rows):
            continue
        is_near = mark.gap(main) <= _NEAR * max(main.height, main.width)
        beside = mark.right <= main.left or main.right <= mark.left
        is_tall = mark.height >= _RIVAL * main.height
        hangs_on_border = mark.touches_border(mask.shape) and not main.touches_border(mask.shape)
        if len(mark.rows) >= _SPECK * len(main.rows) and is_near and not (is_tall and beside) and not hangs_on_border:
            kept.append(mark)
        elif is_tall and not hangs_on_border:
            rivals += 1
        else:
            others += 1
    if rivals:
        notes.append(f"{_counted(rivals, 'mark')} as large as a digit beside it")
    if others:
        notes.append(_counted(others, "speck or mark", "specks or marks"))
    return np.logical_or.reduce([mark.on(mask.shape) for mark in kept])


def _counted(count: int, one: str, several: str | None = None) -> str:
    return f"{count} {one if count == 1 else several or one + 's'}"
