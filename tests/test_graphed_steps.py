"""FusedTrainer where the CUDA kernels refuse the network: steps in graphs, on the CPU, as exact as its own steps."""

import copy
import math
import pickle
import re
import warnings
from contextlib import contextmanager, nullcontext

import pretend_cuda
import pytest
import torch
from random_networks import joined, random_data, random_network
from test_trainer import bytes_like, images_like
from torch import nn

from lenet_fast import autograd_step, backends, env, graphed_steps, models, training_operands
from lenet_fast.nn import ConvActPool2d, SparseConvActPool2d
from lenet_fast.trainer import FusedTrainer, TrainingError
from lenet_fast.training_operands import TrainingOperands

REASON = "network: cannot be trained by the CUDA kernels: for it is a test"
# Learning rates are float32 in a graph: powers of two are exact.
SETTINGS = [
    {"optimizer": "sgd", "lr": 2**-6},
    {"optimizer": "sgd", "lr": 2**-6, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True},
    {"optimizer": "adam", "lr": 2**-9, "weight_decay": 1e-2, "betas": (0.8, 0.99), "eps": 1e-7},
    {"optimizer": "adamw", "lr": 2**-9, "weight_decay": 0.1},
]

pytestmark = pytest.mark.filterwarnings("ignore:lenet_fast. no training in one launch")


@pytest.fixture
def graphed(monkeypatch):
    """Trainers made after it was called take the CPU for a GPU whose kernels refuse every network."""

    def begin():
        monkeypatch.setattr(training_operands, "_QUEUES", {"cpu"})
        monkeypatch.setattr(TrainingOperands, "_try_on_nothing", lambda self, image: REASON)
        for name, value in pretend_cuda.GRAPHS.items():
            monkeypatch.setattr(torch.cuda, name, value)

    return begin


@pytest.fixture
def captures(monkeypatch):
    """Batch sizes of the graphs that were captured."""
    sizes = []
    capture = graphed_steps.GraphedSteps._capture

    def noted(self, images, labels):
        sizes.append(len(labels))
        return capture(self, images, labels)

    monkeypatch.setattr(graphed_steps.GraphedSteps, "_capture", noted)
    return sizes


def build(name="lenet1", dtype=torch.float64):
    torch.manual_seed(0)
    return models.MODELS[name]().to(dtype)


def train(model, settings, data, *, batch_size=8, epochs=2):
    model = copy.deepcopy(model)
    trainer = FusedTrainer(model, **settings)
    generator = torch.Generator().manual_seed(3)
    history = trainer.run(*data, batch_size=batch_size, epochs=epochs, generator=generator)
    return history, model, trainer


def assert_equal_training(one, other):
    (history, model, trainer), (expected, twin, plain) = one, other
    torch.testing.assert_close(history.losses, expected.losses, rtol=1e-10, atol=0)
    assert torch.equal(history.correct, expected.correct)
    assert_equal_parameters(model, twin)
    states = [each.state_dict()["state"] for each in (trainer, plain)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[1].items():
        for name, value in state.items():
            torch.testing.assert_close(states[0][index][name], value, rtol=1e-9, atol=1e-14)


def assert_equal_parameters(model, twin):
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def gentle(name, settings):
    return settings | {"lr": 2**-14} if name == "lenet5-1998" else settings  # its loss starts near 80


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", models.MODELS)
def test_models(graphed, captures, name, settings):
    settings, data = gentle(name, settings), bytes_like(21)
    expected = train(build(name), settings, data)
    graphed()
    assert_equal_training(train(build(name), settings, data), expected)
    assert captures == [8, 5]


def networks():
    torch.manual_seed(1)
    table = torch.rand(5, 3) < 0.6
    table[0] = True
    table[1] = False
    return {
        "sparse": nn.Sequential(
            ConvActPool2d(1, 3, 3, padding="same", activation="tanh", pool="none"),
            SparseConvActPool2d(table, 4, padding=2, activation="relu", pool="max", bias=False),
            nn.Flatten(),
            nn.Linear(125, 12),
            nn.Tanh(),
            nn.Linear(12, 10, bias=False),
        ),
        "plain": nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(6, 10),
        ),
    }


