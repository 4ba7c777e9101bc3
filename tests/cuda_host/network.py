"""Whole training steps of the CUDA kernels on the CPU, against the CPU's own. Run by test_cuda_host.py."""

import copy
import ctypes
import math
import os
import threading

import pretend_cuda
import pytest
import torch
from random_networks import OPTIONS, features, joined, random_data, random_network
from torch import nn

from cuda_host import redirect
from lenet_fast import models, training_operands, watch
from lenet_fast.network import Network
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


@pytest.mark.parametrize("settings", [SETTINGS[0], pytest.param(SETTINGS[1], marks=pytest.mark.races), *SETTINGS[2:]])
@pytest.mark.parametrize("name", models.MODELS)
def test_models(monkeypatch, name, settings):
    if name == "lenet5-1998" and settings["optimizer"] == "sgd":
        settings = settings | {"lr": 1e-4}  # its loss starts near 80
    assert_alike(monkeypatch, build(name), digits(), settings)


@pytest.mark.parametrize("name", models.MODELS)
def test_models_fit_every_gpu_since_2020(monkeypatch, tmp_path, name):
    """The smallest shared memory of a block is that of sm_86, sm_89 and sm_120, 99 KB. (That of sm_75 is 64 KB.)"""
    monkeypatch.setenv("CUDA_HOST_LAUNCHES", str(tmp_path / "launches"))
    direct(build(name), digits(2))
    launches = (line.split(" ", 2) for line in (tmp_path / "launches").read_text().splitlines())
    (shared_bytes,) = (int(size) for _, size, kernel in launches if "train_steps" in kernel)
    assert shared_bytes <= 99 << 10


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


@pytest.mark.races
@pytest.mark.parametrize("name", OTHERS)
def test_other_networks(monkeypatch, name):
    size, channels = SHAPES[name]
    assert_alike(monkeypatch, OTHERS[name], digits(7, size, channels), SETTINGS[1], batch_size=3, epochs=2)


@pytest.mark.parametrize("cooperative", ["1", "0"])
def test_networks_of_any_shape(monkeypatch, cooperative):
    """No further from the CPU's float64 than its float32 is, but for a few roundings: losses and gradients."""
    monkeypatch.setenv("CUDA_HOST_COOPERATIVE", cooperative)
    settings = {"optimizer": "sgd", "lr": 1e-3, "momentum": 0.9}
    tried = set()
    for seed in range(2038, 2060):
        drawn = random_network(seed)
        images, labels, batch_size = random_data(seed, drawn.image, drawn.classes, most=7)
        single = images.float(), labels
        exact = train(monkeypatch, CPU, drawn.network, (images, labels), settings, batch_size)
        model = copy.deepcopy(drawn.network).float()
        own = train(monkeypatch, CPU, model, single, settings, batch_size)
        try:
            found = train(monkeypatch, HOST, model, single, settings, batch_size)
        except RuntimeError as error:
            if "cannot be trained by the CUDA kernels" not in str(error):
                raise
            continue
        *layers, end = features(drawn)
        tried |= {(kind, option) for kind, options in (*layers, end) for option in options}
        tried |= {("last", option) for option in layers[-1][1]}
        for values in (losses_of, velocities_of, parameters_of):
            of_host, of_cpu, right = (values(*trained).double() for trained in (found, own, exact))
            bound = 10 * (of_cpu - right).abs().max() + 1e-5 * right.abs().max()
            assert (of_host - right).abs().max() <= bound, (seed, values)
    wanted = {(kind, option) for kind in OPTIONS for option in OPTIONS[kind]}
    assert tried >= wanted - {("convolution", "padding beyond the kernel")}  # which is refused
    assert tried >= {("last", option) for option in OPTIONS["linear"]}


def losses_of(history, model, trainer):
    return history.losses.flatten()


def velocities_of(history, model, trainer):
    """Sums of the gradients."""
    return joined([state["momentum_buffer"] for state in trainer.state_dict()["state"].values()])


