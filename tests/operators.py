"""Cases for the operator tests: one description of a call, run through any back end and through the reference."""

from dataclasses import dataclass

import pytest
import torch

from lenet_fast import backends, functional, reference

ACTIVATIONS = tuple(reference.ACTIVATIONS)
POOLS = tuple(reference.POOLS)


def implementations() -> list:
    """(device type, backend) pairs to test; those that this machine lacks are skipped with the reason."""
    pairs = [("cpu", "native"), ("cpu", "reference"), ("cuda", "native")]
    parameters = []
    for device, backend in pairs:
        reason = backends.why_unavailable(backend, device)
        if device == "cuda" and not torch.cuda.is_available():
            reason = "no CUDA device"
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        parameters.append(pytest.param((device, backend), marks=marks, id=f"{device}-{backend}"))
    return parameters


@dataclass(frozen=True)
class Case:
    """Shapes of one fused convolution."""

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel_size: int
    padding: int | str = 0
    bias: bool = True

    def __str__(self) -> str:
        return (
            f"n{self.batch}-{self.in_channels}x{self.height}x{self.width}-{self.out_channels}"
            f"k{self.kernel_size}p{self.padding}{'' if self.bias else '-nobias'}"
        )

    def tensors(self, dtype=torch.float64, device="cpu", seed=0) -> tuple:
        """Input, weight and bias (or None); values for which no activation saturates everywhere."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, scale=1.0):
            value = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            return value.to(dtype).to(device)

        input = draw(self.batch, self.in_channels, self.height, self.width)
        fan_in = self.in_channels * self.kernel_size**2
        weight = draw(self.out_channels, self.in_channels, self.kernel_size, self.kernel_size, scale=fan_in**-0.5)
        return input, weight, draw(self.out_channels) if self.bias else None

    def run(self, tensors, activation="sigmoid", pool="avg", backend="auto"):
        return functional.conv_act_pool(
            *tensors, padding=self.padding, activation=activation, pool=pool, backend=backend
        )

    def gradients(self, tensors, activation="sigmoid", pool="avg", backend="auto", seed=1):
        """Output, and the gradients of a fixed random weighting of it."""
        leaves = tuple(t.detach().requires_grad_() if t is not None else None for t in tensors)
        output = self.run(leaves, activation, pool, backend)
        generator = torch.Generator().manual_seed(seed)
        grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        grad_output = grad_output.to(output.dtype).to(output.device)
        present = [t for t in leaves if t is not None]
        return output.detach(), torch.autograd.grad(output, present, grad_output)


LENET_C1 = Case(20, 1, 28, 28, 6, 5, 2)
LENET_C3 = Case(18, 6, 14, 14, 16, 5)
CASES = [
    LENET_C1,
    LENET_C3,
    Case(16, 2, 9, 11, 3, 3, 1),  # odd sides: pooling drops a row and a column
    Case(17, 1, 12, 15, 2, 7, 3, bias=False),
    Case(3, 2, 13, 10, 3, 11, 5),
    Case(33, 4, 6, 7, 5, 1),
    Case(2, 3, 7, 8, 4, 2),
    Case(2, 3, 7, 8, 4, 4, "same"),  # padded on one side more
    Case(1, 1, 6, 6, 1, 5),
    Case(5, 3, 8, 30, 2, 5, 6),  # padding larger than the kernel
    Case(0, 2, 8, 8, 3, 3),
]
SMALL = Case(2, 2, 7, 6, 3, 3, 1)