@pytest.mark.parametrize("name", networks())
def test_other_networks_on_float_images(graphed, name):
    model, data = networks()[name].double(), images_like(11, (1, 9, 9))
    expected = train(model, SETTINGS[1], data, batch_size=4)
    graphed()
    assert_equal_training(train(model, SETTINGS[1], data, batch_size=4), expected)


def test_networks_of_any_shape(graphed):
    networks = [random_network(seed) for seed in range(2000, 2060)]
    data = [random_data(seed, drawn.image, drawn.classes) for seed, drawn in enumerate(networks)]
    settings = [SETTINGS[seed % len(SETTINGS)] | {"lr": 2**-13} for seed in range(len(networks))]

    def train_all():
        return [
            train(drawn.network, setting, each[:2], batch_size=each[2])
            for drawn, each, setting in zip(networks, data, settings, strict=True)
        ]

    expected = train_all()
    graphed()
    for (history, _, trainer), (right, _, plain) in zip(train_all(), expected, strict=True):
        torch.testing.assert_close(history.losses, right.losses, rtol=1e-8, atol=1e-10)
        moments, others = (
            [
                value.flatten()
                for state in each.state_dict()["state"].values()
                for name, value in state.items()
                if name in ("momentum_buffer", "exp_avg")
            ]
            for each in (trainer, plain)
        )
        if moments:  # sums of gradients
            found, right_ones = joined(moments), joined(others)
            assert (found - right_ones).abs().max() <= 1e-8 * right_ones.abs().max()


def test_frozen_parameters_stay(graphed):
    model = build("lenet5-1998")
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 1)
    settings = SETTINGS[3] | {"lr": 2**-14}
    expected = train(model, settings, bytes_like(12))
    graphed()
    assert_equal_training(train(model, settings, bytes_like(12)), expected)


def test_nothing_to_train_is_the_loss_alone(graphed):
    model = build().requires_grad_(False)
    trained = build()
    first = FusedTrainer(trained, lr=2**-6).step(*bytes_like(4))
    graphed()
    assert FusedTrainer(model, lr=2**-6).step(*bytes_like(4)) == pytest.approx(first, rel=1e-12)
    assert_equal_parameters(model, build())


def test_a_rate_for_each_step_and_an_order(graphed, captures):
    data, order = bytes_like(20), torch.tensor([3, 3, 19, 0, 7, 8, 1, 2, 11])
    rates = [2**-6, 2**-5, 2**-7, 2**-4, 2**-8]
    model, twin = build(), build()
    expected = FusedTrainer(twin, lr=1.0).run_epoch(*data, order, 2, rates)
    graphed()
    seen = []
    results = FusedTrainer(model, lr=1.0).run_epoch(*data, order, 2, rates, lambda *step: seen.append(step))
    torch.testing.assert_close(results[0], expected[0], rtol=1e-10, atol=0)
    assert torch.equal(results[1], expected[1])
    assert seen == list(enumerate(results[0].tolist(), 1))
    assert_equal_parameters(model, twin)
    assert captures == [2, 1]


def test_steps_one_by_one(graphed, captures):
    images, labels = bytes_like(12)
    model, twin = build(), build()
    expected = FusedTrainer(twin, lr=2**-6)
    losses = [expected.step(images[:size], labels[:size]) for size in (5, 3, 5, 12)]
    graphed()
    trainer = FusedTrainer(model, lr=2**-6)
    for size, loss in zip((5, 3, 5, 12), losses, strict=True):
        assert trainer.step(images[:size], labels[:size]) == pytest.approx(loss, rel=1e-10)
    assert_equal_parameters(model, twin)
    assert captures == [5, 3, 12]