def parameters_of(history, model, trainer):
    return joined(list(model.parameters())).detach()


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


REFUSALS = {  # of a cooperative launch by a device that says it has them
    "too large": ("CUDA_HOST_USABLE_MULTIPROCESSORS", "1"),
    "not supported": ("CUDA_HOST_COOPERATIVE", "claimed"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refused_cooperative_launch_goes_on_as_a_launch_a_phase(monkeypatch, tmp_path, refusal):
    expected = train(monkeypatch, HOST, build("lenet5"), digits(), SETTINGS[1])
    monkeypatch.setenv(*REFUSALS[refusal])
    monkeypatch.setenv("CUDA_HOST_LAUNCHES", str(tmp_path / "launches"))
    assert_same_bits(train(monkeypatch, HOST, build("lenet5"), digits(), SETTINGS[1]), expected)
    launches = (tmp_path / "launches").read_text()
    assert "train_steps" not in launches
    assert launches.count("update_phase") == 3
    assert ctypes.CDLL(os.environ[redirect.LIBRARY]).cuda_host_last_error() == 0


def test_other_errors_of_a_cooperative_launch_pass(monkeypatch):
    monkeypatch.setenv("CUDA_HOST_ORDER", "sideways")
    with pytest.raises(RuntimeError, match="CUDA_HOST_ORDER: expected forward"):
        direct(build("lenet1"), digits(2))


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


@pytest.mark.parametrize("multiprocessors", ["2", "5", "6", "17"], indirect=True)
def test_any_division_of_the_sums(monkeypatch, multiprocessors):
    """394 of them: 2, 6 or 7 threads share one, or 16, more than there are images."""
    assert_alike(monkeypatch, OTHERS["one-dense"], digits(15, 12, 2), SETTINGS[1], batch_size=13)


def direct(model, data, order=None, rates=(0.1,), batch_size=3, optimizer="sgd", watch=None):
    """The operator itself on a copy of the model: what it returns, and the parameters."""
    network = Network.of(model)
    tensors = [tensor.detach().clone() for tensor in network.tensors()]
    parameters = tensors[: len(list(model.parameters()))]
    moments = [[torch.zeros_like(p) for p in parameters] for _ in range(2 if optimizer == "adam" else 0)] or [[], []]
    counts = [torch.zeros(()) for _ in parameters] if optimizer == "adam" else []
    are_bytes = data[0].dtype == torch.uint8
    image = (1, model.input_spec.size, model.input_spec.size) if are_bytes else tuple(data[0].shape[1:])
    numbers = network.numbers(image)
    settings = optimizer, [0.0, 0.0, 0.0, 0.9, 0.999, 1e-8], list(rates), 0.0, [], 0, 0, 0.0, watch
    results = HOST(
        numbers, tensors, *moments, counts, [1] * len(parameters), *data, order, batch_size, 0.01, 0.0, *settings
    )
    return *results, parameters


def test_learning_rates_stay_double():
    """One whose corrected value rounds to another float than that of its own float."""
    corrected = lambda rate: torch.tensor(rate / (1 - 0.9), dtype=torch.float64).float()  # noqa: E731
    rate = next(k * 1e-5 for k in range(100, 200) if corrected(k * 1e-5) != corrected(single(k * 1e-5)))
    model = build("lenet1")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.zero_()  # the first update shows whole
    *_, exact = direct(model, digits(3), rates=[rate], optimizer="adam")
    *_, rounded = direct(model, digits(3), rates=[single(rate)], optimizer="adam")
    assert any(not torch.equal(a, b) for a, b in zip(exact, rounded, strict=True))


def single(value):
    return torch.tensor(value, dtype=torch.float32).item()


@pytest.mark.parametrize("wrong", ["label", "order"])
def test_a_step_with_what_does_not_exist_is_not_taken(monkeypatch, wrong):
    """The labels and the order are on the device, where nobody has read them."""
    model, (images, labels) = build("lenet1"), digits(6)
    order = torch.arange(6)
    if wrong == "label":
        labels[1] = 10
    else:
        order[1] = 6
    losses, _, parameters = direct(model, (images, labels), order, [0.1, 0.1])
    assert losses.isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), parameters, strict=True))


