"""FusedTrainer: step by step the same as autograd and torch.optim, for every model it takes; what it refuses."""

import copy
import itertools
import math
import os
import pickle
import random
import signal
import sys
import threading
from collections import Counter

import pytest
import torch
from instruction_sets import ISAS, run_on
from torch import nn
from torch.nn import functional as F

import lenet_fast as lf
from lenet_fast import models
from lenet_fast.network import Network, NetworkError
from lenet_fast.trainer import FusedTrainer, TrainingError
from lenet_fast.training_steps import Masks

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SETTINGS = [
    {"optimizer": "sgd", "lr": 0.05},
    {"optimizer": "sgd", "lr": 0.02, "momentum": 0.9, "weight_decay": 1e-2},
    {"optimizer": "sgd", "lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True},
    {"optimizer": "adam", "lr": 2e-3, "weight_decay": 1e-2},
    {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-6},
]


def images_like(number, shape, dtype=torch.float64, seed=0, classes=10):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(number, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(classes, (number,), generator=generator)


def build(name, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    return models.MODELS[name](dtype=dtype, **options)


def size_of(model):
    return (1, model.input_spec.size, model.input_spec.size)


def gentle(name, settings):
    """The settings for a model whose loss starts near 80."""
    return (
        settings | {"lr": settings["lr"] / 200}
        if name == "lenet5-1998" and settings["optimizer"] == "sgd"
        else settings
    )


def plain_optimizer(model, settings):
    options = {name: value for name, value in settings.items() if name != "optimizer"}
    return OPTIMIZERS[settings["optimizer"]](model.parameters(), **options)


def plain_step(model, optimizer, images, labels, loss_function=None):
    optimizer.zero_grad()
    loss = (loss_function or models.criterion(model))(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def assert_parameters_close(one, other, atol):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_trains_alike(
    model, twin, settings, shape, *, steps, batches=(5, 1, 17, 4, 32), atol=1e-10, loss=None, **options
):
    """`steps` steps of both on the same batches: losses and parameters."""
    classes = twin(torch.zeros(1, *shape, dtype=torch.float64)).shape[-1]
    images, labels = images_like(48, shape, classes=classes)
    before = copy.deepcopy(twin)
    trainer, optimizer = FusedTrainer(model, **settings, **options), plain_optimizer(twin, settings)
    for step, size in zip(range(steps), itertools.cycle(batches), strict=False):
        batch = torch.randperm(48, generator=torch.Generator().manual_seed(step))[:size]
        mine = trainer.step(images[batch], labels[batch])
        assert mine == pytest.approx(plain_step(twin, optimizer, images[batch], labels[batch], loss), rel=0, abs=atol)
    assert_parameters_close(model, twin, atol)
    moved = max((a - b).abs().max().item() for a, b in zip(before.parameters(), twin.parameters(), strict=True))
    assert moved > 1e-4  # it does train
    return trainer, optimizer


# --- Parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", models.MODELS)
def test_float64_steps_equal_autograd_and_torch_optim(name, settings):
    model = build(name)
    twin = model.reference()
    trainer, optimizer = assert_trains_alike(model, twin, gentle(name, settings), size_of(model), steps=100)
    for mine, other in zip(
        trainer.state_dict()["state"].values(), optimizer.state_dict()["state"].values(), strict=True
    ):
        for key, value in other.items():
            torch.testing.assert_close(mine[key], value, rtol=0, atol=1e-10)


def random_table(rows, columns, seed=0):
    table = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    table[0], table[1] = False, True  # a map without connections, one with all
    return table


def conv(*sizes, **options):
    return nn.Conv2d(*sizes, **options, dtype=torch.float64)


def linear(*sizes, **options):
    return nn.Linear(*sizes, **options, dtype=torch.float64)


class Functional(nn.Module):
    """A LeNet whose forward calls functions."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = conv(1, 4, 5), conv(4, 6, 3)
        self.dense = linear(6 * 3 * 3, 10)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = F.avg_pool2d(self.conv2(x).tanh(), 2)
        return self.dense(torch.flatten(x, 1))


def odd_models():
    """(shape of an image, network) for sizes and sequences that no model of the package has."""
    pool = lambda: nn.MaxPool2d(2)  # noqa: E731
    return {
        "one channel, K=3, one dense layer": (
            (1, 12, 12),
            nn.Sequential(
                conv(1, 5, 3), nn.ReLU(), pool(), conv(5, 7, 3), nn.ReLU(), pool(), nn.Flatten(), linear(7, 10)
            ),
        ),
        "no activation, no bias, three channels, K=4, oblong, odd sizes": (
            (3, 15, 20),
            nn.Sequential(
                conv(3, 4, 4, bias=False),
                nn.AvgPool2d(2),
                conv(4, 3, 2, padding=1, bias=False),
                nn.Identity(),
                pool(),
                nn.Flatten(),
                linear(3 * 3 * 4, 9, bias=False),
                nn.Sigmoid(),
                linear(9, 3),
            ),
        ),
        "activation behind the maximum, padding same, nested": (
            (2, 11, 11),
            nn.Sequential(
                nn.Sequential(conv(2, 6, 7, padding="same"), pool(), nn.Tanh()),
                nn.Sequential(conv(6, 4, 3, padding="same"), lf.nn.ScaledTanh(), nn.AvgPool2d(2)),
                nn.Flatten(),
                nn.Sequential(linear(16, 33), nn.Tanh(), linear(33, 21), nn.ReLU(), linear(21, 5)),
            ),
        ),
        "sparse table, no pooling in between": (
            (1, 14, 14),
            nn.Sequential(
                lf.nn.ConvActPool2d(1, 4, 5, activation="tanh", pool="none", dtype=torch.float64),
                lf.nn.SparseConvActPool2d(random_table(6, 4), 3, pool="max", dtype=torch.float64),
                nn.Flatten(),
                linear(6 * 16, 10),
            ),
        ),
        "sparse subsampling, RBF": (
            (1, 18, 18),
            nn.Sequential(
                lf.nn.ConvSubsample2d(1, 4, 3, padding=1, dtype=torch.float64),
                lf.nn.ConvSubsample2d(4, 5, 4, table=random_table(5, 4), activation="sigmoid", dtype=torch.float64),
                nn.Flatten(),
                linear(45, 12),
                nn.Tanh(),
                lf.nn.RBF(12, 4, dtype=torch.float64),
            ),
        ),
        "three convolutions, the last over the whole input": (
            (1, 20, 20),
            nn.Sequential(
                conv(1, 3, 5),
                nn.Sigmoid(),
                pool(),
                conv(3, 4, 3),
                nn.ReLU(),
                nn.AvgPool2d(2),
                conv(4, 8, 3),
                nn.Tanh(),
                nn.Flatten(),
                linear(8, 10),
            ),
        ),
        "functions": ((1, 20, 20), Functional()),
        "one block": ((1, 8, 8), nn.Sequential(conv(1, 17, 3), nn.ReLU(), pool(), nn.Flatten(), linear(153, 2))),
    }


@pytest.mark.parametrize("name", odd_models())
@pytest.mark.parametrize("settings", [SETTINGS[1], SETTINGS[3]])
def test_any_lenet_trains_as_by_autograd(name, settings):
    torch.manual_seed(0)
    shape, model = odd_models()[name]
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        layer.backend = "reference"
    if "RBF" in name:
        j, loss = 1.5, lf.nn.MAPLoss(1.5)
        settings = settings | {"lr": settings["lr"] / 10}
    else:
        j, loss = 0.0, nn.CrossEntropyLoss()
    assert_trains_alike(model, twin, settings, shape, steps=20, loss=loss, j=j)


def test_the_twin_is_trained_like_the_model():
    model = build("lenet5-1998")
    twin = model.reference()
    images, labels = images_like(20, (1, 32, 32))
    for trained in (model, twin):
        trainer = FusedTrainer(trained, "adamw", lr=1e-3)
        for _ in range(3):
            trainer.step(images, labels)
    assert_parameters_close(model, twin, 0)


@pytest.mark.parametrize("size", [*range(1, 10), 15, 16, 17, 31, 48, 100])
def test_every_batch_size(size):
    model = build("lenet1")
    twin = model.reference()
    images, labels = images_like(size, (1, 28, 28))
    trainer, optimizer = FusedTrainer(model, lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        assert trainer.step(images, labels) == pytest.approx(plain_step(twin, optimizer, images, labels), abs=1e-12)
    assert_parameters_close(model, twin, 1e-12)


@pytest.mark.parametrize("size", [1023, 1024, 1025, 2050])
def test_a_large_batch_takes_several_chunks(size):
    model = nn.Sequential(conv(1, 2, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), linear(2, 3))
    twin = copy.deepcopy(model)
    images, labels = images_like(size, (1, 4, 4), classes=3)
    trainer, optimizer = FusedTrainer(model, lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(2):
        mine = trainer.step(images, labels)
        assert mine == pytest.approx(plain_step(twin, optimizer, images, labels, nn.CrossEntropyLoss()), abs=1e-12)
    assert_parameters_close(model, twin, 1e-12)


@pytest.mark.parametrize("size", [4, 32])
@pytest.mark.parametrize("name", models.MODELS)
def test_float32_is_as_close_to_float64_as_pytorch_is(name, size):
    """After ten steps of SGD, by the largest error of each parameter; median of five seeds."""
    ratios = []
    for seed in range(5):
        exact = build(name, seed=seed)
        single = copy.deepcopy(exact).float()
        twin = single.reference()
        images, labels = images_like(size, size_of(exact), seed=seed)
        settings = gentle(name, SETTINGS[1])
        exact_twin = exact.reference()
        optimizers = [plain_optimizer(model, settings) for model in (exact_twin, twin)]
        trainer = FusedTrainer(single, **settings)
        for _ in range(10):
            trainer.step(images.float(), labels)
            plain_step(exact_twin, optimizers[0], images, labels)
            plain_step(twin, optimizers[1], images.float(), labels)
        errors = [
            sum((a - b).abs().max().item() for a, b in zip(model.parameters(), exact_twin.parameters(), strict=True))
            for model in (single, twin)
        ]
        ratios.append(errors[0] / errors[1])
    assert sorted(ratios)[2] < 1.5, ratios


@pytest.mark.parametrize("number", [1, 16])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "scaled_tanh"])
def test_dense_values_and_derivatives_are_exact_to_a_few_roundings(activation, number):
    """Of a dense layer's activation, over a sweep: both show in gradients of float32."""
    z = torch.linspace(-9, 9, 1001).repeat_interleave(2)
    layer = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "scaled_tanh": lf.nn.ScaledTanh}[activation]
    model = nn.Sequential(
        nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(4, len(z)), layer(), nn.Linear(len(z), 2, bias=True)
    )
    signs = torch.ones(len(z))
    signs[1::2] = -1  # every value is there twice, and cancels in the scores
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.copy_(z)
        model[4].weight.copy_(torch.stack([signs, -signs]))
        model[4].bias.zero_()
    trainer = FusedTrainer(model, lr=0.0, momentum=0.5)
    trainer.step(torch.zeros(number, 1, 2, 2), torch.zeros(number, dtype=torch.int64))
    of_z, of_weight, of_scores = (
        trainer.optimizer.state[parameter]["momentum_buffer"].double()
        for parameter in (model[2].bias, model[4].weight, model[4].bias)
    )
    exact_z = z.double().requires_grad_()
    values = layer()(exact_z)
    (derivatives,) = torch.autograd.grad(values.sum(), exact_z)
    roundings = 3 * torch.finfo(torch.float32).eps  # sums over images and scores
    assert ((of_weight[0] / of_scores[0] - values).abs() <= 4 * 2**-23 * values.abs() + roundings * values.abs()).all()
    error = (of_z * signs / (of_scores[0] - of_scores[1]) - derivatives).abs()
    assert error.max() <= 4 * 2**-23 + roundings * derivatives.max()


def trained(threads, dtype, name="lenet5-d2l", steps=10):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = build(name, dtype)
        trainer = FusedTrainer(model, "adamw", lr=1e-3, weight_decay=0.1)
        images, labels = images_like(70, size_of(model), dtype)
        losses = [trainer.step(images, labels) for _ in range(steps)]
    finally:
        torch.set_num_threads(before)
    return model, losses


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_training_repeats_itself_to_the_bit(threads):
    (one, losses), (other, other_losses) = (trained(threads, torch.float32) for _ in range(2))
    assert losses == other_losses
    assert_parameters_close(one, other, 0)


@pytest.mark.parametrize("threads", [2, 3, 4, 7])
def test_any_number_of_threads_agrees_within_rounding(threads):
    (one, _), (other, _) = trained(1, torch.float64), trained(threads, torch.float64)
    assert_parameters_close(one, other, 1e-12)


def test_memory_that_starts_as_nan_does_no_harm(poisoned_memory):
    model = build("lenet5-1998", torch.float32)
    trainer = FusedTrainer(model, "adam", lr=1e-3)
    images, labels = images_like(37, (1, 32, 32), torch.float32)
    for size in (37, 3, 1, 37):
        assert math.isfinite(trainer.step(images[:size], labels[:size]))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_trains_alike(isa):
    run_on(isa, "test_trainer", "variant_check")


def variant_check():
    for name in models.MODELS:
        model = build(name)
        assert_trains_alike(model, model.reference(), gentle(name, SETTINGS[2]), size_of(model), steps=5)
        for size in (2, 32):
            test_float32_is_as_close_to_float64_as_pytorch_is(name, size)


# --- Whole runs -------------------------------------------------------------------------------------------------------


def bytes_like(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (number, 28, 28), dtype=torch.uint8, generator=generator)
    return images, torch.randint(10, (number,), generator=generator)


@pytest.mark.parametrize("number", [1, 2, 20])
def test_bytes_are_the_floats_that_they_become(number):
    """In the middle of a larger input, on few images and on blocks of them."""
    model = build("lenet5-1998")
    twin = copy.deepcopy(model)
    images, labels = bytes_like(number)
    floats = model.input_spec.prepare(images, torch.float64)
    loss, expected = (
        FusedTrainer(each, lr=1e-4).step(data, labels) for each, data in ((model, images), (twin, floats))
    )
    assert loss == pytest.approx(expected, rel=1e-12)
    assert_parameters_close(model, twin, 1e-12)


@pytest.mark.parametrize("name", models.MODELS)
def test_a_run_is_the_loop_anyone_would_write(name):
    model = build(name)
    twin = model.reference()
    settings = gentle(name, SETTINGS[1])
    optimizer = plain_optimizer(twin, settings)
    images, labels = bytes_like(68)
    seen = []
    history = FusedTrainer(model, **settings).run(
        images,
        labels,
        batch_size=32,
        epochs=2,
        generator=torch.Generator().manual_seed(3),
        on_step=lambda step, loss: seen.append((step, loss)),
    )
    inputs = model.input_spec.prepare(images, torch.float64)
    generator = torch.Generator().manual_seed(3)
    losses, right = [], []
    for _ in range(2):
        for batch in torch.randperm(68, generator=generator).split(32):
            classes = models.classify(twin, twin(inputs[batch]))
            right.append((classes == labels[batch]).sum().item())
            losses.append(plain_step(twin, optimizer, inputs[batch], labels[batch]))
    torch.testing.assert_close(history.losses.flatten().tolist(), losses, rtol=0, atol=1e-10)
    assert history.correct.tolist() == [right[:3], right[3:]]
    assert history.accuracy == [sum(right[:3]) / 68, sum(right[3:]) / 68]
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in seen] == history.losses.flatten().tolist()
    assert_parameters_close(model, twin, 1e-10)


def test_images_of_any_layout_and_labels_of_any_integers():
    model = build("lenet1")
    images, labels = bytes_like(40)
    strided = images.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    weights = []
    for pixels, targets in ((images, labels), (strided, labels.int()), (images, labels.to(torch.uint8))):
        trained = copy.deepcopy(model)
        FusedTrainer(trained, lr=0.1).step(pixels, targets)
        weights.append(trained.output.weight)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_without_a_generator_the_order_is_pytorchs():
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        model = build("lenet1", seed=1)
        torch.manual_seed(5)
        FusedTrainer(model, lr=0.1).run(*bytes_like(40), batch_size=8)
        results.append(model)
    assert_parameters_close(*results, 0)


def test_learning_rates_of_each_step():
    model = build("lenet1")
    twin = model.reference()
    images, labels = bytes_like(40)
    rates = [0.1, 0.2, 0.05]
    FusedTrainer(model, "adam", lr=1.0).run_epoch(images, labels, torch.arange(40), 16, rates)
    optimizer = torch.optim.Adam(twin.parameters(), lr=1.0)
    inputs = model.input_spec.prepare(images, torch.float64)
    for rate, batch in zip(rates, torch.arange(40).split(16), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        plain_step(twin, optimizer, inputs[batch], labels[batch])
    assert_parameters_close(model, twin, 1e-10)


def test_a_run_that_diverges_stops_there():
    trainer = FusedTrainer(build("lenet5", torch.float32), lr=1e4)
    losses = []
    with pytest.raises(TrainingError, match=r"the loss is not finite in step \d+"):
        trainer.run(*bytes_like(200), batch_size=8, epochs=10, on_step=lambda step, loss: losses.append(loss))
    assert losses
    assert all(math.isfinite(loss) for loss in losses)


def test_an_order_of_any_stride():
    images, labels = bytes_like(8)
    model, twin = build("lenet1"), build("lenet1")
    order = torch.arange(16) % 8
    losses, _ = FusedTrainer(model, lr=0.01).run_epoch(images, labels, order[::2], 3)
    expected, _ = FusedTrainer(twin, lr=0.01).run_epoch(images, labels, order[::2].clone(), 3)
    assert torch.equal(losses, expected)


def test_a_later_epoch_that_diverges_counts_all_steps():
    images, labels = images_like(6, (1, 32, 32))
    trainer = FusedTrainer(build("lenet5"), lr=1e-3)

    def spoil(step, loss):
        if step == 3:  # the first epoch's last
            images.fill_(math.nan)

    with pytest.raises(TrainingError, match="not finite in step 4"):
        trainer.run(images, labels, batch_size=2, epochs=2, on_step=spoil)


def test_the_pace_of_one_epoch_is_that_of_the_next(monkeypatch):
    """Steps a native call: one at first, then ever more; another batch size starts afresh."""
    calls = []
    trainer = FusedTrainer(build("lenet1"), lr=0.01)
    take = trainer._steps.take

    def counted(images, labels, order, batch_size, rates, masks):
        calls.append(len(rates))
        return take(images, labels, order, batch_size, rates, masks)

    monkeypatch.setattr(trainer._steps, "take", counted)
    monkeypatch.setattr("lenet_fast.trainer._CALL_SECONDS", 1e9)  # a call may take as long as it likes
    trainer.run(*bytes_like(40), batch_size=2, epochs=2)
    assert calls == [1, 4, 15, 20]
    trainer.run(*bytes_like(40), batch_size=4)
    assert calls[4:] == [1, 4, 5]


# --- The model and the optimizer stay PyTorch's -----------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS)
def test_training_goes_on_in_plain_pytorch_and_back(settings):
    model = build("lenet5-d2l")
    twin = model.reference()
    images, labels = images_like(20, (1, 28, 28))
    trainer, optimizer = FusedTrainer(model, **settings), plain_optimizer(twin, settings)
    for _ in range(2):
        trainer.step(images, labels)
        plain_step(twin, optimizer, images, labels)
        plain_step(model, trainer.optimizer, images, labels)
        plain_step(twin, optimizer, images, labels)
    assert_parameters_close(model, twin, 1e-10)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_state_loads_from_and_into_torch_optim(settings):
    model = build("lenet1")
    twin = model.reference()
    images, labels = images_like(20, (1, 28, 28))
    optimizer = plain_optimizer(twin, settings)
    plain_step(twin, optimizer, images, labels)
    model.load_state_dict(twin.state_dict())
    trainer = FusedTrainer(model, **settings)
    trainer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trainer.step(images, labels)
    plain_step(twin, optimizer, images, labels)
    assert_parameters_close(model, twin, 1e-12)
    model_of_another = copy.deepcopy(model)
    another = FusedTrainer(model_of_another, **settings)
    another.load_state_dict(copy.deepcopy(trainer.state_dict()))
    trainer.step(images, labels)
    another.step(images, labels)
    assert_parameters_close(model, model_of_another, 0)


def test_learning_rate_schedulers_work():
    model = build("lenet1")
    twin = model.reference()
    images, labels = images_like(20, (1, 28, 28))
    trainer, optimizer = FusedTrainer(model, lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (trainer.optimizer, optimizer)]
    for _ in range(4):
        trainer.step(images, labels)
        trainer.optimizer.step()  # no gradients: nothing to do, but schedulers want to see it
        plain_step(twin, optimizer, images, labels)
        for scheduler in schedulers:
            scheduler.step()
    assert_parameters_close(model, twin, 1e-12)


@pytest.mark.parametrize("settings", SETTINGS)
def test_frozen_parameters_stay(settings):
    model = build("lenet5-d2l")
    twin = model.reference()
    for network in (model, twin):
        network.c1.weight.requires_grad_(False)
        network.f6.bias.requires_grad_(False)
    frozen = model.c1.weight.clone()
    assert_trains_alike(model, twin, settings, (1, 28, 28), steps=5)
    assert torch.equal(model.c1.weight, frozen)


def test_a_step_counts_as_a_change_in_place():
    model = build("lenet1", torch.float32)
    images, labels = images_like(4, (1, 28, 28), torch.float32)
    loss = model(images).sum()
    FusedTrainer(model, lr=0.1).step(images, labels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_needs_no_gradients_and_leaves_them():
    model = build("lenet1", torch.float32)
    images, labels = images_like(4, (1, 28, 28), torch.float32)
    losses = []
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        trained = copy.deepcopy(model)
        with context:
            losses.append(FusedTrainer(trained, lr=0.1).step(images, labels))
        assert all(parameter.grad is None for parameter in trained.parameters())
    assert losses[0] == losses[1] == losses[2]


# --- Interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 5, 40])
def test_an_exception_in_on_step_leaves_whole_steps(stop):
    class Enough(Exception):
        pass

    images, labels = bytes_like(64)
    order = torch.arange(64).repeat(10)

    def report(step, loss):
        if step == stop:
            raise Enough

    model = build("lenet1")
    again = copy.deepcopy(model)
    trainer = FusedTrainer(model, "adam", lr=1e-3)
    with pytest.raises(Enough):
        trainer.run_epoch(images, labels, order, 8, on_step=report)
    counts = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert len(counts) == 1
    (steps,) = counts
    assert steps >= stop
    FusedTrainer(again, "adam", lr=1e-3).run_epoch(images, labels, order[: 8 * steps], 8)
    assert_parameters_close(model, again, 0)


def test_control_c_stops_between_steps():
    model = build("lenet5", torch.float32)
    trainer = FusedTrainer(model, "adam", lr=1e-4)
    images, labels = bytes_like(1000)
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        trainer.run(images, labels, batch_size=32, epochs=3000)
    timer.join()
    assert len({int(state["step"]) for state in trainer.optimizer.state.values()}) == 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_native_call_releases_the_interpreter():
    """While one thread trains in one native call, another one runs Python."""
    model = build("lenet5", torch.float32)
    trainer = FusedTrainer(model, lr=1e-4)
    images, labels = images_like(3000, (1, 32, 32), torch.float32)
    begun, ended, ticks = threading.Event(), threading.Event(), []

    def train():
        begun.set()
        trainer.step(images, labels)
        ended.set()

    thread = threading.Thread(target=train)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)  # a thread that does not release the interpreter would keep it
    try:
        thread.start()
        begun.wait()
        while not ended.wait(0.001):
            ticks.append(None)
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(ticks) >= 3


# --- What is refused --------------------------------------------------------------------------------------------------


def lenet(**changes):
    """A small LeNet with some layers replaced, or None for taken out."""
    layers = {
        "conv1": nn.Conv2d(1, 4, 5),
        "act1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(4, 6, 3),
        "act2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "dense": nn.Linear(54, 20),
        "act3": nn.ReLU(),
        "output": nn.Linear(20, 10),
    } | changes
    model = nn.Sequential()
    for name, layer in layers.items():
        if layer is not None:
            model.add_module(name, layer)
    return model


def test_the_small_lenet_itself_is_taken():
    FusedTrainer(lenet(), lr=0.1).step(*images_like(5, (1, 20, 20), torch.float32))


def test_parameters_that_native_code_cannot_write_to():
    def refused(model, match):
        with pytest.raises(NetworkError, match=match):
            FusedTrainer(model, lr=0.1, native_only=True)

    refused(lenet().half(), "conv1.weight: expected float32 or float64")
    mixed = lenet()
    mixed.output.double()
    refused(mixed, "output.weight: expected float32 or float64, one for all")
    refused(lenet().to("meta"), "conv1.weight: on meta")
    strided = lenet().to(memory_format=torch.channels_last)
    refused(strided, "conv2.weight: not contiguous")
    tied = lenet(dense=nn.Linear(54, 54), output=nn.Linear(54, 54))
    tied.output.weight = tied.dense.weight
    refused(tied, "output.weight: the same parameter as dense.weight")
    overlapping = lenet(dense=nn.Linear(54, 54), output=nn.Linear(54, 54))
    memory = torch.zeros(2 * 54 * 54)
    overlapping.dense.weight.data = memory[: 54 * 54].view(54, 54)
    overlapping.output.weight.data = memory[54 * 53 : 54 * 107].view(54, 54)
    refused(overlapping, "output.weight: shares memory with dense.weight")


def test_changes_of_the_model_are_noticed():
    images, labels = images_like(5, (1, 20, 20), torch.float64)
    model = lenet().double()
    trainer = FusedTrainer(model, lr=0.1)
    trainer.step(images, labels)
    model.act3 = nn.Tanh()
    twin = copy.deepcopy(model)
    loss = plain_step(twin, torch.optim.SGD(twin.parameters(), lr=0.1), images, labels, nn.CrossEntropyLoss())
    assert trainer.step(images, labels) == pytest.approx(loss, abs=1e-12)
    assert_parameters_close(model, twin, 1e-12)
    model.act3 = nn.GELU()
    assert "act3: native steps have no GELU" in trainer.how()
    twin = copy.deepcopy(model)
    loss = plain_step(twin, torch.optim.SGD(twin.parameters(), lr=0.1), images, labels, nn.CrossEntropyLoss())
    assert trainer.step(images, labels) == pytest.approx(loss, abs=1e-12)
    assert_parameters_close(model, twin, 1e-12)
    model.act3 = nn.ReLU()
    model.output.weight = nn.Parameter(torch.zeros(10, 20, dtype=torch.float64))
    with pytest.raises(NetworkError, match=r"output\.weight: was replaced"):
        trainer.step(images, labels)


def changes_between_steps():
    """Of a model and its optimizer, after the first step; each makes the second step another one."""

    def parameter_data(model, optimizer):
        model.output.weight.data = 2 * model.output.weight.data

    def parameter_in_place(model, optimizer):
        with torch.no_grad():
            model.output.weight.mul_(2)

    def frozen(model, optimizer):
        model.output.weight.requires_grad_(False)

    def thawed(model, optimizer):
        model.conv1.bias.requires_grad_(True)

    def state_cleared(model, optimizer):
        optimizer.state.clear()

    def moments_replaced(model, optimizer):
        state = optimizer.state[model.output.weight]
        for name in state.keys() - {"step"}:
            state[name] = 2 * state[name]

    def one_state_replaced(model, optimizer):
        state = optimizer.state[model.output.weight]
        optimizer.state[model.output.weight] = {name: value + 1 for name, value in state.items()}

    def state_loaded(model, optimizer):
        state = copy.deepcopy(optimizer.state_dict())
        for moments in state["state"].values():
            for value in moments.values():
                value.add_(1)
        optimizer.load_state_dict(state)

    def settings(model, optimizer):
        optimizer.param_groups[0].update(lr=0.3, weight_decay=0.2)

    def class_of_a_layer(model, optimizer):
        model.act3.__class__ = nn.Tanh

    def option_of_a_layer(model, optimizer):
        model.conv2.padding = (1, 1)
        model.dense.weight.data = model.dense.weight.data.repeat(1, 2)[:, : 6 * 16].contiguous()
        model.dense.in_features = 6 * 16
        optimizer.state.clear()

    return [value for value in locals().values() if callable(value)]


@pytest.mark.parametrize("change", changes_between_steps(), ids=lambda change: change.__name__)
@pytest.mark.parametrize("settings", [SETTINGS[1], SETTINGS[3]], ids=lambda settings: settings["optimizer"])
def test_what_changes_between_steps_counts(change, settings):
    torch.manual_seed(0)
    model = lenet().double()
    model.conv1.bias.requires_grad_(False)
    twin, unchanged = copy.deepcopy(model), copy.deepcopy(model)
    images, labels = images_like(5, (1, 20, 20))
    trainer, other = FusedTrainer(model, **settings), FusedTrainer(unchanged, **settings)
    optimizer = plain_optimizer(twin, settings)
    for step in range(3):
        if step == 1:
            change(model, trainer.optimizer)
            change(twin, optimizer)
        trainer.step(images, labels)
        other.step(images, labels)
        plain_step(twin, optimizer, images, labels, nn.CrossEntropyLoss())
    assert_parameters_close(model, twin, 1e-12)
    assert any(
        a.shape != b.shape or (a - b).abs().max() > 1e-6
        for a, b in zip(model.parameters(), unchanged.parameters(), strict=True)
    )


def bad_changes_between_steps():
    """The same, but no step can be taken then."""

    def smaller(model, trainer):
        model.output.weight.data = model.output.weight.data[:, :10].contiguous()

    def smaller_in_the_same_place(model, trainer):
        model.output.weight.data = model.output.weight.data[:5]

    def transposed(model, trainer):
        model.output.weight.data = model.output.weight.data.t()

    def another_dtype(model, trainer):
        model.output.weight.data = model.output.weight.data.double()

    def half(model, trainer):
        model.half()

    def overlapping(model, trainer):
        model.output.bias.data = model.output.bias.data[:1].expand(10)

    def moments_of_another_dtype(model, trainer):
        model.double()

    def moment_of_another_size(model, trainer):
        trainer.optimizer.state[model.output.weight]["exp_avg"] = torch.zeros(3)

    def moment_resized(model, trainer):
        trainer.optimizer.state[model.output.weight]["exp_avg_sq"].resize_(10, 10)

    def count_of_another_dtype(model, trainer):
        trainer.optimizer.state[model.output.weight]["step"] = torch.zeros((), dtype=torch.float64)

    def count_that_is_none(model, trainer):
        trainer.optimizer.state[model.output.weight]["step"].fill_(math.nan)

    def negative_count(model, trainer):
        trainer.optimizer.state[model.output.weight]["step"].fill_(-1)

    def parameter_out_of_the_optimizer(model, trainer):
        trainer.optimizer.param_groups[0]["params"].pop()

    def parameter_replaced_in_the_optimizer(model, trainer):
        trainer.optimizer.param_groups[0]["params"][-1] = nn.Parameter(torch.zeros(10))

    def second_group(model, trainer):
        trainer.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})

    return [value for value in locals().values() if callable(value)]


@pytest.mark.parametrize("change", bad_changes_between_steps(), ids=lambda change: change.__name__)
def test_what_cannot_be_trained_any_more_is_refused(change):
    model = lenet()
    trainer = FusedTrainer(model, "adam", lr=0.1)
    images, labels = images_like(5, (1, 20, 20), torch.float32)
    trainer.step(images, labels)
    change(model, trainer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):  # and the second time as the first
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            trainer.step(images, labels)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda trainer: pickle.loads(pickle.dumps(trainer))])
def test_a_copy_is_on_its_own(copied):
    images, labels = images_like(5, (1, 20, 20), torch.float32)
    trainer = FusedTrainer(lenet(), "adam", lr=0.01, native_only=True)
    trainer.step(images, labels)
    other = copied(trainer)
    before = copy.deepcopy(trainer.model)
    other.step(images, labels)
    assert_parameters_close(trainer.model, before, 0)
    trainer.step(images, labels)
    assert_parameters_close(trainer.model, other.model, 0)
    other.model.conv1.stride = (2, 2)
    with pytest.raises(NetworkError, match="conv1: stride"):
        other.step(images, labels)


