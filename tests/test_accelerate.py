"""`accelerate` and `restore`: the same outputs, gradients and state_dict, fused where it can be, undone exactly."""

import copy
import gc
import io
import linecache
import logging
import pickle
import traceback
from collections import Counter, OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from tutorial_lenets import TUTORIALS, Blitz, Block, FeaturesClassifier, Lightning, SharedLayers, d2l

from lenet_fast import models
from lenet_fast.accelerate import accelerate, report, restore
from lenet_fast.nn import ConvActPool2d, ScaledTanh

tutorials = pytest.mark.parametrize("tutorial", TUTORIALS.values(), ids=TUTORIALS)


class Operators(TorchDispatchMode):
    """Counts the operators that run, by name; recording for backward has a name of its own, which counts the same."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name
        self.counts["lenet_fast::conv_act_pool" if name == "lenet_fast::_conv_recording" else name] += 1
        return operator(*args, **(kwargs or {}))


def operators(model, *inputs, **kwargs):
    with Operators() as seen, torch.random.fork_rng():
        model(*inputs, **kwargs)
    return seen.counts


def fused_calls(model, *inputs, **kwargs):
    return operators(model, *inputs, **kwargs)["lenet_fast::conv_act_pool"]


def results(model, images):
    """Outputs, and the gradients of a fixed random weighting of them; the same dropout at every call."""
    images = images.clone().requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(2)
        output = model(images)
        weighting = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    wanted = {"images": images, **dict(model.named_parameters())}
    gradients = torch.autograd.grad(output, list(wanted.values()), weighting)
    return {"output": output.detach(), **dict(zip(wanted, gradients, strict=True))}


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


IMAGES = torch.randn(3, 2, 12, 12, generator=torch.Generator().manual_seed(3))


# --- the LeNets of the tutorials -------------------------------------------------------------------------------------


@tutorials
def test_tutorial_reports_and_runs_what_is_fused(tutorial):
    model = tutorial.model()
    images = tutorial.images()
    found = report(model)
    assert [str(run) for run in found.fused] == list(tutorial.fused)
    assert len(found.left_alone) == len(tutorial.left_alone)
    for run, expected in zip(found.left_alone, tutorial.left_alone, strict=True):
        assert str(run).startswith(expected)
    assert fused_calls(model, images) == 0
    plain = operators(model, images)["aten::convolution"]
    assert accelerate(model) is model
    for training in (True, False):
        counts = operators(model.train(training), images)
        assert counts["lenet_fast::conv_act_pool"] == len(tutorial.fused)
        assert counts["aten::convolution"] == plain - len(tutorial.fused)
    assert report(model) == found


@tutorials
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_tutorial_outputs_and_gradients(tutorial, training):
    plain = tutorial.model().train(training)
    images = tutorial.images()
    fast = accelerate(copy.deepcopy(plain))
    assert fast.training is training
    assert_close_in_float32(fast, plain, images)
    expected = results(plain.double(), images.double())
    for name, value in results(fast.double(), images.double()).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


@tutorials
def test_tutorial_state_dict(tutorial):
    plain, fast = tutorial.model(), accelerate(tutorial.model())
    assert list(fast.state_dict()) == list(plain.state_dict())
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    fast.load_state_dict(plain.state_dict(), strict=True)
    assert_close_in_float32(fast.eval(), plain.eval(), tutorial.images())
    tutorial.model().load_state_dict(fast.state_dict(), strict=True)


@tutorials
def test_tutorial_restore(tutorial):
    model = tutorial.model().eval()
    images = tutorial.images()
    text, output, kinds = str(model), model(images), [type(m) for m in model.modules()]
    objects = [*model.modules(), *model.parameters()]
    attributes = [dict(vars(m)) for m in model.modules()]
    accelerate(model)
    assert (str(model) != text) is bool(tutorial.fused)
    assert restore(model) is model
    assert str(model) == text
    assert [type(m) for m in model.modules()] == kinds
    assert [*map(id, objects)] == [*map(id, model.modules()), *map(id, model.parameters())]
    assert [dict(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(model(images), output)
    assert fused_calls(model, images) == 0


@tutorials
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), lambda model: saved_and_loaded(model)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_tutorial_copies(tutorial, duplicate):
    model = accelerate(tutorial.model().eval())
    images = tutorial.images()
    twin = duplicate(model)
    assert str(twin) == str(model)
    assert fused_calls(twin, images) == len(tutorial.fused)
    assert torch.equal(twin(images), model(images))
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert not torch.equal(twin(images), model(images))
    assert str(restore(twin)) == str(restore(model))


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_shallow_copy_shares_the_layers():
    model = accelerate(d2l())
    twin = copy.copy(model)
    images = torch.randn(2, 1, 28, 28)
    assert fused_calls(twin, images) == 2
    assert twin[0] is model[0]
    assert torch.equal(twin(images), model(images))
    restore(twin)
    assert (fused_calls(twin, images), fused_calls(model, images)) == (0, 2)


# --- what is fused and what is not -----------------------------------------------------------------------------------

FUSED = {
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
}


@pytest.mark.parametrize("layers", FUSED.values(), ids=FUSED)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_fuses(layers):
    model = chain(*layers).double()
    images = IMAGES.double()
    expected = results(model, images)
    accelerate(model)
    assert operators(model, images)["lenet_fast::conv_act_pool"] == 1
    assert operators(model, images)["aten::convolution"] == 0
    for name, value in results(model, images).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


class Subclass(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + 1


def hooked(layer, kind="forward_hook"):
    getattr(layer, f"register_{kind}")(lambda *args: None)
    return layer


def with_own_forward(layer):
    layer.forward = lambda x: type(layer).forward(layer, x) * 2
    return layer


CONVOLUTIONS = [
    ("stride (2, 2)", nn.Conv2d(2, 4, 3, stride=2)),
    ("dilation (2, 2)", nn.Conv2d(2, 4, 3, dilation=2)),
    ("groups 2", nn.Conv2d(2, 4, 3, groups=2)),
    ("padding_mode 'circular'", nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")),
    ("kernel size (3, 5) is not square", nn.Conv2d(2, 4, (3, 5))),
    ("padding (0, 1) differs between the axes", nn.Conv2d(2, 4, 3, padding=(0, 1))),
    ("with 36,864 weights PyTorch's own convolution is faster", nn.Conv2d(2, 2048, 3)),
    ("Subclass is a subclass of Conv2d", Subclass(2, 4, 3)),
    ("it is parametrized", parametrizations.weight_norm(nn.Conv2d(2, 4, 3))),
    ("it is parametrized", parametrizations.spectral_norm(nn.Conv2d(2, 4, 3))),
    ("Conv2d has hooks", prune.l1_unstructured(nn.Conv2d(2, 4, 3), "weight", 3)),
    ("Conv2d has hooks", hooked(nn.Conv2d(2, 4, 3), "forward_pre_hook")),
    ("Conv2d has hooks", hooked(nn.Conv2d(2, 4, 3), "full_backward_hook")),
    ("Conv2d has hooks", hooked(nn.Conv2d(2, 4, 3), "full_backward_pre_hook")),
    (
        "Conv2d has hooks (pruning and weight norm are some) or a forward of its own",
        with_own_forward(nn.Conv2d(2, 4, 3)),
    ),
]
FOLLOWERS = [
    ("pooling with kernel_size 3", (nn.ReLU(), nn.MaxPool2d(3))),
    ("pooling with kernel_size (2, 3)", (nn.ReLU(), nn.AvgPool2d((2, 3)))),
    ("pooling with stride 1", (nn.ReLU(), nn.MaxPool2d(2, stride=1))),
    ("pooling with stride (2, 1)", (nn.ReLU(), nn.AvgPool2d(2, stride=(2, 1)))),
    ("pooling with padding 1", (nn.ReLU(), nn.AvgPool2d(2, padding=1))),
    ("pooling with dilation 2", (nn.ReLU(), nn.MaxPool2d(2, dilation=2))),
    ("pooling with ceil_mode True", (nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True))),
    ("pooling with divisor_override 3", (nn.ReLU(), nn.AvgPool2d(2, divisor_override=3))),
    ("LeakyReLU, which the kernels do not have, comes before any pooling", (nn.LeakyReLU(), nn.MaxPool2d(2))),
    ("BatchNorm2d, which the kernels do not have", (nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))),
    ("Dropout, which the kernels do not have", (nn.ReLU(), nn.Dropout(), nn.MaxPool2d(2))),
    ("AdaptiveAvgPool2d, which the kernels do not have", (nn.ReLU(), nn.AdaptiveAvgPool2d(5))),
    ("two activations come before the pooling", (nn.ReLU(), nn.Sigmoid(), nn.AvgPool2d(2))),
    ("no 2x2 pooling follows", (nn.ReLU(),)),
    ("no 2x2 pooling follows", (nn.Identity(),)),
    ("no 2x2 pooling follows", (nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2))),
    ("ReLU has hooks", (hooked(nn.ReLU()), nn.MaxPool2d(2))),
    ("MaxPool2d has hooks", (nn.ReLU(), hooked(nn.MaxPool2d(2), "forward_pre_hook"))),
    ("Identity has hooks", (hooked(nn.Identity()), nn.MaxPool2d(2))),
]
LEFT_ALONE = [
    *((reason, (conv, nn.ReLU(), nn.MaxPool2d(2))) for reason, conv in CONVOLUTIONS),
    *((reason, (nn.Conv2d(2, 4, 3), *layers)) for reason, layers in FOLLOWERS),
]


@pytest.mark.parametrize(("reason", "layers"), LEFT_ALONE, ids=[reason for reason, _ in LEFT_ALONE])
def test_leaves_alone_and_says_why(reason, layers, caplog):
    model = chain(*layers).eval()
    expected, before = model(IMAGES), str(model)
    with caplog.at_level(logging.WARNING, "lenet_fast.accelerate"):
        accelerate(model)
    assert f"0: {reason}" in caplog.text
    first = report(model).left_alone[0]
    assert first.layers == ("0",)
    assert first.reason.startswith(reason)
    assert str(model) == before
    assert torch.equal(model(IMAGES), expected)


class Functions(nn.Module):
    """A convolution and whatever a test does with its result."""

    def __init__(self, follow):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.follow = follow

    def forward(self, x):
        return self.follow(self.conv(x))


FUSED_CALLS = {
    "F.relu": lambda y: F.max_pool2d(F.relu(y), 2),
    "F.relu-inplace": lambda y: F.max_pool2d(F.relu(y, inplace=True), kernel_size=2, stride=2),
    "F.relu-by-name": lambda y: F.max_pool2d(input=F.relu(input=y), kernel_size=(2, 2), stride=(2, 2), padding=0),
    "F.relu_": lambda y: F.avg_pool2d(F.relu_(y), 2),
    "torch.relu": lambda y: torch.max_pool2d(torch.relu(y), 2),
    "torch.max_pool2d": lambda y: torch.max_pool2d(torch.relu(y), [2, 2], [2, 2]),
    "relu_": lambda y: F.avg_pool2d(y.relu_(), 2, 2, 0, False, False),
    "torch.sigmoid": lambda y: F.avg_pool2d(torch.sigmoid(y), (2,)),
    "F.sigmoid": lambda y: F.avg_pool2d(F.sigmoid(y), 2),
    "expit": lambda y: F.avg_pool2d(torch.special.expit(y), 2),
    "sigmoid": lambda y: F.max_pool2d(y.sigmoid(), 2),
    "F.tanh": lambda y: F.avg_pool2d(F.tanh(y), 2),
    "tanh": lambda y: F.max_pool2d(y.tanh(), 2),
    "scaled-tanh-reversed": lambda y: F.avg_pool2d((y * (2.0 / 3.0)).tanh() * 1.7159, 2),
    "scaled-tanh-torch.mul": lambda y: F.max_pool2d(torch.mul(torch.tanh(torch.mul(y, 2 / 3)), 1.7159), 2),
    "pool-then-tanh": lambda y: torch.tanh(F.max_pool2d(y, 2)),
    "two-users-of-the-pooled": lambda y: (lambda p: torch.cat([p, p.relu()], 1))(F.max_pool2d(torch.tanh(y), 2)),
}
CALLS_LEFT_ALONE = [
    ("the result of conv is used 2 times", lambda y: F.max_pool2d(F.relu(y), 2) + y.mean()),
    ("the result of relu() is used 2 times", lambda y: (lambda r: F.max_pool2d(r, 2) + r.mean())(F.relu(y))),
    ("max_pool2d_with_indices(), which the kernels do not have", lambda y: F.max_pool2d(y, 2, return_indices=True)[0]),
    ("pooling with kernel_size 3", lambda y: F.avg_pool2d(F.relu(y), 3)),
    ("pooling with stride 1", lambda y: F.avg_pool2d(F.relu(y), 2, 1)),
    ("pooling with ceil_mode True", lambda y: F.max_pool2d(F.relu(y), 2, ceil_mode=True)),
    ("gelu(), which the kernels do not have", lambda y: F.max_pool2d(F.gelu(y), 2)),
    ("mul(), which the kernels do not have", lambda y: F.avg_pool2d(1.7 * torch.tanh(2 / 3 * y), 2)),
    ("mul(), which the kernels do not have", lambda y: F.avg_pool2d(torch.tanh(0.66 * y), 2)),
    ("mul(), which the kernels do not have", lambda y: F.avg_pool2d(1.7159 * torch.sigmoid(2 / 3 * y), 2)),
    ("two activations come before the pooling", lambda y: F.avg_pool2d(F.relu(torch.tanh(y)), 2)),
    ("clamp(), which the kernels do not have", lambda y: F.max_pool2d(y.clamp(min=0), 2)),
]


@pytest.mark.parametrize("name", FUSED_CALLS)
@pytest.mark.filterwarnings("ignore:nn.functional.*is deprecated")
def test_fuses_functions_and_methods(name):
    model = Functions(FUSED_CALLS[name]).double()
    images = IMAGES.double()
    expected = results(model, images)
    accelerate(model)
    assert fused_calls(model, images) == 1
    for key, value in results(model, images).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("reason", "follow"), CALLS_LEFT_ALONE, ids=[reason for reason, _ in CALLS_LEFT_ALONE])
def test_leaves_functions_alone_and_says_why(reason, follow):
    model = Functions(follow)
    expected = model(IMAGES)
    (run,) = report(accelerate(model)).left_alone
    assert run.layers == ("conv",)
    assert run.reason.startswith(reason)
    assert torch.equal(model(IMAGES), expected)


def test_a_layer_named_like_a_function_is_no_function():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.tanh = nn.Conv2d(2, 4, 3), nn.GELU(), nn.Softplus()

        def forward(self, x):
            return F.avg_pool2d(1.7159 * self.tanh(2 / 3 * self.conv(x)), 2) + F.avg_pool2d(self.relu(self.conv(x)), 2)

    model = Named()
    expected = model(IMAGES)
    assert not report(accelerate(model)).fused
    assert torch.equal(model(IMAGES), expected)


def test_lazy_layers_are_left_alone_until_initialised():
    model = TUTORIALS["lazy"].build()
    reason = "not initialised yet: run a batch through the model, then accelerate it"
    assert [run.reason for run in report(accelerate(model)).left_alone] == [reason, reason]
    images = torch.randn(2, 1, 28, 28)
    expected = model(images)
    assert fused_calls(accelerate(model), images) == 2
    torch.testing.assert_close(model(images), expected)


def test_a_lone_convolution_is_left_alone():
    conv = nn.Conv2d(2, 4, 3)
    assert [str(run) for run in report(accelerate(conv)).left_alone] == ["Conv2d: no 2x2 pooling follows"]


def test_needs_a_module():
    for function in (accelerate, restore, report):
        with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got list"):
            function([])


# --- forwards that a traced graph would not reproduce ----------------------------------------------------------------

KEPT = []


class Careful(nn.Module):
    """A fusable run in a forward with something besides; subclasses say what."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 2), nn.ReLU(), nn.MaxPool2d(2))
        self.calls = 0
        self.outputs = []
        self.mask = torch.ones(1)

    def run(self, x):
        return self.inner(F.max_pool2d(F.relu(self.conv(x)), 2))


