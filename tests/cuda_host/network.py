"""Whole training steps of the CUDA kernels on the CPU, against the CPU's own. Run by test_cuda_host.py."""

import copy
import math

import pytest
import torch
from torch import nn

from lenet_fast import models
from lenet_fast.nn import ConvActPool2d, SparseConvActPool2d
from lenet_fast.trainer import FusedTrainer, TrainingError

CPU, HOST = torch.ops.lenet_fast.network_train, torch.ops.lenet_fast_cuda_host.network_train
SETTINGS = [
    {"optimizer": "sgd", "lr": 0.02},
    {"optimizer": "sgd", "lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True},
    {"optimizer": "adam", "lr": 2e-3, "weight_decay": 1e-2},
    {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.1},
]


@pytest.fixture(autouse=True, params=["3"])
def multiprocessors(request, monkeypatch):
    monkeypatch.setenv("CUDA_HOST_MULTIPROCESSORS", request.param)


def digits(number=10, size=28, channels=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (number,), generator=generator)
    if channels is not None:
        return torch.randn(number, channels, size, size, generator=generator), labels
    return torch.randint(0, 256, (number, size, size), dtype=torch.uint8, generator=generator), labels


def train(monkeypatch, operator, model, data, settings, batch_size=4, epochs=1):
    model = copy.deepcopy(model)
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.lenet_fast, "network_train", operator)
        trainer = FusedTrainer(model, **settings)
        generator = torch.Generator().manual_seed(3)
        history = trainer.run(*data, batch_size=batch_size, epochs=epochs, generator=generator)
    return history, model, trainer


def assert_alike(monkeypatch, model, data, settings, **options):
    expected, right, right_trainer = train(monkeypatch, CPU, model, data, settings, **options)
    history, trained, trainer = train(monkeypatch, HOST, model, data, settings, **options)
    torch.testing.assert_close(history.losses, expected.losses, rtol=1e-5, atol=1e-5)
    assert torch.equal(history.correct, expected.correct)
    # Adam's first steps are lr times the sign of the gradient: where that is a rounding error, so is the sign.
    adaptive = settings["optimizer"] != "sgd"
    for a, b in zip(trained.parameters(), right.parameters(), strict=True):
        difference = (a - b).abs()
        assert difference.max() <= (settings["lr"] if adaptive else 1e-6)
        assert difference.quantile(0.99) <= 1e-6
    for a, b in zip(trainer.state_dict()["state"].values(), right_trainer.state_dict()["state"].values(), strict=True):
        for name, value in b.items():
            torch.testing.assert_close(
                a[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), model.parameters(), strict=True))


def build(name):
    torch.manual_seed(0)
    return models.MODELS[name]()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", models.MODELS)
def test_models(monkeypatch, name, settings):
    if name == "lenet5-1998" and settings["optimizer"] == "sgd":
        settings = settings | {"lr": 1e-4}  # its loss starts near 80
    assert_alike(monkeypatch, build(name), digits(), settings)


def other_networks():
    torch.manual_seed(1)
    table = torch.rand(5, 3) < 0.6
    table[0] = True
    table[1] = False
    yield (
        "one-dense",
        nn.Sequential(ConvActPool2d(2, 4, 3, activation="relu", pool="max"), nn.Flatten(), nn.Linear(4 * 25, 10)),
    )
    yield (
        "sparse-odd",
        nn.Sequential(
            ConvActPool2d(1, 3, 3, padding=1, activation="tanh", pool="none"),
            SparseConvActPool2d(table, 4, padding=2, activation="relu", pool="max", bias=False),
            nn.Flatten(),
            nn.Linear(5 * 5 * 5, 12),
            nn.Tanh(),
            nn.Linear(12, 10, bias=False),
        ),
    )
    yield (
        "three-convolutions",
        nn.Sequential(
            ConvActPool2d(1, 2, 5, activation="scaled_tanh", pool="none"),
            ConvActPool2d(2, 3, 5, padding=1, activation="sigmoid", pool="avg"),
            ConvActPool2d(3, 4, 2, activation="identity", pool="none"),
            nn.Flatten(),
            nn.Linear(36, 10),
        ),
    )


