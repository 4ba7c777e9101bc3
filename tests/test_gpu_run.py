"""benchmarks/gpu_run.sh and what it runs, here with a pretended GPU: steps, rows, summary, the README's section."""

import csv
import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from lenet_fast import backends

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
BENCHMARKS = ROOT / "benchmarks"
PRETEND = f"{sys.executable} {TESTS / 'pretend_cuda.py'}"

needs_native = pytest.mark.skipif(
    backends.why_unavailable("native", "cpu") is not None, reason="no compiled CPU kernels to stand in"
)


@pytest.fixture(autouse=True)
def _modules_of_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def run(*command, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def gpu_run(out, *steps, python=sys.executable, **environment):
    options = {"OUT": str(out), "PYTHON": python, "GPU_BUNDLE": str(out / "no-bundle")} | environment
    return run(str(BENCHMARKS / "gpu_run.sh"), *steps, **options)


# ---- The steps


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_ends_at_once(tmp_path):
    done = gpu_run(tmp_path / "out", "first")
    assert done.returncode == 2
    assert done.stderr.strip() == f"gpu_run: no CUDA device (PyTorch {torch.__version__})"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["", "third"])
def test_unknown_stages_are_refused(tmp_path, stage):
    done = gpu_run(tmp_path, stage)
    assert done.returncode == 2
    assert done.stderr.strip() == f"gpu_run: expected first or second, got '{stage}'"


def test_what_is_missing_is_said_with_its_cost(monkeypatch, capsys):
    gpu_report = import_module("gpu_report")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_report.util, "find_spec", lambda name: None if name == "xdist" else name)
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name: None if name == "nvcc" else name)
    monkeypatch.setattr(gpu_report.metadata, "version", lambda name: {"setuptools": "65.5.0"}.get(name, "2.11.0"))
    assert gpu_report.before() == "h100_80gb_hbm3 9.0"
    assert capsys.readouterr().err.splitlines() == [
        "NVIDIA H100 80GB HBM3, 1 of them, torch 2.11.0, setuptools 65.5.0",
        "missing here: xdist: the tests run one by one",
        "missing here: nvcc: without a bundle no CUDA kernels are built",
        "missing here: setuptools 77 or later: nothing is built",
    ]


FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *"gpu_report.py before") echo fake_gpu 9.0 ;;
  *"gpu_report.py after"*) exec {python} "$@" ;;
  *"gpu_bundle.py check"*) exit 1 ;;
  *setup.py*) echo "cannot be built"; exit 3 ;;
  *memcheck*) echo "$@" ;;
  *gpu_smoke.py*) echo "c1: FAILED: off | by far"; exit 1 ;;
  *) echo "$@" ;;
esac
"""
# Stands for timeout: the slow steps exceed their time at once, the others have as much as they like.
FAKE_TIMEOUT = """#!/usr/bin/env bash
case "$*" in
  *jax-scan* | *bench_ops.py*) sleep "${FAKE_SECONDS:-0}"; exit 124 ;;
