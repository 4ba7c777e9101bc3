"""Drawn digits: brought back to MNIST's form whatever they were drawn in, refused when unreadable; the answers."""

import os
import re
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from lenet_fast import data, images, inference, models
from lenet_fast.images import DrawnDigit, ImageError, read_digit
from lenet_fast.ink import find_digit
from lenet_fast.models import classify, criterion
from lenet_fast.train import Run, TrainConfig

COUNT = 15


@pytest.fixture(scope="module")
def network():
    run = Run(TrainConfig(model="lenet5", epochs=2, device="cpu"))
    run.fit()
    assert run.history[-1].test_accuracy > 0.96

    def classes(pixels):
        return classify(run.model, inference.outputs(run.model, run.input_spec, pixels))

    return classes


@pytest.fixture(scope="module")
def digits():
    return data.load("mnist-10k").test.images[:COUNT]


# --- Reading ----------------------------------------------------------------------------------------


def coverage(digit, size, resample=Image.Resampling.BICUBIC):
    """The digit as ink from 0 to 255 of another size."""
    return Image.fromarray(digit.numpy()).resize((size, size), resample)


def painted(digit, size, ink, paper, canvas=None, at=(0, 0), mode="RGB"):
    """A drawing with `ink` on `paper`, on a canvas that may be larger than the digit."""
    picture = Image.new(mode, canvas or (size, size), paper)
    picture.paste(Image.new(mode, (size, size), ink), at, coverage(digit, size))
    return picture


def original(digit):
    return Image.fromarray(digit.numpy())


def blocks(digit):
    return coverage(digit, 280, Image.Resampling.NEAREST).point(lambda value: 255 - value)


def dark_on_light(digit):
    return painted(digit, 333, "black", "white")


def light_on_dark_and_small(digit):
    return painted(digit, 45, "white", "black")


def blue_on_cream_in_a_corner(digit):
    return painted(digit, 230, "navy", "cornsilk", (700, 500), (460, 3))


def yellow_on_green_of_equal_brightness(digit):
    return painted(digit, 190, (150, 90, 0), (0, 141, 150), (300, 200), (7, 5))


def faint(digit):
    return painted(digit, 300, (205, 205, 205), (255, 255, 255), (420, 310), (90, 2))


def black_on_nothing(digit):
    picture = Image.new("RGBA", (250, 250), "black")
    picture.putalpha(coverage(digit, 250))
    return picture


def white_on_nothing(digit):
    picture = Image.new("RGBA", (250, 250), "white")
    picture.putalpha(coverage(digit, 250))
    return picture


def grey_and_alpha(digit):
    return black_on_nothing(digit).convert("LA")


def palette(digit):
    return painted(digit, 210, "maroon", "lightgrey").quantize(64)


def palette_with_transparency(digit):
    return black_on_nothing(digit).quantize(64)


def one_bit(digit):
    return coverage(digit, 400).point(lambda value: 255 * (value < 110)).convert("1")


def sixteen_bit(digit):
    return Image.fromarray(np.asarray(coverage(digit, 150), np.uint16) * 257)


def twelve_bits_of_sixteen(digit):
    return Image.fromarray(np.asarray(coverage(digit, 150), np.uint16) * 16)


def sideways_as_a_camera_stores_it(digit):
    picture = dark_on_light(digit).transpose(Image.Transpose.ROTATE_90)
    picture.getexif()[0x0112] = 6  # turn by 90 degrees clockwise to see it
    return picture


def print_colours(digit):
    return dark_on_light(digit).convert("CMYK")


