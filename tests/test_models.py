"""The LeNets: shapes, parameters, their plain PyTorch twins, input preparation, `describe`."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from lenet_fast import models
from lenet_fast.models import MODELS, InputSpec
from lenet_fast.nn import ConvActPool2d, MAPLoss
from lenet_fast.tables import LENET5_C3

NAMES = list(MODELS)
PLAIN_NAMES = [name for name in NAMES if name != "lenet5-1998"]  # torch.nn has layers for all they do
PARAMETERS = {"lenet1": 3_246, "lenet5": 61_706, "lenet5-d2l": 61_706, "lenet5-1998": 60_000}


def build(name, seed=0, **factory):
    torch.manual_seed(seed)
    return MODELS[name](**factory)


def random_input(model, batch=3):
    size = model.input_spec.size
    return torch.randn(batch, 1, size, size, dtype=next(model.parameters()).dtype)


def test_registry_has_the_command_line_names():
    functions = {"lenet1": models.lenet1, "lenet5": models.lenet5, "lenet5-d2l": models.lenet5_d2l}
    assert {**functions, "lenet5-1998": models.lenet5_1998} == MODELS


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_parameters(name):
    model = build(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert model(random_input(model)).shape == (3, 10)
    assert model(random_input(model)[0]).shape == (10,)
    assert model(random_input(model, batch=0)).shape == (0, 10)
    assert {"c1", "c3", "output"} <= dict(model.named_children()).keys()


def test_lenet5_d2l_starts_from_xavier_uniform_weights_and_default_biases():
    model = build("lenet5-d2l")
    fans = {"c1": (25, 150), "c3": (150, 400), "c5": (400, 120), "f6": (120, 84), "output": (84, 10)}
    for name, (fan_in, fan_out) in fans.items():
        layer = getattr(model, name)
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert 0.5 / math.sqrt(fan_in) < layer.bias.abs().max() <= 1 / math.sqrt(fan_in)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twin_is_plain_torch_and_computes_the_same(name, dtype):
    model = build(name, dtype=dtype)
    twin = model.reference()
    assert type(twin) is nn.Sequential
    if name in PLAIN_NAMES:
        assert {type(layer).__module__.split(".")[0] for layer in twin.modules()} == {"torch"}
    assert not any(isinstance(layer, ConvActPool2d) for layer in twin.modules())
    assert all(getattr(layer, "backend", "reference") == "reference" for layer in twin.modules())
    x = random_input(model)
    torch.testing.assert_close(model(x), twin(x))
    for network in (model, twin):
        models.criterion(network)(network(x), torch.tensor([3, 1, 4])).backward()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert other.dtype == dtype
        torch.testing.assert_close(own.grad, other.grad)


def test_twin_layers_are_named_as_in_the_paper():
    names = {name: list(dict(build(name).reference().named_children())) for name in NAMES}
    ends = ["f6", "f6_act", "output"]
    convolutions = ["c1", "c1_act", "s2", "c3", "c3_act", "s4"]
    assert names["lenet5"] == [*convolutions, "c5", "c5_act", "flatten", *ends]
    assert names["lenet5-d2l"] == [*convolutions, "flatten", "c5", "c5_act", *ends]
    assert names["lenet1"] == [*convolutions, "flatten", "output"]
    assert names["lenet5-1998"] == ["c1", "c3", "c5", "c5_act", "flatten", *ends]


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_loads_strictly_both_ways(name):
    model, other = build(name, seed=1), build(name, seed=2)
    twin = other.reference()
    assert list(model.state_dict()) == list(twin.state_dict())
    x = random_input(model)
    assert not torch.allclose(model(x), twin(x))
    twin.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(model(x), twin(x))
    other.load_state_dict(twin.state_dict(), strict=True)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("name", NAMES)
def test_twin_shares_nothing_and_keeps_training_flag_and_frozen_parameters(name):
    model = build(name).eval()
    model.c1.weight.requires_grad_(False)
    before = torch.random.get_rng_state()
    twin = model.reference()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(layer.training for layer in twin.modules())
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert all(torch.equal(kept[key], value) for key, value in model.state_dict().items())


# --- LeNet-5 as in 1998 ---------------------------------------------------------------------------


def test_1998_has_the_parameters_of_the_paper_layer_by_layer():
    counts = {name: sum(p.numel() for p in layer.parameters()) for name, layer in build("lenet5-1998").named_children()}
    assert counts["c1"] == 156 + 12  # C1 and S2
    assert counts["c3"] == 1_516 + 32  # C3 and S4
    assert {name: counts[name] for name in ("c5", "f6", "output")} == {"c5": 48_120, "f6": 10_164, "output": 0}


def test_1998_has_the_connections_of_the_paper_layer_by_layer():
    counts = models.connection_counts(build("lenet5-1998"), (1, 1, 32, 32))
    paper = {"c1": 122_304, "s2": 5_880, "c3": 151_600, "s4": 2_000, "c5": 48_120, "f6": 10_164}
    assert counts == {**paper, "output": 840}
    assert sum(paper.values()) == 340_068


def test_1998_starts_within_2_4_over_the_fan_in_of_each_unit():
    model = build("lenet5-1998")
    weights = model.c3.weight.split(model.c3.connections.fan_in())
    units = [(weight, len(weight) * 25) for weight in weights]
    units += [(model.c1.weight, 25), (model.c1.bias, 25), (model.c5.weight, 400), (model.f6.weight, 120)]
    units += [(layer.coefficient, 4) for layer in (model.c1, model.c3)]
    for values, fan_in in units:
        assert 0.3 * 2.4 / fan_in < values.abs().max() <= 2.4 / fan_in
    assert {len(weight) for weight in weights} == {3, 4, 6}


def test_1998_classifies_by_the_smallest_distance_and_trains_with_map_loss():
    model = build("lenet5-1998")
    for network in (model, model.reference()):
        assert isinstance(models.criterion(network), MAPLoss)
        assert models.classify(network, torch.tensor([[5.0, 1.0, 3.0], [2.0, 4.0, 9.0]])).tolist() == [1, 0]
    linear = models.lenet5_1998(output="linear", connections=None)
    assert isinstance(models.criterion(linear), nn.CrossEntropyLoss)
    assert models.classify(linear, torch.tensor([[5.0, 1.0], [2.0, 4.0]])).tolist() == [0, 1]
    assert sum(p.numel() for p in linear.parameters()) == 60_000 + 900 + 850  # 96 connections and a dense output
    with pytest.raises(ValueError, match=r"output: .*'softmax'"):
        models.lenet5_1998(output="softmax")


# --- options --------------------------------------------------------------------------------------

VARIANTS = {
    "max pooling and ReLU": lambda: models.lenet5_d2l(pool="max", activation="relu"),
    "windows of 3": lambda: models.lenet5_d2l(kernel_size=3),
    "windows of 7 and 3": lambda: models.lenet5_d2l(kernel_size=(7, 3), padding=(3, 1)),
    "wider": lambda: models.lenet5_d2l(channels=(20, 50), dense=(500,)),
    "deeper": lambda: models.lenet5_d2l(
        channels=(6, 16, 32),
        kernel_size=(5, 5, 3),
        padding=(2, 0, 1),
        pool=("avg", "avg", "none"),
        dense=(120, 100, 84),
    ),
    "no hidden layer": lambda: models.lenet5_d2l(dense=()),
    "sparse": lambda: models.lenet5_d2l(connections=LENET5_C3),
    "lenet5 sparse": lambda: models.lenet5(connections=LENET5_C3, activation="scaled_tanh", pool="avg"),
    "lenet5 of windows of 3": lambda: models.lenet5(kernel_size=3, channels=(8, 12)),
    "lenet1 with ReLU": lambda: models.lenet1(activation="relu", pool="max"),
}


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
def test_variants_agree_with_their_twins(make):
    torch.manual_seed(0)
    model = make().double()
    twin = model.reference()
    twin.load_state_dict(model.state_dict(), strict=True)
    x = random_input(model)
    assert model(x).shape == (3, 10)
    torch.testing.assert_close(model(x), twin(x))


def test_sparse_xavier_uses_the_fan_in_of_each_map():
    layer = models.lenet5_d2l(connections=LENET5_C3).c3
    for maps, weight in zip(layer.connections.fan_in(), layer.weight.split(layer.connections.fan_in()), strict=True):
        bound = math.sqrt(6 / (25 * maps + 250))  # each input map has 10 connections
        assert 0.8 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": ()}, r"channels: .*\(\)"),
        ({"channels": (6, 16, 32), "kernel_size": (5, 5)}, r"kernel_size: .* each of the 3"),
        ({"pool": ("avg",)}, "pool: .* each of the 2"),
        ({"kernel_size": 11, "padding": 0}, "channels: nothing is left of the image after c3"),
        ({"channels": (6, 16), "connections": torch.ones(16, 5, dtype=torch.bool)}, r"connections: .*\(16, 6\) for c3"),
        ({"channels": (6,), "connections": LENET5_C3}, "channels: expected at least 2"),
        ({"activation": "gelu"}, r"activation: .*'gelu'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        models.lenet5_d2l(**options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles(name, clone):
    model = build(name)
    other = clone(model)
    assert type(other) is type(model)
    assert other.input_spec == model.input_spec
    x = random_input(model)
    assert torch.equal(other(x), model(x))
    assert torch.equal(other.reference()(x), model.reference()(x))


def test_indexing_gives_layers_and_slicing_a_plain_sequential():
    model = build("lenet5")
    assert model[0] is model.c1
    features = model[:2]
    assert type(features) is nn.Sequential
    assert list(dict(features.named_children())) == ["c1", "c3"]
    assert features(random_input(model)).shape == (3, 16, 5, 5)


# --- InputSpec ------------------------------------------------------------------------------------


def test_prepare_maps_0_to_background_and_255_to_foreground_and_pads():
    spec = InputSpec(32, background=-0.1, foreground=1.175)
    images = torch.zeros(2, 28, 28, dtype=torch.uint8)
    images[1] = 255
    prepared = spec.prepare(images, torch.float64)
    assert prepared.shape == (2, 1, 32, 32)
    assert prepared.dtype == torch.float64
    assert (prepared[0] == -0.1).all()
    torch.testing.assert_close(prepared[1, 0, 2:-2, 2:-2], torch.full((28, 28), 1.175, dtype=torch.float64))
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert (prepared[1, 0][border] == -0.1).all()


def test_prepare_is_linear_in_between_and_leaves_the_images():
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    kept = ramp.clone()
    prepared = InputSpec(16, 0.0, 1.0).prepare(ramp)
    assert prepared.dtype == torch.float32
    torch.testing.assert_close(prepared.flatten(), torch.arange(256) / 255)
    assert torch.equal(ramp, kept)


def test_lenet5_input_is_normalised_with_mean_and_deviation_of_mnist():
    images = torch.randint(256, (4, 28, 28), dtype=torch.uint8)
    prepared = models.lenet5().input_spec.prepare(images)
    torch.testing.assert_close(prepared[:, 0, 2:-2, 2:-2], (images / 255 - 0.1307) / 0.3081, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 28, 28), TypeError, "torch.float32"),
        (torch.zeros(28, 28, dtype=torch.uint8), ValueError, r"\(28, 28\)"),
        (torch.zeros(1, 1, 1, 28, 28, dtype=torch.uint8), ValueError, r"\(1, 1, 1, 28, 28\)"),
        (torch.zeros(1, 34, 28, dtype=torch.uint8), ValueError, r"\(1, 34, 28\)"),
        (torch.zeros(1, 28, 27, dtype=torch.uint8), ValueError, r"\(1, 28, 27\)"),
    ],
)
def test_prepare_refuses_what_it_cannot_map(images, error, message):
    with pytest.raises(error, match=f"images: .*{message}"):
        InputSpec(32, 0.0, 1.0).prepare(images)


def test_prepare_maps_all_channels_alike():
    images = torch.randint(256, (2, 3, 28, 26), dtype=torch.uint8)
    spec = InputSpec(32, -0.5, 2.0)
    prepared = spec.prepare(images)
    assert prepared.shape == (2, 3, 32, 32)
    for channel in range(3):
        assert torch.equal(prepared[:, channel : channel + 1], spec.prepare(images[:, channel]))


# --- describe -------------------------------------------------------------------------------------


def test_describe_prints_shapes_and_parameters_layer_by_layer(capsys):
    table = models.describe(build("lenet5"), (1, 1, 32, 32))
    assert capsys.readouterr().out == table + "\n"
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in table.splitlines()]
    assert rows == [
        ["layer", "type", "output shape", "parameters"],
        ["input", "(1, 1, 32, 32)"],
        ["c1", "ConvActPool2d", "(1, 6, 14, 14)", "156"],
        ["c3", "ConvActPool2d", "(1, 16, 5, 5)", "2,416"],
        ["c5", "ConvActPool2d", "(1, 120, 1, 1)", "48,120"],
        ["flatten", "Flatten", "(1, 120)"],
        ["f6", "Linear", "(1, 84)", "10,164"],
        ["f6_act", "ReLU", "(1, 84)"],
        ["output", "Linear", "(1, 10)", "850"],
        ["total", "61,706"],
    ]


def test_describe_leaves_the_model_as_it_was(capsys):
    calls = []
    inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4))
    model = nn.Sequential(inner, inner, nn.LazyLinear(2))  # a shared block runs twice, its parameters count once
    inner[1].eval()
    inner[0].register_forward_hook(lambda *_: calls.append(1))
    modes = [layer.training for layer in model.modules()]
    state = copy.deepcopy(inner.state_dict())
    hooks = [len(layer._forward_hooks) for layer in model.modules()]
    rng = torch.random.get_rng_state()
    table = models.describe(model, (1, 4))
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert [layer.training for layer in model.modules()] == modes
    assert [len(layer._forward_hooks) for layer in model.modules()] == hooks
    assert all(torch.equal(state[key], value) for key, value in inner.state_dict().items())
    assert isinstance(model[2].weight, nn.UninitializedParameter)
    assert table.count("BatchNorm1d") == 2
    assert table.splitlines()[-1].split() == ["total", str(20 + 8 + 10)]


def test_describe_runs_in_the_dtype_of_the_model_and_shows_several_outputs(capsys):
    table = models.describe(nn.Sequential(nn.LSTM(4, 3, dtype=torch.float64)), (5, 2, 4))
    assert "(5, 2, 3), (1, 2, 3), (1, 2, 3)" in table


@pytest.mark.parametrize("shape", [(), (1, 0, 3), (1, 2.0), (1, -1)])
def test_describe_refuses_no_shapes(shape):
    with pytest.raises(ValueError, match="input_shape"):
        models.describe(nn.Identity(), shape)
