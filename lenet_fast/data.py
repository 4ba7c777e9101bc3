"""MNIST and Fashion-MNIST as uint8 tensors: embedded, found or downloaded, and checked in every case."""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.client
import math
import os
import secrets
import urllib.request
import warnings
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import IO

import numpy as np
import torch

from .terminal import printable

__all__ = ["DATASETS", "DataError", "Dataset", "Split", "load", "read_idx"]

DATASETS: tuple[str, ...] = ("mnist-10k", "mnist", "fashion-mnist")

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

_DIGITS = tuple("0123456789")
# fmt: off
_GARMENTS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
             "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
# fmt: on
CLASSES = {"mnist-10k": _DIGITS, "mnist": _DIGITS, "fashion-mnist": _GARMENTS}

MIRRORS: dict[str, tuple[str, ...]] = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "http://yann.lecun.com/exdb/mnist/",
    ),
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ),
}

# Published MD5 of each file as it is offered for download (.gz). What a mirror sends must match it.
MD5_GZ: dict[str, dict[str, str]] = {
    "mnist": {
        "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
    },
}

# Published MD5 of the uncompressed contents. Copies in circulation (Debian's among them) were compressed
# anew: another .gz, the same data. So the contents, not the .gz, tell what a file on disk is.
MD5_CONTENTS: dict[str, dict[str, str]] = {
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist

MAX_IDX_BYTES = 1 << 30  # 1.3 million 28x28 images; more than any data set in this format
MAX_DOWNLOAD_BYTES = 1 << 26  # the largest published file has 26 MB
TIMEOUT_SECONDS = 20.0  # without a single byte from a mirror
_DEFLATE_MAX_RATIO = 1032  # no deflate stream expands further (zlib's technical notes)

# torchvision.datasets keep the files of each data set in this folder below the one that they are given.
_TORCHVISION = {"mnist": Path("MNIST", "raw"), "fashion-mnist": Path("FashionMNIST", "raw")}

_WANTED = f"{', '.join(FILES)} (each with or without .gz)"
_BY_HAND = f"To supply the files by hand, put {_WANTED} into a folder and name it: --data-dir, or $LENET_FAST_DATA"


class DataError(ValueError):
    """A data file is missing, damaged or not what it should be, or could not be downloaded."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images, uint8 (N, 28, 28), 0 = background, and their labels, int64 (N,), 0 to 9."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, the names of its classes, and, in words for the user, where it came from."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    source: str


def load(name: str = "mnist-10k", data_dir: str | Path | None = None, download: bool = True) -> Dataset:
    """Load a data set, every file checked, from the first place that has it.

    "mnist-10k", 10,000 MNIST training digits and all 10,000 test digits, is embedded in the package. "mnist"
    and "fashion-mnist" are looked for in `data_dir` (if that is given, nowhere else), the folder named by
    $LENET_FAST_DATA, the cache (~/.cache/lenet_fast/<name>) and the folder of Debian's dataset-fashion-mnist,
    and are else downloaded into the cache. `data_dir` and $LENET_FAST_DATA hold the four IDX files, or a subfolder
    that does: one of the data set's name, torchvision's MNIST/raw or FashionMNIST/raw, or raw. Each file may be
    compressed (.gz), may be spelled as in train-images.idx3-ubyte, and may lie in a folder of its own name, as
    Kaggle's archive unpacks.

    Own data in the same format is welcome there: a UserWarning and `source` then name the files that are not
    the published ones. In the cache and in Debian's folder the contents must have the published MD5.

    Raises:
        DataError (a ValueError): a file is missing, truncated, damaged, of the wrong kind or of another
            published data set, or cannot be downloaded; or a folder holds several sets of files, or a file twice
            with different contents. Names the file, what was expected and what was found.
        ValueError: unknown `name`, or `data_dir` given for the embedded data.
    """
    if name not in DATASETS:
        raise ValueError(f"name: expected one of {', '.join(DATASETS)}; got {name!r}")
    if name == "mnist-10k":
        if data_dir is not None:
            raise ValueError(f"data_dir: expected None, as mnist-10k is embedded; got {str(data_dir)!r}")
        return _load_embedded()
    if data_dir is not None:
        files = _find_user_files("data_dir", data_dir, name)
        if not files:
            places = f"{data_dir} or its subfolder {name} or {_TORCHVISION[name]}"
            raise DataError(f"data_dir: expected {_WANTED} in {places}, found none")
        return _read_dataset(name, files, own_data=True)
    user_folder = os.environ.get("LENET_FAST_DATA")
    if user_folder and (files := _find_user_files("$LENET_FAST_DATA", user_folder, name)):
        return _read_dataset(name, files, own_data=True)
    cache = _cache_folder(name)
    folders = [] if cache is None else [cache]
    if name == "fashion-mnist":
        folders.append(DEBIAN_FOLDER)
    for folder in folders:
        try:
            files = _find(folder)
        except PermissionError:  # another user's home folder; `_download` says that it cannot write there
            continue
        if len(files) == len(FILES):
            return _read_dataset(name, files, own_data=False)
    if not download:
        places = ", ".join([f"$LENET_FAST_DATA ({user_folder or 'not set'})", *map(str, folders)])
        raise DataError(f"{name}: found no full set of files in {places}, and download=False. {_BY_HAND}")
    if cache is None:
        raise DataError(f"{name}: there is no home folder to download into, set HOME or XDG_CACHE_HOME. {_BY_HAND}")
    _download(name, cache)
    return _read_dataset(name, _find(cache), own_data=False)


def expand(origin: str, path: str | Path) -> Path:
    """`path` with ~ and ~user replaced by the home folder.

    Raises:
        ValueError: there is no such user or home folder; names `origin`, where the path comes from.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{origin}: expected a path, or one in a home folder that exists; got {str(path)!r}") from None


def read_idx(path: str | Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzip-compressed or not (told by its contents, not its name).

    Returns a writable uint8 array in the shape that the header gives. Nothing is allocated before the header
    was compared with what a file of this size can hold.

    Raises:
        DataError (a ValueError): not such a file, truncated, damaged, longer than its header says, without a
            single element, or above 1 GiB.
        OSError: it does not exist or cannot be read.
    """
    return _read_idx(Path(path))[0]


# ---- Reading and checking


def _read_idx(path: Path) -> tuple[np.ndarray, str]:
    """The array, and the MD5 of the uncompressed contents."""
    if path.exists() and not path.is_file():  # a FIFO would hang, a device never end
        raise DataError(f"{path}: expected an IDX file, found no regular file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise DataError(f"{path}: expected an IDX file, found an empty file")
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not compressed:
            return _parse_idx(path, file, most=size)
        try:
            with gzip.GzipFile(fileobj=file, mode="rb") as stream:
                return _parse_idx(path, stream, most=size * _DEFLATE_MAX_RATIO)
        except EOFError:
            raise DataError(f"{path}: expected a whole gzip file, found it truncated at {size} bytes") from None
        except (zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: expected a sound gzip file, found it damaged ({error})") from None


def _parse_idx(path: Path, stream: IO[bytes] | gzip.GzipFile, most: int) -> tuple[np.ndarray, str]:
    """Parse an IDX stream that cannot hold more than `most` bytes."""
    magic = stream.read(4)
    if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 4:
        raise DataError(
            f"{path}: expected an IDX magic number of unsigned bytes, 0x00000801 to 0x00000804; "
            f"found {f'0x{magic.hex()}' if magic else 'nothing'}"
        )
    header = magic + stream.read(4 * magic[3])
    if len(header) != 4 + 4 * magic[3]:
        raise DataError(f"{path}: expected a header of {4 + 4 * magic[3]} bytes, found {len(header)}: truncated")
    shape = tuple(int(n) for n in np.frombuffer(header, ">u4", offset=4))
    size = math.prod(shape)
    promised = f"{size} bytes of data ({' x '.join(map(str, shape))})"
    if not 0 < size <= MAX_IDX_BYTES:
        raise DataError(f"{path}: expected 1 to {MAX_IDX_BYTES} bytes of data, found a header for {promised}")
    if len(header) + size > most:
        raise DataError(f"{path}: expected {promised}, found a file too small for them: truncated or damaged")
    data = bytearray()
    while chunk := stream.read(min(1 << 20, size + 1 - len(data))):  # + 1: to see that it ends there
        data += chunk
    if len(data) != size:
        found = "more" if len(data) > size else f"{len(data)}: truncated"
        raise DataError(f"{path}: expected {promised}, found {found}")
    md5 = hashlib.md5(header, usedforsecurity=False)
    md5.update(data)
    return np.frombuffer(data, np.uint8).reshape(shape), md5.hexdigest()


def _read_dataset(name: str, files: dict[str, Path], *, own_data: bool) -> Dataset:
    """Read and check the four files; contents other than the published are an error unless `own_data`."""
    arrays, md5 = {}, {}
    for file, path in files.items():
        arrays[file], md5[file] = _read_idx(path)
    train, test = _split("train", arrays, files), _split("t10k", arrays, files)
    base = _common_folder(files)
    unpublished = []
    for file, path in files.items():
        for other in MD5_CONTENTS.keys() - {name}:
            if md5[file] == MD5_CONTENTS[other][file]:
                raise DataError(
                    f"{path}: expected {name}, found the published file of {other}. "
                    "To keep both in one folder, give each a subfolder of its name"
                )
        if md5[file] != (expected := MD5_CONTENTS[name][file]):
            if not own_data:
                raise DataError(
                    f"{path}: expected the published contents, MD5 {expected}; found MD5 {md5[file]}. "
                    "Remove or replace the file"
                )
            for other in _spellings(base, file)[1:]:  # of published contents it is known which of the two is meant
                if _read_idx(other)[1] != md5[file]:
                    raise DataError(f"{path}: expected {file} once in {base}, found {other} with other contents")
            unpublished.append(path.name)
    source = str(base)
    if unpublished:
        source += f" (own data, not the published {name}: {', '.join(unpublished)})"
        warnings.warn(f"{name} read from {source}", stacklevel=3)
    return Dataset(name, train, test, CLASSES[name], source)


def _split(split: str, arrays: dict[str, np.ndarray], files: dict[str, Path]) -> Split:
    """The images and labels of one split, checked against what images and labels are, and one another."""
    images_file, labels_file = f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"
    images, labels = arrays[images_file], arrays[labels_file]
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise DataError(f"{files[images_file]}: expected images, (N, 28, 28); found {images.shape}")
    if labels.ndim != 1:
        raise DataError(f"{files[labels_file]}: expected labels, (N,); found {labels.shape}")
    if labels.max() > 9:
        at = int(np.argmax(labels > 9))
        raise DataError(f"{files[labels_file]}: expected labels from 0 to 9, found {labels[at]} at index {at}")
    if len(images) != len(labels):
        raise DataError(
            f"{files[labels_file]}: expected a label for each image in {files[images_file]}, {len(images)}; "
            f"found {len(labels)}"
        )
    return Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


# ---- Finding


def _spellings(folder: Path, file: str) -> list[Path]:
    """Every place in `folder` where one of the four files lies, the most direct one first."""
    names = [f"{base}{suffix}" for base in (file, file.replace("-idx", ".idx")) for suffix in ("", ".gz")]
    places = [folder / name for name in names] + [folder / outer / name for outer in names for name in names]
    return [place for place in places if place.is_file()]


def _find(folder: Path) -> dict[str, Path]:
    """Those of the four files that lie in `folder` itself or each in a folder of its own name."""
    return {file: places[0] for file in FILES if (places := _spellings(folder, file))}


def _common_folder(files: dict[str, Path]) -> Path:
    """The folder in which `_find` found the files."""
    return Path(os.path.commonpath([path.parent for path in files.values()]))


def _find_user_files(origin: str, folder: str | Path, name: str) -> dict[str, Path]:
    """All four files, or none where the folder has no trace of them.

    A subfolder that bears the data set's name counts before the folder itself, whose files may be another data set.
    """
    path = expand(origin, folder)
    if not path.is_dir():
        there = "a file" if path.exists() else "nothing"
        raise DataError(f"{origin}: expected a folder, found {there} at {path}")
    for places in ((path / name, path / _TORCHVISION[name]), (path, path / "raw")):
        sets = {os.path.realpath(place): (place, files) for place in places if (files := _find(place))}
        if len(sets) > 1:
            found = " and ".join(f"{len(files)} in {place}" for place, files in sets.values())
            raise DataError(f"{origin}: expected the files of {name} in one folder, found {found}; name one of them")
        for place, files in sets.values():
            if missing := [file for file in FILES if file not in files]:
                raise DataError(f"{origin}: expected {_WANTED} in {place}, found no {', '.join(missing)}")
            return files
    return {}


def _cache_folder(name: str) -> Path | None:
    """None where there is no home folder, as in a container whose user has no name."""
    base = os.environ.get("XDG_CACHE_HOME", "")  # which counts only if absolute, says its specification
    if not os.path.isabs(base):
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return None
    return Path(base) / "lenet_fast" / name


def _load_embedded() -> Dataset:
    with ExitStack() as stack:
        folder = resources.files("lenet_fast") / "assets" / "mnist-10k"
        files = {file: stack.enter_context(resources.as_file(folder / f"{file}.gz")) for file in FILES}
        arrays = {file: read_idx(path) for file, path in files.items()}
    train, test = _split("train", arrays, files), _split("t10k", arrays, files)
    return Dataset("mnist-10k", train, test, CLASSES["mnist-10k"], "embedded in the package")


# ---- Downloading


def _download(name: str, cache: Path) -> None:
    """Download into the cache the files that it lacks."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        reason = f"cannot write to the folder to download into, {cache}: {error.strerror}"
        raise DataError(f"{name}: {reason}; set XDG_CACHE_HOME. {_BY_HAND}") from error
    present = _find(cache)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for file in FILES:
            if file in present:
                continue
            task = progress.add_task(file, total=None)
            failures = []
            for mirror in MIRRORS[name]:
                url = f"{mirror}{file}.gz"
                try:
                    _fetch(url, cache / f"{file}.gz", MD5_GZ[name][file], partial(progress.update, task))
                    break
                except (OSError, http.client.HTTPException, ValueError) as error:
                    # A server may put anything into a message: keep it off the terminal.
                    failures.append(f"{url}: {printable(error) or type(error).__name__}")
                    progress.console.print(failures[-1], markup=False, highlight=False, soft_wrap=True)
            else:
                raise DataError(f"{name}: could not download {file}.gz, tried {'; '.join(failures)}. {_BY_HAND}")


def _fetch(url: str, target: Path, md5: str, report: Callable[..., None]) -> None:
    """Download to `target`, which comes into being only as a whole and with this MD5.

    Calls `report(completed=bytes, total=bytes or None)` as it goes.
    """
    part = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    found = hashlib.md5(usedforsecurity=False)
    received = 0
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "lenet_fast"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response, part.open("xb") as file:
            total = response.length
            while chunk := response.read(1 << 16):
                received += len(chunk)
                if received > MAX_DOWNLOAD_BYTES:
                    raise DataError(f"expected at most {MAX_DOWNLOAD_BYTES} bytes, found more")
                file.write(chunk)
                found.update(chunk)
                report(completed=received, total=total)
        if found.hexdigest() != md5:
            size = f"{received} of {total} bytes" if total else f"{received} bytes"
            raise DataError(f"expected MD5 {md5}, found {found.hexdigest()} in {size}")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
