"""FusedTrainer and inference on networks of any shape against PyTorch, with batches of any size."""

import copy
import itertools
from functools import cache

import pytest
import torch
from random_networks import LINKS, OPTIONS, Drawn, batches, features, joined, random_data, random_network
from test_trainer import plain_optimizer, plain_step
from torch import Tensor, nn

from lenet_fast import backends
from lenet_fast.nn import MAPLoss
from lenet_fast.trainer import FusedTrainer

pytestmark = pytest.mark.skipif(
    backends.why_unavailable("native", "cpu") is not None, reason=str(backends.why_unavailable("native", "cpu"))
)

# Seeds of the networks of each test. They begin where 495 have all that the last test wants.
GROUPS = [range(first, first + 45) for first in range(2650, 3145, 45)]
SETTINGS = [
    {"optimizer": "sgd", "lr": 1e-4, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
    {"optimizer": "adam", "lr": 1e-4, "weight_decay": 1e-2},
]


@cache
def drawn(seed: int) -> Drawn:  # what a test changes is a copy
    return random_network(seed, calls=seed % 10 == 0)


def loss_of(network: Drawn) -> nn.Module:
    return MAPLoss(j=0.0) if network.reading.measures_distance else nn.CrossEntropyLoss()


def data_of(network: Drawn, seed: int, number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(number, *network.shape, dtype=torch.float64, generator=generator)
    return images, torch.randint(network.classes, (number,), generator=generator)


def infer(network: Drawn, images: Tensor) -> Tensor:
    """The outputs of the native network."""
    definition = torch.ops.lenet_fast.network_define(network.reading.numbers(network.image))
    try:
        with torch.no_grad():
            images = images.reshape(len(images), *network.image)
            return torch.ops.lenet_fast.network_infer(definition, network.reading.tensors(), images, 0.0, 0.0)
    finally:
        torch.ops.lenet_fast.network_release(definition)


@pytest.mark.parametrize("seeds", GROUPS, ids=str)
def test_outputs_loss_and_gradients_are_those_of_autograd(seeds):
    """On an image, on fewer and on more than half a block of any instruction set."""
    for seed in seeds:
        network = drawn(seed)
        # After each step the velocity, cleared before it, is the gradient; at no learning rate nothing moves.
        trainer = FusedTrainer(network.network, "sgd", lr=0.0, momentum=0.5, native_only=True)
        trained = [parameter for parameter in network.network.parameters() if parameter.requires_grad]
        for number in (1, 2 + seed % 3, 5 + seed % 13):
            images, labels = data_of(network, seed, number)
            outputs = network.network(images)
            loss = loss_of(network)(outputs, labels)
            gradients = torch.autograd.grad(loss, trained)
            scores = infer(network, images)
            assert_close(
                scores.log_softmax(1) if network.reading.ends_in_log_softmax else scores, outputs.detach(), seed
            )
            assert trainer.step(images, labels) == pytest.approx(loss.item(), rel=1e-10, abs=1e-14), seed
            velocities = [trainer.optimizer.state[parameter]["momentum_buffer"] for parameter in trained]
            assert_close(joined(velocities), joined(gradients), seed)
            torch._foreach_zero_(velocities)


def assert_close(found: Tensor, expected: Tensor, seed: int) -> None:
    """By the largest of the values."""
    error, largest = (found - expected).abs().max(), expected.abs().max()
    assert error <= 1e-10 * largest, f"network {seed}: an error of {error}, the largest is {largest}"


def plain_losses(network, twin, images, labels, batch_size, settings):
    """Of the steps that `FusedTrainer.run` takes in two epochs, in plain PyTorch."""
    optimizer = plain_optimizer(twin, settings)
    for batch in batches(len(labels), batch_size, 2, seed=1):
        yield plain_step(twin, optimizer, images[batch], labels[batch], loss_of(network))


@pytest.mark.parametrize("seeds", GROUPS, ids=str)
def test_a_run_is_that_of_autograd(seeds):
    for seed in seeds[::2]:
        network, settings = drawn(seed), SETTINGS[seed // 2 % len(SETTINGS)]
        images, labels, batch_size = random_data(seed, network.shape, network.classes)
        trained, twin = copy.deepcopy(network.network), copy.deepcopy(network.network)
        generator = torch.Generator().manual_seed(1)
        history = FusedTrainer(trained, **settings, native_only=True).run(
            images, labels, batch_size=batch_size, epochs=2, generator=generator
        )
        expected = list(plain_losses(network, twin, images, labels, batch_size, settings))
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(history.losses.flatten(), expected, rtol=1e-8, atol=1e-10)
        for one, other in zip(trained.parameters(), twin.parameters(), strict=True):
            # Adam's step is lr, whatever the gradient: a rounding where it should be 0 moves the parameter.
            wrong = 1 - torch.isclose(one, other, rtol=1e-7, atol=1e-9).double()
            assert wrong.sum() <= (0.02 * wrong.numel() if settings["optimizer"] == "adam" else 0), seed


# What may follow what. A window is a convolution over its whole input: the native network has it as a dense layer.
FOLLOWERS = {
    "convolution": ("convolution", "window", "linear"),
    "window": ("linear", "end"),
    "linear": ("linear", "end"),
}


def test_the_networks_have_all_that_the_reader_takes():
    """Every kind of link, and every option of a layer next to every option of the layers that may follow it."""
    pairs, kinds, frozen = set(), set(), set()
    for seed in itertools.chain(*GROUPS):
        network = drawn(seed)
        kinds.update(network.kinds)
        frozen |= {
            (layer.is_dense, layer.pool == "subsample", layer.connections is None, role, parameter.requires_grad)
            for layer in network.reading.layers
            for role, (_, parameter) in layer.tensors.items()
        }
        for (one, options), (other, other_options) in itertools.pairwise(features(network)):
            pairs |= {(one, option, other, next_) for option in options for next_ in other_options}
    expected = {
        (one, option, other, next_)
        for one, followers in FOLLOWERS.items()
        for other in followers
        for option in OPTIONS[one]
        for next_ in OPTIONS[other]
    }
    assert kinds == set(LINKS), set(LINKS) - kinds
    assert pairs >= expected, sorted(expected - pairs)
    rare = {("linear", "window"), ("window", "window")}  # features as maps of one value, which a forward has to say
    assert {(one, other) for one, _, other, _ in pairs - expected} <= rare
    assert frozen == {(*parameter, trains) for parameter in {key[:-1] for key in frozen} for trains in (False, True)}
