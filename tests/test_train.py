"""Training runs: parity with the plain PyTorch twin, run folders, resuming bit for bit, what is refused."""

import copy
import csv
import io
import json
import math
import os
import re
import warnings
import zipfile
from dataclasses import asdict

import pytest
import torch
from torch.nn import functional as F

from lenet_fast import data, inference, models, plots, train, train_config
from lenet_fast.checkpoint import CheckpointError, load_checkpoint
from lenet_fast.data import Dataset, Split
from lenet_fast.train import Run, TrainConfig, TrainingError

STEPS = 50


@pytest.fixture(scope="session")
def digits():
    return data.load("mnist-10k")


@pytest.fixture(scope="session")
def few(digits):
    """200 training and 100 test digits: an epoch takes milliseconds."""
    return subset(digits, slice(0, 200))


def subset(dataset, part):
    train_part = Split(dataset.train.images[part], dataset.train.labels[part])
    test_part = Split(dataset.test.images[:100], dataset.test.labels[:100])
    return Dataset(dataset.name, train_part, test_part, dataset.classes, "few")


def config(**changes):
    return TrainConfig(**{"device": "cpu", "epochs": 4} | changes)


# --- Parity with the twin -------------------------------------------------------------------------


def losses(dataset, **changes):
    """The loss of each of the first STEPS steps of a run."""
    run = Run(config(**changes), dataset=subset(dataset, slice(0, STEPS * changes["batch_size"])))
    seen = []
    run.engine.run_epoch(
        run._train.images,
        run._train.labels,
        torch.randperm(len(run._train.labels), generator=run.generator),
        [run.config.lr] * STEPS,
        lambda done, loss: seen.append(float(loss)),
    )
    assert len(seen) == STEPS
    return torch.tensor(seen, dtype=torch.float64)


MODELS = list(models.MODELS)


@pytest.mark.parametrize("engine", ["fused", "autograd"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adam", "weight_decay": 1e-3},
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"optimizer": "sgd", "lr": 0.05},
        {"optimizer": "sgd", "lr": 0.02, "momentum": 0.9},
    ],
)
def test_float64_training_equals_the_twins(digits, model, options, engine):
    options = {**options, "model": model, "batch_size": 16, "dtype": "float64"}
    if model == "lenet5-1998":  # its loss starts near 170
        options["lr"] = 1e-4 if options["optimizer"] == "sgd" else 2e-3
    fused, twin = losses(digits, **options, engine=engine), losses(digits, **options, reference=True)
    assert (fused - fused[0]).abs().max() > 0.05  # it does train
    torch.testing.assert_close(fused, twin, rtol=0, atol=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_float32_training_equals_the_twins_to_rounding(digits, model):
    """Median of five seeds: now and then a rounding error decides a ReLU's sign or a maximum, and the paths part."""
    deviations = []
    for seed in range(5):
        options = {"model": model, "batch_size": 8, "lr": 1e-3, "seed": seed}
        fused, twin = losses(digits, **options), losses(digits, **options, reference=True)
        deviations.append(((fused - twin) / fused.abs().clamp_min(1)).abs().max().item())
    assert sorted(deviations)[2] <= 2e-6, deviations


def test_the_twin_starts_from_the_same_weights(few):
    fused, twin = (Run(config(seed=3, reference=reference), dataset=few) for reference in (False, True))
    assert twin.model.state_dict().keys() == fused.model.state_dict().keys()
    for key, value in fused.model.state_dict().items():
        assert torch.equal(twin.model.state_dict()[key], value)
    assert type(twin.model) is torch.nn.Sequential


def test_a_seed_fixes_the_run_and_leaves_the_global_generator(few):
    before = torch.random.get_rng_state()
    weights = []
    for seed in (1, 1, 2):
        run = Run(config(seed=seed, epochs=1), dataset=few)
        run.fit()
        weights.append(run.model.output.weight)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    initial = [train.build_model(config(seed=seed))[0].output.weight for seed in (1, 2)]
    assert not torch.equal(*initial)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adam", "lr": 1e-2, "weight_decay": 0.1},
        {"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.1},
        {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    ],
)
def test_training_is_the_loop_anyone_would_write(few, options):
    run = Run(config(**options, epochs=2, batch_size=70, reference=True, dtype="float64"), dataset=few)
    model = copy.deepcopy(run.model)
    generator = torch.Generator().manual_seed(0)
    numbers = {name: value for name, value in options.items() if name != "optimizer"}
    optimizers = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizer = optimizers[options["optimizer"]](model.parameters(), **numbers)
    inputs = run.input_spec.prepare(few.train.images, torch.float64)
    for epoch in range(2):
        for step, batch in enumerate(torch.randperm(200, generator=generator).split(70)):
            share = (epoch * 3 + step) / 6
            optimizer.param_groups[0]["lr"] = options["lr"] * (1 + math.cos(math.pi * share)) / 2
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), few.train.labels[batch]).backward()
            optimizer.step()
    run.fit()
    for own, other in zip(model.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)


