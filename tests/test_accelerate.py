"""`accelerate`, `report`, `restore`: the same outputs, gradients, side effects and state_dict, fused where possible."""

import copy
import copyreg
import gc
import io
import logging
import pickle
import random
import threading
import types
import weakref
from collections import Counter, OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode
from tutorial_lenets import TUTORIALS, Blitz, Block, FeaturesClassifier, Lightning, SharedLayers, d2l

import lenet_fast
from lenet_fast import dynamo, models
from lenet_fast.accelerate import NOTHING_COMPILED, accelerate, report, restore
from lenet_fast.nn import ConvActPool2d, ScaledTanh
from lenet_fast.runs import NOT_CALLED, WATCHED

tutorials = pytest.mark.parametrize("tutorial", TUTORIALS.values(), ids=TUTORIALS)
FUSED_OPERATORS = ("lenet_fast::conv_act_pool", "lenet_fast::_conv_recording")


def operators(model, *inputs, **kwargs):
    """How often each operator runs, by name, in a call like one that was compiled before."""
    with torch.random.fork_rng():
        model(*inputs, **kwargs)
        with torch.autograd.profiler.profile(use_kineto=False) as seen:
            model(*inputs, **kwargs)
    return Counter(event.name for event in seen.function_events if not within_fused(event.cpu_parent))


def within_fused(event):
    return event is not None and (event.name in FUSED_OPERATORS or within_fused(event.cpu_parent))


def fused_calls(model, *inputs, **kwargs):
    counts = operators(model, *inputs, **kwargs)
    return sum(counts[name] for name in FUSED_OPERATORS)


def gradients(model, images, output):
    """Those of a fixed random weighting of the outputs."""
    weighting = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    wanted = {"images": images, **dict(model.named_parameters())}
    values = torch.autograd.grad(output, list(wanted.values()), weighting.to(output.dtype), allow_unused=True)
    return {name: value for name, value in zip(wanted, values, strict=True) if value is not None}


def results(model, images):
    """Outputs and gradients, with the same dropout at every call."""
    images = images.clone().requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(2)
        output = model(images)
    return {"output": output.detach(), **gradients(model, images, output)}


def assert_close_in_float32(model, plain, images):
    """As near to the plain model in float64 as the plain model in float32 is, or nearly so."""
    actual, single = results(model, images), results(plain, images)
    for name, expected in results(copy.deepcopy(plain).double(), images.double()).items():
        rounding = (single[name] - expected).abs().max().item() + 1e-6 * expected.abs().max().item()
        torch.testing.assert_close(actual[name].double(), expected, rtol=0, atol=3 * rounding)


def chain(*layers):
    """A small convolutional Sequential on (N, 2, 12, 12); tests put their own layers into it."""
    torch.manual_seed(0)
    return nn.Sequential(*layers)


def conv_relu_pool(inputs=2, outputs=4):
    return nn.Conv2d(inputs, outputs, 3), nn.ReLU(), nn.MaxPool2d(2)


IMAGES = torch.randn(3, 2, 12, 12, generator=torch.Generator().manual_seed(3))


# --- the LeNets of the tutorials -------------------------------------------------------------------------------------


@tutorials
def test_tutorial(tutorial):
    """Fused as told, equal in outputs and gradients, the same state_dict, copied as it is, restored exactly."""
    plain = tutorial.model()
    images = tutorial.images()
    model = copy.deepcopy(plain)
    text, kinds = str(model), [type(m) for m in model.modules()]
    objects = [*model.modules(), *model.parameters()]
    attributes = [dict(vars(m)) for m in model.modules()]
    assert accelerate(model) is model
    for training in (True, False):
        assert_close_in_float32(model.train(training), plain.train(training), images)
    found = report(model)
    assert [str(run) for run in found.fused] == list(tutorial.fused)
    assert [str(run) for run in found.left_alone] == list(tutorial.left_alone)
    counts, expected = operators(model, images), operators(plain, images)
    assert sum(counts[name] for name in FUSED_OPERATORS) == len(tutorial.fused)
    assert counts["aten::convolution"] == expected["aten::convolution"] - len(tutorial.fused)

    for duplicate in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded, copy.copy):
        twin = duplicate(model)
        assert fused_calls(twin, images) == len(tutorial.fused)
        assert torch.equal(twin(images), model(images))
        assert [type(m) for m in twin.modules()] == kinds
    assert list(model.state_dict()) == list(plain.state_dict())
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    model.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(model(images), plain(images), rtol=1e-4, atol=1e-4 * plain(images).abs().max().item())

    assert restore(model) is model
    assert [*map(id, objects)] == [*map(id, model.modules()), *map(id, model.parameters())]
    assert [dict(vars(m)) for m in model.modules()] == [{**a, "training": False} for a in attributes]
    assert (str(model), [type(m) for m in model.modules()]) == (text, kinds)
    assert torch.equal(model(images), plain(images))


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("name", ["d2l", "blitz"])
def test_other_dtypes_autocast_and_the_meta_device(name):
    tutorial = TUTORIALS[name]
    plain = tutorial.model().double()
    model, images = accelerate(copy.deepcopy(plain)), tutorial.images()
    expected = results(plain, images.double())
    for key, value in results(model, images.double()).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-12)
    model.to(torch.bfloat16)
    assert fused_calls(model, images.to(torch.bfloat16)) == 2
    assert model(images.to(torch.bfloat16)).dtype == torch.bfloat16
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_calls(model, images) == 2
        assert model(images).dtype == torch.bfloat16
    assert model.to("meta")(images.to("meta")).shape == (5, 10)


def test_shallow_copy_shares_the_layers():
    model = accelerate(d2l())
    twin = copy.copy(model)
    images = torch.randn(2, 1, 28, 28)
    assert twin[0] is model[0]
    assert torch.equal(twin(images), model(images))
    restore(twin)
    assert (fused_calls(twin, images), fused_calls(model, images)) == (0, 2)


# --- what is fused and what is not: many small chains in one model, which is compiled once ---------------------------