esac
while [[ $1 == -* ]]; do shift; done
shift
exec "$@"
"""
STEPS = {
    "first": ["build", "facts", "smoke", "alone", "race-eager", "race", "smoke-memcheck", "race-of-all"],
    "second": [
        *("build", "training-tests", "operator-tests", "races", "racecheck", "memcheck"),
        *("operators", "triton-tests", "alone-tests"),
    ],
}


@pytest.fixture
def fake_python(tmp_path):
    """Stands for Python and compute-sanitizer: building and the smoke test fail, two benchmarks take too long."""
    for name in ("python", "compute-sanitizer"):
        (tmp_path / name).write_text(FAKE_PYTHON.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    (tmp_path / "timeout").write_text(FAKE_TIMEOUT)
    (tmp_path / "timeout").chmod(0o755)
    return {"python": str(tmp_path / "python"), "PATH": f"{tmp_path}:{os.environ['PATH']}", "LENET_FAST_DATA": ""}


def steps_of(summary):
    lines = [line.strip("| ").split(" | ") for line in summary.splitlines()[2:]]
    return {line[0]: line for line in lines}


@pytest.mark.parametrize("stage", STEPS)
def test_a_failed_step_stops_no_other_and_shows_in_the_end(tmp_path, fake_python, stage):
    done = gpu_run(tmp_path / "out", stage, **fake_python)
    assert done.returncode == 1
    steps = steps_of(done.stdout)
    assert [name for name in steps if name != "ncu"] == STEPS[stage]  # ncu may be installed
    assert steps["build"][1:2] + steps["build"][4:] == ["FAILED (3)", "cannot be built"]
    slow = "race-of-all" if stage == "first" else "operators"
    assert steps[slow][1] == "OUT OF TIME"
    if stage == "first":
        assert steps["smoke"][1:2] + steps["smoke"][4:] == ["FAILED (1)", "c1: FAILED: off   by far"]
        assert steps["smoke-memcheck"][1] == "ok"
    assert all(step[1] == "ok" for name, step in steps.items() if name not in ("build", "smoke", slow))
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {f"gpu_run_{stage}.log", f"{stage}_fake_gpu.md"}
    assert (tmp_path / "out" / f"{stage}_fake_gpu.md").read_text() == done.stdout
    assert f"=== {slow}: " in (tmp_path / "out" / f"gpu_run_{stage}.log").read_text()


def test_without_time_every_step_says_so(tmp_path, fake_python):
    done = gpu_run(tmp_path / "out", "second", GPU_RUN_SECONDS="0", **fake_python)
    assert done.returncode == 1
    assert {step[1] for step in steps_of(done.stdout).values()} == {"no time left"}


def test_steps_can_be_chosen(tmp_path, fake_python):
    done = gpu_run(tmp_path / "out", "second", "races", "racecheck", **fake_python)
    assert list(steps_of(done.stdout)) == ["build", "races", "racecheck"]  # without a library nothing can be timed


def test_what_was_done_before_a_kill_is_in_the_summary(tmp_path, fake_python):
    environment = os.environ | {"OUT": str(tmp_path / "out"), "PYTHON": fake_python["python"]}
    environment |= {"PYTHONPATH": str(ROOT), "PATH": fake_python["PATH"], "LENET_FAST_DATA": "", "FAKE_SECONDS": "60"}
    command = [str(BENCHMARKS / "gpu_run.sh"), "first"]
    summary = tmp_path / "out" / "first_fake_gpu.md"
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        for line in process.stderr:
            if line == b"race-of-all ...\n":
                os.killpg(process.pid, signal.SIGKILL)
    assert list(steps_of(summary.read_text()))[-1] == "smoke-memcheck"


def test_a_summary_that_cannot_be_drawn_leaves_that_of_the_steps(tmp_path, fake_python):
    path = tmp_path / "python"
    path.write_text(path.read_text().replace(f'exec {sys.executable} "$@"', "exit 1"))
    done = gpu_run(tmp_path / "out", "second", "races", **fake_python)
    assert done.returncode == 1
    assert list(steps_of(done.stdout)) == ["build", "races"]


# ---- What it runs, on a pretended GPU


@needs_native
def test_cuda_tests_have_no_slip():
    """Large batches take the CPU too long; the smallest case executes the same lines."""
    files = "tests/test_cuda.py", "tests/test_cuda_training.py"
    done = run(*PRETEND.split(), "-m", "pytest", *files, "-k", "not large or n0-1x8x8")
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 200


@needs_native
def test_a_capture_that_is_never_replayed_shows():
    """That is, the pretended device can fail the tests."""
    code = "import torch; x = torch.ones(3, device='cuda:0'); g = torch.cuda.CUDAGraph()\n"
    code += "with torch.cuda.graph(g): y = x * 2\nassert y.isnan().all(); x.fill_(4); g.replay(); assert (y == 8).all()"
    script = (
        f"import runpy, sys; sys.path.insert(0, {str(TESTS)!r}); import pretend_cuda; pretend_cuda.install()\n{code}"
    )
    done = run(sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """The benchmark's run on layer C1 and its files."""
    out = tmp_path_factory.mktemp("gpu_run")
    options = "--batch 2,5 --threads 1 --layers c1 --rounds 2 --sample-ms 0.1 --rivals fused-triton,eager,compile"
    options += " --passes forward+backward,forward --seconds 300"
    environment = {"GPU_RUN_BENCH": options, "LENET_FAST_COMMIT": "carried", "GPU_RUN_SLOWER": "5"}
    done = gpu_run(out, "second", "operators", python=PRETEND, **environment)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "gpu_run_second.log").read_text()
    return done, out