OTHERS = dict(other_networks())
SHAPES = {"one-dense": (12, 2), "sparse-odd": (9, 1), "three-convolutions": (14, 1)}  # size, channels


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks(monkeypatch, name):
    size, channels = SHAPES[name]
    assert_alike(monkeypatch, OTHERS[name], digits(7, size, channels), SETTINGS[1], batch_size=3, epochs=2)


def test_frozen_parameters_stay(monkeypatch):
    model = build("lenet1")
    next(model.parameters()).requires_grad_(False)
    assert_alike(monkeypatch, model, digits(5), SETTINGS[2])


def test_a_launch_a_phase_gives_the_same_bits(monkeypatch):
    """Where there is no cooperative launch."""
    results = []
    for cooperative in ("1", "0"):
        monkeypatch.setenv("CUDA_HOST_COOPERATIVE", cooperative)
        results.append(train(monkeypatch, HOST, build("lenet5"), digits(), SETTINGS[1]))
    assert_same_bits(*results)


def assert_same_bits(one, other):
    assert torch.equal(one[0].losses, other[0].losses)
    assert all(torch.equal(a, b) for a, b in zip(one[1].parameters(), other[1].parameters(), strict=True))


def test_bit_equal_in_every_order(monkeypatch):
    results = []
    for order in ("forward", "reverse", "1"):
        monkeypatch.setenv("CUDA_HOST_ORDER", order)
        results.append(train(monkeypatch, HOST, build("lenet5-1998"), digits(6), SETTINGS[3], batch_size=5))
    for result in results[1:]:
        assert_same_bits(results[0], result)


@pytest.mark.parametrize("multiprocessors", ["1", "7"], indirect=True)
def test_blocks_of_several_images_and_of_none(monkeypatch, multiprocessors):
    assert_alike(monkeypatch, build("lenet1"), digits(6), SETTINGS[1], batch_size=5)


@pytest.mark.parametrize("wrong", ["label", "order"])
def test_a_step_with_what_does_not_exist_is_not_taken(monkeypatch, wrong):
    """The labels and the order are on the device, where nobody has read them."""
    model, (images, labels) = build("lenet1"), digits(6)
    before = [parameter.clone() for parameter in model.parameters()]
    order = torch.arange(6)
    if wrong == "label":
        labels[1] = 10
    else:
        order[1] = 6
    network = FusedTrainer(copy.deepcopy(model), lr=0.1)
    arguments = (network._numbers_for(images), [p.data for p in model.parameters()], [], [], [], [1] * len(before))
    settings = ("sgd", [0.0] * 6, [0.1, 0.1], 0.0)
    losses, _ = HOST(*arguments, images, labels, order, 3, 0.01, 0.0, *settings)
    assert losses.isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_an_order_of_no_images_is_refused():
    model, images = build("lenet1"), torch.zeros(0, 28, 28, dtype=torch.uint8)
    parameters = [p.data for p in model.parameters()]
    arguments = (FusedTrainer(model, lr=0.1)._numbers_for(images), parameters, [], [], [], [1] * len(parameters))
    indices = torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="order: expected none, as there are no images, got 3"):
        HOST(*arguments, images, *indices, 3, 0.01, 0.0, "sgd", [0.0] * 6, [0.1], 0.0)


def test_a_loss_that_is_not_finite_stops_the_run_before_its_step(monkeypatch):
    images, labels = digits(6, 32, 1)
    images[:] = 1e30
    model = build("lenet5")
    with pytest.raises(TrainingError):
        train(monkeypatch, HOST, model, (images, labels), {"optimizer": "sgd", "lr": math.pi})


def test_what_no_multiprocessor_holds_is_refused(monkeypatch):
    wide = nn.Sequential(ConvActPool2d(1, 64, 5, padding=2), nn.Flatten(), nn.Linear(64 * 64 * 64, 10))
    with pytest.raises(RuntimeError, match=r"cannot be trained by the CUDA kernels: .* shared memory"):
        train(monkeypatch, HOST, wide, digits(2, 128, 1), SETTINGS[0])
