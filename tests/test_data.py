"""lenet_fast.data: the embedded digits, every way a file can be wrong, the search order, downloading."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import re
import runpy
import sys
import threading
import tracemalloc
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from lenet_fast import data

ROOT = Path(__file__).resolve().parent.parent
ORIGINALS = os.environ.get("LENET_FAST_DATA")  # before `isolated` hides it
OWN_DATA = "ignore:.*own data, not the published"


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def make_contents(seed: int, train: int = 12, test: int = 7) -> dict[str, bytes]:
    """A small data set: the uncompressed contents of each of the four files."""
    generator = np.random.default_rng(seed)
    contents = {}
    for split, count in (("train", train), ("t10k", test)):
        contents[f"{split}-images-idx3-ubyte"] = idx(generator.integers(0, 256, (count, 28, 28)))
        contents[f"{split}-labels-idx1-ubyte"] = idx(generator.integers(0, 10, count))
    return contents


def write(folder: Path, contents: dict[str, bytes], compress: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, raw in contents.items():
        (folder / (f"{file}.gz" if compress else file)).write_bytes(gzip.compress(raw) if compress else raw)
    return folder


def md5(raw: bytes) -> str:
    return hashlib.md5(raw, usedforsecurity=False).hexdigest()


def assert_holds(dataset: data.Dataset, contents: dict[str, bytes]) -> None:
    for split, prefix in ((dataset.train, "train"), (dataset.test, "t10k")):
        images, labels = contents[f"{prefix}-images-idx3-ubyte"], contents[f"{prefix}-labels-idx1-ubyte"]
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert split.images.shape == (len(labels) - 8, 28, 28)
        assert split.images.numpy().tobytes() == images[16:]
        assert split.labels.tolist() == list(labels[8:])


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees this machine's data, cache or network."""
    monkeypatch.delenv("LENET_FAST_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(data, "MIRRORS", {"mnist": (), "fashion-mnist": ()})


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, bytes]]:
    """Two small data sets that stand in for the published ones: contents per data set and file."""
    sets = {"mnist": make_contents(1), "fashion-mnist": make_contents(2)}
    monkeypatch.setattr(data, "MD5_CONTENTS", {n: {f: md5(raw) for f, raw in c.items()} for n, c in sets.items()})
    monkeypatch.setattr(
        data,
        "MD5_GZ",
        {n: {f: md5(gzip.compress(raw, mtime=0)) for f, raw in c.items()} for n, c in sets.items()},
    )
    return sets


def cache(tmp_path: Path, name: str) -> Path:
    return tmp_path / "xdg" / "lenet_fast" / name


# ---- The embedded digits


def test_embedded_is_the_default_and_complete() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns about arrays that are not writable
        digits = data.load()
    assert digits.name == "mnist-10k" == data.DATASETS[0]
    assert digits.source == "embedded in the package"
    assert digits.classes == tuple("0123456789")
    assert digits.train.images.shape == digits.test.images.shape == (10000, 28, 28)
    assert digits.train.images.dtype == digits.test.images.dtype == torch.uint8
    assert digits.train.labels.dtype == digits.test.labels.dtype == torch.int64
    assert digits.train.labels.bincount().tolist() == [1000] * 10
    assert digits.test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_embedded_test_set_is_the_official_one() -> None:
    digits = data.load()
    assert md5(idx(digits.test.images.numpy())) == "2646ac647ad5339dbf082846283269ea"
    assert md5(idx(digits.test.labels.numpy())) == "27ae3e4e09519cfbb04c329615203637"


def test_embedded_training_set_is_unchanged() -> None:
    digits = data.load()
    assert md5(idx(digits.train.images.numpy())) == "d2442bc08bd5ff7a07250f72c4d51549"
    assert md5(idx(digits.train.labels.numpy())) == "2367398df9813ee76715953f5039d74b"


def test_embedded_has_licence_and_attribution() -> None:
    text = (ROOT / "lenet_fast" / "assets" / "LICENSE-mnist-10k.md").read_text()
    for words in ("LeCun", "Cortes", "Burges", "Attribution-Share Alike 3.0", "by-sa/3.0", "Changes made"):
        assert words in text