def test_a_call_has_an_end(graphed, monkeypatch):
    """However many steps it is asked for."""
    data, order = bytes_like(6), torch.arange(6).repeat(9)
    model, twin = build(), build()
    expected, _ = FusedTrainer(twin, lr=2**-6).run_epoch(*data, order, 3)
    graphed()
    monkeypatch.setattr(graphed_steps, "_MOST_STEPS", 4)
    monkeypatch.setattr("lenet_fast.trainer._CALL_SECONDS", 1e9)
    trainer = FusedTrainer(model, lr=2**-6)
    losses, _ = trainer.run_epoch(*data, order, 3)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=0)
    assert_equal_parameters(model, twin)
    trainer.run_epoch(*data, order[:8], 2)
    trainer.run_epoch(*data, order[:4], 4)  # its capture counts from 0, too


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_whose_loss_is_not_finite_is_not_taken_nor_any_after_it(graphed, monkeypatch, settings):
    images, labels = images_like(12, (1, 28, 28))
    images[7, 0, 3, 3] = math.nan
    order = torch.arange(12)
    model, twin = build(), build()
    expected = FusedTrainer(twin, **settings)
    expected.run_epoch(images, labels, order[:6], 2)
    graphed()
    monkeypatch.setattr("lenet_fast.trainer._CALL_SECONDS", 1e9)
    trainer = FusedTrainer(model, **settings)
    seen = []
    with pytest.raises(TrainingError, match="not finite in step 4"):
        trainer.run_epoch(images, labels, order, 2, on_step=lambda step, loss: seen.append(step))
    assert seen == [1, 2, 3]
    assert_equal_parameters(model, twin)
    for one, other in zip(trainer.optimizer.state.values(), expected.optimizer.state.values(), strict=True):
        for name, value in other.items():
            torch.testing.assert_close(one[name], value, rtol=1e-9, atol=1e-14)
    trainer.step(images[:2], labels[:2])  # and it goes on
    expected.step(images[:2], labels[:2])
    assert_equal_parameters(model, twin)


# --- What a graph is of ----------------------------------------------------------------------------------------------


def test_a_graph_is_captured_anew_for_other_settings_and_other_state(graphed, captures):
    data = bytes_like(8)
    model, twin = build(), build()
    expected, saved = FusedTrainer(twin, **SETTINGS[1]), []
    changes = [
        lambda trainer: None,
        lambda trainer: trainer.optimizer.param_groups[0].update(weight_decay=0.5),
        lambda trainer: saved.append(copy.deepcopy(trainer.state_dict())),
        lambda trainer: trainer.load_state_dict(saved[-1]),
        lambda trainer: next(trainer.model.parameters()).requires_grad_(False),
    ]
    for change in changes:
        change(expected)
        expected.step(*data)
    graphed()
    trainer = FusedTrainer(model, **SETTINGS[1])
    for change in changes:
        change(trainer)
        trainer.step(*data)
    assert_equal_parameters(model, twin)
    assert captures == [8] * 4


def test_the_learning_rate_is_no_part_of_a_graph(graphed, captures):
    model, twin = build(), build()
    expected = FusedTrainer(twin, lr=2**-6)
    trainers = [expected]
    for trainer in trainers:
        for rate in (2**-6, 2**-4):
            trainer.optimizer.param_groups[0]["lr"] = rate
            trainer.step(*bytes_like(8))
        if trainer is expected:
            graphed()
            trainers.append(FusedTrainer(model, lr=2**-6))
    assert_equal_parameters(model, twin)
    assert captures == [8]