class Subclass(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + 1


class Functions(nn.Module):
    """A convolution and whatever a test does with its result."""

    def __init__(self, follow):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.follow = follow

    def forward(self, x):
        return self.follow(self.conv(x))


def in_place_without_result(y):
    y.relu_()
    return F.max_pool2d(y, 2)


FUSED_LAYERS = {
    "sigmoid-avg": (nn.Conv2d(2, 3, 3), nn.Sigmoid(), nn.AvgPool2d(2)),
    "relu-max": (nn.Conv2d(2, 3, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d((2, 2), stride=None)),
    "tanh-avg": (nn.Conv2d(2, 3, (3, 3), padding=(1, 1), bias=False), nn.Tanh(), nn.AvgPool2d((2, 2), (2, 2))),
    "scaled-tanh": (nn.Conv2d(2, 3, 3, padding="same"), ScaledTanh(), nn.MaxPool2d(2)),
    "even-same": (nn.Conv2d(2, 3, 4, padding="same"), nn.ReLU(), nn.MaxPool2d(2)),
    "valid": (nn.Conv2d(2, 3, 3, padding="valid"), nn.ReLU(), nn.AvgPool2d(2, count_include_pad=False)),
    "identities": (nn.Conv2d(2, 3, 3), nn.Identity(), nn.ReLU(), nn.Identity(), nn.MaxPool2d(2)),
    "no-activation": (nn.Conv2d(2, 3, 3), nn.AvgPool2d(2)),
    "no-activation-max": (nn.Conv2d(2, 3, 3), nn.MaxPool2d(2)),
    "max-sigmoid": (nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Sigmoid()),
    "max-unknown": (nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.GELU()),
    "max-relu-relu": (nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.ReLU(), nn.ReLU()),
    "max-max": (nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.MaxPool2d(2)),
    "dropout-behind": (nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.5)),
    "dropout-between": (nn.Conv2d(2, 3, 3), nn.Dropout2d(), nn.ReLU(), nn.Dropout(), nn.AvgPool2d(2)),
    "dropout-in-the-end": (nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.AlphaDropout(), nn.ReLU()),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.MaxPool2d(2)),
    "parametrized": (parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), nn.ReLU(), nn.MaxPool2d(2)),
    "pruned": (prune.l1_unstructured(nn.Conv2d(2, 3, 3), "weight", 3), nn.ReLU(), nn.MaxPool2d(2)),
}
FUSED_CALLS = {
    "F.relu": lambda y: F.max_pool2d(F.relu(y), 2),
    "F.relu-inplace": lambda y: F.max_pool2d(F.relu(y, inplace=True), kernel_size=2, stride=2),
    "F.relu-by-name": lambda y: F.max_pool2d(input=F.relu(input=y), kernel_size=(2, 2), stride=(2, 2), padding=0),
    "F.relu_": lambda y: F.avg_pool2d(F.relu_(y), 2),
    "torch.relu": lambda y: torch.max_pool2d(torch.relu(y), 2),
    "torch.max_pool2d": lambda y: torch.max_pool2d(torch.relu(y), [2, 2], [2, 2]),
    "relu_": lambda y: F.avg_pool2d(y.relu_(), 2, 2, 0, False, False),
    "relu_-without-result": in_place_without_result,
    "torch.sigmoid": lambda y: F.avg_pool2d(torch.sigmoid(y), (2,)),
    "F.sigmoid": lambda y: F.avg_pool2d(F.sigmoid(y), 2),
    "expit": lambda y: F.avg_pool2d(torch.special.expit(y), 2),
    "sigmoid": lambda y: F.max_pool2d(y.sigmoid(), 2),
    "F.tanh": lambda y: F.avg_pool2d(F.tanh(y), 2),
    "tanh": lambda y: F.max_pool2d(y.tanh(), 2),
    "scaled-tanh-reversed": lambda y: F.avg_pool2d((y * (2.0 / 3.0)).tanh() * 1.7159, 2),
    "scaled-tanh-torch.mul": lambda y: F.max_pool2d(torch.mul(torch.tanh(torch.mul(y, 2 / 3)), 1.7159), 2),
    "pool-then-tanh": lambda y: torch.tanh(F.max_pool2d(y, 2)),
    "pool-then-relu": lambda y: F.relu(F.max_pool2d(y, 2)),
    "pool-then-dropout-then-relu": lambda y: F.relu(F.dropout(F.max_pool2d(y, 2), 0.5, False)),
    "dropout-of-nothing": lambda y: F.avg_pool2d(F.dropout2d(F.relu(y), 0.0), 2),
    "two-users-of-the-pooled": lambda y: (lambda p: torch.cat([p, p.relu()], 1))(F.max_pool2d(torch.tanh(y), 2)),
}
LAYERS_LEFT_ALONE = {
    "stride (2, 2)": (nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2)),
    "dilation (2, 2)": (nn.Conv2d(2, 4, 3, dilation=2), nn.ReLU(), nn.MaxPool2d(2)),
    "groups 2": (nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.MaxPool2d(2)),
    "kernel size (3, 5) is not square": (nn.Conv2d(2, 4, (3, 5)), nn.ReLU(), nn.MaxPool2d(2)),
    "padding (0, 1) differs between the axes": (nn.Conv2d(2, 4, 3, padding=(0, 1)), nn.ReLU(), nn.MaxPool2d(2)),
    "with 36,864 weights PyTorch's own convolution is faster": (nn.Conv2d(2, 2048, 3), nn.ReLU(), nn.MaxPool2d(2)),
    "pooling with kernel_size 3": (nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(3)),
    "pooling with kernel_size (2, 3)": (nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d((2, 3))),
    "pooling with stride 1": (nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2, stride=1)),
    "pooling with stride (2, 1)": (nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(2, stride=(2, 1))),
    "pooling with padding 1": (nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(2, padding=1)),
    "pooling with dilation 2": (nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2, dilation=2)),
    "pooling with ceil_mode True": (nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)),
    "pooling with divisor_override 3": (nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(2, divisor_override=3)),
    "LeakyReLU, which the kernels do not have, comes before any pooling": (
        nn.Conv2d(2, 4, 3), nn.LeakyReLU(), nn.MaxPool2d(2),
    ),
    "BatchNorm2d, which the kernels do not have, comes before any pooling": (
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
    ),
    "AdaptiveAvgPool2d, which the kernels do not have, comes before any pooling": (
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(5),
    ),
    "two activations come before the pooling": (nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Sigmoid(), nn.AvgPool2d(2)),
    "add(1) comes before any pooling": (Subclass(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)),
    "no 2x2 pooling follows": (nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2)),
}  # fmt: skip
CALLS_LEFT_ALONE = {
    "its result is used 2 times": lambda y: F.max_pool2d(F.relu(y), 2) + y.mean(),
    "the result of relu() is used 2 times": lambda y: (lambda r: F.max_pool2d(r, 2) + r.mean())(F.relu(y)),
    "max_pool2d_with_indices(2) comes before any pooling": lambda y: F.max_pool2d_with_indices(y, 2)[0],
    "pooling with return_indices True": lambda y: F.max_pool2d(y, 2, return_indices=True)[0],
    "pooling with kernel_size 3": lambda y: F.avg_pool2d(F.relu(y), 3),
    "pooling with stride 1": lambda y: F.avg_pool2d(F.relu(y), 2, 1),
    "pooling with ceil_mode True": lambda y: F.max_pool2d(F.relu(y), 2, ceil_mode=True),
    "gelu() comes before any pooling": lambda y: F.max_pool2d(F.gelu(y), 2),
    "view(-1, 400) comes before any pooling": lambda y: y.view(-1, 400),
    "mul(0.6666666666666666) comes before any pooling": lambda y: F.avg_pool2d(1.7 * torch.tanh(2 / 3 * y), 2),
    "mul(0.66) comes before any pooling": lambda y: F.avg_pool2d(torch.tanh(0.66 * y), 2),
    "two activations come before the pooling": lambda y: F.avg_pool2d(F.relu(torch.tanh(y)), 2),
    "clamp(min=0) comes before any pooling": lambda y: F.max_pool2d(y.clamp(min=0), 2),
    "dropout in training mode comes before its pooling": lambda y: F.max_pool2d(F.dropout(y, 0.5, True), 2),
    "add_(1) comes before any pooling": lambda y: F.max_pool2d(y.add_(1), 2),
    "its result is used 3 times": lambda y: (y[:, :2].zero_(), F.max_pool2d(y, 2) + y.mean())[1],
}


class Many(nn.Module):
    """Chains beside each other: one graph, hence one compilation, for all that tests ask of them."""

    def __init__(self, layers, calls):
        super().__init__()
        torch.manual_seed(0)
        chains = [nn.Sequential(*parts) for parts in layers.values()]
        self.chains = nn.ModuleList([*chains, *map(Functions, calls.values())])

    def forward(self, x):
        return [chain(x) for chain in self.chains]


class Compared:
    """Outputs, gradients and the report of each chain."""

    def __init__(self, layers, calls):
        self.names = [*layers, *calls]
        model = Many(layers, calls).double().eval()
        self.outputs = [self.compute(model), self.compute(accelerate(model))]
        found = report(model)
        self.runs = [[], []]
        for runs, told in zip(self.runs, (found.fused, found.left_alone), strict=True):
            runs += [(run.layers[0].split(".")[1], run) for run in told]

    def compute(self, model):
        images = IMAGES.double().requires_grad_()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            outputs = model(images)
        return [
            {"output": output.detach(), **gradients(chain, images, output)}
            for chain, output in zip(model.chains, outputs, strict=True)
        ]

    def check(self, name, *, exactly=False):
        index = self.names.index(name)
        plain, fast = (outputs[index] for outputs in self.outputs)
        assert fast.keys() == plain.keys()
        for key, value in fast.items():
            torch.testing.assert_close(value, plain[key], rtol=0 if exactly else 1e-10, atol=0 if exactly else 1e-12)
        return tuple([run for chain, run in runs if chain == str(index)] for runs in self.runs)