def test_embedded_takes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data_dir.*mnist-10k is embedded"):
        data.load("mnist-10k", tmp_path)


@pytest.fixture
def originals() -> Path:
    if not ORIGINALS:
        pytest.skip("LENET_FAST_DATA does not name a folder with the original MNIST files")
    if not data._find_user_files("LENET_FAST_DATA", ORIGINALS, "mnist"):
        pytest.skip(f"LENET_FAST_DATA={ORIGINALS} does not hold mnist")
    return Path(ORIGINALS)


@pytest.fixture
def make_embedded_digits(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Path], None]:
    def run(folder: Path, output: Path) -> None:
        script = str(ROOT / "scripts" / "make_embedded_digits.py")
        monkeypatch.setattr(sys, "argv", [script, str(folder), str(output)])
        runpy.run_path(script, run_name="__main__")

    return run


def test_script_reproduces_the_embedded_files(originals: Path, tmp_path: Path, make_embedded_digits) -> None:
    make_embedded_digits(originals, tmp_path / "made")
    for file in data.FILES:
        made = (tmp_path / "made" / f"{file}.gz").read_bytes()
        kept = (ROOT / "lenet_fast" / "assets" / "mnist-10k" / f"{file}.gz").read_bytes()
        assert gzip.decompress(made) == gzip.decompress(kept)
        if "ng" not in zlib.ZLIB_RUNTIME_VERSION:  # zlib-ng compresses the same contents to another stream
            assert made == kept


def test_embedded_training_digits_are_the_first_1000_of_each_class(originals: Path) -> None:
    mnist, digits = data.load("mnist", originals), data.load()
    assert str(originals) in mnist.source
    assert "own data" not in mnist.source
    seen, chosen = [0] * 10, []
    for i, label in enumerate(mnist.train.labels.tolist()):
        seen[label] += 1
        if seen[label] <= 1000:
            chosen.append(i)
    assert torch.equal(digits.train.images, mnist.train.images[chosen])
    assert torch.equal(digits.train.labels, mnist.train.labels[chosen])
    assert torch.equal(digits.test.images, mnist.test.images)


def test_script_refuses_other_digits(tmp_path: Path, make_embedded_digits) -> None:
    with pytest.raises(UserWarning, match="not the published mnist"):
        make_embedded_digits(write(tmp_path / "own", make_contents(3)), tmp_path / "made")
    assert not (tmp_path / "made").exists()


# ---- read_idx


@pytest.mark.parametrize("shape", [(5,), (2, 3), (4, 28, 28), (2, 3, 4, 5)])
@pytest.mark.parametrize("compress", [False, True])
def test_read_idx_by_contents_not_by_name(tmp_path: Path, shape: tuple[int, ...], compress: bool) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    path = tmp_path / ("no-suffix" if compress else "misleading.gz")
    path.write_bytes(gzip.compress(idx(array)) if compress else idx(array))
    read = data.read_idx(str(path))
    assert read.dtype == np.uint8
    assert read.flags.writeable
    np.testing.assert_array_equal(read, array)


def test_read_idx_of_several_gzip_members(tmp_path: Path) -> None:
    array = np.arange(200, dtype=np.uint8)
    raw = idx(array)
    (tmp_path / "f").write_bytes(gzip.compress(raw[:50]) + gzip.compress(raw[50:]))
    np.testing.assert_array_equal(data.read_idx(tmp_path / "f"), array)


def test_read_idx_of_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        data.read_idx(tmp_path / "absent")
    with pytest.raises(data.DataError, match="no regular file"):
        data.read_idx(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # which must not make it wait
    with pytest.raises(data.DataError, match=r"pipe: expected an IDX file, found no regular file"):
        data.read_idx(tmp_path / "pipe")


IMAGES = idx(np.arange(3 * 28 * 28).reshape(3, 28, 28) % 256)


def header(*dims: int, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, len(dims)]) + np.array(dims, ">u4").tobytes()


