"""FusedTrainer on a CUDA device: as on the CPU, repeatable, in the right stream, stoppable, for every batch size."""

import copy
import os
import signal

import pytest
import torch
from regularised_steps import PLACES, SGD, Steps, everywhere, example, native, plainly
from test_cuda import SLEEP, captured
from test_trainer import SETTINGS, bytes_like, gentle
from torch import nn
from torch.nn import functional as F

from lenet_fast import backends, data, models, trainer, watch
from lenet_fast.inference import evaluate
from lenet_fast.nn import ConvActPool2d
from lenet_fast.trainer import FusedTrainer, TrainingError
from lenet_fast.training_steps import Masks, TrainingSteps

missing = [backends.why_unavailable("native", device) for device in ("cuda", "cpu")]  # the CPU's trainer is the judge
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or any(missing), reason=f"no CUDA device, or {missing[0] or missing[1]}"
)

every_model = pytest.mark.parametrize("name", models.MODELS)
no_pretence = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_name() == "pretended GPU", reason="the device is the CPU"
)
ways = pytest.mark.parametrize("cooperative", ["1", "0"], ids=["one-launch", "a-launch-a-phase"])


def build(name, device="cuda", dtype=torch.float32):
    """The same weights wherever."""
    torch.manual_seed(0)
    return models.MODELS[name]().to(device, dtype)


def digits(number, device="cuda"):
    return tuple(tensor.to(device) for tensor in bytes_like(number))


def run(model, settings, data, *, batch_size=16, epochs=1, on_step=None):
    """History and trainer of a run."""
    trained = FusedTrainer(model, **settings)
    generator = torch.Generator().manual_seed(3)
    history = trained.run(*data, batch_size=batch_size, epochs=epochs, generator=generator, on_step=on_step)
    return history, trained


def assert_same_bits(one, other):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert all(parameter.isfinite().all() for parameter in one.parameters())


def difference(one, other):
    """Mean absolute, over the parameters' own mean."""
    return sum((a.cpu().double() - b.double()).abs().mean().item() for a, b in zip(one, other, strict=True))


# ---- Parity with the CPU


@pytest.mark.parametrize("settings", SETTINGS)
@every_model
def test_as_exact_as_the_cpu(name, settings):
    """Both in float32, against the CPU's float64: losses, numbers right, parameters, the optimizer's state."""
    slack = 1e-3 if "adam" in settings["optimizer"] else 1e-5  # adam: where a gradient is rounding, so is its step
    slack = 1e-2 if name == "lenet5" else slack  # rounding decides between near-equal maxima
    settings = gentle(name, settings)
    exact, single, ours = (
        build(name, device, dtype)
        for device, dtype in (("cpu", torch.float64), ("cpu", torch.float32), ("cuda", torch.float32))
    )
    histories, trainers = zip(
        *(
            run(model, settings, digits(70, device), epochs=2)
            for model, device in ((exact, "cpu"), (single, "cpu"), (ours, "cuda"))
        ),
        strict=True,
    )
    losses = [history.losses for history in histories]
    assert losses[2].shape == (2, 5)
    torch.testing.assert_close(losses[2][0, 0], losses[0][0, 0], rtol=1e-5, atol=0)
    bound = 4 * (losses[1] - losses[0]).abs().max() + slack * losses[0].abs().max()
    assert (losses[2] - losses[0]).abs().max() <= bound
    assert (histories[2].correct - histories[0].correct).abs().max() <= 1  # two scores may be near-equal
    moved = difference(exact.parameters(), build(name, "cpu").parameters())
    errors = [difference(model.parameters(), exact.parameters()) for model in (single, ours)]
    assert errors[1] <= 4 * errors[0] + slack * moved
    states = [each.state_dict()["state"] for each in trainers]
    for index, expected in states[0].items():
        for key, value in expected.items():
            own, found = (states[i][index][key].cpu().double() for i in (1, 2))
            value = value.double()
            bound = 4 * (own - value).abs().mean() + slack * value.abs().mean()
            assert (found - value).abs().mean() <= bound, (index, key)