def test_an_order_of_no_images_is_refused():
    with pytest.raises(RuntimeError, match="order: expected none, as there are no images, got 3"):
        direct(build("lenet1"), digits(0), torch.zeros(3, dtype=torch.int64))


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


# --- A host that watches the steps while the device takes them --------------------------------------------------------


class Device:
    """Stands for a stream: takes a call's steps in a thread, while the call has returned and its results are NaN."""

    def __init__(self):
        self.thread = None
        self.calls = 0

    def call(self, *arguments):
        steps = len(arguments[14])
        if steps == 0:
            return HOST(*arguments)  # the trainer tries whether the kernels take the network
        results = torch.full((steps,), torch.nan, dtype=torch.float64), torch.zeros(steps, dtype=torch.int64)

        def run():
            for result, value in zip(results, HOST(*arguments), strict=True):
                result.copy_(value.detach())

        assert self.query()
        self.calls += 1
        self.thread = threading.Thread(target=run)
        self.thread.start()
        return results

    def query(self):
        return self.thread is None or not self.thread.is_alive()

    def synchronize(self):
        if self.thread is not None:
            self.thread.join()

    def record_event(self):
        return self


@pytest.fixture
def device(monkeypatch):
    """For which the trainer takes the CPU, as it would a GPU."""
    device = Device()
    monkeypatch.setattr(watch, "_LAUNCH_SECONDS", 1000.0)  # the shim is slow
    monkeypatch.setattr(training_operands, "_QUEUES", {"cpu"})
    monkeypatch.setattr(watch, "_pinned", lambda size: torch.empty(size, dtype=torch.float64))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device)
    monkeypatch.setattr(torch.ops.lenet_fast, "network_train", device.call)
    yield device
    device.synchronize()


ORDER = torch.arange(6).repeat(4)  # eight steps of three images


def run(order=ORDER, on_step=None, data=None, lr=1e-3):
    """Results, model and trainer of a run on the device."""
    model = build("lenet1")
    trained = FusedTrainer(model, "adam", lr=lr)
    try:
        results = trained.run_epoch(*(data or digits(6)), order, 3, on_step=on_step)
    except (KeyboardInterrupt, TrainingError, ZeroDivisionError) as error:
        results = error
    return results, model, trained


def steps_taken(trained):
    (steps,) = {int(state["step"]) for state in trained.optimizer.state.values()}
    return steps