class Prints(Careful):
    def forward(self, x):
        y = self.run(x)
        print("shape", y.shape)
        return y


class Counts(Careful):
    def forward(self, x):
        self.calls += 1
        return self.run(x)


class Appends(Careful):
    def forward(self, x):
        y = self.run(x)
        self.outputs.append(y)
        return y


class KeepsGlobally(Careful):
    def forward(self, x):
        y = self.run(x)
        KEPT.append(y)
        return y


class WithoutGradients(Careful):
    def forward(self, x):
        with torch.no_grad():
            return self.run(x)


class WithGradients(Careful):
    @torch.enable_grad()
    def forward(self, x):
        return self.run(x)


class Autocasts(Careful):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.run(x)


class DrawsNumbers(Careful):
    def forward(self, x):
        return self.run(x) * torch.rand(1)


class UsesTensor(Careful):
    def forward(self, x):
        return self.run(x) * self.mask


class Branches(Careful):
    def forward(self, x):
        return self.run(x) if x.sum() > 0 else -self.run(x)


class LooksAtSizes(Careful):
    def forward(self, x):
        return self.run(x.unsqueeze(0)) if x.dim() == 3 else self.run(x)


class Variadic(Careful):
    def forward(self, *inputs):
        return self.run(inputs[0])


CAREFUL = {
    Prints: "prints",
    Counts: "assigns self.calls",
    Appends: "reads self.outputs, a list that may change",
    KeepsGlobally: "keeps intermediate results",
    WithoutGradients: "switches gradients or autocast on or off",
    WithGradients: "switches gradients or autocast on or off",
    Autocasts: "switches gradients or autocast on or off",
    DrawsNumbers: "uses a tensor that is neither input, parameter nor buffer",
    UsesTensor: "reads self.mask, a Tensor that may change",
    Branches: "cannot be traced (TraceError: symbolically traced variables",
    LooksAtSizes: "cannot be traced (TraceError: symbolically traced variables",
    Variadic: "takes a variable number of inputs",
}


