"""Networks of any shape that FusedTrainer takes, for tests that look for what nobody thought of."""

import random
from collections.abc import Iterator

import torch
from torch import nn

from lenet_fast.nn import RBF, ConvActPool2d, ConvSubsample2d, ScaledTanh, SparseConvActPool2d

CLASSES = 4
_ACTIVATIONS = ("identity", "relu", "sigmoid", "tanh", "scaled_tanh")
_PLAIN = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "scaled_tanh": ScaledTanh, "identity": nn.Identity}
_POOLS = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}


def random_network(seed: int) -> tuple[nn.Sequential, tuple[int, int, int]]:
    """A network of float64, and the (C, H, W) of its images. Some parameters may be frozen."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    while True:
        image = channels, height, width = draw.randint(1, 3), draw.randint(4, 20), draw.randint(4, 20)
        if draw.random() < 0.5:
            image = channels, height, width = channels, height, height
        layers: list[nn.Module] = []
        for _ in range(draw.randint(1, 3)):
            block, shape = _random_block(draw, channels, height, width)
            if min(shape) > 0:
                layers += block
                channels, height, width = shape
        features = channels * height * width
        if layers and features <= 2000:
            break
    layers.append(nn.Flatten())
    for width in [draw.randint(3, 20) for _ in range(draw.randint(0, 2))]:
        layers += [nn.Linear(features, width, bias=draw.random() < 0.7), _PLAIN[draw.choice(_ACTIVATIONS)]()]
        features = width
    with_distances = draw.random() < 0.2
    layers.append(nn.Linear(features, 5 if with_distances else CLASSES, bias=draw.random() < 0.7))
    if with_distances:
        layers.append(RBF(5, CLASSES))
    network = nn.Sequential(*layers).double()
    for parameter in network.parameters():
        parameter.requires_grad_(draw.random() < 0.9)
    next(network.parameters()).requires_grad_(True)  # one at least
    return network, image


def _random_block(draw: random.Random, channels: int, height: int, width: int) -> tuple[list[nn.Module], tuple]:
    """Layers, and the shape of what they return, of which sides may be 0 or less."""
    kernel, maps = draw.choice([1, 2, 3, 4, 5, 5, 5, 6, 7]), draw.randint(1, 18)
    padding, activation, bias = draw.randint(0, kernel - 1), draw.choice(_ACTIVATIONS), draw.random() < 0.7
    pool = draw.choice(["avg", "max", "none"])
    options = {"padding": padding, "activation": activation}
    kind = draw.choice(["fused", "sparse", "subsample", "plain"])
    if kind == "fused":
        block = [ConvActPool2d(channels, maps, kernel, bias=bias, pool=pool, **options)]
    elif kind == "sparse":
        table = torch.rand(maps, channels) < 0.6
        table[0, 0] = True
        block = [SparseConvActPool2d(table, kernel, bias=bias, pool=pool, **options)]
    elif kind == "subsample":
        pool = "avg"
        block = [ConvSubsample2d(channels, maps, kernel, **options)]
    else:
        block = [nn.Conv2d(channels, maps, kernel, padding=padding, bias=bias), _PLAIN[activation]()]
        block += [] if pool == "none" else [_POOLS[pool](2)]
    sides = [(side + 2 * padding - kernel + 1) // (1 if pool == "none" else 2) for side in (height, width)]
    return block, (maps, *sides)


def random_data(seed: int, image: tuple[int, int, int], most: int = 20) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Images, labels, and a batch size that may leave a smaller last batch."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    number = draw.randint(1, most)
    images = torch.randn(number, *image, dtype=torch.float64, generator=generator)
    return images, torch.randint(CLASSES, (number,), generator=generator), draw.randint(1, 10)


def batches(number: int, batch_size: int, epochs: int, seed: int) -> Iterator[torch.Tensor]:
    """The indices of every step of `FusedTrainer.run`."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(number, generator=generator).split(batch_size)
