"""FusedTrainer on networks of any shape against autograd and torch.optim, with batches of any size."""

import copy

import pytest
import torch
from random_networks import batches, random_data, random_network
from test_trainer import plain_optimizer, plain_step
from torch import nn

from lenet_fast import backends
from lenet_fast.nn import RBF, FusedConv2d, MAPLoss
from lenet_fast.trainer import FusedTrainer

pytestmark = pytest.mark.skipif(
    backends.why_unavailable("native", "cpu") is not None, reason=str(backends.why_unavailable("native", "cpu"))
)

NETWORKS = 40  # of a test
SETTINGS = [
    {"optimizer": "sgd", "lr": 1e-4, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
    {"optimizer": "adam", "lr": 1e-4, "weight_decay": 1e-2},
]


def plain_losses(network, images, labels, batch_size, settings):
    """Of the steps that `FusedTrainer.run` takes in two epochs, in plain PyTorch."""
    for layer in network.modules():
        if isinstance(layer, FusedConv2d | RBF):
            layer.backend = "reference"
    loss_function = MAPLoss(j=0.0) if isinstance(network[-1], RBF) else nn.CrossEntropyLoss()
    optimizer = plain_optimizer(network, settings)
    for batch in batches(len(labels), batch_size, 2, seed=1):
        yield plain_step(network, optimizer, images[batch], labels[batch], loss_function)


def assert_trained_alike(
    network: nn.Module, twin: nn.Module, losses: torch.Tensor, expected: list[float], optimizer
) -> None:
    torch.testing.assert_close(losses.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-10)
    for one, other in zip(network.parameters(), twin.parameters(), strict=True):
        # Adam's step is lr, whatever the gradient: a rounding where it should be 0 moves the parameter.
        close = torch.isclose(one, other, rtol=1e-7, atol=1e-9)
        assert close.double().mean() > (0.98 if optimizer == "adam" else 1 - 1e-9)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("seed", range(0, 8 * NETWORKS, NETWORKS))
def test_a_run_is_that_of_autograd(seed, settings):
    for number in range(seed, seed + NETWORKS):
        network, image = random_network(number)
        images, labels, batch_size = random_data(number, image)
        twin = copy.deepcopy(network)
        generator = torch.Generator().manual_seed(1)
        history = FusedTrainer(network, **settings).run(
            images, labels, batch_size=batch_size, epochs=2, generator=generator
        )
        expected = list(plain_losses(twin, images, labels, batch_size, settings))
        assert_trained_alike(network, twin, history.losses, expected, settings["optimizer"])
