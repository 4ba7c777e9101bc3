"""benchmarks/: they run, write what their README says, refuse wrong contestants, and compute what they claim."""

from __future__ import annotations

import csv
import dataclasses
import platform
import re
import subprocess
import sys
from importlib import import_module
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import typer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lenet_fast import backends
from lenet_fast.functional import conv_subsample
from lenet_fast.tables import LENET5_C3

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
QUICK = ["--batch", "3", "--threads", "1", "--rounds", "2", "--sample-ms", "0.1"]
EAGER = ["eager", "eager-channels-last"]
EAGER_SPARSE = [*EAGER, "fused-dense", "sliced", "grouped", "grouped-channels-last"]

needs_native = pytest.mark.skipif(
    backends.why_unavailable("native", "cpu") is not None, reason="no compiled CPU kernels to time"
)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture
def bench_ops(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, and through it those beside it."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module("bench_ops")


@pytest.fixture
def operator_race(bench_ops: ModuleType) -> ModuleType:
    """What bench_ops races with."""
    return import_module("operator_race")


@pytest.fixture
def layers(bench_ops: ModuleType) -> ModuleType:
    return import_module("layers")


@pytest.fixture
def never_timed(bench_ops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def race(*_: object, **__: object) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(bench_ops.harness, "race", race)


# ---- The command line


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "ops.csv"
    result = run(BENCHMARKS / "bench_ops.py", *QUICK, "--rivals", ",".join(EAGER_SPARSE), "--csv", path)
    assert result.returncode == 0, result.stderr
    assert "time / fused" in result.stdout
    assert "disturbed: " in result.stdout
    return path


@needs_native
def test_one_row_for_each_contestant_of_each_race(written: Path) -> None:
    with written.open(newline="") as file:
        rows = list(csv.DictReader(file))
    raced = [tuple(row[c] for c in ("layer", "activation", "pool", "pass", "contestant")) for row in rows]
    pooled, subsampled = [("sigmoid", "avg"), ("relu", "max")], [("scaled_tanh", "subsample")]
    assert raced == [
        (layer, *variant, one_pass, contestant)
        for one_pass in ("forward", "forward+backward")
        for layer, variants, rivals in (
            ("c1", pooled, EAGER),
            ("c3", pooled, EAGER),
            ("sparse-c3", [("tanh", "avg"), ("relu", "max")], EAGER_SPARSE),
            ("c1s2", subsampled, EAGER),
            ("c3s4", subsampled, EAGER_SPARSE),
        )
        for variant, contestant in product(variants, ("fused", *rivals))
    ]
    for row in rows:
        assert (row["batch"], row["threads"], row["rounds"], row["dtype"]) == ("3", "1", "2", "float32")
        assert row["torch"] == torch.__version__
        assert re.fullmatch(r"[0-9a-f]{40}|unknown", row["commit"])
        assert row["dirty"] in ("yes", "no", "unknown")
        for column in ("median_us", "images_per_s", "gflops", "ratio", "sgemm_peak_gflops", "probe_gflops"):
            assert float(row[column]) > 0
        assert 0 <= int(row["disturbed_rounds"]) <= 2
        if row["contestant"] == "fused":
            assert row["ratio"] == row["ratio_q1"] == row["ratio_q3"] == "1.000"


@needs_native
def test_columns_are_the_documented_ones(written: Path) -> None:
    section = (BENCHMARKS / "README.md").read_text().split("### Columns")[1].split("\n## ")[0]
    documented = [
        name
        for line in section.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    ]
    assert written.read_text().splitlines()[0].split(",") == documented


@needs_native
def test_rows_name_no_host_and_no_path(written: Path) -> None:
    with written.open(newline="") as file:
        cells = {cell for line in csv.reader(file) for cell in line}
    assert platform.node() not in cells
    assert not [cell for cell in cells if cell.startswith(("/", "~", ".")) or str(ROOT) in cell]


@needs_native
@pytest.mark.usefixtures("bench_ops")
def test_picture_is_drawn_from_the_rows_of_one_run(written: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_ops = import_module("plot_ops")
    picture = tmp_path / "ops.png"
    plot_ops.main(written, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")

    mixed = tmp_path / "mixed.csv"
    mixed.write_text(written.read_text().replace(",float32,", ",bfloat16,", 1))
    with pytest.raises(SystemExit, match="rows of one run, but dtype differs: bfloat16, float32"):
        plot_ops.main(mixed, tmp_path / "mixed.png")


@needs_native
@pytest.mark.usefixtures("bench_ops")
def test_picture_without_matplotlib_is_a_clear_message(written, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="plot_ops: matplotlib is not installed"):
        import_module("plot_ops").main(written, tmp_path / "ops.png")


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": "c1,c2"},
        {"rivals": "jax"},
        {"rivals": "sliced", "layers": "c1,c1s2"},  # which have no such contestant
        {"dtype": "float64"},
        {"device": "tpu"},
        {"passes": "backward"},
        {"batch": "128,many"},
        {"batch": "0"},
        {"csv": Path("no/such/folder/ops.csv")},
    ],
)
def test_wrong_arguments_end_before_any_work(bench_ops, never_timed, wrong) -> None:
    name = next(iter(wrong))
    with pytest.raises(typer.BadParameter, match=f"--{name}: "):
        bench_ops.main(**wrong)


PLANT = """
import sys
import typer
sys.path.insert(0, sys.argv.pop(1))
import bench_ops
import layers

class Planted(layers.nn.Sequential):
    def forward(self, input):
        return super().forward(input) * 1.00003

layers.EVERYWHERE["planted"] = layers.Contestant(lambda case: Planted(*layers.build_plain(case)))
typer.run(bench_ops.main)
"""


@needs_native
def test_refuses_to_time_a_wrong_contestant(tmp_path: Path) -> None:
    path = tmp_path / "ops.csv"
    result = run("-c", PLANT, BENCHMARKS, *QUICK, "--rivals", "eager,planted", "--csv", path)
    assert result.returncode == 1
    assert re.search(
        r"refusing to time c1 sigmoid avg forward batch 3: planted: output: off by [23]\.\d+e-05", result.stderr
    )
    assert result.stdout == ""
    assert not path.exists()


# ---- Agreement


class Wrong(nn.Sequential):
    """A plain layer with one fault in its output or in one gradient."""

    def __init__(self, layers: nn.Sequential, fault: str) -> None:
        super().__init__(*layers)
        self.fault = fault

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.fault == "input" and input.requires_grad:
            input = _Scale.apply(input)
        conv, *rest = self
        weight, bias = (
            _Scale.apply(parameter) if self.fault == name else parameter for name, parameter in conv.named_parameters()
        )
        output = nn.Sequential(*rest)(F.conv2d(input, weight, bias))
        if self.fault == "nan":
            output = output + torch.zeros_like(output).index_fill_(0, torch.tensor([0]), float("nan"))
        if self.fault == "shape":
            output = output[:, :-1]
        if self.fault == "dtype":
            output = output.double()
        return output


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.00003


@pytest.mark.usefixtures("never_timed")
@pytest.mark.parametrize("variant", [("sigmoid", "avg"), ("relu", "max")])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("input", "planted: gradient of input: off by [23]\\.\\d+e-05 of its largest value"),
        ("weight", "planted: gradient of weight: off by [23]\\.\\d+e-05 of its largest value"),
        ("bias", "planted: gradient of bias: off by [23]\\.\\d+e-05 of its largest value"),
        ("nan", "planted: output: off by nan"),
    ],
)
def test_every_result_is_checked(operator_race, layers, fault, message, variant) -> None:
    planted = layers.Contestant(lambda case: Wrong(layers.build_plain(case), fault))
    with pytest.raises(operator_race.agreement.Disagreement, match=message):
        check_only(operator_race, layers.LAYERS["c3"], planted, variant, "forward+backward")