def plain_attributes(model):
    return {name: copy.copy(value) for name, value in vars(model).items() if name not in ("_modules", "mask")}


@pytest.mark.parametrize("kind", CAREFUL, ids=lambda kind: kind.__name__)
def test_leaves_a_forward_alone_that_does_more_than_compute(kind, capsys):
    KEPT.clear()
    torch.manual_seed(0)
    model = kind()
    attributes, random_state = plain_attributes(model), torch.get_rng_state()
    found = report(accelerate(model))
    assert [str(run) for run in found.fused] == ["inner.0 + inner.1 + inner.2"]
    (run,) = found.left_alone
    assert run.layers == ("conv",)
    assert run.reason.startswith(f"the forward of {kind.__name__} {CAREFUL[kind]}")
    assert capsys.readouterr().out == ""
    assert plain_attributes(model) == attributes
    assert torch.equal(torch.get_rng_state(), random_state)

    KEPT.clear()
    torch.manual_seed(2)
    output = model(IMAGES)
    assert fused_calls(model, IMAGES) == 1
    torch.manual_seed(2)
    torch.testing.assert_close(output, restore(model)(IMAGES))
    assert capsys.readouterr().out.count("shape torch.Size") == (3 if kind is Prints else 0)
    assert model.calls == (3 if kind is Counts else 0)
    kept = (*model.outputs, *KEPT)
    assert [type(value) for value in kept] == [torch.Tensor] * (3 if kind in (Appends, KeepsGlobally) else 0)
    KEPT.clear()


