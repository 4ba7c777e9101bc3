"""benchmarks/bench_train.py and beside it: contestants train alike, wrong ones are refused, figures come from rows."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from lenet_fast import backends

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
NETWORKS = ("lenet5-d2l", "lenet5", "lenet5-sparse", "lenet5-1998", "lenet1", "lenet5-wide")
QUICK = ["--batch", "3,64", "--networks", "lenet1,lenet5-sparse", "--threads", "1", "--rounds", "2"]
QUICK += ["--sample-ms", "0.1"]

needs_native = pytest.mark.skipif(
    backends.why_unavailable("native", "cpu") is not None, reason="no compiled CPU kernels to time"
)


@pytest.fixture(autouse=True)
def _modules_of_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def networks():
    return import_module("networks")


@pytest.fixture
def race():
    return import_module("network_race")


@pytest.fixture
def never_timed(race, monkeypatch):
    def timed(*_, **__):
        raise AssertionError("timed")

    monkeypatch.setattr(race.harness, "race", timed)


def train_only(race, task, left_out=None, keep_going=False, **contestants):
    device = import_module("devices").Device("cpu", None, None)
    options = {"rounds": 1, "sample_seconds": 0.0, "device": device, "keep_going": keep_going}
    return race.train(task, contestants, left_out=left_out, **options)


# ---- The networks


@pytest.mark.parametrize("name", NETWORKS)
def test_plain_layers_compute_the_same(networks, name):
    task = networks.Task.make(name, 4, 1)
    plain = networks.plain(task.model)
    assert not [layer for layer in plain.modules() if isinstance(layer, networks.FusedConv2d)]
    torch.testing.assert_close(plain(task.images), task.model(task.images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_operations_are_those_that_pytorch_counts(networks, name, training):
    task = networks.Task.make(name, 2, 1)
    model = networks.plain(task.model)
    with FlopCounterMode(display=False) as counter:
        output = model(task.images)
        if training:
            output.sum().backward()
    counted = counter.get_total_flops() / 2
    if name in ("lenet5-sparse", "lenet5-1998"):  # plain PyTorch computes 36 pairs that are not there
        counted -= (3 if training else 1) * 2 * 36 * 25 * 100
    if name == "lenet5-1998":  # the distances are no matrix product there
        counted += (2 if training else 1) * 2 * 84 * 10
    assert networks.flops(task.model, training) == counted
    documented = re.search(rf"^\| `{name}` .*", (BENCHMARKS / "README.md").read_text(), re.MULTILINE).group()
    assert f" {counted:,.0f} |" in documented


def test_the_steps_share_out_the_digits(networks):
    task = networks.Task.make("lenet5", 3, 4)
    assert (task.steps, len(task.batches()), task.first(2).steps, task.first(9).steps) == (4, 4, 2, 4)
    assert task.images.shape == (12, 1, 32, 32)
    torch.testing.assert_close(torch.cat([images for images, _ in task.batches()]), task.images)
    again = networks.Task.make("lenet5", 3, 4)
    for one, other in zip(task.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


# ---- Refusal


@needs_native
@pytest.mark.usefixtures("never_timed")
@pytest.mark.parametrize("name", NETWORKS)
def test_right_contestants_are_timed(networks, race, name):
    everyone = race.train_contestants.CONTESTANTS["cpu"]
    chosen = {who: everyone[who] for who in ("fused-step", "fused-run", "eager", "eager-channels-last")}
    with pytest.raises(AssertionError, match="timed"):
        train_only(race, networks.Task.make(name, 3, 2), **chosen)


@pytest.mark.usefixtures("never_timed")
@pytest.mark.parametrize("fault", ["update", "frozen", "order", "nan"])
@pytest.mark.parametrize("name", ["lenet5-d2l", "lenet5-sparse"])
def test_a_wrong_training_is_refused(networks, race, name, fault):
    def prepare(task):
        if fault == "update":
            return race.train_contestants.EAGER(replace(task, lr=1.001 * task.lr))
        if fault == "order":
            return race.train_contestants.EAGER(replace(task, images=task.images.flip(0), labels=task.labels.flip(0)))
        trained = race.train_contestants.EAGER(task)
        if fault == "nan":
            return replace(trained, run=lambda: [loss * torch.nan for loss in trained.run()])
        return replace(trained, run=lambda: (trained.reset(), trained.run())[1])

    planted = race.train_contestants.Contestant(prepare)
    with pytest.raises(race.agreement.Disagreement, match="planted: losses: off by"):
        train_only(race, networks.Task.make(name, 3, 2), planted=planted)


@pytest.mark.usefixtures("never_timed")
def test_a_wrong_output_is_refused(networks, race):
    task = networks.Task.make("lenet1", 3, 1)
    right = race.infer_contestants.EAGER(task)
    device = import_module("devices").Device("cpu", None, None)
    options = {"rounds": 1, "sample_seconds": 0.0, "device": device, "left_out": None}
    for factor, message in ((1.0, "timed"), (1.00003, "planted: output: off by [23].\\d+e-05")):
        planted = race.infer_contestants.Contestant(lambda _, factor=factor: lambda: right() * factor)
        with pytest.raises((AssertionError, race.agreement.Disagreement), match=message):
            race.infer(task, {"planted": planted}, **options)


@pytest.mark.usefixtures("never_timed")
def test_only_the_less_exact_are_allowed_more(networks, race, monkeypatch):
    slacks = {}

    def check(name, *_, slack, **__):
        slacks[name] = slack
        return race.agreement.Verdict(True, 0.0)

    monkeypatch.setattr(race.agreement, "check", check)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    everyone = dict(race.train_contestants.CONTESTANTS["cpu"])
    chosen = {who: replace(each, prepare=race.train_contestants.EAGER) for who, each in everyone.items()}
    with pytest.raises(AssertionError, match="timed"):
        train_only(race, networks.Task.make("lenet1", 2, 1), **chosen)
    ours, eager = ("fused-step", "fused-run"), ("eager", "eager-channels-last")
    compiled = [name for name in everyone if name not in (*ours, *eager, "compile-bfloat16")]
    assert slacks == {**dict.fromkeys((*ours, *eager), 1), **dict.fromkeys(compiled, 4), "compile-bfloat16": 4 * 2**16}


@pytest.mark.usefixtures("never_timed")
def test_who_is_missing_is_left_out_with_the_reason(networks, race, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    left_out = {}
    with pytest.raises(AssertionError, match="timed"):
        train_only(
            race,
            networks.Task.make("lenet1", 2, 1),
            left_out=lambda name, error: left_out.update({name: str(error)}),
            eager=race.train_contestants.CONTESTANTS["cpu"]["eager"],
            jax=race.train_contestants.CONTESTANTS["cpu"]["jax"],
        )
    assert left_out == {"jax": "jax is not installed"}


# ---- Rivals of other libraries


@pytest.mark.usefixtures("never_timed")
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "lenet5-1998"])
def test_jax_trains_alike(networks, race, name):
    pytest.importorskip("jax")
    contestants = race.train_contestants.CONTESTANTS
    with pytest.raises(AssertionError, match="timed"):
        train_only(
            race,
            networks.Task.make(name, 3, 2),
            jax=contestants["cpu"]["jax"],
            **{"jax-scan": contestants["cuda"]["jax-scan"]},
        )


@pytest.mark.parametrize(("rival", "packages"), [("onnxruntime", "onnxscript onnxruntime"), ("openvino", "openvino")])
@pytest.mark.filterwarnings("ignore")
def test_runtimes_compute_the_same(networks, race, rival, packages):
    for package in packages.split():
        pytest.importorskip(package)
    for name in ("lenet5-sparse", "lenet5-1998"):
        task = networks.Task.make(name, 2, 1)
        with torch.inference_mode():
            outputs = race.infer_contestants.CONTESTANTS[rival].prepare(task)()
            torch.testing.assert_close(outputs, task.model(task.images), rtol=1e-4, atol=1e-4)


# ---- The command line


def run(*arguments):
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Rows of training and of inference."""
    folder = tmp_path_factory.mktemp("benchmark")
    for name, options in (("train", ["--rivals", "fused-run,eager"]), ("infer", ["--inference", "--rivals", "eager"])):
        result = run(BENCHMARKS / "bench_train.py", *QUICK, *options, "--csv", folder / f"{name}.csv")
        assert result.returncode == 0, result.stderr
        assert "disturbed: " in result.stdout
    return folder


