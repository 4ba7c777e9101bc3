"""FusedTrainer on other people's models: natively or by autograd, and always as plain PyTorch does."""

import copy
import gc
import logging
import math
import pickle
import random
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import lenet_fast as lf
from lenet_fast import backends, models
from lenet_fast.dropout_masks import mask
from lenet_fast.network import NetworkError
from lenet_fast.trainer import FusedTrainer, TrainingError
from lenet_fast.training_steps import Masks

if (reason := backends.why_unavailable("native", "cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

NATIVE = "whole steps in native code"
BY_AUTOGRAD = "accelerated forward, autograd and torch.optim: "
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def data(number=8, shape=(1, 12, 12), dtype=torch.float64, classes=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(number, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(classes, (number,), generator=generator)


def assert_close(one, other, atol=1e-10):
    for name, value in other.state_dict().items():
        torch.testing.assert_close(one.state_dict()[name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_trains_as_plain(model, how, *, images=None, labels=None, loss=None, steps=3, atol=1e-10, **options):
    """Steps of the trainer and of the loop anyone would write, and what takes them; returns the trainer."""
    if images is None:
        images, labels = data()
    twin = copy.deepcopy(model).train()
    smoothing = options.get("label_smoothing", 0.0)
    plain = loss or (lambda outputs, labels: F.cross_entropy(outputs, labels, label_smoothing=smoothing))
    trainer = FusedTrainer(model, "sgd", lr=0.05, momentum=0.9, loss=loss, **options)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        torch.manual_seed(step)
        found = trainer.step(images, labels)
        torch.manual_seed(step)
        expected = plain(twin(images), labels)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert found == pytest.approx(expected.item(), rel=atol, abs=atol)
    assert_close(model, twin, atol)
    assert how in trainer.how(images, labels)
    assert trainer.how(images, labels).startswith(NATIVE if how == NATIVE else BY_AUTOGRAD)
    assert all(parameter.grad is None for parameter in model.parameters())
    return trainer


# --- layers that nn.Sequential calls ---------------------------------------------------------------------------------


def lenet(**changes):
    """A small LeNet of float64 with some layers replaced, or None for taken out."""
    torch.manual_seed(0)
    layers = {
        "conv1": nn.Conv2d(1, 4, 3),
        "act1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(4, 6, 2),
        "act2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "dense": nn.Linear(24, 9),
        "act3": nn.ReLU(),
        "output": nn.Linear(9, 4),
    } | changes
    model = nn.Sequential()
    for name, layer in layers.items():
        if layer is not None:
            model.add_module(name, layer)
    return model.double()


BY_PYTORCH = {  # what native steps do not have of the small LeNet, and the change that puts it in
    "act1: native steps have no BatchNorm2d": lambda: {"act1": nn.BatchNorm2d(4)},
    "act1: native steps have no GELU": lambda: {"act1": nn.GELU()},
    "act3: native steps have no AlphaDropout": lambda: {"act3": nn.AlphaDropout(0.5)},
    "conv1: stride": lambda: {"conv1": nn.Conv2d(1, 4, 3, stride=2), "conv2": nn.Conv2d(4, 6, 2, padding=2)},
    "conv2: groups": lambda: {"conv2": nn.Conv2d(4, 6, 2, groups=2)},
    "conv2: kernel size": lambda: {"conv2": nn.Conv2d(4, 6, (2, 1))},
    "conv2: padding": lambda: {"conv2": nn.Conv2d(4, 6, 2, padding=(0, 1)), "dense": nn.Linear(36, 9)},
    "pool1: pooling with kernel_size 3": lambda: {"pool1": nn.MaxPool2d(3, 2), "dense": nn.Linear(6, 9)},
    "pool2.1: an activation cannot follow the avg pooling of conv2": lambda: {
        **{"act2": None, "pool2": nn.Sequential(nn.AvgPool2d(2), nn.ReLU())},
    },
    "act2.1: conv2 has an activation already": lambda: {"act2": nn.Sequential(nn.ReLU(), nn.Tanh())},
    "pool2: a pooling cannot follow a dropout of single values": lambda: {"act2": nn.Dropout(0.5)},
    "act3.1: tanh cannot follow a dropout": lambda: {"act3": nn.Sequential(nn.Dropout(0.5), nn.Tanh())},
    "act2.1: sigmoid cannot follow a dropout": lambda: {"act2": nn.Sequential(nn.Dropout2d(0.5), nn.Sigmoid())},
    "flatten.0: native steps have no Softmax": lambda: {"flatten": nn.Sequential(nn.Softmax(1), nn.Flatten())},
    "output.1: native steps have no Softmax": lambda: {"output": nn.Sequential(nn.Linear(9, 4), nn.Softmax(1))},
    "output.2: nothing can follow log_softmax": lambda: {
        "output": nn.Sequential(nn.Linear(9, 4), nn.LogSoftmax(1), nn.ReLU())
    },
    "output: it is parametrized": lambda: {"output": parametrizations.weight_norm(nn.Linear(9, 4))},
    "dense: native steps have no LayerNorm": lambda: {"dense": nn.LayerNorm(24), "act3": nn.Linear(24, 9)},
    "5 convolutions": lambda: {"act2": nn.Sequential(*(nn.Conv2d(6, 6, 1) for _ in range(3)))},
}


@pytest.mark.parametrize("part", BY_PYTORCH)
def test_layers_that_native_steps_do_not_have(part):
    model = lenet(**BY_PYTORCH[part]())
    assert_trains_as_plain(copy.deepcopy(model), part)
    if part != "5 convolutions":  # for that the size of the images counts
        with pytest.raises(NetworkError, match=part.replace("(", r"\(")):
            FusedTrainer(model, lr=0.1, native_only=True)
    else:
        trainer = FusedTrainer(model, lr=0.1, native_only=True)
        with pytest.raises(NetworkError, match=part):
            trainer.step(*data())


NATIVELY = {
    "log_softmax": lambda: {"output": nn.Sequential(nn.Linear(9, 4), nn.LogSoftmax(dim=-1))},
    "dropout of nothing": lambda: {
        "act2": nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.5).eval()),
        "act3": nn.Identity(),
    },
    "a window over the whole input": lambda: {"flatten": nn.Sequential(nn.Conv2d(6, 24, 2), nn.Flatten())},
    "three channels": lambda: {"conv1": nn.Conv2d(3, 4, 3)},
}


@pytest.mark.parametrize("name", NATIVELY)
def test_layers_that_native_steps_have(name):
    model = lenet(**NATIVELY[name]())
    for layer in model.modules():
        if isinstance(layer, nn.Dropout) and layer.p:
            layer.eval()
    images, labels = data(shape=(model.conv1.in_channels, 12, 12))
    trainer = FusedTrainer(model, lr=0.05, native_only=True)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    for _ in range(3):
        expected = F.cross_entropy(twin(images), labels)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert trainer.step(images, labels) == pytest.approx(expected.item(), abs=1e-12)
    assert_close(model, twin, 1e-12)


# --- forwards that someone wrote -------------------------------------------------------------------------------------


class Net(nn.Module):
    """A LeNet for images (N, 1, 12, 12); derived classes write its forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 2)
        self.dense, self.output = nn.Linear(24, 9), nn.Linear(9, 4)
        self.double()

    def features(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return F.max_pool2d(F.relu(self.conv2(x)), (2, 2))

    def classes(self, x):
        return self.output(torch.relu(self.dense(x)))


class View(Net):
    def forward(self, x):
        return self.classes(self.features(x).view(-1, 24))


class Sizes(Net):
    """The older flattening, and log_softmax at the end."""

    def forward(self, x):
        x = self.features(x)
        x = x.view(x.size(0), -1).view(-1, self.num_flat_features(x))
        return F.log_softmax(self.classes(x), dim=1)

    def num_flat_features(self, x):
        count = 1
        for size in x.size()[1:]:
            count *= size
        return count


class FlatImages(Net):
    """Images as rows, as sklearn has them, or without channels."""

    def forward(self, x):
        x = x.view(-1, 1, 12, 12) if x.dim() == 2 else x.unsqueeze(1)
        return self.classes(self.features(x).reshape(x.shape[0], 24))


class Squeezed(Net):
    """A convolution over all that is left, squeezed; layers in a list; a layer written out."""

    def __init__(self):
        super().__init__()
        self.window = nn.Conv2d(6, 24, 2).double()
        self.acts = [nn.Tanh(), lf.nn.ScaledTanh()]

    def forward(self, x):
        x = F.conv2d(self.features(x), self.window.weight, self.window.bias)
        x = self.acts[0](x).squeeze(-1).squeeze(-1)
        return self.output(self.acts[1](self.dense(x)))


class Fused(nn.Module):
    """Fused layers of this package, and distances."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        table = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
        self.body = nn.ModuleDict({
            "c1": lf.nn.ConvSubsample2d(1, 4, 3, padding=1, dtype=torch.float64),
            "c3": lf.nn.SparseConvActPool2d(table, 3, dtype=torch.float64),
            "c5": lf.nn.ConvActPool2d(3, 7, 2, activation="tanh", pool="none", dtype=torch.float64),
            "f6": nn.Linear(7, 8, dtype=torch.float64),
            "rbf": lf.nn.RBF(8, 4, dtype=torch.float64),
        })  # fmt: skip

    def forward(self, x):
        x = self.body["c5"](self.body["c3"](self.body["c1"](x))).flatten(1)
        return self.body["rbf"](torch.tanh(self.body["f6"](x)))


class Mixing(Net):
    """Takes the values of two images for those of one."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(12, 2).double()
        self.whole = nn.Linear(4, 4).double()

    def forward(self, x):
        return self.whole(self.part(self.features(x).view(-1, 12)).view(-1, 4))


class Residual(Net):
    def __init__(self):
        super().__init__()
        self.side = nn.Conv2d(1, 1, 3, padding=1).double()

    def forward(self, x):
        return self.classes(self.features(x + self.side(x)).flatten(1))


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4).double()

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn(self.conv1(x))), 2)
        return self.classes(F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1))


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -0.3 * grad


class Reversed(Net):
    """As domain-adversarial networks do."""

    def forward(self, x):
        return self.classes(Reverse.apply(self.features(x).flatten(1)))


class Counting(Net):
    """Has side effects."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        self.seen = x.shape
        return self.classes(self.features(x).flatten(1))


class Flipping(Net):
    """Is another network from call to call."""

    def forward(self, x):
        if torch.rand(()).item() < 0.5:
            x = x.flip(3)
        return self.classes(self.features(x).flatten(1))


class Clipped(Net):
    """Computes a weight, and changes another in place."""

    def forward(self, x):
        with torch.no_grad():
            self.dense.weight.clamp_(-0.1, 0.1)
        x = self.features(x).flatten(1)
        return F.linear(F.relu(self.dense(x)), 2 * self.output.weight, self.output.bias)


class Averaged(Net):
    """A part of the network without gradients, and dropout of kinds that native steps do not have."""

    def forward(self, x):
        x = F.feature_alpha_dropout(self.features(x), 0.2, self.training)
        return self.classes(x.flatten(1))


FORWARDS = {
    View: NATIVE,
    Sizes: NATIVE,
    Squeezed: NATIVE,
    Mixing: "view(-1, 12): makes (2*N, 12) of (N, 6, 2, 2), whose first dimension are the images",
    Residual: "add(): computed of 2 results",
    Normed: "bn: native steps have no BatchNorm2d",
    Reversed: "",
    Counting: "Counting: its forward changes something besides computing its result",
    Flipping: "if torch.rand(()).item() < 0.5",
    Clipped: "",
    Averaged: "",
}


@pytest.mark.parametrize("kind", FORWARDS)
def test_forwards_that_someone_wrote(kind):
    model = kind()
    trainer = assert_trains_as_plain(model, FORWARDS[kind])
    if kind is Counting:
        assert model.calls == 3
        trainer.how(data()[0])
        assert model.calls == 3
    if FORWARDS[kind] != NATIVE:
        with pytest.raises(NetworkError):
            FusedTrainer(kind(), lr=0.1, native_only=True).step(*data())


@pytest.mark.parametrize("shape", [(12, 12), (144,)])
def test_images_get_their_shape_in_the_forward(shape):
    assert_trains_as_plain(FlatImages(), NATIVE, images=data(shape=shape)[0], labels=data()[1])


def test_fused_layers_and_distances_in_a_forward():
    model = Fused()
    twin = copy.deepcopy(model)
    images, labels = data()
    trainer = FusedTrainer(model, lr=1e-3, j=1.0)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3)
    loss = lf.nn.MAPLoss(1.0)
    for _ in range(3):
        expected = loss(twin(images), labels)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert trainer.step(images, labels) == pytest.approx(expected.item(), rel=1e-12)
    assert_close(model, twin)
    assert trainer.how(images) == NATIVE


def test_a_batch_of_another_size_may_be_another_network():
    class Odd(View):
        def forward(self, x):
            x = x if x.shape[0] > 2 else x.flip(3)
            return super().forward(x)

    model = Odd()
    twin = copy.deepcopy(model)
    images, labels = data(8)
    history = FusedTrainer(model, lr=0.1).run(images, labels, batch_size=6, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for batch, found in zip(order.split(6), history.losses[0], strict=True):
        loss = F.cross_entropy(twin(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert found.item() == pytest.approx(loss.item(), rel=1e-10)
    assert_close(model, twin)


def test_reading_a_model_leaves_everything_as_it_is():
    class Observed(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("largest", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            self.largest = torch.maximum(self.largest, x.detach().abs().max())
            self.dense.seen = x.shape
            return self.classes(F.dropout(self.features(x), 0.1, self.training).flatten(1))

    model = Observed().eval()
    before = copy.deepcopy(model)
    torch.manual_seed(3)
    random.seed(3)
    state = torch.get_rng_state(), random.getstate()
    FusedTrainer(model, lr=0.1).how(data()[0])
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert_close(model, before, 0)
    assert type(model.largest) is torch.Tensor
    assert not hasattr(model.dense, "seen")
    assert not model.training
    copy.deepcopy(model)


# --- what changes between steps --------------------------------------------------------------------------------------

SCALE = 1.0


class Changing(Net):
    scale = 1.0

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5).eval()
        self.acts = [nn.ReLU()]

    def activation(self, x):
        return self.acts[0](x)

    def forward(self, x):
        x = self.drop(self.features(x).flatten(1))
        x = self.activation(self.dense(x))
        if self.scale != 1 or SCALE != 1:
            x = x * self.scale * SCALE
        return self.output(x)


def _own_forward(model):
    model.forward = lambda x: 2 * Changing.forward(model, x)


def _other_method(model):
    model.activation = torch.tanh


def _class_method(model):
    model.__class__ = type("Other", (Changing,), {"activation": lambda self, x: torch.sigmoid(x)})


def _global(model):
    globals()["SCALE"] = 2.0


def _hook_of_a_layer_in_a_list(model):
    model.acts[0].register_forward_hook(lambda layer, inputs, output: 2 * output)


CHANGES = {
    "an attribute": lambda model: setattr(model, "scale", 3.0),
    "a global": _global,
    "a method of the object": _other_method,
    "the class": _class_method,
    "the forward of the object": _own_forward,
    "a method of the class": lambda model: setattr(type(model), "activation", lambda self, x: torch.tanh(x)),
    "a hook": lambda model: model.dense.register_forward_hook(lambda layer, inputs, output: 2 * output),
    "a hook of a layer in a list": _hook_of_a_layer_in_a_list,
    "a gradient hook": lambda model: model.dense.weight.register_hook(lambda grad: 2 * grad),
    "a layer of a list": lambda model: model.acts.__setitem__(0, nn.Tanh()),
    "pruned": lambda model: prune.ln_structured(model.dense, "weight", 0.5, n=1, dim=0),
    "frozen": lambda model: model.dense.requires_grad_(False),
    "data": lambda model: setattr(model.dense.weight, "data", 2 * model.dense.weight.data),
    "another dtype": lambda model: model.float(),
    "no bias": lambda model: setattr(model.output, "bias", None),
    "a layer's option": lambda model: setattr(model.conv2, "padding_mode", "reflect"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_of_a_forward_counts(change):
    kind = type("Own", (Changing,), {"activation": Changing.activation})
    model = kind()
    twin = copy.deepcopy(model)
    images, labels = data()
    trainer, optimizer = FusedTrainer(model, lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    assert trainer.how(images) == NATIVE
    tolerance = 1e-5 if change == "another dtype" else 1e-10
    try:
        for step in range(3):
            if step == 1:
                CHANGES[change](model)
                if change != "a global":
                    CHANGES[change](twin)
                images = images.to(model.conv1.weight.dtype)
            loss = F.cross_entropy(twin(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert trainer.step(images, labels) == pytest.approx(loss.item(), rel=tolerance)
        assert_close(model, twin, tolerance)
    finally:
        globals()["SCALE"] = 1.0


def test_a_dropout_that_is_switched_on_and_off():
    """Of a hand-written forward and of layers: natively, in both modes."""
    for model in (Changing(), lenet(act3=nn.Sequential(nn.ReLU(), nn.Dropout(0.5).eval()))):
        drop = next(layer for layer in model.modules() if isinstance(layer, nn.Dropout))
        images, labels = data()
        trainer = FusedTrainer(model, lr=0.0)
        same = {trainer.step(images, labels) for _ in range(3)}
        drop.train()
        other = {trainer.step(images, labels) for _ in range(3)}
        drop.eval()
        again = {trainer.step(images, labels) for _ in range(3)}
        assert len(same) == 1
        assert len(other) == 3
        assert again == same
        assert trainer.how(images) == NATIVE


# --- hooks, parameters, dtypes ---------------------------------------------------------------------------------------


def test_hooks_of_every_kind_are_called():
    images, labels = data()
    for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre", "tensor", "accumulated", "global"):
        model, calls = lenet(), []
        trainer = FusedTrainer(model, lr=0.1)
        trainer.step(images, labels)
        note = lambda *of, calls=calls: calls.append(of) and None  # noqa: E731
        if kind == "tensor":
            handle = model.dense.weight.register_hook(note)
        elif kind == "accumulated":
            handle = model.dense.weight.register_post_accumulate_grad_hook(note)
        elif kind == "global":
            handle = nn.modules.module.register_module_forward_hook(note)
        else:
            handle = getattr(model.dense, f"register_{kind}_hook")(note)
        try:
            trainer.step(images, labels)
            assert calls, kind
            assert "hooks" in trainer.how()
        finally:
            handle.remove()
        count = len(calls)
        trainer.step(images, labels)
        assert len(calls) == count
        assert trainer.how() == NATIVE


def test_shared_parameters():
    model = lenet(dense=nn.Linear(24, 9), act3=nn.Linear(9, 9))
    model.add_module("again", model.act3)
    model._modules["output"] = model._modules.pop("output")
    assert_trains_as_plain(model, "again.weight: the same parameter as act3.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = lenet().to(dtype)
    images, labels = data(dtype=dtype)
    assert_trains_as_plain(model, f"got {dtype}", images=images, labels=labels, atol=2e-2)


def test_frozen_models():
    for model in (lenet(), lenet(act3=nn.GELU())):
        before = copy.deepcopy(model)
        model.requires_grad_(False)
        images, labels = data()
        loss = FusedTrainer(model, lr=0.1).step(images, labels)
        assert loss == pytest.approx(F.cross_entropy(model(images), labels).item())
        assert_close(model, before, 0)


def test_lazy_layers():
    torch.manual_seed(0)
    layers = nn.LazyConv2d(4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(4)
    model = nn.Sequential(*layers)
    images, labels = data(dtype=torch.float32)
    trainer = FusedTrainer(model, lr=0.1)
    assert trainer.how().startswith(BY_AUTOGRAD)
    first = trainer.step(images, labels)
    assert trainer.how() == NATIVE
    assert trainer.step(images, labels) < first


def test_gradients_that_are_there_stay():
    model = lenet(act3=nn.GELU())
    images, labels = data()
    model.dense.weight.grad = torch.ones_like(model.dense.weight)
    FusedTrainer(model, lr=0.1).step(images, labels)
    assert torch.equal(model.dense.weight.grad, torch.ones_like(model.dense.weight))
    assert model.output.weight.grad is None


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "how"),
    [
        (nn.CrossEntropyLoss(), NATIVE),
        (nn.CrossEntropyLoss(label_smoothing=0.2), NATIVE),
        (nn.NLLLoss(), NATIVE),
        (nn.CrossEntropyLoss(weight=torch.arange(1.0, 5.0, dtype=torch.float64)), "loss: native steps have no weights"),
        (nn.CrossEntropyLoss(reduction="sum"), "loss: native steps have no weights"),
        (nn.CrossEntropyLoss(ignore_index=2), "loss: native steps ignore no class"),
        (nn.MultiMarginLoss(), "loss: native steps have cross-entropy"),
        (
            lambda outputs, labels: outputs.gather(1, labels[:, None]).neg().mean(),
            "loss: native steps have cross-entropy",
        ),
    ],
    ids=str,
)
def test_losses_of_the_user(loss, how):
    model = lenet(output=nn.Sequential(nn.Linear(9, 4), nn.LogSoftmax(1)))
    assert_trains_as_plain(model, how, loss=loss)


def test_labels_are_what_the_loss_makes_of_them():
    images, labels = data()
    ignored = labels.clone()
    ignored[3] = -100
    assert_trains_as_plain(lenet(), "loss: its labels", images=images, labels=ignored, loss=nn.CrossEntropyLoss())
    soft = torch.rand(8, 4, dtype=torch.float64).softmax(1)
    assert_trains_as_plain(lenet(), "loss: its labels", images=images, labels=soft, loss=nn.CrossEntropyLoss())
    assert_trains_as_plain(lenet(), "loss: ", images=images, labels=torch.rand(8, 4).double(), loss=nn.MSELoss())
    assert_trains_as_plain(lenet(output=nn.Linear(9, 4)), "loss: ", loss=nn.NLLLoss())


@pytest.mark.parametrize("smoothing", [0.3, 1.0])
def test_label_smoothing(smoothing):
    assert_trains_as_plain(lenet(), NATIVE, label_smoothing=smoothing)
    assert_trains_as_plain(lenet(act3=nn.GELU()), "GELU", label_smoothing=smoothing)


def test_a_tuple_needs_a_loss():
    class Both(Net):
        def forward(self, x):
            x = self.features(x).flatten(1)
            return self.classes(x), x

    images, labels = data()
    before = Both()
    model = copy.deepcopy(before)
    trainer = FusedTrainer(model, lr=0.1)
    with pytest.raises(TypeError, match=r"outputs: expected a tensor .* got tuple; pass loss="):
        trainer.step(images, labels)
    assert_close(model, before, 0)
    loss = lambda outputs, labels: F.cross_entropy(outputs[0], labels) + 0.1 * outputs[1].square().mean()  # noqa: E731
    assert_trains_as_plain(model, "results", loss=loss)


def test_distances_in_a_model_that_cannot_be_read_need_a_loss():
    class Hidden(Fused):
        def forward(self, x):
            return super().forward(x) + 0

    images, labels = data()
    with pytest.raises(ValueError, match=r"loss: the model has an RBF layer.*pass loss=lenet_fast\.nn\.MAPLoss"):
        FusedTrainer(Hidden(), lr=1e-3).step(images, labels)
    assert_trains_as_plain(Hidden(), "add", loss=lf.nn.MAPLoss(1.0))


def test_distances_behind_layers_that_native_steps_do_not_have():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(200, 8), lf.nn.RBF(8, 4)).double()
    twin = copy.deepcopy(model)
    images, labels = data()
    trainer = FusedTrainer(model, lr=1e-4, j=0.5)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-4)
    loss = lf.nn.MAPLoss(0.5)(twin(images), labels)
    loss.backward()
    optimizer.step()
    losses, correct = trainer.run_epoch(images, labels, torch.arange(8), 8)
    assert losses.item() == pytest.approx(loss.item())
    assert_close(model, twin)
    assert 0 <= correct.item() <= 8
    with pytest.raises(ValueError, match="label_smoothing: the MAP loss"):
        FusedTrainer(model, lr=1e-4, label_smoothing=0.1).step(images, labels)


def test_bad_losses_and_labels_are_named():
    images, labels = data()
    for model in (lenet(), lenet(act3=nn.GELU())):
        before = copy.deepcopy(model)
        for wrong in (-1, 4):
            bad = labels.clone()
            bad[5] = wrong
            trainer = FusedTrainer(model, lr=0.1)
            with pytest.raises((RuntimeError, ValueError), match=f"labels: expected .*got {wrong}"):
                trainer.step(images, bad)
            with pytest.raises((RuntimeError, ValueError), match=f"labels: expected .*got {wrong}"):
                trainer.run_epoch(images, bad, torch.arange(5, 8), 1)
        for returned, error in (((1.0,), TypeError), (torch.zeros(3), TypeError), (torch.tensor(1), TypeError)):
            with pytest.raises(error, match="loss: expected it to return a scalar"):
                FusedTrainer(model, lr=0.1, loss=lambda *_, returned=returned: returned).step(images, labels)
        assert_close(model, before, 0)
    for options in ({"loss": 1}, {"label_smoothing": -0.1}, {"label_smoothing": "a"}):
        with pytest.raises((TypeError, ValueError), match=r"loss|label_smoothing"):
            FusedTrainer(lenet(), lr=0.1, **options)
    with pytest.raises(ValueError, match="the given loss has its own"):
        FusedTrainer(lenet(), lr=0.1, loss=nn.CrossEntropyLoss(), label_smoothing=0.1)
    with pytest.raises(ValueError, match="label_smoothing: the MAP loss"):
        FusedTrainer(models.lenet5_1998(), lr=0.1, label_smoothing=0.1).step(torch.rand(2, 1, 32, 32), labels[:2])


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_by_autograd_is_the_loop_anyone_would_write(optimizer):
    model = Residual()
    twin = copy.deepcopy(model)
    images, labels = data(20)
    seen = []
    trainer = FusedTrainer(model, optimizer, lr=0.01, weight_decay=1e-2)
    history = trainer.run(
        images,
        labels,
        batch_size=8,
        epochs=2,
        generator=torch.Generator().manual_seed(1),
        on_step=lambda step, loss: seen.append((step, loss)),
    )
    plain = OPTIMIZERS[optimizer](twin.parameters(), lr=0.01, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(1)
    losses, right = [], []
    for _ in range(2):
        for batch in torch.randperm(20, generator=generator).split(8):
            outputs = twin(images[batch])
            loss = F.cross_entropy(outputs, labels[batch])
            plain.zero_grad()
            loss.backward()
            plain.step()
            losses.append(loss.item())
            right.append((outputs.argmax(1) == labels[batch]).sum().item())
    torch.testing.assert_close(history.losses.flatten().tolist(), losses, rtol=0, atol=1e-10)
    assert history.correct.flatten().tolist() == right
    assert seen == list(zip(range(1, 7), history.losses.flatten().tolist(), strict=True))
    assert_close(model, twin)
    other = Residual()
    other.load_state_dict(model.state_dict())
    resumed = FusedTrainer(other, optimizer, lr=0.01, weight_decay=1e-2)
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    assert trainer.step(images, labels) == resumed.step(images, labels)
    assert_close(other, model, 0)


def test_learning_rates_of_each_step_and_schedulers():
    model = lenet(act3=nn.GELU())
    twin = copy.deepcopy(model)
    images, labels = data(12)
    trainer, optimizer = FusedTrainer(model, "adam", lr=1.0), torch.optim.Adam(twin.parameters(), lr=1.0)
    trainer.run_epoch(images, labels, torch.arange(12), 4, [0.1, 0.2, 0.05])
    assert trainer.optimizer.param_groups[0]["lr"] == 1.0
    for rate, batch in zip((0.1, 0.2, 0.05), torch.arange(12).split(4), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(twin(images[batch]), labels[batch]).backward()
        optimizer.step()
    assert_close(model, twin)


@pytest.mark.parametrize("kind", [Normed, View])
def test_a_step_whose_loss_is_not_finite_is_not_taken(kind):
    model = kind()
    images, labels = data()
    trainer = FusedTrainer(model, "adam", lr=0.01)
    trainer.step(images, labels)
    before, state = copy.deepcopy(model), copy.deepcopy(trainer.state_dict())
    images[3, 0, 5, 5] = math.nan
    for _ in range(2):
        with pytest.raises(TrainingError, match="not finite in step 1"):
            trainer.step(images, labels)
    assert_close(model, before, 0)  # running statistics, too
    for one, other in zip(trainer.state_dict()["state"].values(), state["state"].values(), strict=True):
        assert all(torch.equal(one[name], value) for name, value in other.items())


def test_an_exception_between_steps_leaves_whole_steps():
    class Enough(Exception):
        pass

    def stop(step, loss):
        if step == 3:
            raise Enough

    model, again = Normed(), Normed()
    images, labels = data(40)
    trainer = FusedTrainer(model, "adam", lr=0.01)
    with pytest.raises(Enough):
        trainer.run_epoch(images, labels, torch.arange(40), 4, on_step=stop)
    (steps,) = {int(state["step"]) for state in trainer.optimizer.state.values()}
    FusedTrainer(again, "adam", lr=0.01).run_epoch(images, labels, torch.arange(4 * steps), 4)
    assert_close(model, again, 0)


@pytest.mark.parametrize("model", [lambda: lenet(act3=nn.GELU()), lambda: lenet(conv1=nn.Conv2d(3, 4, 3))])
def test_bytes(model):
    model = model().float()
    channels = model.conv1.in_channels
    spec = models.InputSpec(size=12, background=-0.4, foreground=2.8)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (8, channels, 10, 10), dtype=torch.uint8, generator=generator)
    labels = data()[1]
    twin = copy.deepcopy(model)
    trainer = FusedTrainer(model, lr=0.1, input_spec=spec)
    loss = trainer.step(pixels if channels > 1 else pixels[:, 0], labels)
    assert loss == pytest.approx(FusedTrainer(twin, lr=0.1).step(spec.prepare(pixels), labels), rel=1e-5)
    assert_close(model, twin, 1e-6)
    assert ("GELU" in trainer.how()) == (channels == 1)


def test_bytes_that_a_forward_takes_itself():
    class Bytes(View):
        def forward(self, x):
            return super().forward(x.double() / 255)

    pixels = torch.randint(256, (8, 1, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert_trains_as_plain(Bytes(), "", images=pixels, labels=data()[1])


def test_steps_are_taken_in_training_mode():
    for model in (Normed().eval(), Sizes().eval(), lenet().eval()):
        FusedTrainer(model, lr=0.1).step(*data())
        assert all(layer.training for layer in model.modules())
    model = Normed()
    model.bn.eval()
    before = copy.deepcopy(model.bn)
    FusedTrainer(model, lr=0.1).step(*data())
    assert not model.bn.training
    assert torch.equal(model.bn.running_mean, before.running_mean)


@pytest.mark.parametrize("surrounding", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_what_surrounds_a_training_is_not_for_its_steps(surrounding):
    results = []
    for inside in (False, True):
        model = Normed().float()
        trainer = FusedTrainer(model, lr=0.1)
        with surrounding() if inside else torch.enable_grad():
            images, labels = (value.clone() for value in data(dtype=torch.float32))
            trainer.step(images, labels)
            trainer.run(images, labels, batch_size=4, generator=torch.Generator().manual_seed(0))
        results.append(model)
    assert_close(*results, 0)


# --- dropout in native steps -----------------------------------------------------------------------------------------

P = {"image": 0.1, "maps": 0.3, "values": 0.4, "hidden": 0.5}


class Dropping(Net):
    """Dropout wherever native steps have it, and where it moves behind what follows it."""

    def forward(self, x):
        x = F.dropout(x, P["image"], self.training)
        x = F.max_pool2d(F.relu(F.dropout2d(self.conv1(x), P["maps"], self.training)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.dropout(x, P["values"], self.training).flatten(1)
        return self.output(F.relu(F.dropout(self.dense(x), P["hidden"], self.training)))


def with_masks(model, images, seed, step):
    """The forward of `Dropping` with the masks of native steps."""
    of = lambda place, x, p, maps=False: x * mask(seed, step, place, x.shape, p, maps=maps, dtype=x.dtype)  # noqa: E731
    x = F.max_pool2d(F.relu(model.conv1(of(0, images, P["image"]))), 2)
    x = F.max_pool2d(F.relu(model.conv2(of(1, x, P["maps"], True))), 2)
    x = of(2, x, P["values"]).flatten(1)
    return model.output(of(3, F.relu(model.dense(x)), P["hidden"]))


def test_dropout_is_that_of_its_masks():
    model = Dropping()
    twin = copy.deepcopy(model)
    images, labels = data(20)
    generator = torch.Generator().manual_seed(1)
    trainer = FusedTrainer(model, lr=0.1)
    history = trainer.run(images, labels, batch_size=8, epochs=2, generator=generator)
    assert trainer.how(images) == NATIVE
    generator = torch.Generator().manual_seed(1)
    orders = [torch.randperm(20, generator=generator)]
    seed = Masks(generator).seed()
    orders.append(torch.randperm(20, generator=generator))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    batches = [batch for order in orders for batch in order.split(8)]
    for step, (batch, found) in enumerate(zip(batches, history.losses.flatten(), strict=True)):
        loss = F.cross_entropy(with_masks(twin, images[batch], seed, step), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert found.item() == pytest.approx(loss.item(), rel=1e-10)
    assert_close(model, twin)


def test_a_training_with_dropout_is_the_same_however_it_is_cut(monkeypatch):
    results = []
    for seconds in (1e-9, 1e9):  # that a native call may take
        monkeypatch.setattr("lenet_fast.trainer._CALL_SECONDS", seconds)
        model = lenet(act3=nn.Sequential(nn.ReLU(), nn.Dropout(0.5)))
        trainer = FusedTrainer(model, "adam", lr=0.01)
        trainer.run(*data(40), batch_size=3, epochs=2, generator=torch.Generator().manual_seed(1))
        results.append(model)
    assert_close(*results, 0)


def test_who_draws_the_masks():
    images, labels = data()
    model = lenet(act3=nn.Sequential(nn.ReLU(), nn.Dropout(0.5)))
    trainer = FusedTrainer(model, lr=0.0)

    def losses(*seeds):
        return [trainer.step(images, labels, generator=torch.Generator().manual_seed(seed)) for seed in seeds]

    first, second, other = losses(1, 1, 2)
    assert first == second != other
    torch.manual_seed(1)
    assert trainer.step(images, labels) == first
    epoch = [
        trainer.run_epoch(images, labels, torch.arange(8), 4, generator=torch.Generator().manual_seed(3))[0]
        for _ in range(2)
    ]
    assert torch.equal(*epoch)


def test_nothing_is_drawn_without_dropout():
    images, labels = data()
    for model in (lenet(), View(), lenet(act3=nn.Sequential(nn.ReLU(), nn.Dropout(0.5).eval()))):
        trainer = FusedTrainer(model, lr=0.1)
        torch.manual_seed(0)
        state = torch.get_rng_state()
        trainer.step(images, labels)
        trainer.run_epoch(images, labels, torch.arange(8), 4)
        assert torch.equal(torch.get_rng_state(), state)


# --- what it says ----------------------------------------------------------------------------------------------------


def test_how_before_the_first_batch():
    assert FusedTrainer(models.lenet1(), lr=0.1).how() == NATIVE
    assert FusedTrainer(lenet(), lr=0.1).how() == NATIVE
    trainer = FusedTrainer(View(), lr=0.1)
    assert trainer.how() == "not known before the first batch: how(images) tells"
    assert trainer.how(data()[0]) == NATIVE
    trainer.step(*data())
    assert trainer.how() == NATIVE  # as the last step was
    spec = models.InputSpec(size=12, background=0.0, foreground=1.0)
    assert FusedTrainer(View(), lr=0.1, input_spec=spec).how() == NATIVE
    assert "BatchNorm2d" in FusedTrainer(Normed(), lr=0.1, input_spec=spec).how()
    with pytest.raises(NetworkError, match="bn: native steps have no BatchNorm2d"):
        FusedTrainer(Normed(), lr=0.1, input_spec=spec, native_only=True)


def test_how_is_logged_once(caplog):
    images, labels = data()
    with caplog.at_level(logging.INFO, "lenet_fast.trainer"):
        trainer = FusedTrainer(lenet(act3=nn.GELU()), lr=0.1)
        for _ in range(3):
            trainer.step(images, labels)
        trainer.run(images, labels, batch_size=4)
    (record,) = caplog.records
    assert "act3: native steps have no GELU" in record.getMessage()


def test_a_forward_is_read_without_compiling_it_again_for_every_trainer_and_batch():
    from torch._dynamo.utils import counters

    images, labels = data(30)
    FusedTrainer(View(), lr=0.1).step(images[:9], labels[:9])
    captured = counters["frames"]["ok"]
    for size in (30, 2, 17):
        FusedTrainer(View(), lr=0.1, native_only=True).run(images[:size], labels[:size], batch_size=5)
    assert counters["frames"]["ok"] <= captured + 1  # a batch of one image is read of its own


def test_models_are_freed():
    model = View()
    FusedTrainer(model, lr=0.1).step(*data())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda trainer: pickle.loads(pickle.dumps(trainer))])
@pytest.mark.parametrize("kind", [View, Normed])
def test_a_copy_is_on_its_own(copied, kind):
    images, labels = data()
    trainer = FusedTrainer(kind(), "adam", lr=0.01)
    trainer.step(images, labels)
    other = copied(trainer)
    before = copy.deepcopy(trainer.model)
    other.step(images, labels)
    assert_close(trainer.model, before, 0)
    trainer.step(images, labels)
    assert_close(trainer.model, other.model, 0)


def test_gradients_of_several_processes_are_averaged():
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        calls = []
        model = nn.parallel.DistributedDataParallel(View())
        model.register_comm_hook(None, lambda state, bucket: calls.append(bucket) or _as_it_is(bucket))
        trainer = FusedTrainer(model, lr=0.1)
        trainer.step(*data())
        assert calls
        assert "DistributedDataParallel" in trainer.how(data()[0])
    finally:
        distributed.destroy_process_group()


def _as_it_is(bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_where_dynamo_is_switched_off():
    model = View()
    trainer = FusedTrainer(model, lr=0.1)
    torch.compiler.set_stance("force_eager")
    try:
        trainer.step(*data())
        assert "Dynamo, which reads forwards, is switched off" in trainer.how(data()[0])
    finally:
        torch.compiler.set_stance("default")


def test_threads_train_models_that_have_to_be_read():
    kinds = [type(f"Thread{i}", (base,), {}) for i, base in enumerate((View, Sizes, Normed, View))]
    images, labels = data(40)
    expected = []
    for kind in kinds:
        model = kind()
        FusedTrainer(model, lr=0.1).run(images, labels, batch_size=4, generator=torch.Generator().manual_seed(0))
        expected.append(model)
    trained = [type(f"Again{i}", kind.__bases__, {})() for i, kind in enumerate(kinds)]

    def train(model):
        FusedTrainer(model, lr=0.1).run(images, labels, batch_size=4, generator=torch.Generator().manual_seed(0))

    threads = [threading.Thread(target=train, args=(model,)) for model in trained]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(trained, expected, strict=True):
        assert_close(one, other, 1e-9)


def test_two_trainers_of_one_model():
    model = View()
    twin = copy.deepcopy(model)
    images, labels = data()
    trainers = [FusedTrainer(model, lr=rate) for rate in (0.1, 0.2)]
    optimizers = [torch.optim.SGD(twin.parameters(), lr=rate) for rate in (0.1, 0.2)]
    for trainer, optimizer in zip(trainers * 2, optimizers * 2, strict=True):
        loss = F.cross_entropy(twin(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert trainer.step(images, labels) == pytest.approx(loss.item(), rel=1e-10)
    assert_close(model, twin)


# --- what looks like a network of native steps and is none -----------------------------------------------------------


class Cast(Net):
    """Rounds what it computes to whole numbers, and returns to the dtype it had."""

    def forward(self, x):
        return self.classes(self.features(x).to(torch.int32).to(torch.float64).flatten(1))


class CastAlone(Net):
    def forward(self, x):
        return self.classes(self.features(x).to(torch.float32).to(torch.float64).flatten(1))


class OtherSoftmax(Net):
    def forward(self, x):
        return torch.log_softmax(self.classes(self.features(x).flatten(1)), 1, torch.float32)


class Maps(Net):
    """Makes a map of each value of larger maps, behind which channels are others than before."""

    def __init__(self):
        super().__init__()
        self.mixing = nn.Conv2d(24, 24, 1).double()

    def forward(self, x):
        return self.classes(F.relu(self.mixing(self.features(x).view(-1, 24, 1, 1))).flatten(1))


class DroppedMaps(Net):
    def forward(self, x):
        return self.classes(F.dropout2d(self.features(x).view(-1, 24, 1, 1), 0.5, self.training).flatten(1))


class Hooking(Net):
    """Gives a parameter a hook at every call, which has to happen once a step."""

    def forward(self, x):
        self.dense.weight.register_hook(lambda grad: 0.5 * grad)
        return self.classes(self.features(x).flatten(1))


class Calling(Net):
    def __call__(self, x):
        return 2 * super().__call__(x)

    def forward(self, x):
        return self.classes(self.features(x).flatten(1))


class Prototypes(Net):
    """Distances that no RBF layer computes are scores to the loss."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.rand(4, 9, dtype=torch.float64))

    def forward(self, x):
        x = torch.relu(self.dense(self.features(x).flatten(1)))
        return (x.unsqueeze(-2) - self.codes).square().sum(-1)


NO_NETWORKS = {
    Cast: "to(torch.int32): makes torch.int32 of torch.float64",
    CastAlone: "to(torch.float32): makes torch.float32 of torch.float64",
    OtherSoftmax: "in another dtype",
    Maps: "view(-1, 24, 1, 1): makes maps of one value each of larger ones",
    DroppedMaps: "view(-1, 24, 1, 1): makes maps of one value each of larger ones",
    Hooking: "hooks",
    Calling: "mul(2)",
    Prototypes: "unsqueeze(-2): makes (N, 1, 9) of (N, 9)",
}


@pytest.mark.parametrize("kind", NO_NETWORKS)
def test_forwards_that_look_like_networks(kind):
    assert_trains_as_plain(kind(), NO_NETWORKS[kind], atol=1e-7 if kind is OtherSoftmax else 1e-10)


def test_a_sequential_that_is_called_in_a_way_of_its_own():
    class Twice(nn.Sequential):
        def __call__(self, x):
            return 2 * super().__call__(x)

    class Also(nn.Sequential):
        def _call_impl(self, x):
            return 2 * super()._call_impl(x)

    class More(nn.Sequential):
        def __iter__(self):
            return iter([*self._modules.values(), nn.Softmax(1)])

    for kind in (Twice, Also, More):
        assert_trains_as_plain(kind(*lenet()), "")


def test_torchscript_goes_by_autograd():
    twin = View()
    model = torch.jit.trace(View(), data()[0])
    images, labels = data()
    trainer = FusedTrainer(model, lr=0.1)
    loss = F.cross_entropy(twin(images), labels)
    loss.backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert trainer.step(images, labels) == pytest.approx(loss.item(), rel=1e-10)
    assert_close(model, twin)
    assert "native steps do not read TorchScript" in trainer.how()


@pytest.mark.parametrize("surrounding", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_a_forward_is_read_in_the_modes_of_a_step(surrounding):
    class Looking(Net):
        def forward(self, x):
            plain = torch.is_grad_enabled() and not torch.is_autocast_enabled()
            return self.output((torch.relu if plain else torch.tanh)(self.dense(self.features(x).flatten(1))))

    model = Looking()
    images, labels = data()
    expected = F.cross_entropy(model(images), labels).item()
    trainer = FusedTrainer(model, lr=0.0)
    for inside in (True, False):
        with surrounding() if inside else torch.enable_grad():
            assert trainer.step(images, labels) == pytest.approx(expected, rel=1e-12)
            assert trainer.how(images) == NATIVE


def test_bytes_that_get_another_shape_in_the_forward():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.output = nn.Conv2d(4, 4, 3), nn.Linear(16, 4)

        def forward(self, x):
            return self.output(F.max_pool2d(F.relu(self.conv(x.view(-1, 4, 6, 6))), 2).flatten(1))

    spec = models.InputSpec(size=12, background=0.0, foreground=1.0)
    pixels = torch.randint(256, (8, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = Folded()
    expected = F.cross_entropy(model(spec.prepare(pixels)), data()[1]).item()
    trainer = FusedTrainer(model, lr=0.1, input_spec=spec)
    assert trainer.step(pixels, data()[1]) == pytest.approx(expected, rel=1e-5)
    assert "become (4, 6, 6) in the forward" in trainer.how(pixels)


def test_hooks_of_the_optimizer_are_called():
    trainer, calls = FusedTrainer(lenet(), lr=0.1), []
    handle = trainer.optimizer.register_step_post_hook(lambda *of: calls.append(of))
    trainer.step(*data())
    assert len(calls) == 1
    assert "optimizer: has hooks" in trainer.how(data()[0])
    handle.remove()
    trainer.step(*data())
    assert len(calls) == 1


def test_state_of_another_optimizer_is_named():
    trainer = FusedTrainer(lenet(), "adam", lr=0.1)
    with pytest.raises(ValueError, match="the fused trainer has no decoupled_weight_decay"):
        trainer.load_state_dict(FusedTrainer(lenet(), "adamw", lr=0.1).state_dict())


def test_how_knows_the_channels_of_a_forward_that_calls_its_layers_in_another_order():
    class Backwards(Net):
        def __init__(self):
            super().__init__()
            self._modules = dict(reversed(self._modules.items()))

        def forward(self, x):
            return self.classes(self.features(x).flatten(1))

    spec = models.InputSpec(size=12, background=0.0, foreground=1.0)
    assert FusedTrainer(Backwards(), lr=0.1, input_spec=spec, native_only=True).how() == NATIVE