def test_a_replaced_forward_is_left_alone():
    model = Blitz()
    model.forward = lambda x: x.flatten(1)[:, :10]
    reasons = {run.reason for run in report(accelerate(model)).left_alone}
    assert reasons == {"the forward of Blitz was replaced on the object"}
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)


class Asks(Blitz):
    """isinstance has to answer as it does for a Tensor; an argument with a default has to keep working."""

    def forward(self, x, targets=None, *, scale=1.0):
        if not isinstance(x, torch.Tensor):
            raise TypeError("x")
        if torch.is_tensor(x):
            x = x * 2
        logits = super().forward(x) * scale
        return logits if targets is None else F.cross_entropy(logits, targets)


def test_asking_for_types_and_optional_arguments():
    torch.manual_seed(0)
    model = Asks()
    images, targets = torch.randn(4, 1, 32, 32), torch.tensor([1, 2, 3, 4])
    calls = [
        ((images,), {}, 2),
        ((), {"x": images}, 2),
        ((images, targets), {}, 0),
        ((images,), {"targets": targets}, 0),
        ((images,), {"scale": 3.0}, 0),
        ((), {"x": images, "targets": None}, 0),
    ]
    expected = [model(*args, **kwargs) for args, kwargs, _ in calls]
    accelerate(model)
    for (args, kwargs, fused), output in zip(calls, expected, strict=True):
        torch.testing.assert_close(model(*args, **kwargs), output)
        assert fused_calls(model, *args, **kwargs) == fused
    with pytest.raises(TypeError, match="x"):
        model(images.tolist())
    with pytest.raises(TypeError):
        model()
    with pytest.raises(TypeError):
        model(images, unknown=1)