@needs_native
def test_a_row_for_each_contestant(written):
    for name, who in (("train", ["fused-step", "fused-run", "eager"]), ("infer", ["fused", "eager"])):
        rows = read(written / f"{name}.csv")
        assert [(row["network"], row["batch"], row["contestant"]) for row in rows] == [
            (network, batch, each) for network in ("lenet1", "lenet5-sparse") for batch in ("3", "64") for each in who
        ]
        flops = {"lenet1": 702_720, "lenet5-sparse": 1_723_920}
        for row in rows:
            assert row["threads"] == "1"
            assert row["dtype"] == "float32"
            if name == "train":
                assert row["steps"] == {"3": "64", "64": "8"}[row["batch"]]
                gflops = flops[row["network"]] * int(row["batch"]) / float(row["median_us"]) * 1e-3
                assert float(row["gflops"]) == pytest.approx(gflops, rel=0.01, abs=0.01)
                epoch = 60_000 / int(row["batch"]) * float(row["median_us"]) * 1e-3
                assert float(row["epoch_ms"]) == pytest.approx(epoch, rel=0.01)
            if row["contestant"] in ("fused", "fused-step"):
                assert row["ratio"] == row["ratio_q1"] == row["ratio_q3"] == "1.000"


@needs_native
def test_columns_are_documented(written):
    readme = (BENCHMARKS / "README.md").read_text()
    documented = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", readme, re.MULTILINE))))
    for name in ("train", "infer"):
        assert set(read(written / f"{name}.csv")[0]) <= documented


