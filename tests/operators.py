"""Cases for the operator tests: one description of a call, run through any back end and through the reference.

Every test that takes a `Case` runs on dense, sparse and subsampling convolutions alike.
"""

import os
import random
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from lenet_fast import backends, functional, reference
from lenet_fast.tables import LENET5_C3, Connections

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # tests/test_triton.py runs other tests so
ACTIVATIONS = tuple(reference.ACTIVATIONS)
POOLS = tuple(reference.POOLS)


def implementations() -> list:
    """(device type, backend) pairs to test; those that this machine lacks are skipped with the reason."""
    pairs = [("cpu", "native"), ("cpu", "reference"), ("cuda", "native"), ("cuda", "triton")]
    if INTERPRETED:  # on the CPU, and on what is a GPU only in name: tests/pretend_cuda.py
        pairs = [("cpu", "triton"), ("cuda", "triton")]
    parameters = []
    for device, backend in pairs:
        reason = backends.why_unavailable(backend, device)
        if device == "cuda" and not torch.cuda.is_available():
            reason = "no CUDA device"
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        parameters.append(pytest.param((device, backend), marks=marks, id=f"{device}-{backend}"))
    return parameters


class Call:
    """What can be run on its own tensors through any back end."""

    def gradients(self, tensors, activation="sigmoid", pool="avg", backend="auto", seed=1):
        """Output, and the gradients of a fixed random weighting of it."""
        leaves = tuple(t.detach().requires_grad_() if t is not None else None for t in tensors)
        output = self.run(leaves, activation, pool, backend)
        generator = torch.Generator().manual_seed(seed)
        grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        grad_output = grad_output.to(output.dtype).to(output.device)
        present = [t for t in leaves if t is not None]
        return output.detach(), torch.autograd.grad(output, present, grad_output)