@pytest.fixture(scope="module")
def fused():
    return Compared(FUSED_LAYERS, FUSED_CALLS)


@pytest.fixture(scope="module")
def left_alone():
    calls = {f"{name}, as a call": call for name, call in CALLS_LEFT_ALONE.items()}
    return Compared(LAYERS_LEFT_ALONE, calls)


@pytest.mark.parametrize("name", [*FUSED_LAYERS, *FUSED_CALLS])
@pytest.mark.filterwarnings("ignore:nn.functional.*is deprecated", "ignore:Using padding='same' with even kernel")
def test_fuses(fused, name):
    told, untold = fused.check(name)
    assert len(told) == 1
    assert not untold


@pytest.mark.parametrize("reason", LAYERS_LEFT_ALONE)
def test_leaves_layers_alone_and_says_why(left_alone, reason):
    told, untold = left_alone.check(reason)
    assert not told
    assert reason in {run.reason for run in untold}
    first = report(chain(*LAYERS_LEFT_ALONE[reason]).eval()).left_alone[0]  # without any call
    assert first.reason == (reason if type(LAYERS_LEFT_ALONE[reason][0]) is nn.Conv2d else NOT_CALLED)


@pytest.mark.parametrize("reason", CALLS_LEFT_ALONE)
def test_leaves_calls_alone_and_says_why(left_alone, reason):
    told, (run,) = left_alone.check(f"{reason}, as a call")
    assert not told
    assert run.reason == reason


def test_a_layer_named_like_a_function_is_no_function():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.tanh = nn.Conv2d(2, 4, 3), nn.GELU(), nn.Softplus()

        def forward(self, x):
            return F.avg_pool2d(1.7159 * self.tanh(2 / 3 * self.conv(x)), 2) + F.avg_pool2d(self.relu(self.conv(x)), 2)

    model = Named()
    expected = model(IMAGES)
    assert torch.equal(accelerate(model)(IMAGES), expected)
    assert not report(model).fused


def test_lazy_layers_are_fused_once_they_are_initialised():
    model = accelerate(TUTORIALS["lazy"].build())
    images = torch.randn(2, 1, 28, 28)
    assert fused_calls(model, images) == 2
    torch.testing.assert_close(model(images), restore(copy.deepcopy(model))(images))


def test_a_lone_convolution_and_other_dtypes_are_left_alone():
    conv = nn.Conv2d(2, 4, 3)
    accelerate(conv)(IMAGES)
    assert [str(run) for run in report(conv).left_alone] == ["Conv2d: no 2x2 pooling follows"]
    model = chain(nn.Conv2d(2, 4, 3, dtype=torch.complex64), nn.Identity(), nn.AvgPool2d(2))
    assert [run.reason for run in report(accelerate(model)).left_alone] == ["its weight has dtype torch.complex64"]


def test_needs_a_module():
    for function in (accelerate, restore, report):
        with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got list"):
            function([])


# --- what is told ----------------------------------------------------------------------------------------------------


def test_reports_before_and_after_calls_and_with_example_inputs(caplog):
    images = torch.randn(2, 1, 32, 32)
    model = Blitz()
    asked = "not called yet: call the accelerated model, or give `report` example inputs"
    for function in (lambda m: m, accelerate):
        assert str(report(function(model))) == (
            f"0 fused, 2 left alone\n  left alone  conv1: {asked}\n  left alone  conv2: {asked}"
        )
    told = "2 fused, 0 left alone\n  fused       conv1 + relu() + max_pool2d()\n" + (
        "  fused       conv2 + relu() + max_pool2d()"
    )
    assert str(report(Blitz(), images)) == told
    assert str(report(model, images)) == told
    assert str(report(Asks(), x=images, scale=2.0)) == told
    assert "not called yet" in str(report(model))
    model(images)
    assert str(report(model)) == told
    assert lenet_fast.report is report


def test_a_report_with_example_inputs_leaves_the_model_as_it_is():
    model = FeaturesClassifier()
    images = torch.randn(2, 1, 28, 28)
    attributes, values = [dict(vars(m)) for m in model.modules()], copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    assert [run.layers[0] for run in report(model, images).fused] == ["features.4"]
    assert [dict(vars(m)) for m in model.modules()] == attributes
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_sequentials_are_told_of_at_once():
    model = chain(
        *conv_relu_pool(), nn.Sequential(nn.Conv2d(4, 4, 2), nn.Dropout()), nn.MaxPool2d(2), Block(4, 4), nn.Flatten()
    )
    assert [str(run) for run in report(model.eval()).fused] == ["0 + 1 + 2", "3.0 + 3.1 + 4"]
    assert [str(run) for run in report(model.train()).left_alone] == [
        "3.0: Dropout in training mode comes before its pooling",
        "5.body.0: not called yet: call the accelerated model, or give `report` example inputs",
    ]
    model = chain(nn.Conv2d(2, 4, 3), Subclass(4, 4, 3), hooked(nn.ReLU()), nn.MaxPool2d(2))
    assert [run.reason.split(":")[0] for run in report(model).left_alone] == [
        "no 2x2 pooling follows",
        "not called yet",
    ]


def test_a_run_that_is_fused_in_one_mode_only_is_told_of_twice():
    model = accelerate(chain(nn.Conv2d(2, 4, 3), nn.Dropout2d(), nn.ReLU(), nn.MaxPool2d(2)))
    assert (fused_calls(model, IMAGES), fused_calls(model.eval(), IMAGES)) == (0, 1)
    assert str(report(model)) == (
        "1 fused, 1 left alone\n  fused       0 + 1 + 2 + 3\n"
        "  left alone  0: dropout2d in training mode comes before its pooling"
    )


def told(caplog):
    """What this package has logged: Dynamo logs much for other tools."""
    ours = [record for record in caplog.records if record.name == "lenet_fast.accelerate"]
    return [(record.levelname, record.getMessage()) for record in ours]


def test_reports_to_the_log_once(caplog):
    model = accelerate(FeaturesClassifier())
    with caplog.at_level(logging.INFO, "lenet_fast.accelerate"):
        for _ in range(2):
            for count in (2, 3, 4):
                model(torch.randn(count, 1, 28, 28))
    assert told(caplog) == [
        ("INFO", "fused features.4 + features.5 + features.6"),
        (
            "WARNING",
            "left alone:\n  features.0: BatchNorm2d, which the kernels do not have, comes before any pooling",
        ),
    ]


class Unused(Blitz):
    def __init__(self):
        super().__init__()
        self.spare = nn.Conv2d(1, 6, 5)


def test_warns_of_convolutions_that_the_first_call_does_not_reach(caplog):
    accelerate(Unused())(torch.randn(2, 1, 32, 32))
    assert told(caplog) == [("WARNING", "left alone:\n  spare: no call has reached it")]


def test_says_that_nothing_was_compiled():
    model = accelerate(chain(*conv_relu_pool()))
    assert len(report(model).fused) == 1  # as far as its layers tell
    with torch.compiler.set_stance("force_eager"):
        model(IMAGES)
    assert str(report(model)) == f"0 fused, 1 left alone\n  left alone  0: {NOTHING_COMPILED}"
    model(IMAGES)
    assert str(report(model)) == "1 fused, 0 left alone\n  fused       0 + 1 + 2"


# --- forwards that do more than compute ------------------------------------------------------------------------------