@pytest.mark.usefixtures("never_timed")
@pytest.mark.parametrize("fault", ["shape", "dtype", "nan"])
def test_output_is_checked_in_forward(operator_race, layers, fault) -> None:
    planted = layers.Contestant(lambda case: Wrong(layers.build_plain(case), fault))
    with pytest.raises(operator_race.agreement.Disagreement, match="planted: output: "):
        check_only(operator_race, layers.LAYERS["c3"], planted, ("relu", "max"), "forward")


@pytest.mark.usefixtures("never_timed")
@pytest.mark.parametrize("one_pass", ["forward", "forward+backward"])
def test_a_right_contestant_is_timed(operator_race, layers, one_pass) -> None:
    planted = layers.Contestant(lambda case: Wrong(layers.build_plain(case), "none"))
    with pytest.raises(AssertionError, match="timed"):
        check_only(operator_race, layers.LAYERS["c3"], planted, ("relu", "max"), one_pass)


def check_only(operator_race: ModuleType, layer, contestant, variant, one_pass) -> None:
    case = operator_race.Case(layer, *variant)
    options = {"rounds": 1, "sample_seconds": 0.0, "device": operator_race.Device("cpu", None, None)}
    operator_race.measure(case, one_pass, {"planted": contestant}, batch=5, dtype=torch.float32, **options)