class TwoInputs(Blitz):
    def forward(self, x, y):
        if y is None:
            return super().forward(x)
        return super().forward(x) + super().forward(y)


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


class ModeDependent(Blitz):
    """Reads the mode of itself and of a child."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        if self.training:
            x = x * 2
        x = F.dropout(x, self.dropout.p, self.dropout.training)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1))))))


def test_the_mode_may_change_at_any_time():
    torch.manual_seed(0)
    plain = ModeDependent()
    fast = accelerate(copy.deepcopy(plain))
    images = torch.randn(4, 1, 32, 32)
    for training in (True, False, True):
        assert fused_calls(fast.train(training), images) == 2
        assert_close_in_float32(fast, plain.train(training), images)


# --- what happens after accelerate -----------------------------------------------------------------------------------


def test_layers_and_parameters_keep_their_meaning():
    model = SharedLayers()
    parameters = dict(model.named_parameters())
    conv = model.conv1
    accelerate(model)
    assert model.conv1 is conv
    assert type(conv) is nn.Conv2d
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert isinstance(model, SharedLayers)
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
    for tutorial in (TUTORIALS["nested-blocks"], TUTORIALS["shared-layers"]):
        model = accelerate(tutorial.model())
        text, kind = str(model), type(model)
        accelerate(model)
        assert (str(model), type(model)) == (text, kind)
        assert fused_calls(model, tutorial.images()) == 2
        assert type(restore(model)) is type(tutorial.model())


HOOKS = {
    "forward": lambda layer, seen: layer.register_forward_hook(lambda m, i, o: seen.append(o.detach())),
    "forward-pre": lambda layer, seen: layer.register_forward_pre_hook(lambda m, i: seen.append(i[0].detach())),
    "backward": lambda layer, seen: layer.register_full_backward_hook(lambda m, i, o: seen.append(o[0])),
    "backward-pre": lambda layer, seen: layer.register_full_backward_pre_hook(lambda m, o: seen.append(o[0])),
    "global": lambda layer, seen: nn.modules.module.register_module_forward_hook(
        lambda m, i, o: seen.append(o.detach()) if m is layer else None
    ),
}


@pytest.mark.parametrize("where", ["features.0", "features.1", "features.2", "features", "classifier", ""])
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_see_what_they_see_in_the_plain_model(kind, where, when, caplog):
    torch.manual_seed(0)
    plain = Lightning()
    fast = copy.deepcopy(plain)
    images = torch.randn(2, 1, 28, 28)
    seen = {}
    handles = []
    for name, model in (("plain", plain), ("fast", fast)):
        if name == "fast" and when == "after":
            accelerate(fast)
        seen[name] = []
        handles.append(HOOKS[kind](model.get_submodule(where), seen[name]))
    if when == "before":
        accelerate(fast)
    for model in (plain, fast):
        model(images.clone().requires_grad_()).square().sum().backward()
    assert len(seen["plain"]) == 1
    torch.testing.assert_close(seen["fast"], seen["plain"])
    for handle in handles:
        handle.remove()
    assert fused_calls(accelerate(fast), images) == 2


def test_a_later_hook_takes_the_fusion_back_while_it_is_there(caplog):
    model = accelerate(Lightning())
    images = torch.randn(2, 1, 28, 28)
    handle = model.features[3].register_forward_hook(lambda *args: None)
    for _ in range(2):
        assert fused_calls(model, images) == 0
    assert (
        caplog.text.count("runs unfused while this is not as when it was accelerated") == 2
    )  # the model, and the container that it then calls
    assert (
        "Lightning runs unfused while this is not as when it was accelerated: options or hooks of features.3"
        in caplog.text
    )
    assert len(report(model).fused) == 1
    handle.remove()
    assert fused_calls(model, images) == 2


def test_a_hook_on_a_container_leaves_it_fused():
    model = Lightning()
    model.features.register_forward_hook(lambda *args: None)
    accelerate(model)
    assert fused_calls(model, torch.randn(2, 1, 28, 28)) == 2


def test_a_hook_on_a_container_keeps_runs_from_crossing_its_border():
    crossing = nn.Sequential(hooked(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU())), nn.MaxPool2d(2))
    assert [str(run) for run in report(accelerate(crossing)).left_alone] == ["0.0: no 2x2 pooling follows"]
    assert fused_calls(crossing, IMAGES) == 0


def test_a_hook_from_before_leaves_the_other_run_fused():
    model = Lightning()
    model.features[0].register_forward_hook(lambda *args: None)
    accelerate(model)
    assert fused_calls(model, torch.randn(2, 1, 28, 28)) == 1


CHANGES = {
    "append": lambda model: model.features.append(nn.Softplus()),
    "insert": lambda model: model.features.insert(1, nn.Softplus()),
    "replace-activation": lambda model: model.features.__setitem__(1, nn.ReLU()),
    "replace-convolution": lambda model: model.features.__setitem__(0, nn.Conv2d(1, 4, 5, padding=2, stride=1)),
    "delete": lambda model: model.features.__delitem__(slice(4, 5)),
    "stride": lambda model: setattr(model.features[0], "stride", (1, 2)),
    "padding": lambda model: setattr(model.features[0], "padding", (1, 1)),
    "pooling": lambda model: setattr(model.features[2], "ceil_mode", True),
    "child": lambda model: setattr(model, "classifier", nn.Identity()),
    "prune": lambda model: prune.l1_unstructured(model.features[0], "weight", 20),
    "parametrize": lambda model: parametrizations.weight_norm(model.features[3]),
    "class": lambda model: setattr(model.features[0], "__class__", Subclass),
    "forward": lambda model: with_own_forward(model.features[1]),
    "forward-of-container": lambda model: with_own_forward(model.features),
}


@pytest.mark.parametrize("change", CHANGES)
def test_layers_may_change_afterwards(change):
    model = accelerate(Lightning()).eval()
    model.classifier = nn.Identity()
    accelerate(model)
    images = torch.randn(2, 1, 29, 29)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        CHANGES[change](model)
    output = model(images)
    torch.testing.assert_close(output, restore(model)(images))
    torch.testing.assert_close(accelerate(model)(images), output)


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

    def forward(self, x):
        for conv in self.convs:
            x = F.avg_pool2d(self.activation(conv(x)), 2)
        for layer in self.more:
            x = layer(x)
        x = self.last(x) * self.scale * self.gain + self.offset
        return -x if self.flag else x


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        (lambda m: setattr(m, "activation", torch.relu), 0),
        (lambda m: setattr(m, "scale", 3.0), 0),
        (lambda m: setattr(m, "flag", False), 0),
        (lambda m: m.convs.append(nn.Conv2d(2, 3, 3)), 0),
        (lambda m: m.more.append(nn.Softplus()), 0),
        (lambda m: m.last.append(nn.Softplus()), 0),
        (lambda m: setattr(m, "gain", nn.Parameter(torch.full((), 7.0))), 1),
        (lambda m: m.gain.data.fill_(5.0), 1),
        (lambda m: m.offset.fill_(5.0), 1),
        (lambda m: setattr(m, "unrelated", 1), 1),
    ],
    ids=[
        "function",
        "number",
        "flag",
        "list",
        "empty-list",
        "empty-sequential",
        "parameter",
        "value",
        "buffer",
        "unrelated",
    ],
)
def test_attributes_may_change_afterwards(change, fused):
    model = accelerate(Configured())
    assert fused_calls(model, IMAGES) == 1
    change(model)
    assert fused_calls(model, IMAGES) == fused
    torch.testing.assert_close(model(IMAGES), restore(copy.deepcopy(model))(IMAGES))
    torch.testing.assert_close(accelerate(model)(IMAGES), restore(model)(IMAGES))


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
    found = report(fast)
    assert [str(run) for run in found.fused] == ["a + relu() + pool", "a + tanh() + pool", "b + sigmoid() + pool"]
    assert [str(run) for run in found.left_alone] == ["a: pooling with kernel_size 3"]
    assert fused_calls(fast, IMAGES) == 3
    assert_close_in_float32(fast, plain, IMAGES)
    assert fast.a.weight is fast.b.weight
    twin = pickle.loads(pickle.dumps(accelerate(shared_in_sequential())))
    assert twin[0] is twin[3]
    assert fused_calls(twin, IMAGES) == 2


def shared_in_sequential():
    conv, act, pool = nn.Conv2d(2, 2, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)
    return nn.Sequential(conv, act, pool, conv, act, pool)


def test_dtype_and_meta_device():
    model = accelerate(d2l())
    images = torch.randn(2, 1, 28, 28)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        assert fused_calls(model, images.to(dtype)) == 2
        assert model(images.to(dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_calls(model, images) == 2
        assert model(images).dtype == torch.bfloat16
    assert model.to("meta")(images.to("meta")).shape == (2, 10)


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
            images, labels = torch.randn(16, 1, 32, 32), torch.randint(10, (16,))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return values

    torch.manual_seed(0)
    model = Blitz().double()
    torch.set_default_dtype(torch.float64)
    try:
        expected = losses(copy.deepcopy(model), accelerated_at=100)
        assert losses(model, accelerated_at=3) == pytest.approx(expected, rel=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["d2l", "blitz", "module-list", "nested-blocks"])
def test_compiles_without_graph_breaks(name):
    model = accelerate(TUTORIALS[name].model())
    images = TUTORIALS[name].images()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))
    called = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.lenet_fast.conv_act_pool.default) == 2
    expected = results(model, images)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for name, value in results(compiled, images).items():
        torch.testing.assert_close(value, expected[name.removeprefix("_orig_mod.")])


def test_compiles_a_copy_and_a_hooked_model():
    model = copy.deepcopy(accelerate(Blitz()))
    images = torch.randn(2, 1, 32, 32)
    expected = model(images)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(images), expected)
    torch.compiler.reset()
    model.conv1.register_forward_hook(lambda module, inputs, output: output * 2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


def test_exports():
    model = accelerate(Blitz()).eval()
    images = torch.randn(3, 1, 32, 32)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    called = [node.target for node in program.graph.nodes]
    assert called.count(torch.ops.lenet_fast.conv_act_pool.default) == 2
    torch.testing.assert_close(program.module()(torch.cat([images, images])), model(torch.cat([images, images])))


def test_functional_call_and_per_sample_gradients():
    model = accelerate(d2l())
    plain = restore(copy.deepcopy(model))
    images = torch.randn(3, 1, 28, 28)
    parameters = {name: torch.randn_like(value) / 10 for name, value in model.named_parameters()}

    def loss(parameters, image, network):
        return torch.func.functional_call(network, parameters, image[None]).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, None))
    actual, expected = (per_sample(parameters, images, network) for network in (model, plain))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())


def test_classes_that_register_their_subclasses_see_none():
    registered = []

    class Registry(nn.Sequential):
        def __init_subclass__(cls, *, tag, **kwargs):
            super().__init_subclass__(**kwargs)
            registered.append(tag)

    class Entry(Registry, tag="entry"):
        pass

    model = accelerate(Entry(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)))
    assert fused_calls(model, IMAGES) == 1
    assert registered == ["entry"]
    assert isinstance(model, Entry)


def test_a_subclass_made_later_is_not_lost():
    """parametrize gives an object a class of its own, derived from the one that accelerate gave it."""
    model = accelerate(Configured())
    torch.nn.utils.parametrize.register_parametrization(model, "gain", nn.Softplus())
    expected = model(IMAGES)
    for function in (accelerate, restore, accelerate):
        function(model)
        assert torch.nn.utils.parametrize.is_parametrized(model, "gain")
        torch.testing.assert_close(model(IMAGES), expected)


class Reaching(nn.Module):
    """A forward that calls the layers of a child's list itself."""

    def __init__(self):
        super().__init__()
        self.child = nn.Module()
        self.child.convs = nn.ModuleList([nn.Conv2d(2, 2, 3, padding=1)])

    def forward(self, x):
        for conv in self.child.convs:
            x = F.max_pool2d(torch.tanh(conv(x)), 2)
        return x