# contents -> what the message must say of them
BAD_CONTENTS = {
    "a web page": (b"<!DOCTYPE html><html>404</html>", r"expected an IDX magic number.*found 0x3c21444f"),
    "wrong magic": (b"\x08\x03" + IMAGES[2:], r"expected an IDX magic number.*found 0x08030803"),
    "little endian": (IMAGES[3::-1] + IMAGES[4:], r"expected an IDX magic number.*found 0x03080000"),
    "floats": (header(3, 28, 28, kind=0x0D) + bytes(4 * 3 * 784), r"unsigned bytes.*found 0x00000d03"),
    "no dimensions": (header(), r"0x00000801 to 0x00000804; found 0x00000800"),
    "255 dimensions": (b"\0\0\x08\xff" + bytes(4 * 255), r"0x00000801 to 0x00000804; found 0x000008ff"),
    "three bytes": (IMAGES[:3], r"expected an IDX magic number.*found 0x000008"),
    "cut in the header": (IMAGES[:13], r"expected a header of 16 bytes, found 13"),
    "header only": (IMAGES[:16], r"expected 2352 bytes of data \(3 x 28 x 28\), found .*truncated"),
    "one byte short": (IMAGES[:-1], r"expected 2352 bytes of data \(3 x 28 x 28\), found .*truncated"),
    "one byte long": (IMAGES + b"\0", r"expected 2352 bytes of data \(3 x 28 x 28\), found more"),
    "no images": (header(0, 28, 28), r"expected 1 to \d+ bytes.*0 bytes of data \(0 x 28 x 28\)"),
    "0 x absurd": (header(0, 2**32 - 1, 2**32 - 1), r"expected 1 to \d+ bytes.*found a header for 0 bytes"),
    "absurd": (
        header(2**32 - 1, 2**32 - 1, 2**32 - 1) + bytes(784),
        r"expected 1 to 1073741824 bytes of data",
    ),
    "wraps to 0 in 64 bits": (
        header(2**31, 2**31, 4) + bytes(784),
        r"expected 1 to 1073741824 bytes of data",
    ),
    "large": (
        header(1_300_000, 28, 28) + bytes(784),
        r"expected 1019200000 bytes of data.*found a file too small",
    ),
}


@pytest.mark.parametrize("compress", [False, True], ids=["raw", "gz"])
@pytest.mark.parametrize("case", BAD_CONTENTS)
def test_read_idx_refuses(tmp_path: Path, case: str, compress: bool) -> None:
    raw, message = BAD_CONTENTS[case]
    path = tmp_path / "some-file"
    path.write_bytes(gzip.compress(raw) if compress else raw)
    tracemalloc.start()
    try:
        with pytest.raises(data.DataError, match=message) as error:
            data.read_idx(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(error.value).startswith(f"{path}: expected ")
    assert isinstance(error.value, ValueError)
    assert peak < 4 << 20  # above all, not what the header asked for


def test_read_idx_refuses_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "some-file").touch()
    with pytest.raises(data.DataError, match=r"some-file: expected an IDX file, found an empty file"):
        data.read_idx(tmp_path / "some-file")
    (tmp_path / "some-file").write_bytes(gzip.compress(b""))
    with pytest.raises(data.DataError, match=r"some-file: expected an IDX magic number.*found nothing"):
        data.read_idx(tmp_path / "some-file")


def test_read_idx_stops_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = bytes(32 << 20)
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(header(1, 28, 28) + zeros, 1))  # says less than it holds
    tracemalloc.start()
    try:
        with pytest.raises(data.DataError, match=r"expected 784 bytes of data.*found more"):
            data.read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    monkeypatch.setattr(data, "MAX_IDX_BYTES", 16 << 20)
    path.write_bytes(gzip.compress(header(32, 1024, 1024) + zeros, 1))  # is honest, and too large
    with pytest.raises(data.DataError, match=r"expected 1 to 16777216 bytes.*found a header for 33554432"):
        data.read_idx(path)


def test_read_idx_refuses_every_truncation(tmp_path: Path) -> None:
    raw = idx(np.random.default_rng(0).integers(0, 256, 60))
    for whole in (raw, gzip.compress(raw)):
        for length in range(len(whole)):
            (tmp_path / "f").write_bytes(whole[:length])
            with pytest.raises(data.DataError):
                data.read_idx(tmp_path / "f")