def png_of(width, height, bits, colour, content, *more):
    """A sound PNG: its header, further chunks, and compressed lines of pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), *more, (b"IDAT", zlib.compress(content)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def png_header(width, height):
    """A sound PNG of that size, except that its pixels are missing."""
    return png_of(width, height, 8, 2, b"")


def png(values, colour, *more):
    """A PNG of values (H, W, C), 16 bits each, which Pillow cannot write of colours."""
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png_of(values.shape[1], values.shape[0], 16, colour, lines, *more)


RENDERINGS = [  # how, file type, grey levels of 255 that a pixel may be off on average (measured, and a third more)
    (original, "png", 0.4),
    (blocks, "png", 3.0),
    (dark_on_light, "png", 9.0),
    (dark_on_light, "jpg", 9.0),
    (light_on_dark_and_small, "png", 12.0),
    (blue_on_cream_in_a_corner, "png", 9.0),
    (blue_on_cream_in_a_corner, "jpg", 9.0),
    (yellow_on_green_of_equal_brightness, "png", 9.0),
    (faint, "png", 9.0),
    (black_on_nothing, "png", 9.0),
    (white_on_nothing, "png", 9.0),
    (grey_and_alpha, "png", 9.0),
    (palette, "png", 9.0),
    (palette_with_transparency, "png", 9.0),
    (one_bit, "png", 9.5),
    (sixteen_bit, "png", 9.0),
    (twelve_bits_of_sixteen, "png", 9.0),
    (sideways_as_a_camera_stores_it, "jpg", 9.0),
    (print_colours, "jpg", 9.0),
]


def read(picture, path):
    options = {"exif": picture.getexif(), "quality": 90} if path.suffix == ".jpg" else {}
    picture.save(path, **options)
    return read_digit(path).pixels


@pytest.mark.parametrize(("render", "kind", "bound"), RENDERINGS, ids=lambda value: getattr(value, "__name__", value))
def test_a_drawn_mnist_digit_comes_back(digits, network, tmp_path, render, kind, bound):
    found = torch.stack([read(render(digit), tmp_path / f"digit.{kind}") for digit in digits])
    assert found.shape == digits.shape
    assert found.dtype == torch.uint8
    error = (found.double() - digits.double()).abs().mean().item()
    print(f"{render.__name__}: {error:.2f}")
    assert error <= bound
    assert (network(found) != network(digits)).sum() <= 1  # of 15


def test_place_and_inversion_and_scale_of_grey_do_not_matter(digits, tmp_path):
    for digit in digits[:10]:
        ink = coverage(digit, 200)
        at_home = read(ink, tmp_path / "home.png")
        canvas = Image.new("L", (777, 555), 0)
        canvas.paste(ink, (577, 355))
        assert torch.equal(read(canvas, tmp_path / "corner.png"), at_home)
        assert torch.equal(read(canvas.point(lambda value: 255 - value), tmp_path / "inverted.png"), at_home)
        assert (read(canvas.point(lambda value: value // 2), tmp_path / "grey.png").int() - at_home).abs().max() <= 3


def test_a_photograph_of_paper_is_read(digits, network, tmp_path):
    """Shading across the sheet, noise, JPEG."""
    random = np.random.default_rng(0)
    slope = np.linspace(0, 1, 500)
    found = []
    for digit in digits:
        sheet = 200 - 40 * slope[:, None] - 20 * slope + random.normal(0, 5, (500, 500))
        top, left = random.integers(20, 150, 2)
        sheet[top : top + 300, left : left + 300] *= 1 - 0.7 / 255 * np.asarray(coverage(digit, 300), float)
        picture = Image.fromarray((sheet[..., None] * [1, 0.97, 0.9]).clip(0, 255).astype(np.uint8))
        found.append(read(picture, tmp_path / "photo.jpg"))
    assert (network(torch.stack(found)) != network(digits)).sum() <= 1


@pytest.mark.parametrize("pen", [1, 2, 12])
def test_the_form_is_mnists(tmp_path, pen):
    """20 pixels on the longer side, the other one in proportion, full contrast, centre of mass at pixel (14, 14)."""
    picture = Image.new("L", (640, 480), 255)
    ImageDraw.Draw(picture).line([(100, 50), (220, 50), (100, 450)], fill=40, width=pen, joint="curve")
    pixels = read(picture, tmp_path / "seven.png").double()
    rows, columns = (pixels.amax(axis).nonzero().flatten() for axis in (1, 0))
    assert len(rows) == rows[-1] - rows[0] + 1 == 20
    assert abs((columns[-1] - columns[0] + 1) - 20 * 120 / 400) <= 1
    assert pixels.max() == 255
    for axis in (0, 1):
        centre = (pixels.sum(1 - axis) @ torch.arange(28.0, dtype=torch.double)) / pixels.sum()
        assert abs(centre - 14) <= 0.5


def test_large_pictures_are_read_too(digits, network, tmp_path):
    picture = painted(digits[0], 2500, "black", "white", (4100, 3000), (1500, 400))
    assert network(read(picture, tmp_path / "large.png")[None]) == network(digits[:1])


@pytest.mark.parametrize("colour", [0, 2, 4, 6], ids=["grey", "colours", "grey-and-alpha", "colours-and-alpha"])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("inverted", [False, True], ids=["light-on-dark", "dark-on-light"])
def test_sixteen_bits_a_channel(digits, network, tmp_path, colour, bits, inverted):
    """Whatever part of the 16 bits is in use; of colours Pillow reads 8 bits, 2 of them where 10 are in use."""
    found = []
    for digit in digits[:5]:
        grey = np.asarray(coverage(digit, 100), np.int64)
        values = (255 - grey if inverted else grey)[..., None] * (2**bits - 1) // 255
        alpha = np.full_like(values, 2**bits - 1)
        bands = [values] * (1 if colour in (0, 4) else 3) + [alpha] * (colour in (4, 6))
        (tmp_path / "digit.png").write_bytes(png(np.dstack(bands), colour))
        found.append(read_digit(tmp_path / "digit.png").pixels)
    assert torch.equal(network(torch.stack(found)), network(digits[:5]))


@pytest.mark.parametrize("colour", [0, 2], ids=["grey", "colours"])
def test_a_transparent_colour_of_sixteen_bits(digits, network, tmp_path, colour):
    """The value that counts as transparent, as PNG has it beside an alpha channel: here the background's."""
    ink = np.asarray(coverage(digits[0], 100), np.int64) > 127
    values = np.where(ink, 1000, 60000)[..., None].repeat(1 if colour == 0 else 3, 2)
    transparent = np.full(values.shape[2], 60000, ">u2").tobytes()
    (tmp_path / "digit.png").write_bytes(png(values, colour, (b"tRNS", transparent)))
    assert network(read_digit(tmp_path / "digit.png").pixels[None]) == network(digits[:1])