@ways
@pytest.mark.parametrize("name", PLACES)
def test_dropout_and_label_smoothing_are_those_of_autograd(monkeypatch, name, cooperative):
    """On the same masks; no further from float64 than autograd in float32 is, but for a few roundings."""
    monkeypatch.setenv("LENET_FAST_COOPERATIVE", cooperative)
    smoothing = 0.0 if name == "distances" else 0.1
    steps = Steps(everywhere(PLACES[name]), 2**40, 7, smoothing, 16, SGD | {"lr": 0.02})
    network = example(name, torch.float32)
    on_device = [tensor.to("cuda") for tensor in network.data(dtype=torch.float32)]
    found = native(torch.ops.lenet_fast.network_train, network.model.to("cuda"), steps, *on_device)
    tensors = [found, plainly(name, steps, dtype=torch.float32), plainly(name, steps)]
    assert torch.equal(found.correct.cpu(), tensors[2].correct)
    for mine, single, exact in zip(*([taken.losses, *taken.parameters] for taken in tensors), strict=True):
        bound = 10 * (single.double() - exact).abs().max() + 1e-5 * exact.abs().max()
        assert (mine.cpu().double() - exact).abs().max() <= bound


def test_small_training():
    """For compute-sanitizer, which is slow: on the device, nothing runs but our kernels and copies."""
    images, labels = bytes_like(5)
    expected, ours = build("lenet5-1998", "cpu"), build("lenet5-1998", "cpu").to("cuda")
    settings = {"optimizer": "adamw", "lr": 1e-4}
    (losses, _), (found, _) = (
        FusedTrainer(model, **settings).run_epoch(images.to(device), labels.to(device), torch.arange(5), 3)
        for model, device in ((expected, "cpu"), (ours, "cuda"))
    )
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours.parameters(), expected.parameters(), strict=True):
        assert (one.cpu() - other).abs().mean() < 1e-6


def test_float_images_and_steps_one_by_one():
    model, twin = build("lenet5"), build("lenet5", "cpu")
    images, labels = torch.rand(20, 1, 32, 32), torch.arange(20) % 10
    ours, expected = FusedTrainer(model, lr=0.05), FusedTrainer(twin, lr=0.05)
    for size in (1, 20, 7):
        loss = ours.step(images[:size].to("cuda"), labels[:size].to("cuda"))
        assert loss == pytest.approx(expected.step(images[:size], labels[:size]), rel=1e-5)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-6)


def test_frozen_parameters_stay():
    model, twin = build("lenet5-1998"), build("lenet5-1998", "cpu")
    for network in (model, twin):
        for index, parameter in enumerate(network.parameters()):
            parameter.requires_grad_(index % 3 != 1)
    before = copy.deepcopy(model)
    settings = {"optimizer": "adam", "lr": 1e-3}
    run(model, settings, digits(50))
    run(twin, settings, digits(50, "cpu"))
    for one, start, other in zip(model.parameters(), before.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, start) == (not one.requires_grad)
        assert (one.cpu() - other).abs().mean() < 1e-5


def test_real_digits_are_learnt_and_recognised_in_plain_pytorch():
    """An epoch as on the CPU; what was trained is the plain twin's, too."""
    split = data.load("mnist-10k").train
    images, labels = split.images[:3000], split.labels[:3000]
    histories = []
    for device in ("cuda", "cpu"):
        model = build("lenet5", device)
        history, _ = run(model, SETTINGS[3], (images.to(device), labels.to(device)), batch_size=32, epochs=3)
        histories.append(history)
        if device == "cuda":
            ours = model
    torch.testing.assert_close(histories[0].losses[0], histories[1].losses[0], rtol=0, atol=0.02)
    assert histories[0].accuracy[-1] > 0.85
    test = data.Split(images.to("cuda"), labels.to("cuda"))
    assert evaluate(ours, ours.input_spec, test) > 0.85
    twin = ours.reference()
    assert evaluate(twin, ours.input_spec, test) == pytest.approx(evaluate(ours, ours.input_spec, test), abs=2e-3)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
    inputs = ours.input_spec.prepare(test.images[:64])
    first = F.cross_entropy(twin(inputs), test.labels[:64])
    first.backward()
    optimizer.step()
    assert F.cross_entropy(twin(inputs), test.labels[:64]) < first


# ---- The same bits


@every_model
def test_bit_equal_over_runs(name):
    results = []
    for _ in range(5):
        model = build(name)
        history, _ = run(model, gentle(name, SETTINGS[2]), digits(300), batch_size=128, epochs=2)
        results.append((history.losses, model))
    for losses, model in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert_same_bits(model, results[0][1])


def test_a_launch_a_phase_gives_the_same_bits(monkeypatch):
    results = []
    for cooperative in ("1", "0"):
        monkeypatch.setenv("LENET_FAST_COOPERATIVE", cooperative)
        model = build("lenet5")
        history, _ = run(model, SETTINGS[1], digits(100), batch_size=3, epochs=2)  # 34 steps, two graphs
        results.append((history.losses, model))
    assert torch.equal(results[0][0], results[1][0])
    assert_same_bits(results[0][1], results[1][1])


