"""Reads the picture of a drawn digit as MNIST was made, and draws what the network saw of it.

Reading needs Pillow, which is imported only then.
"""

import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint import write_atomically
from .ink import find_digit
from .models import InputSpec
from .terminal import printable

if TYPE_CHECKING:
    from PIL import Image

MISSING = "Pillow is not installed; `pip install lenet-fast[plot]` brings it"
SOFTWARE = "lenet-fast"  # the PNG text "Software" of our own pictures: they may be replaced, others not

MAX_PIXELS = 50_000_000  # 200 MB while it is read
_LONGEST_SIDE = 1000  # a larger picture is averaged down first

_FIELD, _BOX, _CENTRE = 28, 20, 14  # MNIST: the digit in 20x20, its centre of mass on pixel (14, 14) of 28x28

_TILE, _CAPTION, _MOST_TILES = 140, 16, 100  # of the picture of what was seen: side and line height in pixels


class ImageError(ValueError):
    """A file is no picture that can be read, or no digit is to be seen in it. Names the file."""


@dataclass(frozen=True, eq=False)
class DrawnDigit:
    """A picture's digit as MNIST has it, uint8 (28, 28), ink 255 on background 0, and the picture itself, small.

    `left_out` says in words what else is in the picture.
    """

    name: str
    pixels: Tensor
    thumbnail: "Image.Image"
    left_out: tuple[str, ...] = ()


# ---- Reading a picture


def read_digit(path: str | Path) -> DrawnDigit:
    """Read the digit in a PNG or JPEG picture of any size and colours, dark on light or light on dark.

    What else is in the picture (a frame, ruled lines, a box, specks, other marks) is left out, and noted: see
    `lenet_fast.ink`. As LeCun et al. (1998), section III.A, made MNIST: the ink's bounding box is scaled to fit 20x20,
    with anti-aliasing and its aspect ratio kept, and the centre of mass brought to the centre of 28x28. Transparent
    parts count as background. Channels may have 1 to 16 bits.

    Raises:
        OSError: the file does not exist or cannot be opened.
        ImageError: it is no PNG or JPEG picture, damaged, larger than 50 million pixels, or blank.
        ImportError: Pillow is not installed.
    """
    path = Path(path)
    picture = _open(path)
    digit = find_digit(np.asarray(picture))
    if digit is None:
        raise ImageError(f"{path}: no digit to be seen, nothing stands out from the background")
    thumbnail = picture.copy()
    thumbnail.thumbnail((_TILE, _TILE))
    return DrawnDigit(path.name, torch.from_numpy(_normalise(digit.ink)), thumbnail, digit.notes)


def _pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError(MISSING) from error


def _open(path: Path) -> "Image.Image":
    """The picture upright, in RGB, without transparency, no side above _LONGEST_SIDE."""
    _pillow()
    from PIL import Image, ImageOps, UnidentifiedImageError

    if path.exists() and not path.is_file():  # a FIFO would hang, a device never end
        raise ImageError(f"{path}: expected a picture, found no regular file")
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
        try:
            image = Image.open(file, formats=("PNG", "JPEG"))
            if (pixels := image.width * image.height) > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height}, {pixels:,} pixels")
            has_16_bits = any("16" in str(tile.args) for tile in image.tile)
            image.load()
            upright = ImageOps.exif_transpose(_in_8_bits(image) if has_16_bits else image)
            rgba = upright.convert("RGBA")
        except UnidentifiedImageError:
            raise ImageError(f"{path}: expected a PNG or JPEG picture, found something else") from None
        except Image.DecompressionBombError as error:
            raise ImageError(f"{path}: expected at most {MAX_PIXELS:,} pixels, found more ({error})") from None
        except Exception as error:  # a damaged picture fails in many ways: zlib, struct, EOF, SyntaxError
            reason = str(error).strip().partition("\n")[0]
            raise ImageError(f"{path}: the picture is damaged ({reason or type(error).__name__})") from error
    if (factor := -(-max(rgba.size) // _LONGEST_SIDE)) > 1:
        rgba = rgba.reduce(factor)
    return _without_transparency(rgba)


def _in_8_bits(image: "Image.Image") -> "Image.Image":
    """A picture of a file with 16 bits a channel, its values brought to 0 to 255.

    Scanners and cameras write values of 10, 12 or 14 bits into such files: the largest value tells how many. Of colours
    and of grey with transparency Pillow keeps the upper 8 of 16 bits, which are few for such values, but enough.
    """
    from PIL import Image

    values, transparent = np.asarray(image, np.int64), image.info.pop("transparency", None)
    if values.ndim == 2:
        scaled = _to_255(values, least_bits=8)
        alpha = 255 * (values != transparent)
    else:
        scaled = _to_255(values[..., :3], least_bits=1)
        if values.shape[2] == 4:
            alpha = _to_255(values[..., 3], least_bits=1)
        else:
            alpha = (
                255 * (values != np.right_shift(transparent, 8)).any(-1)
                if transparent
                else np.full_like(values[..., 0], 255)
            )
    rgb = scaled if scaled.ndim == 3 else np.repeat(scaled[..., None], 3, 2)
    made = Image.fromarray(np.dstack((rgb, alpha)).astype(np.uint8))
    made.info.update(image.info)  # how it was turned
    return made


def _to_255(values: np.ndarray, least_bits: int) -> np.ndarray:
    bits = max(least_bits, int(values.max()).bit_length())
    return values * 255 // (2**bits - 1)


def _without_transparency(rgba: "Image.Image") -> "Image.Image":
    """RGB, on black or white: that which what is visible stands out from."""
    from PIL import Image

    visible = np.asarray(rgba.getchannel("A"), np.float64)
    grey = np.asarray(rgba.convert("L"))
    is_light = (visible * grey).sum() > 127.5 * visible.sum()
    paper = Image.new("RGBA", rgba.size, "black" if is_light else "white")
    return Image.alpha_composite(paper, rgba).convert("RGB")


def _normalise(ink: np.ndarray) -> np.ndarray:
    """Ink from 0 to 1 in its bounding box, to MNIST's form, uint8 (28, 28)."""
    from PIL import Image

    scale = _BOX / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    small = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.HAMMING)).clip(0)
    small = small / small.max()  # a thin pen leaves grey strokes only; MNIST's are white
    field = np.zeros((_FIELD, _FIELD), np.uint8)
    mass = small.sum()
    top, left = (
        int(np.clip(round(_CENTRE - float(np.arange(side) @ small.sum(axis)) / mass), 0, _FIELD - side))
        for side, axis in ((height, 1), (width, 0))
    )
    field[top : top + height, left : left + width] = np.rint(255 * small)
    return field


