"""Dropout, label smoothing and coloured bytes in native training steps, against autograd on the same masks."""

import copy
import itertools
import math
import random

import pytest
import torch
from instruction_sets import ISAS, run_on
from random_networks import random_data, random_network
from regularised_steps import (
    ADAM,
    PLACES,
    SGD,
    Example,
    Steps,
    everywhere,
    example,
    masked,
    native,
    natively,
    one_place,
    plain,
    plainly,
)
from torch import nn
from torch.nn import functional as F

from lenet_fast import backends, functional
from lenet_fast.network import Network

if (reason := backends.why_unavailable("native", "cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

TRAIN = torch.ops.lenet_fast.network_train
PLAIN = {"lr": 0.05, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
BATCHES = {1: 3, 4: 9, 15: 20, 16: 17, 17: 40, 40: 40}  # size: images, most of them with a smaller last batch


def assert_same(found, expected, atol):
    torch.testing.assert_close(found.losses, expected.losses, rtol=0, atol=atol)
    assert torch.equal(found.correct, expected.correct)
    for one, other in zip(found.parameters, expected.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def assert_right(name, steps, number=40, atol=1e-11):
    assert_same(natively(TRAIN, name, steps, number), plainly(name, steps, number), atol)


def assert_same_bits(one, other):
    assert torch.equal(one.losses, other.losses)
    assert torch.equal(one.correct, other.correct)
    assert all(map(torch.equal, one.parameters, other.parameters))


# --- Parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["values", "maps"])
@pytest.mark.parametrize(("name", "place"), [(name, place) for name in PLACES for place in range(PLACES[name])])
def test_dropout_at_every_place_equals_autograd_on_the_same_masks(name, place, kind):
    """On few images, and on blocks of them, of every instruction set."""
    for size, number in ((1, 7), (4, 40), (40, 40)):
        assert_right(name, Steps(one_place(PLACES[name], place, **{kind: 0.35}), batch_size=size), number)


@pytest.mark.parametrize("settings", [SGD, ADAM])
@pytest.mark.parametrize("size", BATCHES)
@pytest.mark.parametrize("name", PLACES)
def test_dropout_everywhere_in_batches_of_any_size(name, size, settings):
    smoothing = 0.0 if name == "distances" else 0.15
    steps = Steps(everywhere(PLACES[name]), label_smoothing=smoothing, batch_size=size, settings=settings, j=0.5)
    assert_right(name, steps, BATCHES[size], 1e-10)


@pytest.mark.parametrize("smoothing", [1e-3, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("size", [3, 20])
@pytest.mark.parametrize("name", ["lenet", "colours"])
def test_label_smoothing_is_that_of_cross_entropy(name, size, smoothing):
    assert_right(name, Steps(label_smoothing=smoothing, batch_size=size))


@pytest.mark.parametrize("seed", range(3000, 3020))
def test_networks_of_any_shape(seed):
    """Loss and gradients of a step; dropout of both kinds at places that are drawn."""
    drawn = random_network(seed)
    network = Network.of(drawn.network.requires_grad_(True))
    images, labels, _ = random_data(seed, drawn.image, drawn.classes)
    draw = random.Random(seed)
    dropout = tuple((draw.choice((0.0, 0.3)), draw.choice((0.0, 0.0, 0.3))) for _ in (*network.layers, "output"))
    steps = Steps(dropout, seed, batch_size=len(images), settings=PLAIN | {"lr": 1.0}, j=1.0)
    found = native(TRAIN, drawn.network, steps, images, labels)
    tensors = network.tensors()
    remaining, x = iter(tensors), images
    for place, layer in enumerate(network.layers):
        x = layer.compute(masked(steps, 0, place, x), remaining)
    x = masked(steps, 0, len(network.layers), x).flatten(1)
    if network.measures_distance:
        loss = functional.map_loss(functional.rbf(x, tensors[-1]), labels, j=1.0)
    else:
        loss = F.cross_entropy(x, labels)
    parameters = tensors[: len(found.parameters)]
    assert found.losses.item() == pytest.approx(loss.item(), rel=1e-12)
    for before, after, grad in zip(parameters, found.parameters, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(before - after, grad, rtol=1e-9, atol=1e-10)


def float32_errors(name, size, seed):
    """The largest error of each parameter after the steps, summed: of the native steps and of PyTorch's."""
    steps = Steps(everywhere(PLACES[name]), seed, batch_size=size, label_smoothing=0.0 if name == "distances" else 0.1)
    exact = plainly(name, steps)
    single = natively(TRAIN, name, steps, dtype=torch.float32), plainly(name, steps, dtype=torch.float32)
    return [
        sum((a - b).abs().max().item() for a, b in zip(taken.parameters, exact.parameters, strict=True))
        for taken in single
    ]


def assert_float32_is_as_close_to_float64_as_pytorch_is(name, size):
    """The median of five seeds."""
    errors = [float32_errors(name, size, seed) for seed in range(5)]
    assert sorted(mine / other for mine, other in errors)[2] < 1.5, errors


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_drops_alike(isa):
    """Steps in float32 are compared with PyTorch only here: on every instruction set, the selected one included."""
    run_on(isa, "test_regularised_steps", "variant_check")


def variant_check():
    for name, size in itertools.product(PLACES, BATCHES):
        test_dropout_everywhere_in_batches_of_any_size(name, size, ADAM)
        if size in (4, 16):
            assert_float32_is_as_close_to_float64_as_pytorch_is(name, size)


def test_a_large_batch_takes_several_chunks():
    """Its images go on being counted."""
    layers = [
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AvgPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(2, 3)),
    ]
    network = Example((1, 4, 4), 3, [layer.double() for layer in layers])
    images, labels, order = network.data(1100)
    steps = Steps(((0.1, 0.2), (0.3, 0.1), (0.2, 0.0)), batch_size=1100)
    found = native(TRAIN, network.model, steps, images, labels, order)

    assert_same(found, plain(network, steps, images, labels, order), 1e-12)


# --- The numbers that choose the masks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "first_step"), [(0, 0), (1, 0), (2**40, 7), (2**63 - 1, 2**31), (-3, 0), (5, 2**32 - 5)]
)
@pytest.mark.parametrize("size", [4, 16])
def test_any_seed_and_any_first_step(seed, first_step, size):
    steps = Steps(everywhere(PLACES["lenet"]), seed, first_step, batch_size=size)
    assert_right("lenet", steps, 5 * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_in_two_calls_are_the_steps_of_one(dtype):
    network = example("lenet", dtype)
    images, labels, order = network.data(dtype=dtype)
    steps = Steps(everywhere(PLACES["lenet"]), batch_size=16, first_step=3, settings=PLAIN)
    whole = native(TRAIN, network.model, steps, images, labels, order)
    first = native(TRAIN, network.model, steps, images, labels, order[:16])
    with torch.no_grad():
        for parameter, value in zip(network.model.parameters(), first.parameters, strict=True):
            parameter.copy_(value)
    steps = Steps(steps.dropout, batch_size=16, first_step=4, settings=PLAIN)
    second = native(TRAIN, network.model, steps, images, labels, order[16:])
    assert torch.equal(whole.losses, torch.cat((first.losses, second.losses)))
    assert all(map(torch.equal, whole.parameters, second.parameters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_masks_are_the_same_on_any_number_of_threads(dtype):
    network = example("lenet", dtype)
    images, labels, order = network.data(100, dtype)
    steps = Steps(everywhere(PLACES["lenet"]), batch_size=100)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([native(TRAIN, network.model, steps, images, labels, order) for _ in range(2)])
    finally:
        torch.set_num_threads(before)
    for one, again in results:
        assert_same_bits(one, again)
        assert_same(one, results[0][0], 1e-6 if dtype == torch.float32 else 1e-14)


# --- The ends of the probabilities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("name", PLACES)
def test_probabilities_of_0_change_no_bit(name, size, dtype):
    network = example(name, dtype)
    images, labels, order = network.data(dtype=dtype)
    none = native(TRAIN, network.model, Steps(batch_size=size), images, labels, order)
    zeros = Steps(((0.0, 0.0),) * network.num_places, batch_size=size)
    assert_same_bits(native(TRAIN, network.model, zeros, images, labels, order), none)


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("size", [4, 40])
@pytest.mark.parametrize("name", PLACES)
def test_a_probability_of_1_drops_everything(name, size, maps):
    for place in range(PLACES[name]):
        steps = Steps(one_place(PLACES[name], place, *((0, 1) if maps else (1, 0))), batch_size=size)
        assert_right(name, steps)
    assert all(parameter.isfinite().all() for parameter in natively(TRAIN, name, steps).parameters)


@pytest.mark.parametrize("p", [2.0**-40, 1e-300, 1 - 2.0**-33, 1 - 2.0**-31, 1 - 2.0**-53])
def test_probabilities_next_to_the_ends(p):
    for size in (4, 16):
        steps = Steps(one_place(PLACES["lenet"], 3, values=p), batch_size=size)
        assert_right("lenet", steps)


# --- Statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_what_the_kernels_keep_is_as_much_as_the_probability_says(p):
    """The first of two scores is the sum of what is kept of many ones; for the other class it is the loss."""
    features, largest = 1000, 64
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(4, features), nn.ReLU(), nn.Linear(features, 2))
    network.double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network[2].bias.fill_(1.0)
        network[4].weight[0].fill_(1.0)
    kept = []
    for size, step in ((1, 0), (4, 0), (largest, 0), (largest, 1)):
        steps = Steps(one_place(4, 2, values=p), first_step=step, batch_size=size)
        images, labels = torch.zeros(size, 1, 2, 2, dtype=torch.float64), torch.ones(size, dtype=torch.int64)
        losses = native(TRAIN, network, steps, images, labels).losses
        kept.append(losses.item() * size * (1 - p))
        assert kept[-1] == pytest.approx(round(kept[-1]), abs=1e-6)
        draws = size * features
        assert abs(kept[-1] - draws * (1 - p)) <= 5 * math.sqrt(draws * p * (1 - p))
    assert kept[2] != kept[3]


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLACES)
def test_memory_that_starts_as_nan_does_no_harm(poisoned_memory, name):
    steps = Steps(everywhere(PLACES[name]))
    network = example(name, torch.float32)
    for number, size in ((37, 37), (3, 3), (1, 1)):
        images, labels, _ = network.data(number, torch.float32)
        taken = native(TRAIN, network.model, Steps(steps.dropout, batch_size=size), images, labels)
        assert all(parameter.isfinite().all() for parameter in taken.parameters)


# --- Bytes of several channels ----------------------------------------------------------------------------------------


def colourful_bytes(number, channels, height, width):
    generator = torch.Generator().manual_seed(number)
    return torch.randint(256, (number, channels, height, width), dtype=torch.uint8, generator=generator)


SCALE, BACKGROUND = 0.004, -0.3


def prepared(images, height, width):
    top, left = (height - images.shape[2]) // 2, (width - images.shape[3]) // 2
    return F.pad(images.double() * SCALE + BACKGROUND, (left, left, top, top), value=BACKGROUND)


@pytest.mark.parametrize("margins", [(0, 0), (4, 2)])
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("name", ["lenet", "colours"])
def test_bytes_are_the_floats_that_they_become(name, drops, margins):
    """What is dropped of the background of some images is there again in the next ones."""
    network = example(name)
    channels, height, width = network.image
    _, labels, order = network.data()
    images = colourful_bytes(40, channels, height - margins[0], width - margins[1])
    for size in (3, 16, 40):
        steps = Steps(one_place(network.num_places, 0, 0.3, 0.2) if drops else (), batch_size=size)
        options = {"image": network.image, "scale": SCALE, "background": BACKGROUND}
        found = native(TRAIN, network.model, steps, images, labels, order, **options)
        floats = prepared(images, height, width)
        assert_same(found, native(TRAIN, network.model, steps, floats, labels, order), 1e-12)
        if channels == 1:
            assert_same_bits(native(TRAIN, network.model, steps, images[:, 0], labels, order, **options), found)


@pytest.mark.parametrize("number", [1, 5, 16, 40])
def test_bytes_of_several_channels_in_inference(number):
    network = example("colours")
    images = colourful_bytes(number, 3, 5, 10)
    reading = Network.of(network.model)
    tensors = [tensor.detach() for tensor in reading.tensors()]
    handle = torch.ops.lenet_fast.network_define(reading.numbers(network.image))
    try:
        scores = torch.ops.lenet_fast.network_infer(handle, tensors, images, SCALE, BACKGROUND)
        floats = torch.ops.lenet_fast.network_infer(handle, tensors, prepared(images, 9, 12), 0.0, 0.0)
    finally:
        torch.ops.lenet_fast.network_release(handle)
    torch.testing.assert_close(scores, network.model(prepared(images, 9, 12)), rtol=0, atol=1e-12)
    torch.testing.assert_close(floats, scores, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("colours", (4, 9, 12)), ("colours", (4, 1, 9, 12)), ("colours", (4, 4, 9, 12)), ("lenet", (4, 3, 16, 16))],
)
def test_bytes_of_other_channels_are_refused(name, shape):
    network = example(name)
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=rf"images: expected uint8 \(N, {network.image[0]}, H, W\)"):
        native(TRAIN, network.model, Steps(), torch.zeros(shape, dtype=torch.uint8), labels, image=network.image)


# --- What the operator refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": ((0.5, 0.5),) * 5}, "dropout: expected no numbers or 12, two for each of 5 layers"),
        (
            {"dropout": ((0.5, 0.5),) * 5 + ((0.5, -0.1),)},
            "dropout: expected probabilities from 0 to 1, got -0.1 at 11",
        ),
        ({"dropout": ((0.5, 1.5),) * 6}, "dropout: expected probabilities from 0 to 1, got 1.5 at 1"),
        ({"dropout": ((math.nan, 0.5),) * 6}, "dropout: expected probabilities from 0 to 1, got nan at 0"),
        ({"first_step": -1}, "first_step: expected 0 to 2\\^32"),
        ({"first_step": 2**32 - 4}, "first_step: expected 0 to 2\\^32 less the 5 steps"),
        ({"label_smoothing": -0.1}, "label_smoothing: expected 0 to 1, got -0.1"),
        ({"label_smoothing": 1.1}, "label_smoothing: expected 0 to 1, got 1.1"),
        ({"label_smoothing": math.nan}, "label_smoothing: expected 0 to 1, got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(changes, message):
    network = example("lenet")
    before = copy.deepcopy(network.model)
    with pytest.raises(RuntimeError, match=message):
        native(TRAIN, network.model, Steps(**changes), *network.data())
    assert all(map(torch.equal, network.model.parameters(), before.parameters()))


def test_label_smoothing_of_distances_is_refused():
    network = example("distances")
    with pytest.raises(RuntimeError, match="label_smoothing: expected 0 for the MAP loss of distances"):
        native(TRAIN, network.model, Steps(label_smoothing=0.1), *network.data())