def test_a_list_within_a_child_may_change_afterwards():
    model = accelerate(Reaching())
    assert fused_calls(model, IMAGES) == 1
    model.child.convs.append(nn.Conv2d(2, 3, 3))
    assert model(IMAGES).shape == (3, 3, 2, 2)
    assert fused_calls(accelerate(model), IMAGES) == 2


class Reduced(Blitz):
    """Pickles as an instruction to build a new one."""

    def __reduce__(self):
        return Reduced, ()


def test_a_class_that_pickles_in_its_own_way_is_left_alone():
    model = accelerate(Reduced())
    assert {run.reason for run in report(model).left_alone} == {
        "the forward of Reduced belongs to a class with its own way of being pickled"
    }
    assert type(pickle.loads(pickle.dumps(model))) is Reduced


def test_complex_weights_are_left_alone():
    model = accelerate(nn.Sequential(nn.Conv2d(2, 4, 3, dtype=torch.complex64), nn.Identity(), nn.AvgPool2d(2)))
    assert [run.reason for run in report(model).left_alone] == ["its weight has dtype torch.complex64"]


def test_new_objects_of_an_accelerated_class_are_plain():
    model = accelerate(Blitz())
    other = type(model)()
    assert fused_calls(other, torch.randn(2, 1, 32, 32)) == 0
    assert fused_calls(accelerate(other), torch.randn(2, 1, 32, 32)) == 2


