"""Races contestants against each other: interleaved, paired rounds, a probe beside every sample.

Contestants are plain callables, so an operator, a training step and a whole network are raced alike.
"""

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

Run = Callable[[], object]
Timer = Callable[[Run, int], float]  # (run, calls) -> seconds for all of them
Probe = Callable[[], float]  # -> speed of the machine now, GFLOP/s

DISTURBED_BELOW = 0.8  # of the best probe: another process had (part of) a core


def time_on_cpu(run: Run, calls: int) -> float:
    """Wall-clock seconds of `calls` calls of `run`."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


def time_on_cuda(run: Run, calls: int) -> float:
    """Seconds between two events in the current stream, around all that `calls` calls of `run` queue there."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def time_synchronised(run: Run, calls: int) -> float:
    """Wall-clock seconds from an idle device to an idle device: of work in several streams, of other libraries too."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class SgemmProbe:
    """Speed of a float32 matrix product, a few ms a call: on PyTorch's threads, or wherever `device` and `timer` say.

    `peak` is the fastest product seen, of any of `sizes`; `best` the fastest of the first size, that of the calls. In
    GFLOP/s.
    """

    def __init__(
        self, sizes: Sequence[int] = (512, 1024, 2048), *, device: str = "cpu", timer: Timer = time_on_cpu
    ) -> None:
        self._timer = timer
        products = [product for size in sizes for product in _matrix_products(size, device)]
        self.peak = max(self._speed(*product) for product in products for _ in range(3))
        self._product = max(_matrix_products(sizes[0], device), key=lambda product: self._speed(*product, calls=5))
        self.best = 0.0

    def __call__(self) -> float:
        speed = self._speed(*self._product, calls=3)
        self.best = max(self.best, speed)
        self.peak = max(self.peak, speed)
        return speed

    def _speed(self, run: Run, flops: float, calls: int = 1) -> float:
        run()  # brings the operands into the cache
        return 1e-9 * flops * calls / self._timer(run, calls)


def _matrix_products(size: int, device: str) -> list[tuple[Run, float]]:
    """A product of two square matrices by each library that PyTorch has, with its floating-point operations.

    MKL's is slow on processors that are not Intel's; oneDNN's (cuDNN's) is reached as a 1x1 convolution.
    """
    left, right, out = torch.rand(3, size, size, device=device)
    image = torch.rand(1, size, 16, size // 16, device=device).to(memory_format=torch.channels_last)
    flops = 2.0 * size**3
    return [
        (lambda: torch.mm(left, right, out=out), flops),
        (lambda: F.conv2d(image, left.view(size, size, 1, 1)), flops),
    ]


class Quartiles(NamedTuple):
    """Median and spread of one quantity over the rounds."""

    q1: float
    median: float
    q3: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Quartiles":
        """The quartiles of `values`, interpolated linearly."""
        return cls(*np.quantile(values, (0.25, 0.5, 0.75)).tolist())


@dataclass(frozen=True)
class Race:
    """What a race measured: an entry a round in every array."""

    seconds: dict[str, np.ndarray]  # per contestant: seconds a call
    probes: np.ndarray  # the slowest probe beside the round's samples, GFLOP/s

    def times(self, name: str) -> Quartiles:
        """Seconds a call of contestant `name`."""
        return Quartiles.of(self.seconds[name])

    def ratios(self, name: str, to: str) -> Quartiles:
        """How many times longer `name` took than `to`, each pair from one round."""
        return Quartiles.of(self.seconds[name] / self.seconds[to])

    def disturbed_rounds(self, best_probe: float) -> int:
        """Rounds during which a probe fell far below `best_probe`."""
        return int((self.probes < DISTURBED_BELOW * best_probe).sum())


def race(
    contestants: Mapping[str, Run],
    *,
    rounds: int,
    sample_seconds: float,
    probe: Probe,
    timer: Timer = time_on_cpu,
    repeats: int = 1,
) -> Race:
    """Time every contestant once a round, in an order shuffled anew (but repeatably) for every round.

    A sample is as many calls as take about `sample_seconds`; the probe runs before and after each sample. A call that
    does the same `repeats` times over counts as that many.
    """
    calls = {name: _calibrate(run, timer, sample_seconds) for name, run in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    probes = []
    shuffler = random.Random(0)
    with _no_garbage_collection():
        for _ in range(rounds):
            slowest = probe()
            for name in shuffler.sample(list(contestants), len(contestants)):
                seconds[name].append(timer(contestants[name], calls[name]) / (calls[name] * repeats))
                slowest = min(slowest, probe())
            probes.append(slowest)
    return Race({name: np.array(samples) for name, samples in seconds.items()}, np.array(probes))


def _calibrate(run: Run, timer: Timer, sample_seconds: float) -> int:
    """How many calls make a sample; warms `run` up on the way."""
    run()  # compiles
    calls = 1
    while (seconds := timer(run, calls)) < sample_seconds / 2:
        calls *= 2
    return math.ceil(calls * sample_seconds / seconds)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