def test_contestants_are_documented(race):
    section = (BENCHMARKS / "README.md").read_text().split("## bench_train.py")[1].split("\n## ")[0]
    documented = set(re.findall(r"`([\w-]+)`", section))
    training = race.train_contestants.CONTESTANTS
    assert {*training["cpu"], *training["cuda"], *race.infer_contestants.CONTESTANTS, *NETWORKS} <= documented
    titles = {*import_module("train_table").RIVALS, "fused"}
    assert {*training["cpu"], *training["cuda"], *race.infer_contestants.CONTESTANTS} == titles


@pytest.mark.parametrize(
    "wrong",
    [
        {"networks": "lenet5,lenet6"},
        {"rivals": "jax-scan"},  # on CUDA only
        {"rivals": "openvino"},  # does not train
        {"device": "tpu"},
        {"batch": "0"},
        {"inference": True, "device": "cuda"},
        {"csv": Path("no/such/folder/train.csv")},
    ],
)
@pytest.mark.usefixtures("never_timed")
def test_wrong_arguments_end_before_any_work(wrong):
    with pytest.raises(typer.BadParameter, match=f"--{next(iter(wrong))}: "):
        import_module("bench_train").main(**wrong)


@needs_native
def test_only_the_races_that_the_readme_shows(networks, monkeypatch, capsys):
    asked = []

    def make(name, batch, *_):
        asked.append((name, batch))
        raise RuntimeError("no task")

    bench_train = import_module("bench_train")
    monkeypatch.setattr(networks.Task, "make", make)
    monkeypatch.setattr(bench_train, "_keep_to", lambda threads: None)  # this process has other tests to run
    options = {"threads": torch.get_num_threads(), "only_shown": True, "keep_going": True}
    with torch._inductor.config.patch(compile_threads=1), pytest.raises(SystemExit):
        bench_train.main(batch="1,128", networks="lenet5-d2l,lenet1", **options)
    assert asked == [("lenet5-d2l", 1), ("lenet5-d2l", 128), ("lenet1", 128)]
    assert capsys.readouterr().out.count("FAILED") == 3


# ---- What is drawn from the rows