def test_read_idx_survives_every_flipped_bit_of_a_gzip_file(tmp_path: Path) -> None:
    array = (np.random.default_rng(0).integers(0, 256, 60) // 32).astype(np.uint8)
    whole = gzip.compress(idx(array), mtime=0)
    refused = 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "f").write_bytes(damaged)
        try:
            np.testing.assert_array_equal(data.read_idx(tmp_path / "f"), array)  # time, system, flags: no data
        except data.DataError:
            refused += 1
    assert refused >= 8 * (len(whole) - 10)  # all but, at most, those of the gzip header


# ---- Folders that a user names


@pytest.mark.parametrize("compress", [False, True], ids=["raw", "gz"])
@pytest.mark.parametrize("spelling", ["-idx", ".idx"])
@pytest.mark.parametrize("subfolder", ["", "fashion-mnist"])
def test_data_dir_layouts(
    tmp_path: Path,
    published: dict,
    compress: bool,
    spelling: str,
    subfolder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contents = published["fashion-mnist"]
    renamed = {file.replace("-idx", spelling): raw for file, raw in contents.items()}
    write(tmp_path / "d" / subfolder, renamed, compress)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = data.load("fashion-mnist", str(tmp_path / "d"))
        monkeypatch.setenv("LENET_FAST_DATA", str(tmp_path / "d"))
        named = data.load("fashion-mnist")
    for dataset in (given, named):
        assert_holds(dataset, contents)
        assert dataset.name == "fashion-mnist"
        assert dataset.source == str(tmp_path / "d" / subfolder)
        assert dataset.classes[0] == "T-shirt/top"
        assert len(dataset.classes) == 10


def test_data_dir_in_the_home_folder(tmp_path: Path, published: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "digits", published["mnist"])
    assert_holds(data.load("mnist", "~/digits"), published["mnist"])


def test_mixed_spellings_and_a_folder_of_a_files_name(tmp_path: Path, published: dict) -> None:
    folder = write(tmp_path, published["mnist"])
    (folder / data.FILES[0]).rename(folder / "train-images.idx3-ubyte")
    (folder / data.FILES[0]).mkdir()  # as one archive in circulation unpacks
    assert_holds(data.load("mnist", folder), published["mnist"])


TORCHVISION = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}