# --- Numbers reported -----------------------------------------------------------------------------


def test_history_counts_every_image_once(few, monkeypatch):
    monkeypatch.setattr(train, "_REPORT_SECONDS", 0)
    steps = []
    run = Run(config(batch_size=64, epochs=1), dataset=few)
    (epoch,) = run.fit(on_step=lambda done, loss: steps.append((done, loss)))
    assert [done for done, _ in steps] == [64, 128, 192, 200]
    sizes = [64, 64, 64, 8]
    assert epoch.loss == pytest.approx(sum(size * loss for size, (_, loss) in zip(sizes, steps, strict=True)) / 200)
    assert epoch.train_accuracy * 200 == pytest.approx(round(epoch.train_accuracy * 200))
    assert epoch.examples_per_second == pytest.approx(200 / epoch.seconds)
    run.model.eval()
    outputs = run.model(run.input_spec.prepare(few.test.images))
    assert epoch.test_accuracy == (outputs.argmax(1) == few.test.labels).sum().item() / 100


def test_evaluate_is_the_same_for_every_batch_size_and_keeps_the_training_flag(few):
    run = Run(config(), dataset=few)
    accuracies = {
        inference.evaluate(run.model, run.input_spec, few.test, batch_size) for batch_size in (1, 7, 100, 1000)
    }
    assert len(accuracies) == 1
    modes = []
    run.model.output.register_forward_hook(lambda layer, *_: modes.append(layer.training))
    inference.evaluate(run.model, run.input_spec, few.test)
    assert modes == [False]
    assert run.model.training


def test_learning_rate_follows_its_schedule_from_step_to_step():
    def rates(schedule):
        one = config(lr=0.8, epochs=4, schedule=schedule)
        return [rate for epoch in range(4) for rate in one.learning_rates(epoch, steps=5)]

    assert rates("constant") == [0.8] * 20
    cosine = rates("cosine")
    assert cosine == pytest.approx([0.4 * (1 + math.cos(math.pi * step / 20)) for step in range(20)])
    cycle = rates("one-cycle")
    assert cycle[0] == pytest.approx(0.8 / 25)
    assert cycle[6] == max(cycle) == pytest.approx(0.8)  # after 30 %
    assert cycle[:7] == sorted(cycle[:7])
    assert cycle[6:] == sorted(cycle[6:], reverse=True)
    assert cycle[-1] < 0.02


@pytest.mark.parametrize("dtype", train_config.DTYPES)
@pytest.mark.parametrize("reference", [False, True])
def test_every_dtype_learns(few, dtype, reference):
    options = {"dtype": dtype, "reference": reference, "engine": "autograd"}
    run = Run(config(**options, epochs=3, lr=5e-3, batch_size=20), dataset=few)
    computed = set()
    run.model.output.register_forward_hook(lambda layer, _, out: computed.add(out.dtype) if layer.training else None)
    history = run.fit()
    assert computed == {getattr(torch, dtype)}
    assert history[-1].loss < 0.8 * history[0].loss
    expected = torch.float64 if dtype == "float64" else torch.float32
    assert {parameter.dtype for parameter in run.model.parameters()} == {expected}


# --- Run folders and resuming ---------------------------------------------------------------------


def interrupted(config, folder, dataset, after, error=KeyboardInterrupt):
    """Start a run that ends with an error in the middle of the epoch after `after` finished ones."""
    run = Run.create(config, folder, dataset=dataset)

    def interrupt(done, loss):
        if len(run.history) == after and done > len(dataset.train.labels) // 2:
            raise error

    with pytest.raises(error):
        run.fit(on_step=interrupt)