@needs_native
def test_picture_is_drawn_from_the_rows_of_one_run(written, tmp_path):
    pytest.importorskip("matplotlib")
    plot_train = import_module("plot_train")
    for name in ("train", "infer"):
        plot_train.main(written / f"{name}.csv", tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    rows = read(written / "train.csv")
    rows[0]["threads"] = "7"
    with pytest.raises(ValueError, match="rows of one run, but threads differs: 1, 7"):
        plot_train.draw(rows, tmp_path / "mixed.png")


def test_the_readme_says_what_the_results_say():
    train_table, readme_section = import_module("train_table"), import_module("readme_section")
    done = run(BENCHMARKS / "train_table.py")
    assert done.returncode == 0, done.stderr
    readme = (ROOT / "README.md").read_text()
    below = [readme_section.text_below(heading, readme) for heading in (train_table.CPU, train_table.GPU)]
    assert "\n\n".join(below) == done.stdout.strip()
    results = BENCHMARKS / "results"
    assert (below[0] == train_table.NOT_MEASURED) == (
        not ((results / "train_cpu.csv").exists() or (results / "inference_cpu.csv").exists())
    )
    if not [path for path in results.glob("train_*.csv") if path.stem != "train_cpu"]:
        assert below[1] == train_table.NOT_MEASURED


FORMS = ("", "6.6"), ("-update", "5.5"), ("-channels-last", "7.7")


@needs_native
def test_sections_are_drawn_from_the_rows(written):
    train_table = import_module("train_table")
    training, inference = read(written / "train.csv"), read(written / "infer.csv")
    for row in training + inference:
        row |= {
            "batch": {"64": "128", "3": "3"}[row["batch"]],
            "median_us": "1234.5",
            "peak_share": "0.4321",
        }
        row["images_per_s"] = "98765"
        if row["contestant"] == "eager":
            row["ratio"] = "7.251" if "epoch_ms" in row else "3.949"
        if row["contestant"] == "fused-run":
            row |= {"ratio": "0.912"}
    text = train_table.cpu_text(training, inference)
    assert "| network | batch | ours | images/s | of peak | ours, all steps in a call | eager |" in text
    assert "| lenet1 | 128 | 1,234 us | 98,765 | 43% | 0.9x | 7.3x |" in text
    assert "| network | batch | ours | images/s | of peak | eager |" in text
    assert "| lenet5-sparse | 128 | 1,234 us | 98,765 | 43% | 3.9x |" in text
    assert text.count("\n| lenet") == 4  # no other batches of these networks
    assert text.index("A training step; ") < text.index("Inference; ")
    for row in training:
        row |= {"gpu": "some GPU", "epoch_ms": "1234.567"}
    text = train_table.gpu_text([training])
    assert "| network | batch | ours | images/s | of peak | epoch | ours, a call each step | eager |" in text
    assert "| lenet1 | 3 | 1,234 us | 98,765 | 43% | 1,234.6 ms | 1.0x | 7.3x |" in text
    compiled = [row | {"contestant": f"compile{form}", "ratio": ratio} for row in training[:1] for form, ratio in FORMS]
    assert train_table.gpu_text([training[:2] + compiled]).count(" 5.5x |") == 1  # the fastest form
    assert train_table.cpu_text([], []) == train_table.gpu_text([]) == train_table.NOT_MEASURED


# ---- Time to an accuracy


@needs_native
def test_time_to_an_accuracy_stops_at_it(tmp_path):
    path = tmp_path / "times.csv"
    options = ["--dataset", "mnist-10k", "--model", "lenet1", "--epochs", "3", "--threads", "1", "--seeds", "2"]
    done = run(BENCHMARKS / "time_to_accuracy.py", *options, "--target", "70", "--csv", path)
    assert done.returncode == 0, done.stderr
    rows = read(path)
    assert [row["seed"] for row in rows] == ["0", "1"]
    for row in rows:
        assert row["reached"] == "True"
        assert 70 <= float(row["test_accuracy_percent"]) < 100
        assert row["epochs"] == "1"
        assert float(row["seconds"]) > 0
    seconds = sorted(float(row["seconds"]) for row in rows)
    assert f"2 of 2 trainings reached 70.0 %, in {sum(seconds) / 2:.3f} s (median)" in done.stdout


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        (2, "1 of 2 trainings reached 98.0 %, too few for a median"),
        (3, "2 of 3 trainings reached 98.0 %, in 6.000 s (median)"),
    ],
)
def test_an_accuracy_that_is_not_reached_took_longest(monkeypatch, capsys, tmp_path, seeds, said):
    module = import_module("time_to_accuracy")
    options = {"dataset": "mnist-10k", "engine": "autograd"}
    accuracies = iter([0.5, 0.9, 0.95, 0.985, 0.4, 0.5, 0.6, 0.4, 0.99])

    class FakeRun:
        def __init__(self, config, dataset):
            self.config = config

        def fit(self, on_epoch):
            for number in range(self.config.epochs):
                on_epoch(module.Epoch(number + 1, 0.1, 1.0, 0.5, next(accuracies), 2.0, 1.0))

    monkeypatch.setattr(module, "Run", FakeRun)
    module.main(target=98.0, seeds=seeds, model="lenet1", epochs=3, batch_size=100, optimizer="adam", lr=1e-3,
                schedule="constant", reference=False, device="cpu", threads=None, data_dir=None,
                csv=tmp_path / "times.csv", **options)  # fmt: skip
    rows = read(tmp_path / "times.csv")
    assert [(row["reached"], row["seconds"], row["epochs"]) for row in rows] == [
        ("True", "6.0000", "3"),
        ("False", "6.0000", "3"),
        ("True", "4.0000", "2"),
    ][:seeds]
    assert capsys.readouterr().out.splitlines()[-1] == said