def test_containers_of_modules_and_torch_wrappers():
    held = nn.ModuleDict({"a": d2l(), "b": nn.ModuleList([FeaturesClassifier(), Block(1, 6)])})
    accelerate(held)
    images = torch.randn(2, 1, 28, 28)
    assert [fused_calls(m, images) for m in (held["a"], held["b"][0], held["b"][1])] == [2, 1, 1]
    compiled = torch.compile(d2l(), backend="eager")
    expected = compiled(images)
    accelerate(compiled)
    assert fused_calls(compiled._orig_mod, images) == 2
    torch.testing.assert_close(compiled(images), expected)


def test_a_graph_module_is_left_alone():
    model = torch.fx.symbolic_trace(Blitz())
    assert {run.reason for run in report(accelerate(model)).left_alone} == {"the forward of Blitz is PyTorch's own"}


def test_reports_to_the_log(caplog):
    with caplog.at_level(logging.INFO, "lenet_fast.accelerate"):
        accelerate(FeaturesClassifier())
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "fused features.4 + features.5 + features.6"),
        (
            "WARNING",
            "left alone:\n  features.0: BatchNorm2d, which the kernels do not have, comes before any pooling",
        ),
    ]
    assert str(report(FeaturesClassifier())) == (
        "1 fused, 1 left alone\n"
        "  fused       features.4 + features.5 + features.6\n"
        "  left alone  features.0: BatchNorm2d, which the kernels do not have, comes before any pooling"
    )


def test_shows_what_is_fused():
    assert "(\n  fused: conv1 + act + pool, conv2 + act + pool\n  (pool): MaxPool2d" in str(accelerate(SharedLayers()))


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


def test_what_is_no_longer_accelerated_leaves_no_source_behind():
    """Tracebacks find the lines of a traced forward in linecache, for as long as there is that forward."""

    def kept():
        return [name for name in linecache.cache if "fused by lenet_fast" in name]

    gc.collect()
    before = set(kept())
    model = nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.MaxPool2d(2))
    other = accelerate(copy.deepcopy(model))
    for _ in range(3):
        accelerate(model)
        gc.collect()
        assert len(set(kept()) - before) == 4  # two modes each
    with pytest.raises(ValueError, match="channels") as raised:
        other(torch.zeros(1, 3, 8, 8))
    lines = [frame.line for frame in traceback.extract_tb(raised.tb) if "fused by lenet_fast" in frame.filename]
    assert len(lines) == 1
    assert "conv_act_pool(" in lines[0]
    del raised
    restore(model)
    del other
    gc.collect()
    assert not set(kept()) - before


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