KEPT = []


class Reverse(torch.autograd.Function):
    """The gradient reversal of domain-adversarial networks."""

    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.alpha * gradient, None


@torch.jit.script
def swish(x):
    return x * torch.sigmoid(x)


class Careful(nn.Module):
    """Two runs in a forward with something besides; subclasses say what."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 2), nn.ReLU(), nn.MaxPool2d(2))
        self.child = nn.Module()
        self.child.p, self.child.seen = 0.5, None
        self.calls, self.outputs, self.mask = 0, [], torch.ones(1)

    def run(self, x):
        return F.max_pool2d(F.relu(self.conv(x)), 2)


def careful(name, forward):
    return type(name, (Careful,), {"forward": forward, "__module__": __name__, "__qualname__": name})


def prints(self, x):
    y = self.run(x)
    print("shape", y.shape)
    return self.inner(y)


def counts(self, x):
    self.calls += 1
    return self.inner(self.run(x)) * self.calls


def appends(self, x):
    y = self.run(x)
    self.outputs.append(y)
    return self.inner(y)


def keeps_globally(self, x):
    y = self.run(x)
    KEPT.append(y)
    return self.inner(y)


def keeps_on_a_child(self, x):
    self.child.seen = x.detach().mean()
    return self.inner(self.run(x)) + self.child.seen


def switches_gradients_off(self, x):
    with torch.no_grad():
        y = self.run(x)
    return self.inner(y)


def switches_gradients_off_within_a_run(self, x):
    y = self.conv(x)
    with torch.no_grad():
        y = F.max_pool2d(F.relu(y), 2)
    return self.inner(y)


@torch.enable_grad()
def switches_gradients_on(self, x):
    return self.inner(self.run(x))


def autocasts_within_a_run(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = self.conv(x)
    return self.inner(F.max_pool2d(F.relu(y), 2).float())


def draws(draw):
    def forward(self, x):
        return self.inner(self.run(x.flip(3) if draw() < 0.5 else x))

    return forward


def changes_what_a_run_computed(self, x):
    y = self.conv(x)
    alias = y.view_as(y)
    y.relu_()
    return self.inner(F.max_pool2d(alias, 2))


def changes_its_input(self, x):
    z = x.detach().clone()
    with torch.no_grad():
        y = self.conv(z)
        z.zero_()
        y = F.max_pool2d(F.relu(y), 2)
    return self.inner(y) + z.sum()


def catches(self, x):
    try:
        return self.inner(self.run(x[:, :1]))
    except RuntimeError:
        self.calls += 1
        return self.inner(self.run(x))


def unpacks(self, x):
    n, c, h, w = x.shape
    assert c == 2
    return self.inner(self.run(x.view(n, c, h, w)))


def checkpoints(self, x):
    return self.inner(torch.utils.checkpoint.checkpoint(self.run, x, use_reentrant=False))


def registers_a_hook(self, x):
    y = self.conv(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * 2)
    return self.inner(F.max_pool2d(F.relu(y), 2))


def writes_into_a_tensor(self, x):
    with torch.no_grad():
        kept = torch.empty(len(x), 4, 10, 10)
        y = F.max_pool2d(torch.tanh(self.conv(x), out=kept), 2)
    return self.inner(y) + kept.sum()


def computes_forward_mode_gradients(self, x):
    return torch.func.jvp(lambda t: self.inner(self.run(t)), (x,), (x + 1,))[1]


CAREFUL = {
    # what forward does: how many of two runs are fused, which others are left alone
    "prints": (prints, 2),
    "counts": (counts, 2),
    "appends": (appends, 2),
    "keeps-globally": (keeps_globally, 2),
    "keeps-on-a-child": (keeps_on_a_child, 2),
    "switches-gradients-off": (switches_gradients_off, 2),
    "switches-gradients-off-within-a-run": (switches_gradients_off_within_a_run, 1),
    "switches-gradients-on": (switches_gradients_on, 2),
    "autocasts-within-a-run": (autocasts_within_a_run, 1),
    "draws": (lambda self, x: self.inner(self.run(x)) * torch.rand(1), 2),
    "draws-python": (draws(lambda: random.random()), 2),
    "draws-item": (draws(lambda: torch.rand(1).item()), 2),
    "uses-tensor": (lambda self, x: self.inner(self.run(x)) * self.mask, 2),
    "branches": (lambda self, x: self.inner(self.run(x)) if x.sum() > 0 else -self.inner(self.run(x)), 2),
    "looks-at-sizes": (lambda self, x: self.inner(self.run(x[None] if x.dim() == 3 else x)), 2),
    "variadic": (lambda self, *inputs: self.inner(self.run(inputs[0])), 2),
    "unpacks": (unpacks, 2),
    "reads-child": (lambda self, x: F.dropout(self.inner(self.run(x)), self.child.p, self.child.training), 2),
    "reverses-gradients": (lambda self, x: Reverse.apply(self.inner(self.run(x)), 0.3), 2),
    "scripted": (lambda self, x: self.inner(swish(self.run(x))), 2),
    "variable": (lambda self, x: torch.autograd.Variable(self.inner(self.run(x))), 2),
    "changes-what-a-run-computed": (changes_what_a_run_computed, 1),
    "changes-its-input": (changes_its_input, 2),
    "catches": (catches, 2),
    "checkpoints": (checkpoints, 2),
    "registers-a-hook": (registers_a_hook, 1),
    "writes-into-a-tensor": (writes_into_a_tensor, 1),
    "computes-forward-mode-gradients": (computes_forward_mode_gradients, 0),
}


@pytest.mark.parametrize("name", CAREFUL)
@pytest.mark.filterwarnings("ignore:.*requires_grad=True.*to a scalar", "ignore:.*Variable")
def test_a_forward_that_does_more_than_compute(name, capsys):
    forward, fused = CAREFUL[name]
    torch.manual_seed(0)
    plain = careful(name, forward)()
    fast = accelerate(copy.deepcopy(plain))
    seen = []
    for model in (plain, fast):
        KEPT.clear()
        torch.manual_seed(1)
        random.seed(1)
        values = []
        for count, training in ((3, True), (3, False), (2, True), (3, True)):
            output = model.train(training)(IMAGES[:count])
            model.zero_grad()
            if output.requires_grad:
                output.sum().backward()
            values += [output.detach(), *(p.grad for p in model.parameters()), torch.rand(1), random.random()]
        values += [model.child.seen, *(o.detach() for o in (*model.outputs, *KEPT))]
        seen.append((values, (model.calls, capsys.readouterr().out, torch.is_grad_enabled())))
    (expected, state), (actual, state_of_fast) = seen
    assert state_of_fast == state
    for value, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=2e-2 if "autocast" in name else 1e-5)
    assert len({run.layers[0] for run in report(fast).fused}) == fused


class Prints(nn.Module):
    def forward(self, x):
        print("shape", x.shape)
        return x


@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential, nn.DataParallel], ids=["itself", "nested", "wrapped"])
def test_a_sequential_runs_fused_on_both_sides_of_a_layer_that_dynamo_cannot_read(wrap, capsys):
    model = wrap(chain(*conv_relu_pool(), Prints(), *conv_relu_pool(4)))
    expected = model(IMAGES)
    accelerate(model)
    capsys.readouterr()
    torch.testing.assert_close(model(IMAGES), expected)
    assert capsys.readouterr().out == "shape torch.Size([3, 4, 5, 5])\n"
    assert fused_calls(model, IMAGES) == 2
    assert [run.layers[-1][-1] for run in report(model).fused] == ["2", "6"]
    assert not report(model).left_alone


def test_a_sequential_may_change_its_layers_and_how_it_runs_them():
    class Backwards(nn.Sequential):
        def __iter__(self):
            return reversed(self._modules.values())

    model = accelerate(chain(*conv_relu_pool()))
    model(IMAGES)
    model.append(nn.Flatten())
    assert model(IMAGES).shape == (3, 100)
    model.forward = lambda x: x + 1
    assert torch.equal(model(IMAGES), IMAGES + 1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'input'"):
        accelerate(chain(*conv_relu_pool()))()
    model = chain(*conv_relu_pool())
    expected = model(IMAGES)
    torch.testing.assert_close(accelerate(model)(input=IMAGES), expected)
    model = Backwards(nn.Flatten(), *reversed(conv_relu_pool()))
    expected = model(IMAGES)
    torch.testing.assert_close(accelerate(model)(IMAGES), expected)


class Failing(Blitz):
    def forward(self, x):
        KEPT.append(len(x))
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        if len(x) == 3:
            raise KeyError("mine")
        return self.fc3(self.fc2(self.fc1(F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1))))


def test_errors_of_the_forward_come_through_once_and_change_nothing():
    model = accelerate(Failing())
    plain = restore(copy.deepcopy(model))
    KEPT.clear()
    for wrong in (torch.randn(3, 1, 32, 32), torch.randn(2, 1, 28, 28), torch.randn(2, 3, 32, 32), "text", None):
        errors = []
        for tried in (plain, model):
            with pytest.raises(Exception) as raised:  # noqa: PT011
                tried(wrong)
            errors.append((raised.type, str(raised.value)))
        assert errors[0] == errors[1]
    with pytest.raises(TypeError):
        model()
    with pytest.raises(TypeError):
        model(torch.randn(2, 1, 32, 32), unknown=1)
    assert KEPT == [3, 3, 2, 2, 2, 2, 4, 4]
    assert fused_calls(model, torch.randn(2, 1, 32, 32)) == 2


def test_failures_of_dynamo_are_none_of_the_model(monkeypatch, caplog):
    import torch._dynamo

    class Unlucky(Blitz):
        pass

    def fail(*args):
        raise ZeroDivisionError("within the compiler")

    images = torch.randn(2, 1, 32, 32)
    with monkeypatch.context() as patch:
        patch.setattr(dynamo, "fuse", fail)
        model = accelerate(Unlucky())
        expected = restore(copy.deepcopy(model))(images)
        assert torch.equal(model(images), expected)
        reason = "PyTorch runs its forward, as Dynamo says: ZeroDivisionError: within the compiler"
        assert {run.reason for run in report(model).left_alone} == {reason}
        assert reason in str(told(caplog))
    assert fused_calls(model, images) == 2
    torch._dynamo.reset_code(dynamo._compiled[Unlucky][None].__wrapped__.__code__)
    with monkeypatch.context() as patch:
        patch.setattr(dynamo, "fuse", fail)
        for _ in range(10):
            model(images)
    warning = ("WARNING", "Unlucky: new kinds of calls run unfused, Dynamo failed 8 times")
    assert told(caplog).count(warning) == 1
    torch.testing.assert_close(model(images), expected)


class Asks(Blitz):
    """isinstance has to answer as it does for a Tensor; an argument with a default has to keep working."""

    def forward(self, x, targets=None, *, scale=1.0):
        if not isinstance(x, torch.Tensor):
            raise TypeError("x")
        logits = super().forward(x * 2) * scale
        return logits if targets is None else F.cross_entropy(logits, targets)


def test_optional_arguments_and_numbers():
    torch.manual_seed(0)
    model = Asks()
    images, targets = torch.randn(4, 1, 32, 32), torch.tensor([1, 2, 3, 4])
    calls = [
        ((images,), {}),
        ((), {"x": images}),
        ((images, targets), {}),
        ((images,), {"targets": targets}),
        *(((images,), {"scale": scale}) for scale in (3.0, 0.5, 0.25, 7)),
    ]
    expected = [model(*args, **kwargs) for args, kwargs in calls]
    accelerate(model)
    for (args, kwargs), output in zip(calls, expected, strict=True):
        torch.testing.assert_close(model(*args, **kwargs), output)
        assert fused_calls(model, *args, **kwargs) == 2
    with pytest.raises(TypeError, match="x"):
        model(images.tolist())


class TwoInputs(Blitz):
    def forward(self, x, y):
        return super().forward(x) if y is None else super().forward(x) + super().forward(y)


def test_two_inputs_call_every_layer_twice():
    torch.manual_seed(0)
    model = TwoInputs()
    x, y = torch.randn(2, 2, 1, 32, 32)
    expected = model(x, y)
    accelerate(model)
    assert fused_calls(model, x, y) == 4
    for output in (model(x, y), model(x, y=y), model(y=y, x=x)):
        torch.testing.assert_close(output, expected)
    torch.testing.assert_close(model(x, None), Blitz.forward(model, x))


def test_tied_weights_and_shared_layers():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
            self.b.weight = self.a.weight
            self.pool = nn.MaxPool2d(2)

        def forward(self, x):
            shared = self.pool(torch.relu(self.a(x))) + self.pool(torch.tanh(self.a(x)))  # two follow-ups of one layer
            return self.pool(torch.sigmoid(self.b(shared))) + F.max_pool2d(self.a(shared), 3, 2, 1).mean()

    torch.manual_seed(0)
    plain = Tied()
    fast = accelerate(copy.deepcopy(plain))
    assert_close_in_float32(fast, plain, IMAGES)
    found = report(fast)
    assert [str(run) for run in found.fused] == ["a + relu() + pool", "a + tanh() + pool", "b + sigmoid() + pool"]
    assert [str(run) for run in found.left_alone] == ["a: pooling with kernel_size 3"]
    assert fused_calls(fast, IMAGES) == 3
    assert fast.a.weight is fast.b.weight


# --- what happens after accelerate -----------------------------------------------------------------------------------


def hooked(layer):
    layer.register_forward_hook(lambda *args: None)
    return layer


def with_own_forward(layer):
    layer.forward = lambda x: type(layer).forward(layer, x) * 2
    return layer


def test_layers_and_parameters_keep_their_meaning():
    model = SharedLayers()
    parameters = dict(model.named_parameters())
    conv = model.conv1
    accelerate(model)
    assert model.conv1 is conv
    assert (type(conv), type(model)) == (nn.Conv2d, SharedLayers)
    assert all(value is parameters[name] for name, value in model.named_parameters())
    images = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(model.conv1(images), F.conv2d(images, conv.weight, conv.bias))
    with torch.no_grad():
        model.conv1.weight.fill_(0.01)
    plain = restore(copy.deepcopy(model))
    torch.testing.assert_close(model.eval()(images), plain.eval()(images))
    model.conv1.bias = None
    model.conv2.weight = nn.Parameter(torch.randn(20, 10, 5, 5) / 20)
    assert fused_calls(model, images) == 2
    torch.testing.assert_close(model(images), restore(copy.deepcopy(model))(images))


def test_accelerating_twice_changes_nothing_more():
    model = accelerate(Lightning())
    state = dict(vars(model))
    assert accelerate(model) is model
    assert vars(model) == state
    assert fused_calls(model, torch.randn(2, 1, 28, 28)) == 2


def test_parts_that_are_called_on_their_own_run_fused():
    model = accelerate(Lightning())
    images = torch.randn(2, 1, 28, 28)
    assert fused_calls(model.features, images) == 2
    assert [str(run) for run in report(model).fused] == [
        "features.0 + features.1 + features.2", "features.3 + features.4 + features.5",
    ]  # fmt: skip


HOOKS = {
    "forward": lambda layer, seen: layer.register_forward_hook(lambda m, i, o: seen.append(o.detach())),
    "forward-pre": lambda layer, seen: layer.register_forward_pre_hook(lambda m, i: seen.append(i[0].detach())),
    "backward": lambda layer, seen: layer.register_full_backward_hook(lambda m, i, o: seen.append(o[0])),
    "backward-pre": lambda layer, seen: layer.register_full_backward_pre_hook(lambda m, o: seen.append(o[0])),
    "global": lambda layer, seen: nn.modules.module.register_module_forward_hook(
        lambda m, i, o: seen.append(o.detach()) if m is layer else None
    ),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("where", ["features.0", "features.2", "features", ""])
def test_later_hooks_see_what_they_see_in_the_plain_model(kind, where):
    torch.manual_seed(0)
    plain = Lightning()
    fast = accelerate(copy.deepcopy(plain))
    images = torch.randn(2, 1, 28, 28)
    fast(images)
    seen, handles = {}, []
    for name, model in (("plain", plain), ("fast", fast)):
        seen[name] = []
        handles.append(HOOKS[kind](model.get_submodule(where), seen[name]))
        model(images.clone().requires_grad_()).square().sum().backward()
    assert len(seen["plain"]) == 1
    torch.testing.assert_close(seen["fast"], seen["plain"])
    for handle in handles:
        handle.remove()
    assert fused_calls(fast, images) == 2


CHANGES = {
    "append": lambda model: model.features.append(nn.Softplus()),
    "insert": lambda model: model.features.insert(1, nn.Softplus()),
    "replace-activation": lambda model: model.features.__setitem__(1, nn.ReLU()),
    "replace-convolution": lambda model: model.features.__setitem__(0, nn.Conv2d(1, 4, 5, padding=2, stride=1)),
    "delete": lambda model: model.features.__delitem__(slice(4, 5)),
    "stride": lambda model: setattr(model.features[0], "stride", (1, 2)),
    "padding": lambda model: setattr(model.features[0], "padding", (1, 1)),
    "pooling": lambda model: setattr(model.features[2], "ceil_mode", True),
    "child": lambda model: setattr(model, "classifier", nn.Softplus()),
    "prune": lambda model: prune.l1_unstructured(model.features[0], "weight", 20),
    "parametrize": lambda model: parametrizations.weight_norm(model.features[3]),
    "class": lambda model: setattr(model.features[0], "__class__", Subclass),
    "forward": lambda model: with_own_forward(model.features[1]),
    "forward-of-container": lambda model: with_own_forward(model.features),
    "forward-of-model": lambda model: setattr(model, "forward", types.MethodType(lambda self, x: x * 2, model)),
    "hook": lambda model: model.features[0].register_forward_hook(lambda module, inputs, output: output * 2),
    "freeze": lambda model: model.features[0].weight.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_layers_may_change_afterwards(change):
    model = accelerate(Lightning()).eval()
    model.classifier = nn.Identity()
    images = torch.randn(2, 1, 29, 29)
    before = model(images)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        CHANGES[change](model)
    output = model(images)
    assert change in ("freeze", "parametrize") or output.shape != before.shape or not torch.allclose(output, before)
    torch.testing.assert_close(output, restore(model)(images), rtol=1e-4, atol=1e-5)


class Configured(nn.Module):
    """Its forward reads plain attributes, walks lists, which may be empty, takes parameters by name."""

    def __init__(self):
        super().__init__()
        self.activation = torch.tanh
        self.scale, self.flag = 2.0, True
        self.convs = nn.ModuleList([nn.Conv2d(2, 2, 3, padding=1)])
        self.more, self.last = nn.ModuleList(), nn.Sequential()
        self.gain = nn.Parameter(torch.ones(()))
        self.register_buffer("offset", torch.zeros(()))

    def step(self, x):
        return x * self.scale

    def forward(self, x):
        for conv in self.convs:
            x = F.avg_pool2d(self.activation(conv(x)), 2)
        for layer in self.more:
            x = layer(x)
        x = self.step(self.last(x)) * self.gain + self.offset
        return -x if self.flag else x


CONFIGURATIONS = {
    "function": lambda m: setattr(m, "activation", torch.relu),
    "number": lambda m: setattr(m, "scale", 3.0),
    "flag": lambda m: setattr(m, "flag", False),
    "list": lambda m: m.convs.append(nn.Conv2d(2, 3, 3)),
    "empty-list": lambda m: m.more.append(nn.Softplus()),
    "empty-sequential": lambda m: m.last.append(nn.Softplus()),
    "parameter": lambda m: setattr(m, "gain", nn.Parameter(torch.full((), 7.0))),
    "value": lambda m: m.gain.data.fill_(5.0),
    "buffer": lambda m: m.offset.fill_(5.0),
    "method": lambda m: setattr(m, "step", types.MethodType(lambda self, x: x * 9, m)),
    "parametrization": lambda m: parametrizations_of_gain(m),
}


def parametrizations_of_gain(model):
    nn.utils.parametrize.register_parametrization(model, "gain", nn.Softplus())


@pytest.mark.parametrize("change", CONFIGURATIONS)
def test_attributes_may_change_afterwards(change):
    model = accelerate(Configured())
    before = model(IMAGES)
    CONFIGURATIONS[change](model)
    after = model(IMAGES)
    assert after.shape != before.shape or not torch.allclose(after, before)
    assert fused_calls(model, IMAGES) == len(model.convs)
    torch.testing.assert_close(after, restore(model)(IMAGES))


def test_methods_may_be_replaced_on_the_class():
    class Notebook(Blitz):
        def forward(self, x):
            return super().forward(x)

    images = torch.randn(2, 1, 32, 32)
    model = accelerate(Notebook())
    before = model(images)
    Notebook.forward = lambda self, x: self.scaled(Blitz.forward(self, x))
    Notebook.scaled = lambda self, x: x * 2
    torch.testing.assert_close(model(images), before * 2)
    Notebook.scaled = lambda self, x: x * 3
    torch.testing.assert_close(model(images), before * 3)
    Notebook.scaled.__code__ = (lambda self, x: x * 4).__code__  # as IPython's autoreload does
    torch.testing.assert_close(model(images), before * 4)
    for kind in (staticmethod, classmethod):
        for factor in (5, 6):
            scaled = (lambda x, f=factor: x * f) if kind is staticmethod else (lambda cls, x, f=factor: x * f)
            Notebook.scaled = kind(scaled)
            for _ in range(2):
                torch.testing.assert_close(model(images), before * factor)
    assert fused_calls(model, images) == 2


def test_what_a_class_has_is_not_computed():
    class Raises:
        def __get__(self, owner, kind):
            raise RuntimeError("not now")

    class Described(Blitz):
        later = Raises()

    assert fused_calls(accelerate(Described()), torch.randn(2, 1, 32, 32)) == 2


def test_batches_of_any_size_are_compiled_a_few_times():
    class Batches(Blitz):
        pass

    model = accelerate(Batches())
    plain = restore(copy.deepcopy(model))
    for count in (8, 5, 1, 2, 3, 4, 6, 7, 9, 33):
        images = torch.randn(count, 1, 32, 32)
        torch.testing.assert_close(model(images), plain(images))
    assert compilations(Batches) <= 4  # PyTorch picks convolutions by whether there are 16 images


def compilations(cls):
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    return len(_debug_get_cache_entry_list(dynamo._compiled[cls][None].__wrapped__.__code__))


def test_models_of_one_class_share_what_is_compiled_and_many_architectures_of_it_run_fused(caplog):
    class Wide(nn.Module):
        def __init__(self, maps):
            super().__init__()
            self.features = nn.Sequential(*conv_relu_pool(2, maps))

        def forward(self, x):
            return self.features(x).flatten(1)

    kept = [accelerate(Wide(4)) for _ in range(20)]
    for model in kept:
        model(IMAGES)
    assert compilations(Wide) == 1
    assert all(len(report(model).fused) == 1 for model in kept)
    for maps in range(5, 18):
        kept.append(accelerate(Wide(maps)))
        assert fused_calls(kept[-1], IMAGES) == 1
    assert all(fused_calls(model, IMAGES) == 1 for model in kept)


def test_says_where_too_many_architectures_are_not_fused_any_more(monkeypatch, caplog):
    class TooMany(nn.Module):
        def __init__(self, maps):
            super().__init__()
            self.conv = nn.Conv2d(2, maps, 3)

        def forward(self, x):
            return F.max_pool2d(F.relu(self.conv(x)), 2)

    monkeypatch.setattr(dynamo, "_COMPILATIONS", 8)
    kept = [accelerate(TooMany(maps)) for maps in range(1, 12)]
    for model in kept:
        torch.testing.assert_close(model(IMAGES), restore(copy.deepcopy(model))(IMAGES))
    assert ("WARNING", "TooMany: new kinds of calls run unfused, 8 are compiled") in told(caplog)
    assert [fused_calls(model, IMAGES) for model in kept] == [1] * 8 + [0] * 3


def test_gives_up_a_model_whose_every_call_is_new(caplog):
    """A list that grows, say: it would be compiled anew in each call. Parts of it still run fused."""
    model = accelerate(careful("Growing", appends)())
    plain = restore(copy.deepcopy(model))
    for _ in range(12):
        torch.testing.assert_close(model(IMAGES), plain(IMAGES))
    assert len([message for _, message in told(caplog) if message.startswith("Growing runs unfused")]) == 1
    assert len(model.outputs) == 12
    assert fused_calls(model, IMAGES) == 1
    assert compilations(type(model)) <= 9


def test_training_goes_on_with_the_same_optimizer():
    def losses(model, *, accelerated_at):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        values = []
        for step in range(12):
            if step == accelerated_at:
                accelerate(model)
            if step == accelerated_at + 5:
                restore(model)
            images, labels = torch.randn(16, 1, 32, 32).double(), torch.randint(10, (16,))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return values

    torch.manual_seed(0)
    model = Blitz().double()
    expected = losses(copy.deepcopy(model), accelerated_at=100)
    assert losses(model, accelerated_at=3) == pytest.approx(expected, rel=1e-9)


# --- other tools of PyTorch ------------------------------------------------------------------------------------------


def graphs_of(model, images, **options):
    """The graphs that another backend of `torch.compile` gets of a model, and its outputs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    output = torch.compile(model, backend=backend, **options)(images)
    return [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"], output


def test_other_backends_get_the_fused_operators_of_a_model():
    model, images = accelerate(Blitz()), torch.randn(2, 1, 32, 32)
    called, output = graphs_of(model, images, fullgraph=True)
    assert called.count(lenet_fast.functional.conv_act_pool) == 2
    expected = results(model, images)
    torch.testing.assert_close(output, expected["output"])
    torch.compiler.reset()
    for name, value in results(torch.compile(model, backend="aot_eager", fullgraph=True), images).items():
        torch.testing.assert_close(value, expected[name.removeprefix("_orig_mod.")])


@pytest.mark.parametrize("name", ["d2l", "nested-blocks"])
def test_compiles_within_other_functions_without_graph_breaks(name):
    model, images = accelerate(TUTORIALS[name].model()), TUTORIALS[name].images()
    _, output = graphs_of(lambda x: model(x) * 2, images, fullgraph=True)
    torch.testing.assert_close(output, model(images) * 2)
    model.register_forward_hook(lambda module, inputs, output: output * 2)
    _, output = graphs_of(model, images, fullgraph=True)
    torch.testing.assert_close(output, model(images))


def test_traced_scripted_and_exported_models_are_plain(tmp_path):
    model = accelerate(FeaturesClassifier()).eval()
    plain = restore(copy.deepcopy(model))
    images, more = torch.randn(3, 1, 28, 28), torch.randn(5, 1, 28, 28)
    traced = torch.jit.trace(model, images)
    torch.jit.save(traced, tmp_path / "model.pt")
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    symbolic = torch.fx.symbolic_trace(nn.Sequential(OrderedDict(model=model)))
    made = torch.fx.experimental.proxy_tensor.make_fx(model)(images)
    assert "lenet_fast" not in f"{traced.inlined_graph} {program.graph} {made.graph}"
    for other in (torch.jit.load(tmp_path / "model.pt"), torch.jit.script(model), program.module(), symbolic):
        torch.testing.assert_close(other(more), plain(more))
    assert fused_calls(model, images) == 1


def test_other_modes_see_the_plain_operators():
    """A counter of operations or a mode for fake tensors; and the model is not spoilt for later calls."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            seen.append(str(operator))
            return operator(*args, **(kwargs or {}))

    class Fresh(Blitz):
        pass

    model, images, seen = accelerate(Fresh()), torch.randn(2, 1, 32, 32), []
    with Names():
        model(images)
    assert seen.count("aten.convolution.default") == 2
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(images)).shape == (2, 10)
    assert fused_calls(model, images) == 2


def test_hooks_of_all_modules_see_every_layer():
    class Hooked(Blitz):
        pass

    model, images, seen = accelerate(Hooked()), torch.randn(2, 1, 32, 32), []
    expected = model(images)
    for _ in range(2):
        hook = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__) or o * 2)
        try:
            assert not torch.allclose(model(images), expected)
        finally:
            hook.remove()
        assert seen == ["Conv2d", "Conv2d", "Linear", "Linear", "Linear", "Hooked"]
        seen.clear()
    assert torch.equal(model(images), expected)


def test_forward_mode_gradients():
    model, images = accelerate(d2l()), torch.randn(2, 1, 28, 28)
    tangents = []
    for each in (model, restore(copy.deepcopy(model))):
        with torch.autograd.forward_ad.dual_level():
            output = each(torch.autograd.forward_ad.make_dual(images, images))
            tangents.append(torch.autograd.forward_ad.unpack_dual(output).tangent)
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("make", [Blitz, lambda: nn.Sequential(Blitz().conv1, nn.MaxPool2d(2))], ids=["own", "chain"])
def test_says_once_that_other_tools_looked_on_in_every_call(make, caplog):
    model = accelerate(nn.Sequential(OrderedDict(inner=make())))
    for _ in range(2):
        torch.vmap(model)(torch.randn(2, 2, 1, 32, 32))
    assert told(caplog) == [("WARNING", f"Sequential: {WATCHED}")]
    assert {run.reason for run in report(model).left_alone} == {WATCHED}
    assert not report(model).fused
    model(torch.randn(2, 1, 32, 32))
    assert report(model).fused
    assert not report(model).left_alone


def test_functional_call_and_per_sample_gradients():
    model = accelerate(d2l())
    plain = restore(copy.deepcopy(model))
    images = torch.randn(3, 1, 28, 28)
    parameters = {name: torch.randn_like(value) / 10 for name, value in model.named_parameters()}
    outputs = [torch.func.functional_call(network, parameters, images) for network in (model, plain)]
    torch.testing.assert_close(*outputs)

    def loss(parameters, image, network):
        return torch.func.functional_call(network, parameters, image[None]).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, None))
    actual, expected = (per_sample(parameters, images, network) for network in (model, plain))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())


def test_averaged_models_ensembles_and_replicas():
    model = accelerate(Blitz())
    images = torch.randn(2, 1, 32, 32)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert fused_calls(average, images) == 2
    torch.testing.assert_close(average(images), model(images))
    replica = model._replicate_for_data_parallel()  # takes over the __dict__, and gets other parameters
    for name, layer in model._modules.items():
        replica._modules[name] = copy.deepcopy(layer)
    with torch.no_grad():
        replica.fc3.bias.add_(1)
    torch.testing.assert_close(replica(images), model(images) + 1)


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain = Blitz()
        model = accelerate(copy.deepcopy(plain))
        parallel, images = nn.parallel.DistributedDataParallel(model), torch.randn(4, 1, 32, 32)
        for _ in range(2):
            for each in (parallel, plain):
                each.zero_grad()
                each(images).square().sum().backward()
            for actual, expected in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-5)
        assert len(report(model).fused) == 2
    finally:
        torch.distributed.destroy_process_group()


def test_threads_call_models_at_the_same_time():
    class Threaded(Blitz):
        pass

    fast = [accelerate(Threaded()) for _ in range(4)]
    images = [torch.randn(count, 1, 32, 32) for count in (1, 2, 3, 4)]
    outputs = [[] for _ in fast]

    def call(index):
        outputs[index] = [fast[index](batch).detach() for batch in images * 3]

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, own in zip(fast, outputs, strict=True):
        torch.testing.assert_close(own, [restore(copy.deepcopy(model))(batch).detach() for batch in images * 3])
        assert len(report(model).fused) == 2


def test_an_accelerated_model_is_freed_with_its_last_reference():
    model = accelerate(Blitz())
    model(torch.randn(2, 1, 32, 32))
    gc.collect()
    gc.disable()
    try:
        reference = weakref.ref(model.conv1)
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_a_class_is_copied_as_ever_after_its_last_accelerated_model():
    """The table of `copyreg` would keep the class, and what was compiled for it, alive."""

    class Forgotten(Blitz):
        pass

    models = [accelerate(Forgotten()), accelerate(Forgotten())]
    models[0](torch.randn(2, 1, 32, 32))
    del models[0]
    gc.collect()
    assert copy.deepcopy(models[0])._compiled_call_impl
    del models
    gc.collect()
    assert Forgotten not in copyreg.dispatch_table


def test_classes_that_pytorch_derives_from_a_model_s_are_accelerated():
    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * 2

    model, images = Blitz(), torch.randn(2, 1, 32, 32)
    model.scale = nn.Parameter(torch.ones(()))
    parametrize.register_parametrization(model, "scale", Doubled())
    assert type(model).__module__.startswith("torch.")
    assert fused_calls(accelerate(model), images) == 2


def test_settings_of_dynamo_are_left_as_they_are():
    from torch._dynamo import config

    before = config.save_config_portable()
    accelerate(Blitz())(torch.randn(2, 1, 32, 32))
    torch.compile(Blitz(), backend=dynamo.backend)(torch.randn(2, 1, 32, 32))
    assert config.save_config_portable() == before


def test_classes_with_their_own_ways():
    registered = []

    class Registry(nn.Sequential):
        def __init_subclass__(cls, *, tag, **kwargs):
            super().__init_subclass__(**kwargs)
            registered.append(tag)

    class Entry(Registry, tag="entry"):
        def __getstate__(self):
            return dict(self.__dict__)  # with what nn.Module would leave out

    model = accelerate(Entry(*conv_relu_pool()))
    assert fused_calls(model, IMAGES) == 1
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].bias.add_(1)
    assert fused_calls(twin, IMAGES) == 1
    assert not torch.allclose(twin(IMAGES), model(IMAGES))
    assert registered == ["entry"]


class Reduced(Blitz):
    """Pickles as an instruction to build a new one."""

    def __reduce__(self):
        return Reduced, ()


def test_a_class_that_pickles_in_its_own_way_goes_on_to():
    model, images = accelerate(Reduced()), torch.randn(2, 1, 32, 32)
    assert fused_calls(model, images) == 2
    twin = pickle.loads(pickle.dumps(model))
    assert (type(twin), fused_calls(twin, images)) == (Reduced, 0)


def test_new_objects_of_the_class_of_an_accelerated_model_are_plain():
    model = accelerate(Blitz())
    other = type(model)()
    images = torch.randn(2, 1, 32, 32)
    assert fused_calls(other, images) == 0
    assert fused_calls(pickle.loads(pickle.dumps(other)), images) == 0
    assert fused_calls(accelerate(other), images) == 2


def test_containers_of_modules_and_torch_wrappers():
    held = nn.ModuleDict({"a": d2l(), "b": nn.ModuleList([FeaturesClassifier(), Block(1, 6)])})
    accelerate(held)
    images = torch.randn(2, 1, 28, 28)
    assert [fused_calls(m, images) for m in (held["a"], held["b"][0], held["b"][1])] == [2, 1, 1]
    torch.compiler.reset()
    compiled = torch.compile(d2l(), backend="eager")
    expected = compiled(images)
    accelerate(compiled)
    assert fused_calls(compiled._orig_mod, images) == 2
    torch.testing.assert_close(compiled(images), expected)
    traced = accelerate(torch.fx.symbolic_trace(Blitz()))
    assert fused_calls(traced, torch.randn(2, 1, 32, 32)) == 2


def test_what_the_user_compiled_stays():
    model = Blitz()
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    assert accelerate(model)._compiled_call_impl is compiled
    assert restore(model)._compiled_call_impl is compiled


# --- restoring models built from fused layers ------------------------------------------------------------------------


class Built(nn.Module):
    """A fused layer that another forward calls by name, one in a Sequential, one that is shared."""

    def __init__(self):
        super().__init__()
        self.c1 = ConvActPool2d(2, 3, 3, padding=1, activation="scaled_tanh", pool="max")
        self.rest = nn.Sequential(
            ConvActPool2d(3, 4, 3, padding="same", bias=False, activation="identity", pool="avg"),
            ConvActPool2d(4, 4, 2, activation="tanh", pool="none"),
        )

    def forward(self, x):
        return self.rest(self.c1(x))


def test_restores_fused_layers_to_plain_ones():
    torch.manual_seed(0)
    model = Built()
    model.rest[0].weight.requires_grad_(False)
    model.rest.eval()
    parameters = dict(model.named_parameters())
    expected = model(IMAGES)
    assert fused_calls(model, IMAGES) == 3
    restore(model)
    assert not any("lenet_fast" in name for name in operators(model, IMAGES))
    torch.testing.assert_close(model(IMAGES), expected)
    assert list(model.state_dict()) == list(parameters)
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert str(model.rest) == str(
        nn.Sequential(
            OrderedDict(
                {
                    "0": nn.Conv2d(3, 4, 3, padding="same", bias=False),
                    "0_pool": nn.AvgPool2d(2),
                    "1": nn.Conv2d(4, 4, 2),
                    "1_act": nn.Tanh(),
                }
            )
        )
    )
    assert not any(layer.training for layer in model.rest.modules())
    assert fused_calls(accelerate(model), IMAGES) == 2
    torch.testing.assert_close(model(IMAGES), expected)


def test_fused_layers_with_hooks_or_twice_in_a_model_stay_and_compute_plainly():
    shared = ConvActPool2d(2, 2, 3, padding=1)
    model = nn.Sequential(shared, nn.Sequential(shared), hooked(ConvActPool2d(2, 2, 2, pool="none")))
    expected = model(IMAGES)
    restore(model)
    assert not any("lenet_fast" in name for name in operators(model, IMAGES))
    assert model[0] is model[1][0]
    torch.testing.assert_close(model(IMAGES), expected)
    assert fused_calls(accelerate(model), IMAGES) == 3


@pytest.mark.parametrize("name", models.MODELS)
def test_restores_the_package_s_own_models(name):
    torch.manual_seed(0)
    model = models.MODELS[name]()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    size = model.input_spec.size
    images = torch.randn(3, 1, size, size)
    expected = model(images)
    assert any("lenet_fast" in operator for operator in operators(model, images))
    restore(model)
    assert not any("lenet_fast" in operator for operator in operators(model, images))
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    models.MODELS[name]().load_state_dict(model.state_dict(), strict=True)
    program = torch.export.export(model.eval(), (images,))
    assert not any("lenet_fast" in str(node.target) for node in program.graph.nodes)
    accelerate(model)
    assert sum(count for op, count in operators(model, images).items() if "lenet_fast" in op) == 2