def test_sizes_that_do_not_fit_are_refused():
    trainer = FusedTrainer(lenet(), lr=0.1)
    for shape, part in (
        ((1, 28, 28), "dense: expected 54 features, 150 arrive"),
        ((3, 20, 20), "conv1: expected 1 channels, 3 arrive"),
        ((1, 4, 4), "conv1: nothing is left"),
        ((1, 8, 8), "conv2: nothing is left"),
    ):
        with pytest.raises(NetworkError, match=part):
            trainer.step(*images_like(5, shape, torch.float32))


def test_images_and_labels_are_checked():
    model = build("lenet1", torch.float32)
    weights = copy.deepcopy(model.state_dict())
    trainer = FusedTrainer(model, lr=0.1)
    images, labels = images_like(8, (1, 28, 28), torch.float32)
    pixels, _ = bytes_like(8)
    for error, arguments, match in (
        (TypeError, (images.double(), labels), "images: expected uint8 or torch.float32"),
        (TypeError, (images.tolist(), labels), "images: expected a tensor"),
        (ValueError, (images[:, 0], labels), r"images: expected \(N, C, H, W\)"),
        (ValueError, (pixels[:, None, None], labels), r"images: expected uint8 \(N, H, W\) or \(N, C, H, W\)"),
        (ValueError, (images, labels[:7]), r"labels: expected \(8,\)"),
        (ValueError, (images[:0], labels[:0]), "labels: expected"),
        (TypeError, (images, labels.float()), "labels: expected an integer dtype"),
        (ValueError, (images.to("meta"), labels), "images: expected on cpu"),
        (ValueError, (pixels[:, :, :27], labels), "images: height and width must be 28"),
    ):
        with pytest.raises((error, RuntimeError) if "height" in match else error, match=match):
            trainer.step(*arguments)
    for wrong in (-1, 10, 2**40):
        bad = labels.clone()
        bad[5] = wrong
        with pytest.raises(RuntimeError, match=f"labels: expected 0 to 9, got {wrong} at 5"):
            trainer.step(images, bad)
    for wrong in (-1, 8):
        with pytest.raises(ValueError, match=f"order: expected indices from 0 to 7, got {wrong}"):
            trainer.run_epoch(images, labels, torch.tensor([0, 1, 2, wrong]), 1)
    for wrong, batch_size in itertools.product((-1, 8, 2**40), (1, 8)):  # the native steps look at it themselves
        order = torch.tensor([0, 1, 2, 3, 4, wrong, 6, 7])
        with pytest.raises(RuntimeError, match=f"order: expected 0 to 7, got {wrong} at 5"):
            trainer._steps.take(images, labels, order, batch_size, [0.1] * (8 // batch_size), Masks(None))
    for size in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="batch_size"):
            trainer.run(images, labels, batch_size=size)
        with pytest.raises(ValueError, match="batch_size"):
            trainer.run_epoch(images, labels, torch.arange(8), size)
    with pytest.raises(ValueError, match="epochs"):
        trainer.run(images, labels, batch_size=2, epochs=0)
    with pytest.raises(ValueError, match="learning_rates"):
        trainer.run_epoch(images, labels, torch.arange(8), 4, [0.1])
    with pytest.raises(ValueError, match="input_spec"):
        FusedTrainer(model.reference(), lr=0.1).step(pixels, labels)
    for key, value in weights.items():
        assert torch.equal(model.state_dict()[key], value)  # nothing of all that trained


def test_settings_are_checked():
    for settings, error, match in (
        ({"optimizer": "rmsprop"}, ValueError, "optimizer"),
        ({"optimizer": "adam", "momentum": 0.9}, ValueError, "momentum"),
        ({"lr": -1.0}, ValueError, "learning rate"),
        ({"j": -1.0}, ValueError, "j: expected"),
        ({"input_spec": 28}, TypeError, "input_spec"),
        ({"nesterov": True}, ValueError, "Nesterov"),
    ):
        with pytest.raises(error, match=match):
            FusedTrainer(lenet(), **({"lr": 0.1} | settings))
    with pytest.raises(TypeError, match="model"):
        FusedTrainer(lambda x: x, lr=0.1)
    trainer = FusedTrainer(lenet(), "adam", lr=0.1)
    trainer.optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad"):
        trainer.step(*images_like(5, (1, 20, 20), torch.float32))


@pytest.mark.parametrize("name", ["lenet5", "lenet5-1998"])
@pytest.mark.parametrize("size", [2, 20])
def test_a_step_whose_loss_is_not_finite_is_not_taken(name, size):
    model = build(name, torch.float32)
    before = copy.deepcopy(model)
    images, labels = images_like(size, size_of(model), torch.float32)
    images[size // 2, 0, 5, 5] = math.nan
    with pytest.raises(TrainingError, match="not finite in step 1"):
        FusedTrainer(model, "adam", lr=1e-3).step(images, labels)
    assert_parameters_close(model, before, 0)


def test_the_raw_operators_survive_anything():
    """Random changes of a good call raise or run; they never crash the interpreter. Both happen to each operator."""
    operators = torch.ops.lenet_fast
    networks = [Network.of(build(name, torch.float32)) for name in ("lenet5-1998", "lenet5")]
    images, labels = bytes_like(8)
    generator = random.Random(0)
    outcomes = Counter()

    def attempt(operator, *arguments):
        try:
            result = operator(*arguments)
        except RuntimeError:
            outcomes[operator, "raised"] += 1
            return None
        outcomes[operator, "ran"] += 1
        return result

    def cut(values):
        return values if generator.random() < 0.9 else values[: generator.randrange(len(values))]

    def changed_numbers():
        changed = list(numbers)
        for _ in range(generator.choice((0, 1, 1, 2))):
            value = generator.choice((-1, 0, 1, 2, 3, 7, 100, 2**20, 2**31, 2**62))
            changed[generator.randrange(12) if generator.random() < 0.7 else generator.randrange(len(changed))] = value
        return cut(changed)

    def changed_tensors():
        changed = [tensor.clone() for tensor in tensors]
        if generator.random() < 0.3:
            changed[generator.randrange(len(changed))] = torch.zeros(generator.randrange(3))
        return cut(changed)

    def changed_images():
        side = generator.choice((0, 1, 28, 30, 32, 32, 33))
        if generator.random() < 0.5:
            return torch.zeros(generator.choice((0, 1, 3, 40)), side, side, dtype=torch.uint8)
        floats = torch.rand(generator.choice((0, 1, 3, 40)), generator.choice((0, 1, 1, 1, 2)), side, side)
        return generator.choice((floats, floats, floats, floats.double(), floats.mT, floats.flatten(1)))

    def most_often(right, *wrong):
        return right if generator.random() < 0.85 else generator.choice(wrong)

    def changed_bytes():
        """Images of the batch, most of them of one channel and 28 x 28."""
        channels, height, width = most_often(1, 0, 2, 3), most_often(28, 0, 1, 32, 33), most_often(28, 0, 1, 32, 33)
        four = torch.full((8, channels, height, width), 255, dtype=torch.uint8)
        return generator.choice((images, images[:, None], four, four))

    def changed_dropout():
        """No probability, or two for each layer and two for the output, most of the time."""
        right = 2 * (len(network.layers) + 1)
        length = most_often(generator.choice((0, right, right)), 1, 2, right - 2, right - 1, right + 1, 99)
        drawn = [generator.choice((0.0, 0.5, 1.0)) for _ in range(length)]
        if drawn and generator.random() < 0.15:
            drawn[generator.randrange(length)] = generator.choice((math.nan, math.inf, -math.inf, -0.5, 1.5, -1e-300))
        return drawn

    for _ in range(400):
        network = generator.choice(networks)
        numbers, tensors = network.numbers((1, 32, 32)), network.tensors()
        trained = changed_tensors()
        attempt(
            operators.network_train, changed_numbers() if generator.random() < 0.4 else numbers, trained, [], [], [],
            [1] * (len(trained) - network.measures_distance), changed_bytes(), labels, None, 8, 0.01, -0.1,
            "sgd", [0.0] * 6, [0.0], 0.0, changed_dropout(), generator.choice((0, 1, -1, 2**63 - 1, -(2**63))),
            most_often(generator.choice((0, 5, 2**32 - 1)), -1, 2**32, 2**62, -(2**63)),
            most_often(0.0, 0.1, 1.0, 1.5, -0.1, math.nan),
        )  # fmt: skip
        handle = attempt(operators.network_define, changed_numbers())
        if handle is not None:
            for _ in range(4):
                scores = attempt(operators.network_infer, handle, changed_tensors(), changed_images(), 0.01, -0.1)
                assert scores is None or scores.dim() == 2
            operators.network_release(handle)
        assert attempt(operators.network_infer, handle or 2**40, tensors, images, 0.01, -0.1) is None
    for operator in (operators.network_train, operators.network_define, operators.network_infer):
        assert min(outcomes[operator, "ran"], outcomes[operator, "raised"]) > 40, outcomes