# --- What else is in a picture ----------------------------------------------------------------------


def on_paper(digit, size=200, box=112, ink=30):
    """Test digit as a pen draws it, float64 (size, size), 235 where nothing is."""
    page, at = np.full((size, size), 235.0), (size - box) // 2
    share = np.asarray(coverage(digit, box)) / 255
    page[at : at + box, at : at + box] = 235 * (1 - share) + ink * share
    return page


def framed(page, width, grey=0, sides="tblr"):
    page = page.copy()
    for side, part in {"t": np.s_[:width], "b": np.s_[-width:], "l": np.s_[:, :width], "r": np.s_[:, -width:]}.items():
        if side in sides:
            page[part] = grey
    return page


def ruled(page, apart, grey=150, thick=1):
    page = page.copy()
    for row in range(apart // 2, len(page), apart):
        page[row : row + thick] = np.minimum(page[row : row + thick], grey)
    return page


def turned(page, angle):
    return np.asarray(Image.fromarray(page.astype(np.uint8)).rotate(angle, Image.Resampling.BICUBIC, fillcolor=235))


def with_shape(page, shape, *arguments, **options):
    picture = Image.fromarray(page.clip(0, 255).astype(np.uint8))
    getattr(ImageDraw.Draw(picture), shape)(*arguments, **options)
    return np.asarray(picture)


def specked(page, count, size):
    page = page.copy()
    for row, column in np.random.default_rng(0).integers(2, len(page) - size - 2, (count, 2)):
        page[row : row + size, column : column + size] = 60
    return page


def shadowed(page, factor, penumbra):
    rows, columns = np.mgrid[: len(page), : len(page)] / len(page)
    return page * (1 - (1 - factor) * ((columns + 0.3 * rows - 0.65) / penumbra + 0.5).clip(0, 1))


def on_a_table(page, angle):
    sheet, whole = (Image.fromarray(array.astype(np.uint8)) for array in (page, np.full_like(page, 255)))
    table = Image.new("L", (300, 300), 60)
    place = tuple((300 - side) // 2 for side in sheet.rotate(angle, expand=True).size)
    table.paste(sheet.rotate(angle, expand=True), place, whole.rotate(angle, expand=True))
    return np.asarray(table)


EDGE, LINES, BOX, SPECKS = (
    "edge along the border",
    r"\d lines? across the picture",
    "round the digit",
    "specks? or marks?",
)
CLUTTER = {  # what is done to the page, and what must be said of it
    "thin frame": (lambda digit: framed(on_paper(digit), 1), EDGE),
    "frame": (lambda digit: framed(on_paper(digit), 10), EDGE),
    "two sides of a frame": (lambda digit: framed(on_paper(digit), 3, sides="tl"), EDGE),
    "frame that touches the digit": (lambda digit: framed(on_paper(digit, 110, 112 - 2), 9), EDGE),
    "black frame round a pencil's digit": (lambda digit: framed(on_paper(digit, ink=190), 4), EDGE),
    "scanner's edge": (lambda digit: framed(on_paper(digit), 9, 20, "l"), f"{EDGE}|{SPECKS}"),
    "scanner's thick edge": (lambda digit: framed(on_paper(digit), 30, 20, "r"), f"{EDGE}|{SPECKS}"),
    "ruled": (lambda digit: ruled(on_paper(digit), 36), LINES),
    "ruled as dark as the digit": (lambda digit: ruled(on_paper(digit), 36, 30, 3), LINES),
    "one line": (lambda digit: with_shape(on_paper(digit), "line", (0, 110, 199, 113), fill=120, width=2), LINES),
    "squared": (lambda digit: ruled(ruled(on_paper(digit), 25).T, 25).T, LINES),
    "ruled and scanned askew": (lambda digit: turned(framed(ruled(on_paper(digit), 36), 9, 20, "l"), 3), LINES),
    "specks": (lambda digit: specked(on_paper(digit), 25, 3), SPECKS),
    "many specks": (lambda digit: specked(on_paper(digit), 200, 1), None),
    "blots": (lambda digit: specked(on_paper(digit), 5, 8), SPECKS),
    "box": (lambda digit: with_shape(on_paper(digit), "rectangle", (24, 24, 175, 175), outline=40, width=3), BOX),
    "box that touches the digit": (
        lambda digit: with_shape(on_paper(digit), "rectangle", (60, 56, 140, 144), outline=40, width=3),
        BOX,
    ),
    "tilted box": (
        lambda digit: turned(with_shape(on_paper(digit), "rectangle", (24, 24, 175, 175), outline=40, width=3), 6),
        BOX,
    ),
    "ring": (lambda digit: with_shape(on_paper(digit), "ellipse", (20, 20, 179, 179), outline=40, width=4), BOX),
    "shadow": (lambda digit: shadowed(on_paper(digit), 0.5, 0.1), None),
    "gradient": (lambda digit: shadowed(on_paper(digit), 0.5, 1.2), None),
    "sheet on a table": (lambda digit: on_a_table(on_paper(digit), 4), BOX),
    "text": (lambda digit: with_shape(on_paper(digit), "text", (5, 4), "Name: Miller", fill=30), SPECKS),
    "nothing": (lambda digit: on_paper(digit), None),
}


@pytest.mark.parametrize(("kind", "inverted"), [("png", False), ("jpg", True)], ids=["png", "inverted-jpg"])
@pytest.mark.parametrize("clutter", CLUTTER)
def test_the_digit_is_told_from_what_else_is_in_the_picture(digits, network, tmp_path, clutter, kind, inverted):
    change, said = CLUTTER[clutter]
    found = []
    for digit in digits[:6]:
        page = change(digit).clip(0, 255).astype(np.uint8)
        path = tmp_path / f"digit.{kind}"
        Image.fromarray(255 - page if inverted else page).save(path)
        found.append(read_digit(path))
        if said:
            assert re.search(said, ", ".join(found[-1].left_out))
        elif clutter == "nothing":
            assert found[-1].left_out == ()
    right = network(torch.stack([digit.pixels for digit in found])) == network(digits[:6])
    assert right.sum() >= 5


def test_pieces_of_a_digit_stay(tmp_path):
    """A 5 whose bar is apart, with and without ruled lines."""
    picture = Image.new("L", (200, 200), 255)
    draw = ImageDraw.Draw(picture)
    draw.line([(80, 50), (80, 95), (110, 90), (130, 110), (125, 140), (75, 150)], fill=0, width=10, joint="curve")
    alone = read(picture, tmp_path / "body.png")
    draw.line([(94, 45), (135, 42)], fill=0, width=10)
    picture.save(tmp_path / "five.png")
    whole = read_digit(tmp_path / "five.png")
    assert whole.left_out == ()
    assert (whole.pixels.int() - alone.int()).abs().float().mean() > 5
    page = Image.fromarray(ruled(np.asarray(picture, float), 40).astype(np.uint8))
    page.save(tmp_path / "ruled.png")
    assert (read_digit(tmp_path / "ruled.png").pixels.int() - whole.pixels.int()).abs().float().mean() < 6


def test_a_line_alone_is_a_one(network, tmp_path):
    picture = Image.new("L", (200, 200), 255)
    ImageDraw.Draw(picture).line([(104, 0), (96, 199)], fill=0, width=14)
    for kind in ("png", "jpg"):
        assert network(read(picture, tmp_path / f"one.{kind}")[None]) == 1


def test_two_digits_are_said(digits, tmp_path):
    pages = [on_paper(digit)[:, 40:160] for digit in digits[:2]]
    Image.fromarray(np.hstack(pages).astype(np.uint8)).save(tmp_path / "two.png")
    assert read_digit(tmp_path / "two.png").left_out == ("1 mark as large as a digit beside it",)


def test_digits_cropped_to_their_ink_are_read(digits, network, tmp_path):
    """Where strokes run along the border, and there is little paper."""
    found = []
    for digit in digits:
        rows, columns = (np.flatnonzero(digit.numpy().max(axis) > 50) for axis in (1, 0))
        cropped = Image.fromarray(digit.numpy()[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
        large = cropped.resize((8 * cropped.width, 8 * cropped.height), Image.Resampling.BICUBIC)
        found.append(read(large.point(lambda value: 255 - value), tmp_path / "digit.png"))
    assert (network(torch.stack(found)) != network(digits)).sum() <= 1  # of 15


# --- Refusing ---------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_refused_by_name(digits, tmp_path):
    path = tmp_path / "picture.png"
    sound = tmp_path / "sound.png"
    dark_on_light(digits[0]).save(sound)
    for content, message in (
        (b"", "expected a PNG or JPEG picture, found something else"),
        (b"a seven", "expected a PNG or JPEG picture, found something else"),
        (b"GIF89a" + bytes(100), "expected a PNG or JPEG picture, found something else"),
        (sound.read_bytes()[:3000], "the picture is damaged"),
        (b"\xff\xd8\xff\xe0 and no more", "PNG or JPEG|damaged"),
        (png_header(28, 28), "the picture is damaged"),
        (png_header(60_000, 60_000), "expected at most 50,000,000 pixels, found more"),  # Pillow's own limit
        (png_header(10_000, 10_000), "expected at most 50,000,000 pixels, found more"),  # Pillow only warns
        (png_header(8_000, 8_000), "expected at most 50,000,000 pixels, found more"),
    ):
        path.write_bytes(content)
        with pytest.raises(ImageError, match=message) as error:
            read_digit(path)
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("L", (300, 200), 255),
        Image.new("RGB", (300, 200), "navy"),
        Image.new("RGBA", (300, 200), (0, 0, 0, 0)),
        Image.new("L", (1, 1), 0),
        Image.new("L", (2, 5), 9),
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 100), np.uint8)),
        Image.fromarray((240 + np.random.default_rng(0).normal(0, 3, (100, 100))).astype(np.uint8)),
    ],
    ids=["white", "navy", "transparent", "one-pixel", "tiny", "noise", "paper"],
)
def test_a_blank_picture_is_refused(tmp_path, picture):
    with pytest.raises(ImageError, match=r"blank\.png: no digit to be seen"):
        read(picture, tmp_path / "blank.png")