@pytest.mark.parametrize("kept", ["raw", "gz", "both"])
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_folders(
    tmp_path: Path, published: dict, name: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other, folder in TORCHVISION.items():
        for compress in (False, True):
            if kept in ("both", "gz" if compress else "raw"):
                write(tmp_path / folder, published[other], compress)
    monkeypatch.setenv("LENET_FAST_DATA", str(tmp_path))
    folder = tmp_path / TORCHVISION[name]
    for data_dir in (None, tmp_path, folder.parent, folder):
        dataset = data.load(name, data_dir)
        assert_holds(dataset, published[name])
        assert dataset.source == str(folder)


@pytest.mark.parametrize("compress", [False, True], ids=["raw", "gz"])
@pytest.mark.parametrize("spelling", ["-idx", ".idx"])
@pytest.mark.parametrize("outer", ["-idx", ".idx"])
def test_a_folder_for_every_file(
    tmp_path: Path, published: dict, outer: str, spelling: str, compress: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file, raw in published["mnist"].items():
        folder = tmp_path / "d" / file.replace("-idx", outer)
        write(folder, {file.replace("-idx", spelling): raw}, compress)
    monkeypatch.setenv("LENET_FAST_DATA", str(tmp_path / "d"))
    for dataset in (data.load("mnist"), data.load("mnist", tmp_path / "d")):
        assert_holds(dataset, published["mnist"])
        assert dataset.source == str(tmp_path / "d")


def test_several_sets_of_files_are_ambiguous(tmp_path: Path, published: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "MNIST" / "raw", published["mnist"])
    named = write(tmp_path / "mnist", dict(list(published["mnist"].items())[:2]))
    monkeypatch.setenv("LENET_FAST_DATA", str(tmp_path))
    for origin, data_dir in (("data_dir", tmp_path), (r"\$LENET_FAST_DATA", None)):
        with pytest.raises(data.DataError, match=f"{origin}: .*found 2 in {named} and 4 in .*/MNIST/raw; name one"):
            data.load("mnist", data_dir)
    write(tmp_path, published["fashion-mnist"])
    write(tmp_path / "raw", published["fashion-mnist"])
    with pytest.raises(data.DataError, match=f"found 4 in {tmp_path} and 4 in {tmp_path / 'raw'}; name one"):
        data.load("fashion-mnist", tmp_path)


def test_one_folder_by_two_names_is_not_ambiguous(tmp_path: Path, published: dict) -> None:
    write(tmp_path / "MNIST" / "raw", published["mnist"])
    (tmp_path / "mnist").symlink_to("MNIST/raw")
    assert_holds(data.load("mnist", tmp_path), published["mnist"])


def test_the_named_subfolder_counts_before_the_folder(tmp_path: Path, published: dict) -> None:
    write(tmp_path, published["mnist"])
    write(tmp_path / "FashionMNIST" / "raw", published["fashion-mnist"])
    assert_holds(data.load("mnist", tmp_path), published["mnist"])
    assert_holds(data.load("fashion-mnist", tmp_path), published["fashion-mnist"])


def test_a_partial_torchvision_folder(tmp_path: Path, published: dict) -> None:
    folder = write(tmp_path / "MNIST" / "raw", published["mnist"])
    (folder / data.FILES[3]).unlink()
    with pytest.raises(data.DataError, match=rf"^data_dir: expected .* in {folder}, found no {data.FILES[3]}$"):
        data.load("mnist", tmp_path)


@pytest.mark.filterwarnings(OWN_DATA)
def test_a_file_twice_with_other_contents(tmp_path: Path, published: dict) -> None:
    write(tmp_path, published["mnist"])
    write(tmp_path, make_contents(3), compress=True)
    assert_holds(data.load("mnist", tmp_path), published["mnist"])  # the published ones are known
    own = write(tmp_path / "own", make_contents(4))
    write(own, make_contents(4), compress=True)
    assert_holds(data.load("mnist", own), make_contents(4))
    write(own, make_contents(5), compress=True)
    with pytest.raises(data.DataError, match=rf"{data.FILES[0]} once in {own}, found .*\.gz with other contents"):
        data.load("mnist", own)


def test_data_dir_never_falls_through(tmp_path: Path, published: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    write(cache(tmp_path, "mnist"), published["mnist"])
    monkeypatch.setenv("LENET_FAST_DATA", str(write(tmp_path / "env", published["mnist"])))
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.DataError, match=r"data_dir.*train-images-idx3-ubyte.*t10k-labels.*empty.*found none"):
        data.load("mnist", tmp_path / "empty")
    with pytest.raises(data.DataError, match=r"data_dir: expected a folder, found nothing at .*absent"):
        data.load("mnist", tmp_path / "absent")
    with pytest.raises(data.DataError, match=r"data_dir: expected a folder, found a file at "):
        data.load("mnist", tmp_path / "env" / data.FILES[0])


@pytest.mark.parametrize("missing", data.FILES)
def test_incomplete_folder(tmp_path: Path, published: dict, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "d", published["mnist"])
    (folder / missing).unlink()
    with pytest.raises(data.DataError, match=rf"^data_dir: expected .* in {folder}, found no {missing}$"):
        data.load("mnist", folder)
    monkeypatch.setenv("LENET_FAST_DATA", str(folder))
    with pytest.raises(data.DataError, match=rf"^\$LENET_FAST_DATA: expected .* in {folder}, found no {missing}$"):
        data.load("mnist")


def test_own_data_is_taken_and_said(tmp_path: Path, published: dict) -> None:
    own = published["mnist"] | {"train-labels-idx1-ubyte": idx(np.arange(12) % 10)}
    write(tmp_path, own, compress=True)
    with pytest.warns(UserWarning, match=r"not the published mnist: train-labels-idx1-ubyte.gz\)$") as caught:
        dataset = data.load("mnist", tmp_path)
    assert caught[0].filename == __file__
    assert_holds(dataset, own)
    assert dataset.source == f"{tmp_path} (own data, not the published mnist: train-labels-idx1-ubyte.gz)"


def test_files_of_the_other_data_set(tmp_path: Path, published: dict) -> None:
    write(tmp_path, published["fashion-mnist"])
    with pytest.raises(data.DataError, match="expected mnist, found the published file of fashion-mnist"):
        data.load("mnist", tmp_path)


# the file replaced, its contents -> what the message must say
MISFITS = {
    "a label too few": ("train-labels-idx1-ubyte", idx(np.arange(11) % 10), "for each .*, 12; found 11"),
    "labels of the other split": (
        "t10k-labels-idx1-ubyte",
        idx(np.arange(12) % 10),
        "for each .*, 7; found 12",
    ),
    "label 10": (
        "train-labels-idx1-ubyte",
        idx(np.arange(12) % 11),
        "labels from 0 to 9, found 10 at index 10",
    ),
    "images as labels": (
        "train-labels-idx1-ubyte",
        idx(np.zeros((12, 28, 28))),
        r"\(N,\); found \(12, 28, 28\)",
    ),
    "labels as images": ("train-images-idx3-ubyte", idx(np.arange(12) % 10), r"\(N, 28, 28\); found \(12,\)"),
    "32 x 32": ("t10k-images-idx3-ubyte", idx(np.zeros((7, 32, 32))), r"\(N, 28, 28\); found \(7, 32, 32\)"),
    "flat": ("t10k-images-idx3-ubyte", idx(np.zeros((7, 784))), r"\(N, 28, 28\); found \(7, 784\)"),
    "a web page": ("t10k-images-idx3-ubyte", b"<html>", "an IDX magic number"),
    "empty": ("t10k-labels-idx1-ubyte", b"", "found an empty file"),
}


@pytest.mark.filterwarnings(OWN_DATA)
@pytest.mark.parametrize("case", MISFITS)
def test_load_refuses_files_that_do_not_fit(tmp_path: Path, case: str) -> None:
    file, raw, message = MISFITS[case]
    write(tmp_path, make_contents(3) | {file: raw})
    with pytest.raises(data.DataError, match=f"^{tmp_path / file}: expected.*{message}") as error:
        data.load("mnist", tmp_path)
    if "for each" in message:
        assert str(tmp_path / file.replace("labels-idx1", "images-idx3")) in str(error.value)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="name: expected one of mnist-10k, mnist, fashion-mnist; got 'MNIST'"):
        data.load("MNIST")


# ---- Search order


@pytest.mark.filterwarnings(OWN_DATA)
def test_search_order(tmp_path: Path, published: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = published["fashion-mnist"]
    own = {"given": make_contents(11), "env": make_contents(12)}
    folders = {
        "given": write(tmp_path / "given", own["given"]),
        "env": write(tmp_path / "env", own["env"]),
        "cache": write(cache(tmp_path, "fashion-mnist"), contents),
        "debian": write(tmp_path / "debian", contents, compress=True),
    }
    monkeypatch.setenv("LENET_FAST_DATA", str(folders["env"]))
    assert_holds(data.load("fashion-mnist", folders["given"]), own["given"])
    assert_holds(data.load("fashion-mnist"), own["env"])
    monkeypatch.setenv("LENET_FAST_DATA", "")
    assert data.load("fashion-mnist").source == str(folders["cache"])
    (folders["cache"] / data.FILES[2]).unlink()  # as an interrupted download leaves it
    assert data.load("fashion-mnist").source == str(folders["debian"])
    assert_holds(data.load("fashion-mnist"), contents)
    with pytest.raises(data.DataError, match=r"mnist: found no full set of files.*download=False"):
        data.load("mnist", download=False)  # Debian's folder has Fashion-MNIST only


def test_environment_folder_without_this_data_set_is_passed_over(
    tmp_path: Path, published: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "env" / "mnist", published["mnist"])
    write(tmp_path / "debian", published["fashion-mnist"])
    monkeypatch.setenv("LENET_FAST_DATA", str(tmp_path / "env"))
    assert data.load("mnist").source == str(tmp_path / "env" / "mnist")
    assert data.load("fashion-mnist").source == str(tmp_path / "debian")
    monkeypatch.setenv("LENET_FAST_DATA", str(tmp_path / "mistyped"))
    with pytest.raises(data.DataError, match=r"\$LENET_FAST_DATA: expected a folder, found nothing at .*mistyped"):
        data.load("fashion-mnist")


def test_cache_folder_default(tmp_path: Path, published: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = write(tmp_path / "home" / ".cache" / "lenet_fast" / "mnist", published["mnist"])
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert data.load("mnist", download=False).source == str(folder)


@pytest.mark.parametrize("place", ["cache", "debian"])
def test_only_published_contents_in_cache_and_debian_folder(tmp_path: Path, published: dict, place: str) -> None:
    folder = cache(tmp_path, "fashion-mnist") if place == "cache" else tmp_path / "debian"
    contents = dict(published["fashion-mnist"])
    contents["train-images-idx3-ubyte"] = contents["train-images-idx3-ubyte"][:-1] + b"\x55"  # structure is sound
    write(folder, contents)
    path = folder / "train-images-idx3-ubyte"
    with pytest.raises(data.DataError, match=rf"{path}: expected the published contents, MD5 \w+; found MD5 \w+"):
        data.load("fashion-mnist")


# ---- Downloading

Answer = Callable[[BaseHTTPRequestHandler], None]


def send(body: bytes, status: int = 200, length: int | str | None = None) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body) if length is None else length))
        request.end_headers()
        request.wfile.write(body)

    return answer


