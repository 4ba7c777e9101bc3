"""The example scripts run, with the real libraries that they are about."""

import csv
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def lightning_example():
    pytest.importorskip("lightning", reason="Lightning is not installed (requirements-interop.txt)")
    return str(EXAMPLES / "lightning_lenet1.py")


def is_share_of(count, accuracy):
    return abs(accuracy * count - round(accuracy * count)) < 0.01


@pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"
)  # of PyTorch's own, in Lightning
def test_lightning_script_trains_and_logs(lightning_example, tmp_path, monkeypatch):
    options = ["--dataset", "mnist-10k", "--epochs", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [lightning_example, *options])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(lightning_example, run_name="__main__")
    assert not stop.value.code

    (log,) = tmp_path.rglob("metrics.csv")
    with log.open() as file:
        rows = list(csv.DictReader(file))
    columns = {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}
    assert columns["lr-Adam"] == pytest.approx([1e-3, 1e-3])
    assert columns["step"][-1] == 2 * 36  # 9,167 images in batches of 256
    first, second = columns["train_loss"]
    assert second < first
    assert len(columns["val_loss"]) == 2
    assert all(is_share_of(9167, accuracy) for accuracy in columns["train_accuracy"])
    assert all(is_share_of(833, accuracy) for accuracy in columns["val_accuracy"])
    (test_accuracy,) = columns["test_accuracy"]
    assert is_share_of(10_000, test_accuracy)
    assert test_accuracy > 0.7
    assert [file.name for file in tmp_path.rglob("*.ckpt")] == ["epoch=1-step=72.ckpt"]  # only the best


def test_lightning_rate_falls_when_the_validation_loss_stalls(lightning_example):
    module = runpy.run_path(lightning_example)["LeNet1"]()
    configured = module.configure_optimizers()
    assert configured["lr_scheduler"]["monitor"] == "val_loss"
    for _ in range(4):
        configured["lr_scheduler"]["scheduler"].step(1.0)
    assert configured["optimizer"].param_groups[0]["lr"] < 1e-3