@needs_native
def test_rows_of_a_gpu(benchmark):
    done, out = benchmark
    rows = read(out / "gpu_pretended_gpu.csv")
    triton = [] if backends.why_unavailable("triton", "cpu") else ["fused-triton"]
    columns = ("pass", "batch", "activation", "launch", "contestant")
    assert [tuple(row[column] for column in columns) for row in rows] == [
        (one_pass, batch, activation, launch, contestant)
        for one_pass in ("forward+backward", "forward")
        for batch in ("2", "5")
        for activation in ("sigmoid", "relu")
        for launch in ("calls", "graph")
        for contestant in ("fused", "eager", "compile", *triton)
    ]
    for row in rows:
        assert (row["gpu"], row["tf32"], row["kernels"]) == ("pretended GPU", "off", "native")
        peak, bandwidth = float(row["sgemm_peak_gflops"]), float(row["copy_gbytes_per_s"])
        batch, training = int(row["batch"]), row["pass"] == "forward+backward"
        flops, elements = 470_400 if training else 235_200, 784 + 1176 * (1 + training)
        least = 1e-3 * batch * max(flops / peak, 4 * elements / bandwidth)
        assert float(row["roofline_us"]) == pytest.approx(least, rel=0.5 / bandwidth + 1e-2, abs=0.01)
        share = float(row["roofline_us"]) / float(row["median_us"])
        assert float(row["roofline_share"]) == pytest.approx(share, abs=0.01)
        if row["contestant"] == "fused":
            assert row["ratio"] == "1.000"
    assert "| c1, relu + max | 5 |" in done.stdout
    assert all(row["agrees"] == "yes" and float(row["error"]) < 1e-4 for row in rows)
    assert (out / "second_pretended_gpu.md").read_text() == done.stdout


@needs_native
def test_whole_networks_of_a_gpu(tmp_path):
    options = "--races lenet1:5,lenet1:3 --threads 1 --rounds 2 --epoch-images 10"
    options += " --rivals fused-step,fused-phases,eager,compile-graph"
    options += " --seconds 300"
    done = gpu_run(tmp_path, "first", "facts", "alone", python=PRETEND, GPU_RUN_TRAIN=options, GPU_RUN_SLOWER="5")
    assert "| alone | ok |" in done.stdout, done.stdout + done.stderr + (tmp_path / "gpu_run_first.log").read_text()
    rows = read(tmp_path / "alone_pretended_gpu.csv")
    assert [(row["batch"], row["steps"], row["contestant"]) for row in rows] == [
        (batch, steps, who)
        for batch, steps in (("5", "2"), ("3", "3"))
        for who in ("fused-step", "fused-run", "eager", "fused-phases", "compile-graph")
    ]
    for row in rows:
        assert (row["gpu"], row["tf32"], row["agrees"]) == ("pretended GPU", "off", "yes")
        if row["contestant"] == "fused-run":
            assert row["ratio"] == row["ratio_q1"] == row["ratio_q3"] == "1.000"
    assert "| lenet1 | 5 |" in done.stdout
    assert (tmp_path / "first_pretended_gpu.md").read_text() == done.stdout