class Mirror:
    """An HTTP server on loopback; `answers` maps a path to what to do, `requests` lists those asked for."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: list[str] = []
        self.closing = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                self.requests.append(handler.path)
                with contextlib.suppress(ConnectionError):  # the client had enough
                    self.answers.get(handler.path, send(b"no such file", 404))(handler)

            def log_message(handler, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def url(self, folder: str) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/{folder}/"

    def offer(self, folder: str, contents: dict[str, bytes]) -> None:
        for file, raw in contents.items():
            self.answers[f"/{folder}/{file}.gz"] = send(gzip.compress(raw, mtime=0))

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """The server, as two mirrors of mnist: /first/ and /second/."""
    server = Mirror()
    monkeypatch.setattr(data, "MIRRORS", {"mnist": (server.url("first"), server.url("second"))})
    yield server
    server.close()


def test_download_fills_the_cache_once(tmp_path: Path, published: dict, mirror: Mirror, capfd) -> None:
    mirror.offer("first", published["mnist"])
    dataset = data.load("mnist")
    assert_holds(dataset, published["mnist"])
    assert dataset.source == str(cache(tmp_path, "mnist"))
    assert sorted(p.name for p in cache(tmp_path, "mnist").iterdir()) == sorted(f"{f}.gz" for f in data.FILES)
    assert len(mirror.requests) == 4
    out, err = capfd.readouterr()
    assert "train-images-idx3-ubyte" in err
    assert out == ""
    assert_holds(data.load("mnist", download=False), published["mnist"])
    assert len(mirror.requests) == 4


def test_download_completes_an_interrupted_one(tmp_path: Path, published: dict, mirror: Mirror) -> None:
    folder = cache(tmp_path, "mnist")
    write(folder, {f: published["mnist"][f] for f in data.FILES[:2]}, compress=True)
    (folder / f"{data.FILES[2]}.gz.0123abcd.part").write_bytes(b"what a killed process left")
    mirror.offer("first", published["mnist"])
    assert_holds(data.load("mnist"), published["mnist"])
    assert mirror.requests == [f"/first/{f}.gz" for f in data.FILES[2:]]


def test_download_false_asks_nobody(tmp_path: Path, published: dict, mirror: Mirror) -> None:
    mirror.offer("first", published["mnist"])
    with pytest.raises(data.DataError, match=r"mnist: found no full set.*not set.*xdg.*download=False.*--data-dir"):
        data.load("mnist", download=False)
    assert mirror.requests == []
    assert not cache(tmp_path, "mnist").exists()


def hang(mirror: Mirror) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        request.wfile.write(b"\x1f\x8b")
        request.wfile.flush()
        mirror.closing.wait(30)

    return answer


def redirect(location: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(302)
        request.send_header("Location", location)
        request.end_headers()

    return answer


def endless(mirror: Mirror) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        while not mirror.closing.is_set():
            request.wfile.write(bytes(1 << 16))

    return answer


FAILURES: dict[str, tuple[Callable[[Mirror], Answer], str]] = {
    "not found": (lambda _: send(b"gone", 404), "HTTP Error 404"),
    "server error": (lambda _: send(b"oops", 500), "HTTP Error 500"),
    "wrong MD5": (
        lambda _: send(gzip.compress(idx(np.arange(9)))),
        r"expected MD5 \w{32}, found \w{32} in \d+ of \d+",
    ),
    "a web page": (
        lambda _: send(b"<html>please log in</html>"),
        r"expected MD5 \w{32}, found \w{32} in 26 of 26",
    ),
    "cut short": (
        lambda _: send(b"\x1f\x8b", length=1000),
        r"expected MD5 \w{32}, found \w{32} in 2 of 1000 bytes",
    ),
    "hangs up": (lambda _: lambda request: request.connection.close(), "."),
    "garbage": (lambda _: lambda request: request.wfile.write(b"\0\xff garbage\r\n\r\n"), "garbage"),
    "bad redirect": (lambda _: redirect("http://[oops/"), "IPv6"),
    "absurd length": (lambda _: send(b"x", length="9" * 5000), r"found \w{32} in 1 bytes"),
    "hangs": (hang, "timed out"),
    "endless": (endless, "expected at most 1000000 bytes, found more"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_download_tries_the_next_mirror_and_reports_each_failure(
    tmp_path: Path, published: dict, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, capfd, case: str
) -> None:
    monkeypatch.setattr(data, "TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(data, "MAX_DOWNLOAD_BYTES", 1_000_000)
    monkeypatch.setenv("COLUMNS", "200")
    make, reason = FAILURES[case]
    file = "t10k-labels-idx1-ubyte"
    mirror.offer("first", published["mnist"])
    mirror.answers[f"/first/{file}.gz"] = make(mirror)
    folder = cache(tmp_path, "mnist")

    with pytest.raises(data.DataError) as error:
        data.load("mnist")
    message = str(error.value)
    first, second = (f"{mirror.url(folder)}{file}.gz: " for folder in ("first", "second"))
    assert message.startswith(f"mnist: could not download {file}.gz, tried {first}")
    told, _, rest = message.partition(f"; {second}HTTP Error 404")
    assert re.search(reason, told.partition(first)[2])
    assert all(word in rest for word in ("--data-dir", file, "$LENET_FAST_DATA"))
    assert message.isprintable()
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{f}.gz" for f in data.FILES if f != file)
    assert f"{mirror.url('first')}{file}.gz: " in capfd.readouterr().err

    mirror.offer("second", published["mnist"])
    assert_holds(data.load("mnist"), published["mnist"])
    assert mirror.requests[-1] == f"/second/{file}.gz"
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{f}.gz" for f in data.FILES)


def test_no_mirror_answers(tmp_path: Path, published: dict, mirror: Mirror) -> None:
    mirror.close()
    with pytest.raises(data.DataError, match=r"first/train-images.*refused.*second/train-images.*--data-dir"):
        data.load("mnist")
    assert list(cache(tmp_path, "mnist").iterdir()) == []


def test_interrupt_leaves_nothing_half_done(tmp_path: Path, published: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MIRRORS", {"mnist": ("http://127.0.0.1:1/",)})

    class Response:
        length = 1000
        chunks = iter([b"\x1f\x8b" + bytes(100)])

        def read(self, size: int) -> bytes:
            for chunk in self.chunks:
                return chunk
            assert len(list(cache(tmp_path, "mnist").glob("*.part"))) == 1
            raise KeyboardInterrupt

        def __enter__(self) -> Response:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: Response())
    with pytest.raises(KeyboardInterrupt):
        data.load("mnist")
    assert list(cache(tmp_path, "mnist").iterdir()) == []


def test_published_tables_are_complete() -> None:
    for name in ("mnist", "fashion-mnist"):
        for table in (data.MD5_GZ, data.MD5_CONTENTS):
            assert table[name].keys() == set(data.FILES)
            assert all(len(value) == 32 and int(value, 16) for value in table[name].values())
    everything = [value for t in (data.MD5_GZ, data.MD5_CONTENTS) for files in t.values() for value in files.values()]
    assert len(set(everything)) == 16
