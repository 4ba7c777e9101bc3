"""The phase clocks of the training kernel on the CPU: a table whose form is a GPU's. Run by test_cuda_host.py.

The shim's clock counts how often a thread was run on, so that it repeats itself.
"""

import os
from importlib import import_module

import numpy as np
import pytest
import torch

from cuda_host import build

NETWORK, BATCH, BLOCKS = "lenet5-d2l", 5, 3  # the first two blocks take two images, the last takes one


@pytest.fixture
def clocked(monkeypatch):
    monkeypatch.syspath_prepend(build.ROOT / "benchmarks")
    monkeypatch.setenv("CUDA_HOST_MULTIPROCESSORS", str(BLOCKS))
    monkeypatch.setattr(torch.ops.lenet_fast, "network_train", torch.ops.lenet_fast_cuda_host.network_train)
    phase_clocks = import_module("phase_clocks")
    clocks = phase_clocks.Clocks(os.environ["LENET_FAST_CUDA_HOST"])
    return phase_clocks, clocks, phase_clocks.measure(clocks, NETWORK, BATCH, "cpu")


def test_every_phase_of_every_layer_has_a_row(clocked):
    phase_clocks, clocks, phases = clocked
    convs, denses = range(2), range(3)
    expected = [("stage", 0), ("load", 0)]
    expected += [("convolution", layer) for layer in convs] + [("dense", layer) for layer in denses]
    expected += [("score", 0), ("loss", 0), ("output_gradient", 0)]
    for layer in reversed(denses):
        expected += [("dense_activation", layer), ("dense_gradient", layer)]
    for layer in reversed(convs):
        expected += [("conv_activation", layer), ("gradients", layer)]
    expected += [
        (name, 0) for name in ("sums", "first_barrier", "loss_sum", "gradient_sums", "update", "second_barrier")
    ]
    assert [(phase.name, phase.layer) for phase in phases] == expected
    assert list(dict.fromkeys(name for name, _ in expected)) == clocks.phases[1:]

    rows = list(
        phase_clocks.as_rows(phases, clocks.phases, BLOCKS, {name: {"instructions": "7"} for name in clocks.phases})
    )
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=0.01)
    of_images = {row["phase"] for row in rows if row["images_in_flight"] == BLOCKS}
    assert of_images == set(clocks.phases[2:12])
    assert all(row["times_a_step"] == 2 for row in rows if row["phase"] in of_images)
    assert [row["instructions"] for row in rows if row["phase"] == "dense"] == ["7", "", ""]


def test_a_block_with_fewer_images_has_fewer_cycles(clocked):
    _, _, phases = clocked
    (load,) = (phase for phase in phases if phase.name == "load")
    first, middle, last = load.cycles
    assert first > 0
    assert 0 < last < max(first, middle)
    # The shim's first thread stores the block's sums without being interrupted.
    assert all(cycles > 0 for phase in phases if phase.name != "sums" for cycles in phase.cycles)


def test_cycles_are_between_neighbouring_clocks():
    phase_clocks = import_module("phase_clocks")
    clocks = np.zeros((3, 20, 32, 3, 4), np.int64)
    clocks[:, :, 0, 0, 0] = 100  # begin
    clocks[:, :, 0, 1, 0] = 130
    clocks[:, :, 0, 1, 1] = 137
    clocks[:, :, 1, 1, 0] = 150  # the second image
    clocks[:, 0] *= 9  # the first steps do not count
    (first, second) = phase_clocks.durations(clocks, ["begin", "work", "idle"])
    assert (first.layer, first.cycles, first.times) == (0, (43, 43, 43), 2)
    assert (second.layer, second.cycles, second.times) == (1, (7, 7, 7), 1)


def test_nothing_trained_is_said(clocked):
    phase_clocks, clocks, _ = clocked
    with pytest.raises(ValueError, match="no clock was stored"):
        phase_clocks.durations(clocks.take(), clocks.phases)
