"""Dropout, label smoothing and coloured bytes in the training steps of the CUDA kernels, on the CPU.

Against autograd that is given the same masks. Run by test_cuda_host.py.
"""

import pytest
import torch
from regularised_steps import ADAM, PLACES, SGD, Steps, everywhere, example, native, natively, one_place, plainly

from cuda_host import redirect  # noqa: F401

CPU, HOST = torch.ops.lenet_fast.network_train, torch.ops.lenet_fast_cuda_host.network_train


@pytest.fixture(autouse=True, params=["3"])
def multiprocessors(request, monkeypatch):
    monkeypatch.setenv("CUDA_HOST_MULTIPROCESSORS", request.param)


def assert_right(name, steps, number):
    """No further from autograd in float64 than autograd in float32 is, but for a few roundings."""
    found, exact = taken(name, steps, number), plainly(name, steps, number)
    single = plainly(name, steps, number, torch.float32)
    assert torch.equal(found.correct, exact.correct)
    tensors = [[one.losses, *one.parameters] for one in (found, single, exact)]
    for mine, single_precision, right in zip(*tensors, strict=True):
        bound = 10 * (single_precision.double() - right).abs().max() + 1e-5 * right.abs().max()
        assert (mine.double() - right).abs().max() <= bound


def assert_same_bits(one, other):
    assert torch.equal(one.losses, other.losses)
    assert torch.equal(one.correct, other.correct)
    assert all(map(torch.equal, one.parameters, other.parameters))


def taken(name, steps, number=10, operator=HOST):
    return natively(operator, name, steps, number, torch.float32)


@pytest.mark.parametrize("kind", ["values", "maps"])
@pytest.mark.parametrize(("name", "place"), [(name, place) for name in PLACES for place in range(PLACES[name])])
def test_dropout_at_every_place(name, place, kind):
    assert_right(name, Steps(one_place(PLACES[name], place, **{kind: 0.35}), batch_size=5), 10)


@pytest.mark.races
@pytest.mark.parametrize("cooperative", ["1", "0"])
@pytest.mark.parametrize("multiprocessors", ["1", "3"], indirect=True)
@pytest.mark.parametrize("name", PLACES)
def test_dropout_everywhere(monkeypatch, name, cooperative):
    monkeypatch.setenv("CUDA_HOST_COOPERATIVE", cooperative)
    smoothing = 0.0 if name == "distances" else 0.15
    steps = Steps(everywhere(PLACES[name]), 2**62 + 5, 2**32 - 3, smoothing, 4, SGD | {"lr": 0.02}, 0.5)
    assert_right(name, steps, 10)


def test_the_masks_of_several_steps_are_those_of_the_cpu():
    """Where the steps of Adam are as long for a gradient that is only a rounding error, the losses tell."""
    steps = Steps(everywhere(PLACES["lenet"]), first_step=7, batch_size=3, settings=ADAM)
    found, expected = taken("lenet", steps), taken("lenet", steps, operator=CPU)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-5, atol=0)


def test_a_launch_a_phase_draws_the_same_masks(monkeypatch):
    results = []
    for cooperative in ("1", "0"):
        monkeypatch.setenv("CUDA_HOST_COOPERATIVE", cooperative)
        results.append(taken("lenet", Steps(everywhere(PLACES["lenet"]), batch_size=4)))
    assert_same_bits(*results)


@pytest.mark.parametrize("name", PLACES)
def test_the_ends_of_the_probabilities(name):
    """What drops with a probability of 2^-40 drops nothing here, and takes the kernel that drops."""
    none = taken(name, Steps(batch_size=5))
    for p in (0.0, 2.0**-40):
        assert_same_bits(taken(name, Steps(((p, p),) * PLACES[name], batch_size=5)), none)
    for place in range(PLACES[name]):
        assert_right(name, Steps(one_place(PLACES[name], place, *((0, 1) if place % 2 else (1, 0))), batch_size=5), 5)


@pytest.mark.parametrize("smoothing", [1e-3, 0.2, 1.0])
@pytest.mark.parametrize("name", ["lenet", "colours"])
def test_label_smoothing(name, smoothing):
    assert_right(name, Steps(label_smoothing=smoothing, batch_size=5), 10)


@pytest.mark.parametrize("margins", [(0, 0), (4, 2)])
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("name", ["lenet", "colours"])
def test_bytes_are_the_floats_that_they_become(name, drops, margins):
    """What is dropped of the background of one image is there again in the next."""
    network = example(name, torch.float32)
    channels, height, width = network.image
    _, labels, order = network.data(10, torch.float32)
    sides = height - margins[0], width - margins[1]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (10, channels, *sides), dtype=torch.uint8, generator=generator)
    scale, background = 2.0**-8, -0.25  # no product or sum of theirs is rounded
    edges = (margins[1] // 2,) * 2 + (margins[0] // 2,) * 2
    floats = torch.nn.functional.pad(images * scale + background, edges, value=background)
    steps = Steps(one_place(network.num_places, 0, 0.3, 0.2) if drops else (), batch_size=5)
    expected = native(HOST, network.model, steps, floats, labels, order)
    options = {"image": network.image, "scale": scale, "background": background}
    assert_same_bits(native(HOST, network.model, steps, images, labels, order, **options), expected)
    if channels == 1:
        assert_same_bits(native(HOST, network.model, steps, images[:, 0], labels, order, **options), expected)