def assert_same_parameters(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_watched_run_is_the_run(monkeypatch, device):
    seen = []
    (losses, correct), model, _ = run(on_step=lambda step, loss: seen.append((step, loss)))
    assert device.calls == 1
    assert seen == list(enumerate(losses.tolist(), 1))
    monkeypatch.setattr(training_operands, "_QUEUES", set())
    monkeypatch.setattr(torch.ops.lenet_fast, "network_train", HOST)
    (expected, expected_correct), twin, _ = run()
    assert torch.equal(losses, expected)
    assert torch.equal(correct, expected_correct)
    assert_same_parameters(model, twin)


@pytest.mark.parametrize("cooperative", ["1", "0", "claimed"])
@pytest.mark.parametrize("error", [pytest.param(KeyboardInterrupt, marks=pytest.mark.races), ZeroDivisionError])
def test_an_interruption_ends_the_launch_between_steps(monkeypatch, device, error, cooperative):
    monkeypatch.setenv("CUDA_HOST_COOPERATIVE", cooperative)

    def interrupt(step, loss):
        if step == 2:
            raise error

    order = ORDER.repeat(4)
    raised, model, trained = run(order, interrupt)
    assert isinstance(raised, error)
    assert device.query()
    steps = steps_taken(trained)
    assert 2 <= steps < 32
    _, twin, _ = run(order[: 3 * steps])
    assert_same_parameters(model, twin)


def test_a_long_run_is_several_launches(monkeypatch, device):
    (losses, correct), model, _ = run()
    monkeypatch.setattr(watch, "_LAUNCH_SECONDS", 0.0)
    before = device.calls
    (split_losses, split_correct), twin, trained = run()
    assert device.calls - before > 2
    assert steps_taken(trained) == 8
    assert torch.equal(losses, split_losses)
    assert torch.equal(correct, split_correct)
    assert_same_parameters(model, twin)


@pytest.mark.parametrize("cooperative", ["0", "claimed"])
def test_a_watched_run_of_many_launches_is_several_calls(monkeypatch, device, cooperative):
    """Without cooperative launch: the host must not wait for room in the queue."""
    monkeypatch.setenv("CUDA_HOST_COOPERATIVE", cooperative)
    monkeypatch.setenv("CUDA_HOST_MULTIPROCESSORS", "1")
    trained = FusedTrainer(copy.deepcopy(OTHERS["one-dense"]), "adam", lr=1e-3)
    losses, _ = trained.run_epoch(*digits(5, 12, 2), torch.arange(5).repeat(104), 1)
    assert device.calls == 2
    assert steps_taken(trained) == len(losses) == 520
    assert losses.isfinite().all()


def test_a_watched_run_that_diverges_says_where(device):
    images, labels = digits(6, 28, 1)
    images[5] = math.nan  # in the second step
    seen = []
    raised, model, trained = run(data=(images, labels), on_step=lambda *of_step: seen.append(of_step))
    assert "not finite in step 2" in str(raised)
    assert [step for step, _ in seen] == [1]
    assert steps_taken(trained) == 1
    _, twin, _ = run(ORDER[:3], data=(images, labels))
    assert_same_parameters(model, twin)


@pytest.mark.parametrize("cooperative", ["1", "0", "claimed"])
def test_a_run_that_is_asked_to_stop_takes_no_step(monkeypatch, cooperative):
    monkeypatch.setenv("CUDA_HOST_COOPERATIVE", cooperative)
    model, memory = build("lenet1"), torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    losses, correct, parameters = direct(model, digits(6), rates=[0.1] * 2, watch=memory)
    assert memory.tolist() == [1, -1, -1]
    assert losses.isnan().all()
    assert correct.tolist() == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("wrong", [torch.zeros(2, dtype=torch.float64), torch.zeros(3), torch.zeros(1, 3).double()])
def test_a_watch_of_another_kind_is_refused(wrong):
    with pytest.raises(RuntimeError, match=r"watch: expected float64 \(3,\) on the CPU"):
        direct(build("lenet1"), digits(6), rates=[0.1] * 2, watch=wrong)


def test_a_device_without_cooperative_launches_can_be_tried(monkeypatch, tmp_path):
    kernels = []
    for wish in ("1", "0"):
        monkeypatch.setenv("CUDA_HOST_LAUNCHES", str(tmp_path / wish))
        monkeypatch.setenv("LENET_FAST_COOPERATIVE", wish)
        direct(build("lenet1"), digits(6), rates=[0.1] * 2)
        names = [line.split(" ", 2)[2] for line in (tmp_path / wish).read_text().splitlines()]
        kernels.append([name.partition("<")[0].removeprefix("void ").rpartition("::")[2] for name in names])
    assert [name for name in kernels[0] if "upload" not in name] == ["clear_results", "train_steps", "count_steps"]
    assert [name for name in kernels[1] if "phase" in name] == ["train_images_phase", "update_phase"] * 2


@pytest.mark.races
@pytest.mark.parametrize(("steps", "graphs"), [(16, 0), (35, 2)])
@pytest.mark.parametrize("diverges", [False, True])
def test_many_launches_are_graphs(monkeypatch, tmp_path, steps, graphs, diverges):
    """Each of 16 steps, after those that are left over."""
    images, labels = digits(6, 12, 2)
    order = torch.arange(5).repeat(steps)
    if diverges:
        images[5] = math.nan
        order[18 % steps * 3] = 5
    results = []
    for cooperative in ("1", "0"):
        monkeypatch.setenv("CUDA_HOST_COOPERATIVE", cooperative)
        monkeypatch.setenv("CUDA_HOST_LAUNCHES", str(tmp_path / cooperative))
        rates = [0.1 / (1 + step) for step in range(steps)]
        losses, correct, parameters = direct(
            OTHERS["one-dense"], (images, labels), order[: 3 * steps], rates, optimizer="adam"
        )
        results.append((losses.nan_to_num(-1), correct, *parameters))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert (results[0][0][-1] == -1) == diverges
    assert (tmp_path / "0").read_text().count("graph of 32 launches") == graphs


@pytest.mark.parametrize(
    ("dtype", "side", "reason"),
    [(torch.float32, 128, "more of an image than .* shared memory holds"), (torch.float64, 12, "not of dtype float32")],
)
def test_what_the_kernels_refuse_takes_its_steps_in_graphs(monkeypatch, device, dtype, side, reason):
    """Where the size of its images is known, that is said at once."""
    for name, value in pretend_cuda.GRAPHS.items():
        monkeypatch.setattr(torch.cuda, name, value)
    torch.manual_seed(0)
    features = 4 * (side // 2 - 1) ** 2
    model = nn.Sequential(ConvActPool2d(1, 4, 3), nn.Flatten(), nn.Linear(features, 10)).to(dtype)
    twin = copy.deepcopy(model)
    spec = models.InputSpec(side, 0.0, 1.0)
    with pytest.warns(RuntimeWarning, match=f"cannot be trained by the CUDA kernels: .*{reason}.* CUDA graphs"):
        trained = FusedTrainer(model, lr=2**-6, input_spec=spec)
    losses, _ = trained.run_epoch(*digits(7, side), torch.arange(7), 3)
    monkeypatch.setattr(torch.ops.lenet_fast, "network_train", CPU)
    monkeypatch.setattr(training_operands, "_QUEUES", set())
    expected, _ = FusedTrainer(twin, lr=2**-6, input_spec=spec).run_epoch(*digits(7, side), torch.arange(7), 3)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("CUDA_HOST_CAPABILITY", "70", "no kernel image for sm_70"),
        ("CUDA_HOST_DRIVER", "12040", "the driver supports CUDA 12.4"),
    ],
)
def test_where_the_kernels_cannot_run_the_steps_are_graphs(monkeypatch, device, variable, value, reason):
    """As Python knows beforehand on a GPU (tests/test_served.py): the operator refuses what nobody asked about."""
    library, buffer = ctypes.CDLL(os.environ[redirect.LIBRARY]), ctypes.create_string_buffer(1024)
    with monkeypatch.context() as patch:
        patch.setenv(variable, value)
        library.lenet_fast_why_unserved(-1, buffer, len(buffer))
    try:
        with pytest.warns(RuntimeWarning, match=f"cannot be trained by the CUDA kernels: {reason}.* CUDA graphs"):
            trained = FusedTrainer(build("lenet1"), lr=0.1)
        assert not trained._steps.are_queued(*digits(2), 2, 2)
    finally:
        library.lenet_fast_why_unserved(-1, buffer, len(buffer))
    assert buffer.value == b""
    assert FusedTrainer(build("lenet1"), lr=0.1)._steps.are_queued(*digits(2), 2, 2)


def test_other_errors_of_the_native_steps_pass(monkeypatch, device):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.ops.lenet_fast, "network_train", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        FusedTrainer(build("lenet1"), lr=0.1)