def assert_same(one, other):
    """Two checkpoints equal in everything but the time it took and where the data lay."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds", "examples_per_second", "data_dir"}:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


def saved_in(folder):
    return load_checkpoint(folder / train.CHECKPOINT)


RUNS = [
    {"model": "lenet5"},
    {"model": "lenet5", "engine": "autograd"},
    {
        "model": "lenet5-d2l",
        "optimizer": "sgd",
        "lr": 0.05,
        "momentum": 0.9,
        "dtype": "float64",
        "weight_decay": 1e-3,
    },
    {"model": "lenet5", "optimizer": "sgd", "schedule": "constant", "lr": 0.01, "reference": True},
    {"model": "lenet5-d2l", "dtype": "bfloat16"},
]


@pytest.mark.parametrize("options", RUNS)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, few, monkeypatch, options, after):
    monkeypatch.setattr(train, "_REPORT_SECONDS", 0)
    Run.create(config(**options), tmp_path / "whole", dataset=few).fit()
    interrupted(config(**options), tmp_path / "parts", few, after)
    assert len(saved_in(tmp_path / "parts")["history"]) == after
    run = Run.resume(tmp_path / "parts", dataset=few)
    assert [epoch.epoch for epoch in run.fit()] == [1, 2, 3, 4]
    assert_same(saved_in(tmp_path / "whole"), saved_in(tmp_path / "parts"))


@pytest.mark.parametrize("engines", [("fused", "autograd"), ("autograd", "fused")])
@pytest.mark.parametrize("options", [{"optimizer": "adamw"}, {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9}])
def test_either_engine_goes_on_with_the_others_run(tmp_path, few, monkeypatch, options, engines):
    monkeypatch.setattr(train, "_REPORT_SECONDS", 0)
    options = {**options, "model": "lenet5-d2l", "dtype": "float64"}
    whole = Run(config(**options), dataset=few)
    whole.fit()
    interrupted(config(**options, engine=engines[0]), tmp_path, few, after=2)
    with pytest.warns(UserWarning, match=f"had the {engines[0]} engine, now {engines[1]}"):
        run = Run.resume(tmp_path, dataset=few, engine=engines[1])
    run.fit()
    for one, other in zip(whole.model.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_the_engine_is_fused_where_it_can_be(few):
    assert Run(config(), dataset=few).engine.name == Run(config(), dataset=few).config.engine == "fused"
    for options, why in (({"dtype": "bfloat16"}, "bfloat16"), ({"reference": True}, "twin")):
        run = Run(config(**options), dataset=few)
        assert run.engine.name == "autograd"
        assert why in run.why_not_fused
    with pytest.raises(ValueError, match=r"engine: 'fused' cannot train this: .* bfloat16"):
        Run(config(engine="fused", dtype="bfloat16"), dataset=few)
    assert Run(config(engine="fused", reference=True), dataset=few).engine.name == "fused"
    with pytest.raises(ValueError, match="engine: expected one of"):
        config(engine="native")


def test_a_checkpoint_from_before_the_engines_goes_on_with_autograd(tmp_path, few):
    Run.create(config(epochs=1, engine="autograd"), tmp_path, dataset=few).fit()
    state = saved_in(tmp_path)
    del state["config"]["engine"]
    torch.save(state, tmp_path / train.CHECKPOINT)
    assert Run.resume(tmp_path, dataset=few).engine.name == "autograd"


def test_run_folder_shows_what_the_checkpoint_has(tmp_path, few):
    run = Run.create(config(epochs=2, seed=7), tmp_path / "run", dataset=few)
    on_disk = []
    run.fit(on_epoch=lambda epoch: on_disk.append(len(saved_in(run.folder)["history"])))
    assert on_disk == [1, 2]
    assert {path.name for path in run.folder.iterdir()} == {"checkpoint.pt", "config.json", "metrics.csv"}
    saved = torch.load(run.folder / "checkpoint.pt", weights_only=True)
    assert_same(saved["model"], dict(run.model.state_dict()) | saved["model"])
    assert json.loads((run.folder / "config.json").read_text()) == asdict(run.config) == saved["config"]
    with (run.folder / "metrics.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert rows == [asdict(epoch) for epoch in run.history] == saved["history"]


def test_resume_trims_what_is_ahead_of_the_checkpoint(tmp_path, few):
    run = Run.create(config(epochs=1), tmp_path, dataset=few)
    run.fit()
    metrics = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "metrics.csv").write_text(metrics + "2,0.1,0.5,0.5,0.5,1,1\n3,0.")
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "checkpoint.pt.tmp").write_bytes(b"half of a checkpo")
    Run.resume(tmp_path, dataset=few)
    assert (tmp_path / "metrics.csv").read_text() == metrics
    assert json.loads((tmp_path / "config.json").read_text())["epochs"] == 1


def test_a_failing_disk_leaves_the_last_checkpoint(tmp_path, few, monkeypatch):
    run = Run.create(config(), tmp_path, dataset=few)
    replace = os.replace

    def fail_after_third_epoch(source, target):
        if len(run.history) == 2:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_after_third_epoch)
    with pytest.raises(OSError, match="No space left"):
        run.fit()
    monkeypatch.undo()
    assert len(saved_in(tmp_path)["history"]) == 2
    resumed = Run.resume(tmp_path, dataset=few)
    assert len(resumed.fit()) == 4


def test_create_refuses_a_folder_in_use(tmp_path, few):
    Run.create(config(), tmp_path / "new" / "run", dataset=few)
    kept = (tmp_path / "new" / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(FileExistsError, match="not empty"):
        Run.create(config(seed=9), tmp_path / "new" / "run", dataset=few)
    assert (tmp_path / "new" / "run" / "checkpoint.pt").read_bytes() == kept
    (tmp_path / "file").write_text("a file")
    with pytest.raises(OSError, match="file"):
        Run.create(config(), tmp_path / "file", dataset=few)
    assert (tmp_path / "file").read_text() == "a file"


def test_more_epochs_at_a_constant_rate_equal_a_longer_run(tmp_path, few):
    Run.create(config(schedule="constant"), tmp_path / "long", dataset=few).fit()
    Run.create(config(schedule="constant", epochs=2), tmp_path / "short", dataset=few).fit()
    Run.resume(tmp_path / "short", dataset=few, epochs=4).fit()
    assert_same(saved_in(tmp_path / "long"), saved_in(tmp_path / "short"))


def test_more_epochs_stretch_the_schedule_and_say_so(tmp_path, few):
    Run.create(config(epochs=1), tmp_path, dataset=few).fit()
    with pytest.warns(UserWarning, match="after 1 of 1 epochs, the cosine schedule goes on over 2"):
        run = Run.resume(tmp_path, dataset=few, epochs=2)
    assert run.fit()[-1].learning_rate == pytest.approx(1e-3)


def test_another_number_of_threads_is_said(tmp_path, few):
    Run.create(config(epochs=1), tmp_path, dataset=few)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match=f"had {threads} threads, now {threads + 1}"):
            Run.resume(tmp_path, dataset=few)
    finally:
        torch.set_num_threads(threads)


def test_resuming_a_finished_run_changes_nothing(tmp_path, few):
    Run.create(config(epochs=1), tmp_path, dataset=few).fit()
    kept = saved_in(tmp_path)
    assert len(Run.resume(tmp_path, dataset=few).fit()) == 1
    assert_same(kept, saved_in(tmp_path))


def test_resume_refuses_contradictions(tmp_path, few, digits):
    Run.create(config(), tmp_path, dataset=few).fit()
    Run.resume(tmp_path, dataset=few, batch_size=32, device="cpu", lr=2e-3)  # as the run has them
    for changes, message in (
        ({"batch_size": 64}, "batch_size: .* has 32; got 64"),
        ({"optimizer": "sgd"}, "optimizer: .* has 'adam'; got 'sgd'"),
        ({"reference": True}, "reference: .* has False; got True"),
        ({"epochs": 3}, "epochs: .* finished 4 already; got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            Run.resume(tmp_path, dataset=few, **changes)
    with pytest.raises(ValueError, match=r"dataset: .* not what the run"):
        Run.resume(tmp_path, dataset=subset(digits, slice(1, 201)))


def test_resume_without_or_with_a_damaged_checkpoint(tmp_path, few):
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.pt"):
        Run.resume(tmp_path / "none")
    Run.create(config(), tmp_path / "run", dataset=few)
    path = tmp_path / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    damaged = {size: whole[:size] for size in (0, 1, 100, len(whole) // 2, len(whole) - 1)}
    damaged["text"] = b"epoch,loss\n1,0.3\n"
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():  # one flipped bit in the contents of every entry
            position = whole.index(archive.read(entry), entry.header_offset) + entry.file_size // 2
            flipped = bytes([whole[position] ^ 16])
            damaged[f"bit in {entry.filename}"] = whole[:position] + flipped + whole[position + 1 :]
    for what in (42, {"model": {}}, torch.load(io.BytesIO(whole), weights_only=True) | {"format": 99}):
        buffer = io.BytesIO()
        torch.save(what, buffer)
        damaged[f"other {what!r:.20}"] = buffer.getvalue()

    def error_of(content):
        path.write_bytes(content)
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            return str(error)

    errors = {name: error_of(content) for name, content in damaged.items()}
    assert len(errors) > 20
    assert [name for name, error in errors.items() if not re.fullmatch(f"{path}: .+", error or "")] == []


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "lenet6"}, "model: .*'lenet5', 'lenet5-d2l', .*got 'lenet6'"),
        ({"dataset": "cifar"}, "dataset: .*'mnist-10k', 'mnist', 'fashion-mnist', got 'cifar'"),
        ({"optimizer": "lion"}, "optimizer: .*'adam', 'adamw', 'sgd', got 'lion'"),
        ({"schedule": "step"}, "schedule: .*'cosine', 'one-cycle', 'constant', got 'step'"),
        ({"dtype": "float16"}, "dtype: .*'float32', 'float64', 'bfloat16', got 'float16'"),
        ({"epochs": 0}, "epochs: .*at least 1, got 0"),
        ({"epochs": 2.5}, "epochs: .*int .*2.5"),
        ({"batch_size": 0}, "batch_size: .*at least 1, got 0"),
        ({"seed": -1}, "seed: .*at least 0, got -1"),
        ({"seed": 2**63}, "seed"),
        ({"lr": 0.0}, "lr: .*above 0, got 0.0"),
        ({"lr": math.nan}, "lr: .*nan"),
        ({"lr": math.inf}, "lr: .*inf"),
        ({"momentum": 1.0, "optimizer": "sgd"}, "momentum: .*below 1, got 1.0"),
        ({"momentum": 0.9}, "momentum: only 'sgd'"),
        ({"weight_decay": -0.1}, "weight_decay: .*-0.1"),
        ({"device": "banana"}, "device: .*'banana'"),
        ({"device": "meta"}, "device: 'meta' is not available"),
        ({"device": "cuda:99"}, "device: 'cuda:99' is not available"),
    ],
)
def test_config_is_checked_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_config_is_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = TrainConfig()
    assert (plain.dataset, plain.lr) == ("mnist-10k", 2e-3)
    assert plain.device == ("cuda" if torch.cuda.is_available() else "cpu")
    own = TrainConfig(data_dir="digits", optimizer="sgd")
    assert (own.dataset, own.data_dir, own.lr) == ("mnist", str(tmp_path / "digits"), 0.1)
    assert TrainConfig(**asdict(own)) == own


@pytest.mark.parametrize("report_seconds", [0, 1000])
def test_divergence_stops_before_anything_is_saved(tmp_path, few, monkeypatch, report_seconds):
    monkeypatch.setattr(train, "_REPORT_SECONDS", report_seconds)
    run = Run.create(config(optimizer="sgd", lr=1e30), tmp_path, dataset=few)
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(TrainingError, match="loss is not finite in epoch 1"):
        run.fit()
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept


def test_parameters_ruined_by_the_last_step_are_noticed(tmp_path, few):
    run = Run.create(config(batch_size=200, engine="autograd"), tmp_path, dataset=few)
    run.model.f6.bias.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingError, match="parameter is not finite in epoch 1"):
        run.fit()
    assert saved_in(tmp_path)["history"] == []


# --- Picture --------------------------------------------------------------------------------------


def test_curve_is_a_png(tmp_path, few):
    pytest.importorskip("matplotlib")
    run = Run(config(epochs=1), dataset=few)
    plots.learning_curves(run.fit(), tmp_path / "curve.png", "a title")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_no_warnings_in_a_run(few):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Run(config(epochs=1), dataset=few).fit()
