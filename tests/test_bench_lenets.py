"""benchmarks/bench_lenets.py: rows for each contestant, wrong ones refused, the table of the docs from the results."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer
from public_lenets import LENETS

from lenet_fast import backends

ROOT = Path(__file__).resolve().parent.parent

needs_native = pytest.mark.skipif(
    backends.why_unavailable("native", "cpu") is not None, reason="no compiled CPU kernels to time"
)


@pytest.fixture(autouse=True)
def _modules_of_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def bench(monkeypatch):
    module = import_module("bench_lenets")
    probe = import_module("harness").SgemmProbe((32,))  # a small one
    monkeypatch.setattr(module.devices, "cpu", lambda: module.Device("cpu", module.harness.time_on_cpu, probe))
    return module


def quickly(bench, path, lenets):
    bench.main(batch=3, threads=torch.get_num_threads(), lenets=lenets, rounds=2, sample_ms=0.01, csv=path)


@needs_native
def test_a_row_for_each_contestant(bench, tmp_path, capsys):
    """Of a network that native steps take, of one that they do not, of one that draws random numbers."""
    path = tmp_path / "lenets.csv"
    quickly(bench, path, "split-learning,keeps-activations,adda")
    assert "split-learning: eager" in capsys.readouterr().out
    rows = import_module("rows").read(path)
    assert [(row["lenet"], row["contestant"]) for row in rows] == [
        (lenet, contestant)
        for lenet in ("split-learning", "keeps-activations", "adda")
        for contestant in ("eager", "accelerate", "fused-step")
    ]
    for row in rows:
        assert row["fused"] == str(LENETS[row["lenet"]].fused[0])
        assert ("native" in row["how"]) is not bool(LENETS[row["lenet"]].autograd)
        drawn = (row["lenet"], row["contestant"]) == ("adda", "fused-step")
        assert row["agrees"] == ("not comparable" if drawn else "yes")
        assert float(row["median_us"]) > 0 < float(row["gflops"])
    section = (ROOT / "benchmarks" / "README.md").read_text().split("## bench_lenets.py")[1].split("\n## ")[0]
    own = set(re.findall(r"^\| `(\w+)`", section.split("only here")[1], re.MULTILINE))
    assert own <= set(rows[0])
    table = import_module("lenets_table").text(rows)
    for row in rows:
        if row["contestant"] != "eager":
            line = next(line for line in table.splitlines() if line.startswith(f"| {row['lenet']} |"))
            assert f" {1 / float(row['ratio']):.1f}x |" in line


def test_a_wrong_training_is_refused(bench, monkeypatch, tmp_path):
    def wrong(task):
        step = bench.eager(task)
        return lambda: 1.00003 * step()

    monkeypatch.setattr(bench, "CONTESTANTS", {"eager": bench.eager, "accelerate": wrong})
    with pytest.raises(SystemExit, match="refusing to time lenet-1: accelerate: losses: off by"):
        quickly(bench, tmp_path / "lenets.csv", "lenet-1")
    assert not (tmp_path / "lenets.csv").exists()


@pytest.mark.parametrize(
    "wrong", [{"lenets": "lenet-1,alexnet"}, {"lenets": "siamese"}, {"csv": Path("no/such/a.csv")}]
)
def test_wrong_arguments_end_before_any_work(bench, wrong):
    (name,) = wrong
    with pytest.raises(typer.BadParameter, match=f"--{name}: "):
        bench.main(**wrong)


def test_the_docs_say_what_the_results_say():
    table, readme_section = import_module("lenets_table"), import_module("readme_section")
    measured = import_module("rows").read(table.RESULTS) if table.RESULTS.exists() else []
    assert readme_section.text_below(table.HEADING, table.DOCUMENT.read_text()) == table.text(measured).strip()
    assert f" {len(LENETS)} published LeNets" in (ROOT / "README.md").read_text()