# ---- Pictures of our own


def seen_picture(digits: Sequence[DrawnDigit], input_spec: InputSpec, captions: Sequence[str]) -> "Image.Image":
    """Each of the first 100 digits beside what the network saw of it, the whole input with its padding."""
    from PIL import Image, ImageDraw

    shown = list(zip(digits, captions, strict=True))[:_MOST_TILES]
    in_a_row = min(len(shown), 4)
    width, height, gap = 2 * _TILE + 4, _TILE + 2 * _CAPTION, 12
    rows = -(-len(shown) // in_a_row)
    sheet = Image.new("RGB", (in_a_row * (width + gap) + gap, rows * (height + gap) + gap), "lightgrey")
    draw = ImageDraw.Draw(sheet)
    for index, (digit, caption) in enumerate(shown):
        left, top = gap + index % in_a_row * (width + gap), gap + index // in_a_row * (height + gap)
        for row, text in enumerate((digit.name, caption)):
            draw.text((left, top + row * _CAPTION), _fitting(draw, text, width), fill="black")
        top += 2 * _CAPTION
        small = digit.thumbnail
        sheet.paste(small, (left + (_TILE - small.width) // 2, top + (_TILE - small.height) // 2))
        pixels = input_spec.prepare(digit.pixels[None])[0, 0] - input_spec.background
        grey = (255 * pixels / (input_spec.foreground - input_spec.background)).round().to(torch.uint8).numpy()
        seen = Image.fromarray(grey).resize((_TILE, _TILE), Image.Resampling.NEAREST)
        sheet.paste(seen, (left + _TILE + 4, top))
    return sheet


def _fitting(draw: Any, text: str, width: int) -> str:
    text = printable(text)[:80]  # so many never fit, and measuring takes its time
    while draw.textlength(text) > width:
        text = text[: -1 if text[-1] != "…" else -2] + "…"
    return text


def check_replaceable(path: str | Path) -> None:
    """Refuse to write a picture to `path` where that is impossible or would replace what is none of our pictures.

    Raises:
        FileExistsError: there is something else: another file, a folder, a FIFO, a device.
        FileNotFoundError: there is no folder for it.
        PermissionError: nothing can be written into its folder.
        ImportError: Pillow is not installed.
    """
    _pillow()
    from PIL import Image

    path = Path(path)
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: nothing can be written into the folder {folder}")
    if not (path.exists() or path.is_symlink()):
        return
    if path.is_file():  # opening a FIFO would wait for ever
        try:
            with Image.open(path, formats=("PNG",)) as image:
                if image.info.get("Software") == SOFTWARE:
                    return
        except Exception:  # damaged or something else: in no case ours
            pass
    raise FileExistsError(f"{path}: exists and is no picture that lenet-fast wrote; name another")


def save_png(picture: "Image.Image", path: str | Path) -> None:
    """Write `picture` as PNG, marked as ours; raises as `check_replaceable`."""
    from PIL.PngImagePlugin import PngInfo

    check_replaceable(path)
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    content = io.BytesIO()
    picture.save(content, "PNG", pnginfo=mark)
    write_atomically(Path(path), content.getvalue())
