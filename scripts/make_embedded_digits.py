"""Write the digits embedded in the package: 10,000 training digits of MNIST and its whole test set.

    python scripts/make_embedded_digits.py FOLDER [OUTPUT]      (with the package installed)

FOLDER holds the four original MNIST files, whose contents must have the published MD5. Chosen are the first
1,000 training images of each class, in the order of the file: every class equally often, and anyone can
draw the same subset. (A 1-nearest-neighbour classifier gets 94.66 % of the test set right with it, and
94.56, 94.73 and 94.95 % with three random subsets of this size: it is neither an easy nor a hard one.)

The files are IDX, gzip level 9, with no name or time in the header: the same bytes on every run. (zlib-ng,
used by some Python builds in place of zlib, gives another stream of the same contents.)
"""

from __future__ import annotations

import argparse
import gzip
import warnings
from pathlib import Path

import numpy as np

from lenet_fast import data

PER_CLASS = 1000
OUTPUT = Path(__file__).resolve().parent.parent / "lenet_fast" / "assets" / "mnist-10k"


def choose(labels: np.ndarray) -> np.ndarray:
    """Indices, ascending, of the first PER_CLASS labels of each class."""
    return np.sort(np.concatenate([np.flatnonzero(labels == digit)[:PER_CLASS] for digit in range(10)]))


def write_idx_gz(path: Path, array: np.ndarray) -> None:
    """Write uint8 `array` as gzip-compressed IDX, reproducibly."""
    header = bytes([0, 0, 0x08, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as file:
        file.write(header + array.tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds the original MNIST files")
    parser.add_argument("output", type=Path, nargs="?", default=OUTPUT, help=f"default: {OUTPUT}")
    arguments = parser.parse_args()

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # files other than the published ones are an error here
        mnist = data.load("mnist", arguments.folder)
    chosen = choose(mnist.train.labels.numpy())
    arrays = {
        "train-images-idx3-ubyte": mnist.train.images.numpy()[chosen],
        "train-labels-idx1-ubyte": mnist.train.labels.numpy()[chosen].astype(np.uint8),
        "t10k-images-idx3-ubyte": mnist.test.images.numpy(),
        "t10k-labels-idx1-ubyte": mnist.test.labels.numpy().astype(np.uint8),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    for file, array in arrays.items():
        path = arguments.output / f"{file}.gz"
        write_idx_gz(path, array)
        print(f"{path}: {' x '.join(map(str, array.shape))}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