@no_pretence
def test_a_generator_of_the_device_draws_there():
    images, labels = digits(50)
    model, twin = build("lenet1"), build("lenet1")
    generator = torch.Generator("cuda").manual_seed(3)
    FusedTrainer(model, lr=0.1).run(images, labels, batch_size=16, generator=generator)
    order = torch.randperm(50, generator=torch.Generator("cuda").manual_seed(3), device="cuda")
    FusedTrainer(twin, lr=0.1).run_epoch(images, labels, order, 16)
    assert_same_bits(model, twin)


# ---- Batches


TINY = {"conv": (1, 3, 3), "side": 8}


def tiny(device, dtype=torch.float32):
    torch.manual_seed(0)
    conv = ConvActPool2d(*TINY["conv"], activation="tanh", pool="avg")
    return nn.Sequential(conv, nn.Flatten(), nn.Linear(27, 10)).to(device, dtype)


def assert_steps_as_exact(model, exact, images, labels, steps=2):
    before = [parameter.clone() for parameter in exact.parameters()]
    ours, expected = FusedTrainer(model, lr=0.5), FusedTrainer(exact, lr=0.5)
    for _ in range(steps):
        loss = ours.step(images.to("cuda"), labels.to("cuda"))
        assert loss == pytest.approx(expected.step(images.double(), labels), rel=1e-5)
    for one, other, start in zip(model.parameters(), exact.parameters(), before, strict=True):
        assert (one.cpu() - other).abs().max() <= 1e-4 * (other - start).abs().max() + 1e-7


@pytest.mark.parametrize("batch", [1, 2, 131, 132, 133, 1000, 65_536, 70_000])
def test_every_batch_size(batch):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 1, TINY["side"], TINY["side"], generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)
    assert_steps_as_exact(tiny("cuda"), tiny("cpu", torch.float64), images, labels)


def test_large_batches_of_lenet5():
    model, twin = build("lenet5"), build("lenet5", "cpu", torch.float64)
    images, labels = torch.rand(65_536, 1, 32, 32), torch.randint(10, (65_536,))
    assert_steps_as_exact(model, twin, images, labels, steps=1)


def test_an_epoch_of_batches_of_one():
    model, twin = build("lenet1"), build("lenet1")
    run(model, SETTINGS[0], digits(200), batch_size=1)
    run(twin, SETTINGS[0], digits(200), batch_size=1)
    assert_same_bits(model, twin)


# ---- Streams, devices, graphs


@pytest.mark.alone
def test_runs_on_the_current_stream(monkeypatch):
    """Queued behind a long sleep and a copy on a side stream: elsewhere, kernels would see empty images."""
    images, labels = digits(40)
    order = torch.arange(40)
    expected, model = build("lenet5"), build("lenet5")
    FusedTrainer(expected, lr=0.1).run_epoch(images, labels, order, 16)
    trained, late = FusedTrainer(model, lr=0.1), torch.zeros_like(images)
    stream = torch.cuda.Stream()
    queue = FusedTrainer._run

    def queue_behind_a_copy(*arguments):  # behind the look at the labels, which waits
        torch.cuda._sleep(SLEEP)
        late.copy_(images)
        return queue(*arguments)

    monkeypatch.setattr(FusedTrainer, "_run", queue_behind_a_copy)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        trained.run_epoch(late, labels, order, 16)
    stream.synchronize()
    assert_same_bits(model, expected)


@pytest.mark.alone
def test_the_host_waits_for_nothing_but_results(monkeypatch):
    """An epoch is queued, its order uploaded, while the device is busy with something else."""
    model = build("lenet5")
    busy = []
    queue, follow = FusedTrainer._run, watch.Watch.follow

    def queue_behind_a_sleep(*arguments):
        torch.cuda._sleep(SLEEP)
        return queue(*arguments)

    def look(self, finished, note):
        busy.append(not finished.query())
        return follow(self, finished, note)

    run(model, SETTINGS[3], digits(100))  # loads kernels, takes memory
    monkeypatch.setattr(FusedTrainer, "_run", queue_behind_a_sleep)
    monkeypatch.setattr(watch.Watch, "follow", look)
    run(model, SETTINGS[3], digits(100), epochs=3)
    assert all(busy)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize(("current", "other"), [(0, 1), (1, 0)])