@pytest.mark.usefixtures("never_timed")
@pytest.mark.parametrize("name", ["eager", "sliced", "grouped"])
def test_a_connection_with_a_wrong_gradient_is_found(operator_race, layers, name) -> None:
    """In whatever layout; a connection of the last map, whose gradient is not the largest."""
    right = layers.SPARSE[name]

    def build(case) -> nn.Module:
        module = right.build(case)
        *_, weight = (parameter for parameter in module.parameters() if parameter.dim() == 4)
        weight.register_hook(lambda gradient: torch.cat([gradient[:-1], 1.01 * gradient[-1:]]))
        return module

    planted = dataclasses.replace(right, build=build)
    with pytest.raises(operator_race.agreement.Disagreement, match="planted: gradient of weight: off by"):
        check_only(operator_race, layers.LAYERS["c3s4"], planted, ("scaled_tanh", "subsample"), "forward+backward")


@pytest.mark.parametrize("name", ["eager", *EAGER_SPARSE[2:]])
def test_gradients_have_the_layout_of_the_fused_layer(operator_race, layers, name) -> None:
    """Against autograd through the fused layer's own parameters; float64, so that only the layout can differ."""
    case = operator_race.Case(layers.LAYERS["c3s4"], "scaled_tanh", "subsample")
    operands = operator_race.Operands.make(case, 3, torch.float32).double()
    contestant = layers.SPARSE[name]
    one_pass = "forward+backward"
    results = operator_race.results(
        operator_race.prepare(contestant, case, operands, one_pass), contestant, case, one_pass
    )

    wanted = [tensor.clone().requires_grad_() for tensor in (operands.input, *operands.parameters)]
    output = conv_subsample(*wanted, table=LENET5_C3, backend="reference")
    gradients = torch.autograd.grad(output, wanted, operands.grad_output)
    names = ("input", "weight", "bias", "coefficient", "pool_bias")
    assert list(results) == ["output", *(f"gradient of {name}" for name in names)]
    assert results["gradient of weight"].shape == (60, 5, 5)
    for found, expected in zip(results.values(), (output, *gradients), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("slack", [{}, {"slack": 4}])
def test_bounds_are_two_and_three_times_pytorchs_own_error(operator_race, slack) -> None:
    """Around each bound: what is just inside passes, what is just outside is refused."""
    truth = {name: torch.ones(4, dtype=torch.float64) for name in ("output", "gradient of weight")}
    own = {name: torch.full((4,), 1 + 1e-4) for name in truth}
    floor = 4 * torch.finfo(torch.float32).eps
    for name, factor in (("output", 2), ("gradient of weight", 3)):
        bound = (factor * (own[name][0].double().item() - 1) + floor) * slack.get("slack", 1)
        results = {**own, name: torch.full((4,), 1 + 0.99 * bound)}
        operator_race.agreement.check("near", results, truth=truth, own=own, **slack)
        results = {**own, name: torch.full((4,), 1 + 1.01 * bound)}
        with pytest.raises(operator_race.agreement.Disagreement, match=f"far: {name}: off by"):
            operator_race.agreement.check("far", results, truth=truth, own=own, **slack)


@needs_native
@pytest.mark.usefixtures("never_timed")
def test_only_what_is_compiled_may_be_less_exact(operator_race, layers, monkeypatch) -> None:
    slacks = {}

    def check(name, *_, slack, **__):
        slacks[name] = slack
        return operator_race.agreement.Verdict(True, 0.0)

    monkeypatch.setattr(operator_race.agreement, "check", check)
    monkeypatch.setattr(operator_race.torch, "compile", lambda module, **_: module)
    case = operator_race.Case(layers.LAYERS["c3s4"], "scaled_tanh", "subsample")
    options = {"rounds": 1, "sample_seconds": 0.0, "device": operator_race.Device("cpu", None, None)}
    with pytest.raises(AssertionError, match="timed"):
        operator_race.measure(case, "forward", layers.SPARSE, batch=2, dtype=torch.float32, **options)
    assert slacks == {"fused": 1, **dict.fromkeys(EAGER_SPARSE, 1), "compile": 4, "compile-channels-last": 4}


def test_no_gradient_comes_in_where_rounding_decides(operator_race, layers) -> None:
    blocks = torch.tensor(
        [
            [[3.0, 1.0], [2.0, -1.0]],  # plain
            [[3.0, 3.0 + 1e-7], [2.0, -1.0]],  # a near-tie
            [[1e-7, -1.0], [-2.0, -3.0]],  # the maximum at the kink
            [[3.0, -1.0], [-2.0, -2.0 - 1e-7]],  # a near-tie of what is not the maximum
        ],
        dtype=torch.float64,
    )
    conv = F.pad(blocks, (0, 1, 0, 1), value=7.0).unsqueeze(1)  # a last odd row and column
    layer = layers.LAYERS["c3"]

    def stable(activation: str, pool: str) -> list[bool]:
        return (
            operator_race._stable(conv, operator_race.Case(layer, activation, pool), torch.float32).flatten().tolist()
        )

    assert stable("relu", "max") == [True, False, False, True]
    assert stable("sigmoid", "max") == [True, False, True, True]
    assert stable("relu", "avg") == [True, True, False, True]
    assert stable("sigmoid", "avg") == [True] * 4


@pytest.mark.parametrize(
    ("name", "contestant"),
    [("c1", "eager"), ("c3", "eager"), ("sparse-c3", "sliced"), ("c1s2", "eager"), ("c3s4", "sliced")],
)
@pytest.mark.parametrize("one_pass", ["forward", "forward+backward"])
def test_operations_are_those_that_pytorch_counts(operator_race, layers, name, contestant, one_pass) -> None:
    layer = layers.LAYERS[name]
    case = operator_race.Case(layer, *layer.variants[0])
    operands = operator_race.Operands.make(case, 2, torch.float32)
    call = operator_race.prepare(layer.contestants[contestant], case, operands, one_pass)
    with FlopCounter() as counter:
        call()
    assert 2 * layer.flops(one_pass) == counter.total
    documented = re.search(rf"^\| `{name}` .*", (BENCHMARKS / "README.md").read_text(), re.MULTILINE).group()
    assert f" {layer.flops(one_pass):,} |" in documented


class FlopCounter(TorchDispatchMode):
    """Sums PyTorch's own counts of every operator (its FlopCounterMode cannot see torch.autograd.grad)."""

    total = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        output = operator(*args, **(kwargs or {}))
        if count := flop_registry.get(operator.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=output)
        return output


# ---- The race


class Machine:
    """A simulated clock: `b` costs three times `a`; in every third round the machine has a tenth of its speed."""

    def __init__(self, contestants: int) -> None:
        self.log: list[str] = []
        self.samples = 0
        self.contestants = contestants
        self.racing = False

    def contestant(self, name: str):
        return lambda: self.log.append(name)

    @property
    def speed(self) -> float:
        return 0.1 if self.racing and (self.samples // self.contestants) % 3 == 2 else 1.0

    def timer(self, call, calls: int) -> float:
        call()
        name = self.log[-1]
        seconds = calls * {"a": 1.0, "b": 3.0}[name] / self.speed
        self.samples += self.racing
        return seconds

    def probe(self) -> float:
        self.racing = True  # the race has begun: calibration is over
        return 100 * self.speed


def test_ratios_are_paired_and_slow_rounds_are_counted(bench_ops) -> None:
    machine = Machine(contestants=2)
    runs = {name: machine.contestant(name) for name in ("a", "b")}
    race = bench_ops.harness.race(runs, rounds=9, sample_seconds=12, probe=machine.probe, timer=machine.timer)
    assert race.times("a") == pytest.approx((1, 1, 10))
    assert race.times("b") == pytest.approx((3, 3, 30))
    assert race.ratios("b", to="a") == pytest.approx((3, 3, 3))
    # Three rounds were slow; before each, the last probe of a quick round fell into the slow time already.
    assert race.disturbed_rounds(best_probe=100) == 6
    assert len(race.probes) == 9


def test_every_round_times_everyone_in_changing_order(bench_ops) -> None:
    machine = Machine(contestants=2)
    runs = {name: machine.contestant(name) for name in ("a", "b")}
    options = {"rounds": 20, "sample_seconds": 1, "probe": machine.probe, "timer": machine.timer}
    bench_ops.harness.race(runs, **options)
    rounds = list(zip(machine.log[-40::2], machine.log[-39::2], strict=True))
    assert set(rounds) == {("a", "b"), ("b", "a")}
    first = machine.log[-40:]
    machine.log.clear()
    bench_ops.harness.race(runs, **options)
    assert machine.log[-40:] == first  # repeatable


def test_a_call_that_repeats_counts_as_often(bench_ops) -> None:
    machine = Machine(contestants=2)
    runs = {name: machine.contestant(name) for name in ("a", "b")}
    options = {"rounds": 2, "sample_seconds": 12, "probe": machine.probe, "timer": machine.timer}
    race = bench_ops.harness.race(runs, **options, repeats=4)
    assert race.times("b") == pytest.approx((0.75, 0.75, 0.75))


def test_probe_measures_the_machine(bench_ops) -> None:
    probe = bench_ops.harness.SgemmProbe()
    speed = probe()
    assert 0 < speed <= probe.best <= probe.peak
