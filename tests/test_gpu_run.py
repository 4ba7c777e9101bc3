"""benchmarks/gpu_run.sh and what it runs, here with a pretended GPU: steps, rows, summary, the README's section."""

import csv
import os
import re
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
    return run(str(BENCHMARKS / "gpu_run.sh"), *steps, OUT=str(out), PYTHON=python, **environment)


# ---- The steps


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_ends_at_once(tmp_path):
    done = gpu_run(tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.strip() == f"gpu_run: no CUDA device (PyTorch {torch.__version__})"
    assert not list(tmp_path.iterdir())


def test_unknown_steps_are_refused(tmp_path):
    done = gpu_run(tmp_path, "build", "bnch")
    assert done.returncode == 2
    assert done.stderr.strip() == "gpu_run: expected build, test, sanitize, train or bench, got 'bnch'"


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
        "missing here: nvcc: no CUDA kernels are built",
        "missing here: setuptools 77 or later: nothing is built",
    ]


FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *"gpu_report.py before") echo fake_gpu 9.0 ;;
  *"gpu_report.py after"*) exec {python} "$@" ;;
  *setup.py*) echo "cannot be built"; exit 3 ;;
  *bench_ops.py*) sleep 60 ;;
  *) echo "$@" ;;
esac
"""


@pytest.fixture
def fake_python(tmp_path):
    """Stands for Python and compute-sanitizer: building fails, the benchmark never ends."""
    for name in ("python", "compute-sanitizer"):
        (tmp_path / name).write_text(FAKE_PYTHON.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    return {"python": str(tmp_path / "python"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_a_failed_step_stops_no_other_and_shows_in_the_end(tmp_path, fake_python):
    done = gpu_run(tmp_path / "out", GPU_RUN_SECONDS="4", **fake_python)
    assert done.returncode == 1
    steps = {re.sub(r"^\| ", "", line).split(" | ")[0]: line for line in done.stdout.splitlines()[2:]}
    assert list(steps) == [
        "build",
        "env",
        "training",
        "operators",
        "alone",
        "memcheck",
        "racecheck",
        "initcheck",
        "train",
        "bench",
    ]
    assert "| FAILED (3) |" in steps["build"]
    assert "| cannot be built |" in steps["build"]
    assert "| OUT OF TIME |" in steps["bench"]
    assert all("| ok |" in line for name, line in steps.items() if name not in ("build", "bench"))
    assert (tmp_path / "out" / "gpu_fake_gpu.md").read_text() == done.stdout
    log = (tmp_path / "out" / "gpu_run.log").read_text()
    assert "=== operators: " in log
    assert re.search(
        r"--tool racecheck .* tests/test_cuda.py tests/test_cuda_training.py -k test_small$", log, re.MULTILINE
    )


def test_no_time_left_is_a_failure(tmp_path, fake_python):
    done = gpu_run(tmp_path, "test", GPU_RUN_SECONDS="0", **fake_python)
    assert done.returncode == 1
    assert done.stdout.count("| FAILED (no time left) |") == 3


def test_the_whole_run_stays_below_nine_minutes():
    (limit,) = re.findall(r"GPU_RUN_SECONDS:-(\d+)", (BENCHMARKS / "gpu_run.sh").read_text())
    assert int(limit) <= 9 * 60 - 20  # for what comes before and after the steps


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
    done = gpu_run(out, "bench", python=PRETEND, GPU_RUN_BENCH=options, LENET_FAST_COMMIT="carried")
    assert done.returncode == 0, done.stdout + done.stderr + (out / "gpu_run.log").read_text()
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
    assert (out / "gpu_pretended_gpu.md").read_text() == done.stdout


@needs_native
def test_whole_networks_of_a_gpu(tmp_path):
    options = "--batch 5,3 --threads 1 --networks lenet1 --rounds 2 --epoch-images 10"
    options += " --rivals fused-step,fused-phases,eager,compile-graph"
    done = gpu_run(tmp_path, "train", python=PRETEND, GPU_RUN_TRAIN=options, LENET_FAST_DATA="")
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "gpu_run.log").read_text()
    rows = read(tmp_path / "train_pretended_gpu.csv")
    assert [(row["batch"], row["steps"], row["contestant"]) for row in rows] == [
        (batch, steps, who)
        for batch, steps in (("5", "2"), ("3", "3"))
        for who in ("fused-step", "fused-run", "eager", "fused-phases", "compile-graph")
    ]
    for row in rows:
        assert (row["gpu"], row["tf32"]) == ("pretended GPU", "off")
        if row["contestant"] == "fused-run":
            assert row["ratio"] == row["ratio_q1"] == row["ratio_q3"] == "1.000"
    assert "| lenet1 | 5 |" in done.stdout
    assert (tmp_path / "gpu_pretended_gpu.md").read_text() == done.stdout


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