def test_only_so_many_graphs_are_kept(graphed, captures, monkeypatch):
    monkeypatch.setattr(graphed_steps, "_MOST_GRAPHS", 2)
    images, labels = bytes_like(5)
    graphed()
    trainer = FusedTrainer(build(), lr=2**-6)
    for size in (1, 2, 1, 3, 1, 2):
        trainer.step(images[:size], labels[:size])
    assert captures == [1, 2, 3, 2]  # without the one that was used longest ago
    trainer.run(images, labels, batch_size=3)
    assert captures == [1, 2, 3, 2, 3]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda trainer: pickle.loads(pickle.dumps(trainer))])
def test_a_copy_has_its_own(graphed, copied):
    data = bytes_like(8)
    graphed()
    trainer = FusedTrainer(build(), **SETTINGS[2])
    trainer.step(*data)
    other = copied(trainer)
    before = copy.deepcopy(trainer.model)
    other.step(*data)
    assert_equal_parameters(trainer.model, before)
    trainer.step(*data)
    assert_equal_parameters(trainer.model, other.model)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu"),
        lambda: torch.autograd.set_detect_anomaly(True),
        lambda: default_dtype(torch.float64),
    ],
    ids=["no_grad", "inference_mode", "autocast", "anomaly", "default_dtype"],
)
def test_what_surrounds_it_does_not_matter(graphed, context):
    images, labels = images_like(8, (1, 28, 28), torch.float32)
    graphed()
    models = build(dtype=torch.float32), build(dtype=torch.float32)
    for model, surroundings in zip(models, (nullcontext, context), strict=True):
        generator = torch.Generator().manual_seed(3)
        with surroundings():
            FusedTrainer(model, **SETTINGS[1]).run(images, labels, batch_size=8, epochs=2, generator=generator)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_images_of_every_kind_have_graphs_of_their_own(graphed, captures):
    pixels, labels = bytes_like(8)
    images, _ = images_like(8, (1, 28, 28))
    model, twin = build(), build()
    trainers = [FusedTrainer(twin, lr=2**-6)]
    losses = []
    for _ in range(2):
        trainer = trainers[-1]
        batches = pixels, images, pixels, images.clone().requires_grad_()
        losses.append([trainer.step(batch, labels) for batch in batches])
        graphed()
        trainers.append(FusedTrainer(model, lr=2**-6))
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)
    assert_equal_parameters(model, twin)
    assert captures == [8, 8]


def test_the_constant_of_the_map_loss(graphed):
    data = bytes_like(8)
    losses = [FusedTrainer(build("lenet5-1998"), lr=2**-14, j=j).step(*data) for j in (0.0, 50.0)]
    graphed()
    ours = [FusedTrainer(build("lenet5-1998"), lr=2**-14, j=j).step(*data) for j in (0.0, 50.0)]
    assert ours == pytest.approx(losses, rel=1e-10)
    assert losses[0] != losses[1]


def test_the_state_of_a_plain_optimizer(graphed):
    """Saved by one that was not fused: what goes on is, and its state where the model is."""
    data = bytes_like(8)
    model, twin = build(), build()
    plain = torch.optim.Adam(twin.parameters(), lr=2**-9, foreach=True)
    images = twin.input_spec.prepare(data[0], torch.float64)
    for step in range(3):
        if step == 2:
            graphed()
            trainer = FusedTrainer(model, "adam", lr=2**-9)
            model.load_state_dict(twin.state_dict())
            trainer.load_state_dict(copy.deepcopy(plain.state_dict()))
        plain.zero_grad()
        nn.functional.cross_entropy(twin(images), data[1]).backward()
        plain.step()
    trainer.step(*data)
    assert_equal_parameters(model, twin)
    assert trainer.optimizer.param_groups[0]["fused"]
    assert not trainer.optimizer.param_groups[0]["foreach"]