@pytest.mark.parametrize("shape", [(1, 1), (1, 60), (60, 1), (2, 2), (3, 999), (999, 3), (8, 8), (200, 205)])
def test_pictures_of_any_shape_and_content(shape):
    """Noise, stripes, checkers, blots: an answer or none, never an exception."""
    random, place = np.random.default_rng(0), np.indices(shape)
    for ink in (random.random(shape) < 0.02, random.random(shape) < 0.5, place.sum(0) % 2 == 0, place[0] % 4 < 2):
        digit = find_digit(np.where(ink, 0, 255).astype(np.uint8)[..., None].repeat(3, 2))
        assert digit is None or (digit.ink.size and 0 < digit.ink.max() <= 1)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path, tmp_path / "pipe.png"):
        with pytest.raises(ImageError, match=f"{path}: expected a picture, found no regular file"):
            read_digit(path)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        read_digit(tmp_path / "none.png")


def test_missing_pillow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    for call in (read_digit, images.check_replaceable):
        with pytest.raises(ImportError, match=r"pip install lenet-fast\[plot\]"):
            call(tmp_path / "picture.png")


# --- Answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.MODELS)
def test_the_loss_is_the_negative_logarithm_of_the_probability(name):
    model = models.MODELS[name]()
    outputs = 4 * torch.rand(5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares = inference.probabilities(model, outputs)
    for row in range(5):
        for label in range(10):
            loss = criterion(model)(outputs[row : row + 1], torch.tensor([label]))
            torch.testing.assert_close(shares[row, label], torch.exp(-loss))
    assert torch.equal(shares.argmax(1), classify(model, outputs))
    assert (shares.sum(1) < 0.99).all() == models.measures_distance(model) == (name == "lenet5-1998")


def test_probabilities_of_far_outputs_are_finite():
    for name in ("lenet5", "lenet5-1998"):
        shares = inference.probabilities(
            models.MODELS[name](), torch.linspace(900, 5000, 10, dtype=torch.float64)[None]
        )
        assert shares.isfinite().all()
        assert shares.sum() <= 1


def test_outputs_are_the_models_in_evaluation_mode_whatever_the_batch(digits):
    model = models.lenet1().double()
    model.train()
    expected = model(model.input_spec.prepare(digits, torch.float64))
    found = inference.outputs(model, model.input_spec, digits, batch_size=7)
    torch.testing.assert_close(found, expected.detach())
    assert model.training


# --- Our own pictures -------------------------------------------------------------------------------


def test_the_picture_shows_what_the_network_saw(digits, tmp_path):
    thumbnail = Image.new("RGB", (50, 80), "red")
    drawn = [DrawnDigit(f"{'a very long name ' * 9}.png", digit, thumbnail) for digit in digits[:5]]
    spec = models.lenet5_1998().input_spec
    sheet = np.asarray(images.seen_picture(drawn, spec, ["7"] * 5).convert("L"))
    top, left = 12 + 2 * 16, 12 + 140 + 4  # of the first input: 32 x 32 pixels in 140 x 140
    padded = torch.nn.functional.pad(digits[0], (2, 2, 2, 2)).numpy()
    seen = np.asarray(Image.fromarray(sheet[top : top + 140, left : left + 140]).resize((32, 32), 0))
    assert np.abs(seen.astype(int) - padded).max() <= 1
    many = images.seen_picture(drawn * 30, spec, ["7"] * 150)
    assert many.size == images.seen_picture(drawn * 20, spec, ["7"] * 100).size


def test_only_pictures_of_our_own_are_replaced(tmp_path):
    picture = Image.new("RGB", (3, 3), "red")
    images.save_png(picture, tmp_path / "own.png")
    images.save_png(Image.new("RGB", (3, 3), "blue"), tmp_path / "own.png")
    assert Image.open(tmp_path / "own.png").getpixel((0, 0)) == (0, 0, 255)
    picture.save(tmp_path / "foreign.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("nowhere")
    for name in ("foreign.png", "text.png", "folder.png", "link.png"):
        with pytest.raises(FileExistsError, match=f"{name}: exists and is no picture that lenet-fast wrote"):
            images.save_png(picture, tmp_path / name)
    assert (tmp_path / "text.png").read_text() == "no picture"
    assert {path.name for path in tmp_path.iterdir()} == {
        "own.png",
        "foreign.png",
        "text.png",
        "folder.png",
        "link.png",
    }