def test_a_device_that_is_not_current(current, other):
    expected = build("lenet5-1998", f"cuda:{current}")
    run(expected, SETTINGS[4], digits(50, f"cuda:{current}"))
    with torch.cuda.device(current):
        model = build("lenet5-1998", f"cuda:{other}")
        history, _ = run(model, SETTINGS[4], digits(50, f"cuda:{other}"))
    assert history.losses.device.type == "cpu"
    for one, same in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.cpu(), same.cpu(), rtol=1e-4, atol=1e-6)


@ways
def test_queued_steps_neither_wait_nor_allocate_in_a_graph(monkeypatch, cooperative):
    """Capture fails at any synchronisation and at any allocation by cudaMalloc."""
    monkeypatch.setenv("LENET_FAST_COOPERATIVE", cooperative)
    images, labels = digits(30)
    model, expected = build("lenet5"), build("lenet5")
    order = torch.arange(30, device="cuda")
    initial = [parameter.detach().clone() for parameter in model.parameters()]
    trained = FusedTrainer(model, lr=0.1, momentum=0.9)
    graph, (losses, correct) = captured(lambda: trained._steps.take(images, labels, order, 8, [0.1] * 4, Masks(None)))
    twin = FusedTrainer(expected, lr=0.1, momentum=0.9)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), initial, strict=True):
            parameter.copy_(value)
            trained.optimizer.state[parameter]["momentum_buffer"].zero_()
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        expected_losses, expected_correct = twin.run_epoch(images, labels, order, 8)
        assert torch.equal(losses.cpu(), expected_losses)
        assert torch.equal(correct.cpu(), expected_correct)
        assert_same_bits(model, expected)


# ---- Interruptions


class Enough(Exception):
    pass


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def enough():
    raise Enough


@ways
@pytest.mark.parametrize(("stop", "error"), [(interrupt, KeyboardInterrupt), (enough, Enough)])
def test_an_interruption_ends_a_launch_between_steps(monkeypatch, stop, error, cooperative):
    monkeypatch.setenv("LENET_FAST_COOPERATIVE", cooperative)
    images, labels = digits(64)
    order = torch.arange(64).repeat(1000)
    steps = len(order) // 2
    model, again = build("lenet1"), build("lenet1")
    trained = FusedTrainer(model, "adam", lr=1e-4)
    with pytest.raises(error):
        trained.run_epoch(images, labels, order, 2, on_step=lambda step, loss: step == 3 and stop())
    (taken,) = {int(state["step"]) for state in trained.optimizer.state.values()}
    assert 3 <= taken < steps
    FusedTrainer(again, "adam", lr=1e-4).run_epoch(images, labels, order[: 2 * taken], 2)
    assert_same_bits(model, again)
    trained.run_epoch(images, labels, order[:64], 2)  # and it goes on


def test_a_long_run_is_several_launches(monkeypatch):
    monkeypatch.setattr(watch, "_LAUNCH_SECONDS", 0.01)
    monkeypatch.setattr(trainer, "_CALL_SECONDS", 0.01)
    calls = []
    take = TrainingSteps.take

    def counted(self, *arguments):
        calls.append(len(arguments[4]))
        return take(self, *arguments)

    monkeypatch.setattr(TrainingSteps, "take", counted)
    images, labels = digits(64)
    model = build("lenet1")
    trained = FusedTrainer(model, "adam", lr=1e-4)
    seen = []
    losses, _ = trained.run_epoch(
        images, labels, torch.arange(64).repeat(100), 2, on_step=lambda step, loss: seen.append((step, loss))
    )
    assert len(calls) > 1
    assert seen == list(enumerate(losses.tolist(), 1))
    assert {int(state["step"]) for state in trained.optimizer.state.values()} == {3200}


def test_a_run_that_diverges_stops_there():
    trained = FusedTrainer(build("lenet5"), "sgd", lr=1e4)
    seen = []
    with pytest.raises(TrainingError, match=r"the loss is not finite in step \d+"):
        trained.run(*digits(200), batch_size=8, epochs=10, on_step=lambda step, loss: seen.append(step))
    assert seen == list(range(1, len(seen) + 1))
    assert all(parameter.isfinite().all() for parameter in trained.model.parameters())


# ---- What the kernel refuses: steps in CUDA graphs

in_graphs = pytest.mark.filterwarnings("ignore:lenet_fast. no training in one launch")


def wide(device, dtype=torch.float32):
    torch.manual_seed(0)
    return models.lenet5(channels=(40, 60)).to(device, dtype)