@dataclass(frozen=True)
class Case(Call):
    """Shapes of one fused convolution: dense, sparse (with a table) or followed by trainable subsampling."""

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel_size: int
    padding: int | str = 0
    bias: bool = True
    table: Connections | None = None
    subsample: bool = False

    def __str__(self) -> str:
        return (
            f"n{self.batch}-{self.in_channels}x{self.height}x{self.width}-{self.out_channels}"
            f"k{self.kernel_size}p{self.padding}{'' if self.bias else '-nobias'}"
            f"{f'-sparse{len(self.table)}' if self.table else ''}{'-subsample' if self.subsample else ''}"
        )

    @property
    def pools(self) -> tuple[str, ...]:
        return ("subsample",) if self.subsample else POOLS

    def dense(self) -> "Case":
        return replace(self, table=None)

    def tensors(self, dtype=torch.float64, device="cpu", seed=0) -> tuple:
        """Input, weight and bias (or None); values for which no activation saturates everywhere."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, scale=1.0):
            value = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            return value.to(dtype).to(device)

        input = draw(self.batch, self.in_channels, self.height, self.width)
        sides = (self.kernel_size, self.kernel_size)
        maps = (self.out_channels, self.in_channels) if self.table is None else (len(self.table),)
        weight = draw(*maps, *sides, scale=(self.in_channels * self.kernel_size**2) ** -0.5)
        bias = draw(self.out_channels) if self.bias else None
        subsampling = (draw(self.out_channels), draw(self.out_channels)) if self.subsample else ()
        return input, weight, bias, *subsampling

    def run(self, tensors, activation="sigmoid", pool="avg", backend="auto"):
        options = {"padding": self.padding, "activation": activation, "backend": backend}
        if self.subsample:
            return functional.conv_subsample(*tensors, table=self.table, **options)
        if self.table is not None:
            return functional.sparse_conv_act_pool(*tensors, table=self.table, pool=pool, **options)
        return functional.conv_act_pool(*tensors, pool=pool, **options)

    def raw(self, tensors, activation="sigmoid", pool="avg"):
        """Through torch.ops; padding must be an int."""
        indices = None if self.table is None else self.table.indices
        if self.subsample:
            return torch.ops.lenet_fast.conv_subsample(*tensors, indices, self.padding, activation)
        if self.table is not None:
            options = (indices, self.out_channels, self.padding, activation, pool)
            return torch.ops.lenet_fast.sparse_conv_act_pool(*tensors, *options)
        return torch.ops.lenet_fast.conv_act_pool(*tensors, self.padding, activation, pool)


@dataclass(frozen=True)
class DenseCase(Call):
    """Shapes of `linear_act`, or of `rbf`, which has neither bias nor activation."""

    operator: str
    batch: int
    features: int
    outputs: int
    bias: bool = True

    def __str__(self) -> str:
        return f"{self.operator}-n{self.batch}-{self.features}to{self.outputs}{'' if self.bias else '-nobias'}"

    def tensors(self, dtype=torch.float64, device="cpu", seed=0) -> tuple:
        """Input and weight (or codes), and the bias (or None) of `linear_act`."""
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        weight = draw(self.outputs, self.features) / self.features**0.5
        tensors = draw(self.batch, self.features), weight, draw(self.outputs)
        on_device = [t.to(dtype).to(device) for t in tensors]
        if self.operator == "rbf":
            return tuple(on_device[:2])
        return (*on_device[:2], on_device[2] if self.bias else None)

    def run(self, tensors, activation="sigmoid", pool=None, backend="auto"):
        if self.operator == "rbf":
            return functional.rbf(*tensors, backend=backend)
        return functional.linear_act(*tensors, activation=activation, backend=backend)


def random_table(out_channels, in_channels, seed=0) -> Connections:
    """About half of the connections; output map 1 has none."""
    table = torch.rand(out_channels, in_channels, generator=torch.Generator().manual_seed(seed)) < 0.5
    table[1] = False
    table[0, 0] = True
    return Connections.of(table)


def random_cases(number, seed) -> list[Case]:
    """Of any shape, small ones."""
    draw = random.Random(seed)
    cases = []
    while len(cases) < number:
        kernel_size = draw.randint(1, 8)
        case = Case(
            batch=draw.choice([1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33]),
            in_channels=draw.randint(1, 7),
            height=draw.randint(1, 24),
            width=draw.randint(1, 24),
            out_channels=draw.randint(2, 9),
            kernel_size=kernel_size,
            padding=draw.randint(0, kernel_size + 1),
            bias=draw.random() < 0.8,
            subsample=draw.random() < 0.2,
        )
        if draw.random() < 0.4:
            case = replace(case, table=random_table(case.out_channels, case.in_channels, draw.randrange(2**31)))
        if draw.random() < 0.5:
            case = replace(case, width=case.height)
        if min(case.height, case.width) + 2 * case.padding > kernel_size:
            cases.append(case)
    return cases


LENET_C1 = Case(20, 1, 28, 28, 6, 5, 2)
LENET_C3 = Case(18, 6, 14, 14, 16, 5)
K7 = Case(17, 1, 12, 15, 2, 7, 3, bias=False)
K11 = Case(3, 2, 13, 10, 3, 11, 5)
if INTERPRETED:  # which takes a tenth of a millisecond for every operation of a kernel
    LENET_C1 = Case(3, 1, 10, 10, 6, 5, 2)
    LENET_C3 = Case(3, 6, 8, 8, 16, 3)
    K7 = Case(3, 1, 8, 9, 2, 7, 3, bias=False)
    K11 = Case(2, 1, 9, 9, 2, 9, 4)
SPARSE_C3 = replace(LENET_C3, table=Connections.of(LENET5_C3))
LENET_1998_C3 = replace(SPARSE_C3, subsample=True)
ODD = Case(16, 2, 9, 11, 3, 3, 1)  # odd sides: pooling drops a row and a column
CASES = [
    LENET_C1,
    LENET_C3,
    SPARSE_C3,
    LENET_1998_C3,
    ODD,
    replace(ODD, table=random_table(3, 2)),
    replace(ODD, subsample=True),
    K7,
    K11,
    Case(3, 4, 13, 10, 5, 6, 3, table=random_table(5, 4), bias=False),
    Case(33, 4, 6, 7, 5, 1),
    Case(2, 3, 7, 8, 4, 2, subsample=True, bias=False),
    Case(2, 3, 7, 8, 4, 4, "same"),  # padded on one side more
    Case(1, 1, 6, 6, 1, 5),
    Case(1, 2, 6, 6, 2, 3, table=Connections(2, 2, ())),  # no connection at all: act(bias)
    Case(5, 3, 8, 30, 2, 5, 6),  # padding larger than the kernel
    Case(0, 2, 8, 8, 3, 3),
    Case(0, 2, 8, 8, 3, 3, table=random_table(3, 2), subsample=True),
]
if not INTERPRETED:
    # Winograd on the CPU: several tiles, neighbouring maps with different connections, an odd number of maps.
    RAGGED = Connections(3, 6, (0, 1, 2, 3, 4, 5, 8, 12, 13, 14, 15, 16, 17))
    CASES += [Case(17, 4, 11, 29, 5, 5, 2), Case(19, 6, 9, 8, 3, 5, table=RAGGED)]
    # A padded band of rows happens to be as large as the image.
    CASES += [Case(1, 2, 12, 12, 3, 7, 3), Case(4, 2, 12, 12, 4, 4, 2)]
SMALL = Case(2, 2, 7, 6, 3, 3, 1)
SMALL_CASES = [SMALL, replace(SMALL, table=random_table(3, 2)), replace(SMALL, subsample=True)]