def test_addresses_are_part_of_a_graph(graphed, captures):
    data = bytes_like(8)
    graphed()
    model = build("lenet5-1998")
    trainer = FusedTrainer(model, "adam", lr=2**-14)
    trainer.step(*data)
    trainer.step(*data)
    assert captures == [8]
    moment = next(iter(trainer.optimizer.state.values()))["exp_avg"]
    for number, tensor in enumerate((next(model.parameters()), model.output.codes, moment), 2):
        tensor.data = tensor.data.clone()
        trainer.step(*data)
        assert captures == [8] * number
    torch.set_float32_matmul_precision("high")
    trainer.step(*data)
    torch.set_float32_matmul_precision("highest")
    assert captures == [8] * 5


def test_autograd_knows_nothing_of_the_parameters(graphed):
    """What it has of them elsewhere, on another stream, would be waited for in a capture."""
    graphed()
    model = build()
    trainer = FusedTrainer(model, lr=2**-6)
    trainer.step(*bytes_like(4))
    leaves = trainer._steps._graphed[1]._step.update.parameters
    for leaf, parameter in zip(leaves, model.parameters(), strict=True):
        assert leaf is not parameter
        assert leaf.data_ptr() == parameter.data_ptr()
        assert leaf.is_leaf
        assert leaf.grad is parameter.grad is None


def test_an_error_before_the_capture_changes_nothing(graphed, monkeypatch):
    """Not even the numbers of steps, which the optimizer raises before its update."""
    graphed()
    model = build()
    trainer = FusedTrainer(model, "adam", lr=2**-9)
    call, calls = autograd_step.Update.__call__, []

    def fail(self, *arguments):
        call(self, *arguments)
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(autograd_step.Update, "__call__", fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.step(*bytes_like(4))
    assert_equal_parameters(model, build())
    assert {float(state["step"]) for state in trainer.optimizer.state.values()} == {0.0}
    trainer.step(*bytes_like(4))
    assert {float(state["step"]) for state in trainer.optimizer.state.values()} == {1.0}


def test_it_is_said_once(graphed):
    graphed()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = FusedTrainer(build(), lr=2**-6)
        for trained in (False, True):
            next(trainer.model.parameters()).requires_grad_(trained)
            trainer.run(*bytes_like(8), batch_size=2, epochs=2)
    (warning,) = said
    assert str(warning.message) == (
        f"lenet_fast: no training in one launch: {REASON}. The steps are CUDA graphs of the operators, autograd and "
        "torch.optim."
    )


def test_without_compiled_kernels_for_the_device(graphed, monkeypatch):
    """The operators run on others."""
    data = bytes_like(8)
    expected = train(build(), SETTINGS[1], data)
    attempt = TrainingOperands._try_on_nothing
    graphed()
    monkeypatch.setattr(TrainingOperands, "_try_on_nothing", attempt)
    monkeypatch.setattr(backends, "why_untrained", lambda device_type: None)
    monkeypatch.setattr(backends, "why_unavailable", lambda backend, device_type: "it was not built")
    with pytest.warns(RuntimeWarning, match="no training in one launch: it was not built"):
        FusedTrainer(build(), lr=2**-6)
    assert_equal_training(train(build(), SETTINGS[1], data), expected)


@pytest.mark.parametrize(
    ("missing", "device", "untrained", "report"),
    [
        ({}, "cpu", None, "native"),
        ({}, "cuda", None, "one launch a run; CUDA graphs of networks that are not float32 or too large for a"),
        ({"native": "no nvcc"}, "cpu", "no nvcc", r"not possible \(no nvcc\)"),
        ({"native": "no nvcc"}, "cuda", None, r"CUDA graphs of the operators \(no nvcc\)"),
        ({"native": "no nvcc", "triton": "none"}, "cuda", "no nvcc; none", r"not possible \(no nvcc; none\)"),
    ],
)
def test_what_takes_the_steps(monkeypatch, missing, device, untrained, report):
    monkeypatch.setattr(backends, "why_unavailable", lambda backend, _: missing.get(backend))
    assert backends.why_untrained(device) == untrained
    assert re.match(report, backends.training(device))
    assert re.match(report, env.facts()[f"training on {device}"])