@no_pretence
@pytest.mark.parametrize(("dtype", "reason"), [(torch.float32, "shared memory"), (torch.float64, "float32")])
def test_a_refusal_is_said(dtype, reason):
    with pytest.warns(RuntimeWarning, match=f"cannot be trained by the CUDA kernels: .*{reason}"):
        trained = FusedTrainer(wide("cuda", dtype), lr=0.1)
    trained.step(*digits(5))
    assert trained._steps._graphed is not None


@in_graphs
@pytest.mark.parametrize("settings", SETTINGS)
@every_model
def test_float64_as_the_cpu(name, settings):
    """Learning rates are float32 in a graph."""
    settings = gentle(name, settings)
    model, twin = build(name, dtype=torch.float64), build(name, "cpu", torch.float64)
    (history, trained), (expected, plain) = (
        run(network, settings, digits(70, device), epochs=2) for network, device in ((model, "cuda"), (twin, "cpu"))
    )
    torch.testing.assert_close(history.losses, expected.losses, rtol=1e-6, atol=0)
    assert torch.equal(history.correct, expected.correct)
    assert difference(model.parameters(), twin.parameters()) <= 1e-6 * difference(
        twin.parameters(), build(name, "cpu").parameters()
    )
    for one, other in zip(trained.optimizer.state.values(), plain.optimizer.state.values(), strict=True):
        for key, value in other.items():
            torch.testing.assert_close(one[key].cpu(), value, rtol=1e-3, atol=1e-8)


@in_graphs
def test_a_wide_network_as_the_cpu_and_repeatedly():
    runs = []
    for device, dtype in (("cpu", torch.float64), ("cpu", torch.float32), ("cuda", torch.float32)):
        model = wide(device, dtype)
        history, _ = run(model, SETTINGS[1], digits(70, device), epochs=2)
        runs.append((history.losses, model))
    bound = 4 * (runs[1][0] - runs[0][0]).abs().max() + 1e-5 * runs[0][0].abs().max()
    assert (runs[2][0] - runs[0][0]).abs().max() <= bound
    again = wide("cuda")
    history, _ = run(again, SETTINGS[1], digits(70), epochs=2)
    assert torch.equal(history.losses, runs[2][0])
    assert_same_bits(again, runs[2][1])


@in_graphs
def test_graphs_beside_what_autograd_still_knows():
    """Of a loss that is alive, nodes of the parameters are, on another stream than that of a capture."""
    model, twin = wide("cuda", torch.float64), wide("cpu", torch.float64)
    images, labels = digits(8)
    for network in (model, twin):
        device = next(network.parameters()).device
        data = images.to(device), labels.to(device)
        loss = F.cross_entropy(network(network.input_spec.prepare(data[0], torch.float64)), data[1])
        loss.backward()
        FusedTrainer(network, lr=0.1).step(*data)
        assert loss.isfinite()
    assert difference(model.parameters(), twin.parameters()) < 1e-6


@in_graphs
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize(("current", "other"), [(0, 1), (1, 0)])
def test_graphs_on_a_device_that_is_not_current(current, other):
    expected = wide(f"cuda:{current}")
    run(expected, SETTINGS[4], digits(50, f"cuda:{current}"))
    with torch.cuda.device(current):
        model = wide(f"cuda:{other}")
        run(model, SETTINGS[4], digits(50, f"cuda:{other}"))
    for one, same in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.cpu(), same.cpu(), rtol=1e-4, atol=1e-6)


@in_graphs
@pytest.mark.parametrize(("stop", "error"), [(interrupt, KeyboardInterrupt), (enough, Enough)])
def test_an_interruption_of_graphs_leaves_whole_steps(stop, error):
    images, labels = digits(64)
    order = torch.arange(64).repeat(1000)
    model, again = wide("cuda"), wide("cuda")
    trained = FusedTrainer(model, "adam", lr=1e-4)
    with pytest.raises(error):
        trained.run_epoch(images, labels, order, 32, on_step=lambda step, loss: step == 3 and stop())
    (taken,) = {int(state["step"]) for state in trained.optimizer.state.values()}
    assert 3 <= taken < 2000
    FusedTrainer(again, "adam", lr=1e-4).run_epoch(images, labels, order[: 32 * taken], 32)
    assert_same_bits(model, again)


# ---- What is refused


@no_pretence
@pytest.mark.parametrize("label", [-1, 10])
def test_labels_out_of_range(label):
    images, labels = digits(10)
    labels[4] = label
    with pytest.raises(ValueError, match=r"labels: expected 0 to 9, got"):
        FusedTrainer(build("lenet1"), lr=0.1).run(images, labels, batch_size=2)