@needs_native
def test_the_smoke_test_runs():
    done = run(*PRETEND.split(), str(BENCHMARKS / "gpu_smoke.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("training ") for line in lines) == 12
    assert lines[-1] == f"{len(lines) - 1} passed, 0 failed"


@needs_native
def test_a_wrong_kernel_fails_the_smoke_test(monkeypatch, capsys):
    gpu_smoke = import_module("gpu_smoke")
    monkeypatch.setattr(gpu_smoke, "LAYERS", {})
    monkeypatch.setattr(gpu_smoke, "NETWORKS", ["lenet1"])
    monkeypatch.setattr(gpu_smoke, "TRAINING_BATCHES", [5])

    def wrong(network, batch, cooperative):
        found = gpu_smoke.train_plainly(network, batch, torch.float32)
        return found | {"losses": found["losses"] * 1.0001}

    monkeypatch.setattr(gpu_smoke, "train", wrong)
    with pytest.raises(SystemExit):
        gpu_smoke.main()
    assert (
        "training lenet1 batch 5: FAILED: Disagreement: one launch: losses: off by 9.99e-05" in capsys.readouterr().out
    )


@needs_native
def test_columns_of_a_gpu_are_documented(benchmark):
    readme = (BENCHMARKS / "README.md").read_text()
    documented = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", readme, re.MULTILINE))))
    assert set(read(benchmark[1] / "gpu_pretended_gpu.csv")[0]) <= documented


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- Time and ceilings


def test_the_roofline_is_the_slower_of_arithmetic_and_memory():
    devices = import_module("devices")
    probe = type("Probe", (), {"peak": 50_000.0})()  # GFLOP/s
    device = devices.Device("cuda", None, probe, bandwidth=2e12, cache_bytes=1000)
    assert device.roofline_seconds(flops=1e9, bytes=1e6) == pytest.approx(20e-6)
    assert device.roofline_seconds(flops=1e9, bytes=1e9) == pytest.approx(500e-6)
    assert [device.copies(size) for size in (1, 1999, 2000, 5000)] == [2000, 2, 1, 1]


def test_events_are_around_all_calls(monkeypatch):
    harness = import_module("harness")
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            assert end is not self
            return 2500.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert harness.time_on_cuda(lambda: log.append("call"), 3) == 2.5
    assert log == ["record", "call", "call", "call", "record", "wait"]


def test_bytes_are_those_of_inputs_outputs_and_their_gradients():
    layers = import_module("layers").LAYERS
    operator_race = import_module("operator_race")
    readme = (BENCHMARKS / "README.md").read_text()
    for name, layer in layers.items():
        case = operator_race.Case(layer, *layer.variants[0])
        operands = operator_race.Operands.make(case, 2, torch.float32)
        results = operator_race.results(
            operator_race.prepare(operator_race.PLAIN, case, operands, "forward+backward"),
            operator_race.PLAIN,
            case,
            "forward+backward",
        )
        input, output = operands.input.nbytes, results["output"].nbytes
        once = input + output
        twice = once + operands.grad_output.nbytes + (input if "gradient of input" in results else 0)
        assert [2 * 4 * layer.elements(each) for each in operator_race.PASSES] == [once, twice]
        assert re.search(rf"^\| `{name}` .*\| {twice // 2:,} \|$", readme, re.MULTILINE)


# ---- What goes wrong


@pytest.fixture
def planted(monkeypatch):
    """bench_ops on the CPU with a rival that is wrong; races cost nothing."""
    bench_ops, layers = import_module("bench_ops"), import_module("layers")

    class Wrong(torch.nn.Sequential):
        def forward(self, input):
            return 1.001 * super().forward(input)

    def plant(name):
        contestant = layers.Contestant(lambda case: Wrong(*layers.build_plain(case)))
        monkeypatch.setitem(layers.EVERYWHERE, name, contestant)

    probe = import_module("harness").SgemmProbe((16, 32))
    monkeypatch.setitem(bench_ops.DEVICES, "cpu", lambda: bench_ops.Device("cpu", lambda run, calls: calls, probe))
    return bench_ops, plant


OPTIONS = {"batch": "3", "threads": 1, "layers": "c1", "passes": "forward", "rounds": 1, "sample_ms": 0.1}


@needs_native
def test_a_wrong_rival_is_left_out_and_named(planted, tmp_path, capsys):
    bench_ops, plant = planted
    plant("planted")
    path = tmp_path / "ops.csv"
    with pytest.raises(SystemExit) as stop:
        bench_ops.main(**OPTIONS, rivals="planted,eager", keep_going=True, csv=path)
    assert stop.value.code == 1
    assert [row["contestant"] for row in read(path)] == ["fused", "eager"] * 2
    assert (
        "FAILED c1 sigmoid avg forward batch 3: without planted: Disagreement: planted: output"
        in capsys.readouterr().out
    )


@needs_native
def test_where_ours_is_wrong_nobody_is_timed(planted, tmp_path, capsys):
    bench_ops, plant = planted
    plant("fused")
    path = tmp_path / "ops.csv"
    with pytest.raises(SystemExit) as stop:
        bench_ops.main(**OPTIONS, rivals="eager", keep_going=True, csv=path)
    assert stop.value.code == 1
    assert not path.exists()
    assert "FAILED c1 relu max forward batch 3: not raced: Disagreement: fused: output" in capsys.readouterr().out


@needs_native
def test_where_ours_is_wrong_on_a_gpu_it_is_timed_and_written_down(planted, tmp_path, capsys, monkeypatch):
    bench_ops, plant = planted
    plant("fused")
    monkeypatch.setattr(import_module("operator_race").agreement, "Judge", writing_down("fused"))
    path = tmp_path / "ops.csv"
    with pytest.raises(SystemExit) as stop:
        bench_ops.main(**OPTIONS, rivals="eager", keep_going=True, csv=path)
    assert stop.value.code == 1
    rows = read(path)
    assert [(row["contestant"], row["agrees"]) for row in rows] == [("fused", "no"), ("eager", "yes")] * 2
    assert float(rows[0]["error"]) == pytest.approx(1e-3, rel=0.01)
    assert "FAILED c1 relu max forward batch 3: fused was timed although it disagrees" in capsys.readouterr().out


def writing_down(name):
    """agreement.Judge as on a GPU."""
    judge = import_module("agreement").Judge
    return lambda *args, **_: judge(*args, writes_down=(name,))


@needs_native
def test_races_without_time_are_counted(planted, capsys):
    bench_ops, _ = planted
    with pytest.raises(SystemExit) as stop:
        bench_ops.main(**OPTIONS, rivals="eager", seconds=0.0)
    assert stop.value.code == 1
    assert "FAILED the last 2 of 2 races: no time was left for them" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_missing_is_said(monkeypatch):
    bench_ops = import_module("bench_ops")
    monkeypatch.setattr(bench_ops.backends, "why_unavailable", lambda *_: None)
    with pytest.raises(SystemExit, match="bench_ops: --device: no CUDA device"):
        bench_ops.main(**OPTIONS, device="cuda")


# ---- The README's section


def below_gpu_heading(readme):
    return import_module("readme_section").text_below(import_module("gpu_table").HEADING, readme)


def test_the_readme_says_what_the_results_say():
    done = run(sys.executable, str(BENCHMARKS / "gpu_table.py"))
    assert done.returncode == 0, done.stderr
    assert below_gpu_heading((ROOT / "README.md").read_text()) == done.stdout.strip()
    if not list((BENCHMARKS / "results").glob("gpu_*.csv")):
        assert done.stdout.startswith("Not yet measured.")


@needs_native
def test_the_section_is_drawn_from_the_rows(benchmark):
    gpu_table = import_module("gpu_table")
    rows = read(benchmark[1] / "gpu_pretended_gpu.csv")
    for row in rows:
        row |= {"median_us": "12.34", "roofline_share": "0.4321", "ratio": "1.000", "batch": row["batch"] + "00"}
        if row["contestant"] == "eager" and row["launch"] == "graph":
            row["ratio"] = "7.251" if row["activation"] == "relu" else "3.949"
    rows = [row for row in rows if (row["contestant"], row["activation"]) != ("compile", "relu")]
    text = gpu_table.text([rows])
    assert "| layer | batch | ours | roofline | eager | torch.compile |" in text
    assert "| c1, sigmoid + avg | 200 | 12.3 us | 43% | 3.9x | 1.0x |" in text
    assert "| c1, relu + max | 500 | 12.3 us | 43% | 7.3x |  |" in text
    assert text.index("In CUDA graphs") < text.index("| c1, relu + max | 500 |") < text.index("call by call")
    assert text.count("\n| c1") == 8  # forward alone is not in it
    assert below_gpu_heading(f"# A\n\n{gpu_table.HEADING}\n\n{text}\n\n### Models\n") == text
