"""Published LeNets: `accelerate` changes nothing that they compute, and `FusedTrainer` trains them as PyTorch does."""

import contextlib
import copy
import io
import math
import pickle
import random
from itertools import chain

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from public_lenets import LENETS, Scores
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import lenet_fast as lf
from lenet_fast.dropout_masks import mask

nets = pytest.mark.parametrize("entry", LENETS.values(), ids=LENETS)


def seed():
    """Before every forward: PyTorch's and Python's random numbers from the start."""
    torch.manual_seed(3)
    random.seed(3)


def tensors(output):
    """The tensors of what a forward returns: one, a tuple or a dictionary."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def loss_of(output):
    """A number that depends on every element of the outputs, on each differently."""
    generator = torch.Generator().manual_seed(4)
    return sum(
        (tensor * torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)).sum()
        for tensor in tensors(output)
    )


def outcome(model, entry, dtype=torch.float64, **options):
    """What one forward and backward compute: outputs, gradients of images and parameters, buffers afterwards."""
    inputs = [
        given.requires_grad_() if isinstance(given, torch.Tensor) else given
        for given in entry.inputs(dtype=dtype, **options)
    ]
    seed()
    output = model(*inputs)
    loss_of(output).backward()
    found = {f"output {index}": tensor.detach() for index, tensor in enumerate(tensors(output))}
    found |= {f"image {index}": given.grad for index, given in enumerate(inputs) if isinstance(given, torch.Tensor)}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    found |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad()
    return found


def assert_same(actual, expected, share=1e-10):
    """Equal names; every tensor off by at most this share of the expected one's largest value."""
    assert list(actual) == list(expected)
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
            continue
        error = (actual[name].double() - value.double()).abs().max().item()
        assert error <= share * max(1e-3, value.abs().max().item()), f"{name}: off by {error:.1e}"


def pair(entry, dtype=torch.float64):
    """The plain model and an accelerated one of the same values."""
    return entry.model(dtype), lf.accelerate(entry.model(dtype))


def fused_operators(action, *arguments):
    """How many fused operators `action(*arguments)` calls, and what it returns."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = action(*arguments)
    counts = {event.key: event.count for event in profile.key_averages()}
    # one within the other where gradients are recorded
    return max(counts.get(f"lenet_fast::{name}", 0) for name in ("conv_act_pool", "_conv_recording")), result


def test_the_collection():
    """As many as were promised, each with its reasons."""
    assert len(LENETS) >= 40
    assert sum(not entry.autograd for entry in LENETS.values()) >= 30
    for name, entry in LENETS.items():
        assert entry.origin.endswith("."), name
        assert bool(entry.unfused) is (0 in entry.fused), name


@nets
@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float64, 1e-10), (torch.float32, 3e-5)], ids=["float64", "float32"]
)
def test_outputs_gradients_and_buffers(entry, dtype, share):
    """In training, in evaluation, and in training again; the second time, fused operators are counted."""
    plain, fast = pair(entry, dtype)
    for training in (True, False):
        expected = outcome(plain.train(training), entry, dtype)
        assert_same(outcome(fast.train(training), entry, dtype), expected, share)
    for training, expected_count in zip((True, False), entry.fused, strict=True):
        count, found = fused_operators(outcome, fast.train(training), entry, dtype)
        assert_same(found, outcome(plain.train(training), entry, dtype), share)
        assert count == expected_count
    assert vars(fast).get("iter_num") == vars(plain).get("iter_num")


# --- what else people do with their networks -------------------------------------------------------------------------
# Each function below gets a plain and an accelerated model of the same values, does the same to both and compares.


def alike(action):
    """A test that does `action(model, entry)`, which returns named tensors, to both models.

    Where the plain model refuses (`view` of channels_last maps, a Function without a vmap), the other one may, too.
    """

    def check(entry):
        plain, fast = pair(entry)
        try:
            expected = action(plain, entry)
        except Exception as refusal:
            with contextlib.suppress(type(refusal)):
                action(fast, entry)
        else:
            assert_same(action(fast, entry), expected)

    return check


def first_convolution(model):
    """The first convolution that is a layer, or None."""
    return next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)


def low_precision(dtype):
    def check(entry):
        """In evaluation mode: no further from float64 than PyTorch's own layers are, or not much."""
        expected = outcome(entry.model(torch.float64).eval(), entry)
        plain, fast = (outcome(model.eval(), entry, dtype) for model in pair(entry, dtype))
        assert_no_worse(fast, plain, expected, dtype)

    return check


def assert_no_worse(actual, plain, expected, dtype):
    for name, value in expected.items():
        if value is None or name.startswith("image"):  # a maximum with ties goes either way
            continue
        largest = value.abs().max()
        errors = [(found[name].double() - value).abs().max() for found in (actual, plain)]
        assert errors[0] <= 3 * errors[1] + 4 * torch.finfo(dtype).eps * largest, f"{name}: {errors}, {largest}"


def autocast(entry):
    expected = outcome(entry.model(torch.float64).eval(), entry)
    found = []
    for model in pair(entry, torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(outcome(model.eval(), entry, torch.float32))
    assert_no_worse(found[1], found[0], expected, torch.bfloat16)


@alike
def channels_last(model, entry):
    if len(entry.shape) != 3:
        pytest.skip("no images of four dimensions")
    model = model.to(memory_format=torch.channels_last)
    inputs = [
        given.contiguous(memory_format=torch.channels_last) if isinstance(given, torch.Tensor) else given
        for given in entry.inputs(dtype=torch.float64)
    ]
    seed()
    output = model(*inputs)
    loss_of(output).backward()
    return {"loss": loss_of(output).detach(), **{n: p.grad for n, p in model.named_parameters()}}


@alike
def forward_hooks(model, entry):
    """Added after the first call; one looks, one changes the output."""
    outcome(model, entry)
    seen = []
    layer = first_convolution(model)
    if layer is None:
        layer = next(module for module in model.modules() if not list(module.children()))
    layer.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    layer.register_forward_hook(lambda module, args, output: 1.5 * output)
    found = outcome(model, entry)
    assert seen
    return {"seen": seen[-1], **found}


@alike
def full_backward_hooks(model, entry):
    outcome(model, entry)
    seen = []
    model.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    found = outcome(model, entry)
    return {"seen": seen[-1], **found}


@alike
def pruning(model, entry):
    outcome(model, entry)
    layer = first_convolution(model)
    if layer is not None and not prune.is_pruned(layer):
        prune.random_unstructured(layer, "bias", 0.5)
        prune.l1_unstructured(layer, "weight", 0.5)
    found = outcome(model, entry)
    if layer is not None:
        prune.remove(layer, "weight")
        found |= {f"afterwards {name}": value for name, value in outcome(model, entry).items()}
    return found


def parametrization(register):
    @alike
    def check(model, entry):
        outcome(model, entry)
        layer = first_convolution(model)
        if layer is not None and not prune.is_pruned(layer):
            seed()
            register(layer)
        return outcome(model, entry) | {f"again {name}": value for name, value in outcome(model, entry).items()}

    return check


@alike
def moving_average(model, entry):
    outcome(model, entry)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    average.update_parameters(model)
    return outcome(average, entry)


@alike
def frozen(model, entry):
    outcome(model, entry)
    half = list(model.parameters())[: len(list(model.parameters())) // 2]
    for parameter in half:
        parameter.requires_grad_(False)
    found = outcome(model, entry)
    assert all(parameter.grad is None for parameter in half)
    return found


def trained(model, entry, step):
    """The parameters after `step(loss)` on batches of several sizes; `loss()` is of one batch, and repeats itself."""
    for batch in (3, 5, 2, 3):
        inputs = entry.inputs(batch, torch.float64)

        def loss(inputs=inputs):
            seed()
            return 0.01 * loss_of(model(*inputs))

        step(loss)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@alike
def momentum(model, entry):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)

    def step(loss):
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    return trained(model, entry, step)


@alike
def lbfgs(model, entry):
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-2, max_iter=3)

    def step(loss):
        def closure():
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        optimizer.step(closure)

    return trained(model.eval(), entry, step)


@alike
def scaled_gradients(model, entry):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(loss):
        optimizer.zero_grad()
        scaler.scale(loss()).backward()
        scaler.step(optimizer)
        scaler.update()

    return trained(model, entry, step)


@alike
def functional_call(model, entry):
    outcome(model, entry)
    values = {name: value * 1.1 for name, value in chain(model.named_parameters(), model.named_buffers())}
    seed()
    output = torch.func.functional_call(model.eval(), values, entry.inputs(dtype=torch.float64))
    gradients = torch.autograd.grad(loss_of(output), list(model.parameters()), allow_unused=True)
    return {"loss": loss_of(output).detach(), **dict(zip(dict(model.named_parameters()), gradients, strict=True))}


@alike
def per_sample_gradients(model, entry):
    model.eval()
    values = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values, *images):
        return loss_of(torch.func.functional_call(model, values, tuple(image[None] for image in images) + entry.others))

    dims = (None,) + (0,) * entry.images
    seed()
    per_sample = torch.vmap(torch.func.grad(loss), dims, randomness="different")
    return per_sample(values, *entry.inputs(dtype=torch.float64)[: entry.images])


@alike
def double_backward(model, entry):
    """A penalty on the gradient of the images, as WGAN-GP has it."""
    inputs = entry.inputs(dtype=torch.float64)
    inputs[0].requires_grad_()
    seed()
    (gradient,) = torch.autograd.grad(loss_of(model(*inputs)), inputs[0], create_graph=True)
    gradients = torch.autograd.grad(gradient.square().sum(), list(model.parameters()), allow_unused=True)
    return {"images": gradient.detach(), **dict(zip(dict(model.named_parameters()), gradients, strict=True))}


def duplicates(duplicate):
    def check(entry):
        """The copy of a model that has run is fused too, and its own."""
        plain, fast = pair(entry)
        for model in (plain, fast):
            with torch.no_grad():
                seed()
                model(*entry.inputs(dtype=torch.float64))
        twin = duplicate(fast)
        with torch.no_grad():
            next(fast.parameters()).zero_()
        count, found = fused_operators(outcome, twin, entry)
        assert_same(found, outcome(plain, entry))
        assert count == entry.fused[0]

    return check


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """A group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@alike
def distributed(model, entry):
    return outcome(nn.parallel.DistributedDataParallel(model, find_unused_parameters=True), entry)


@alike
def exported(model, entry):
    outcome(model, entry)
    program = torch.export.export(model.eval(), entry.inputs(dtype=torch.float64))
    seed()
    return {str(i): t.detach() for i, t in enumerate(tensors(program.module()(*entry.inputs(dtype=torch.float64))))}


@alike
def traced(model, entry):
    outcome(model, entry)
    seed()
    script = torch.jit.trace(model.eval(), entry.inputs(dtype=torch.float64), check_trace=False, strict=False)
    seed()
    return {str(i): t.detach() for i, t in enumerate(tensors(script(*entry.inputs(dtype=torch.float64))))}


@alike
def compiled(model, entry):
    return outcome(torch.compile(model, backend="eager"), entry)


def by_name(entry):
    """`torch.compile(model, backend="lenet_fast")`."""
    if "lenet_fast" not in torch.compiler.list_backends():
        pytest.skip("the package was installed before it named its backend: pip install -e . again")
    model = torch.compile(entry.model(torch.float64), backend="lenet_fast")
    expected = {f"_orig_mod.{name}": value for name, value in outcome(entry.model(torch.float64), entry).items()}
    found = outcome(model, entry)
    assert_same(dict(zip(expected, found.values(), strict=True)), expected)


@alike
def checkpointed(model, entry):
    """Activations computed again in the backward."""
    inputs = [given.requires_grad_() for given in entry.inputs(dtype=torch.float64)[: entry.images]]
    seed()
    output = torch.utils.checkpoint.checkpoint(model, *inputs, *entry.others, use_reentrant=False)
    loss_of(output).backward()
    return {"images": inputs[0].grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}


@alike
def without_gradients(model, entry):
    found = {}
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            seed()
            output = model(*entry.inputs(dtype=torch.float64))
        found |= {f"{context.__name__} {i}": tensor for i, tensor in enumerate(tensors(output))}
    return found | outcome(model, entry)


@alike
def another_layer(model, entry):
    """A layer replaced after the first call, by one with another bias."""
    outcome(model, entry)
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Conv2d and not prune.is_pruned(layer):
                twin = copy.deepcopy(layer)
                if twin.bias is not None:
                    nn.init.ones_(twin.bias)
                setattr(module, name, twin)
    return outcome(model, entry)


@alike
def converted(model, entry):
    """From float64 to float32 and back after the first call."""
    outcome(model, entry)
    return outcome(model.float().double(), entry)


@alike
def restored(model, entry):
    outcome(model, entry)
    lf.restore(model)
    count, found = fused_operators(outcome, model, entry)
    assert count == 0
    return found


FEATURES = {
    "float16": low_precision(torch.float16),
    "bfloat16": low_precision(torch.bfloat16),
    "autocast": autocast,
    "channels_last": channels_last,
    "forward-hooks": forward_hooks,
    "full-backward-hooks": full_backward_hooks,
    "pruning": pruning,
    "weight-norm": parametrization(parametrizations.weight_norm),
    "spectral-norm": parametrization(parametrizations.spectral_norm),
    "moving-average": moving_average,
    "frozen": frozen,
    "momentum-and-clipping": momentum,
    "lbfgs": lbfgs,
    "grad-scaler": scaled_gradients,
    "functional_call": functional_call,
    "vmap-of-grad": per_sample_gradients,
    "double-backward": double_backward,
    "deepcopy": duplicates(copy.deepcopy),
    "pickle": duplicates(pickled),
    "torch.save": duplicates(saved),
    "ddp": distributed,
    "export": exported,
    "jit.trace": traced,
    "torch.compile": compiled,
    "backend-by-name": by_name,
    "checkpoint": checkpointed,
    "no-gradients": without_gradients,
    "another-layer": another_layer,
    "converted": converted,
    "restore": restored,
}


def rotation(each=2):
    """Every net meets `each` features, every feature several nets: (feature, net)."""
    names = list(FEATURES)
    for index, net in enumerate(LENETS):
        for turn in range(each):
            yield names[(each * index + turn * 7 + index // len(names)) % len(names)], net


@pytest.mark.parametrize(("feature", "net"), list(rotation()))
@pytest.mark.usefixtures("process_group")
def test_features(feature, net):
    FEATURES[feature](LENETS[net])


# --- training --------------------------------------------------------------------------------------------------------


single = pytest.mark.parametrize(
    "entry",
    [entry for entry in LENETS.values() if entry.images == 1],
    ids=[name for name, entry in LENETS.items() if entry.images == 1],
)
SETTINGS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}


class SameDropout(TorchFunctionMode):
    """Plain PyTorch with the masks of the native steps, those of the input of the layer that comes next."""

    def __init__(self, seed):
        super().__init__()
        self.seed = seed
        self.step = -1
        self.place = 0

    def __enter__(self):
        self.step += 1
        self.place = 0
        return super().__enter__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.conv2d, F.linear):
            self.place += 1
        if function in (F.dropout, F.dropout2d):
            return self.dropout(*args, maps=function is F.dropout2d, **kwargs)
        return function(*args, **kwargs)

    def dropout(self, input, p=0.5, training=True, inplace=False, *, maps):
        if not training:
            return input
        return input * mask(self.seed, self.step, self.place, input.shape, p, maps=maps, dtype=input.dtype)


def plain_training(model, images, labels, order, batch_size, dropout):
    """The losses of each step; the model is trained in place."""
    optimizer = torch.optim.SGD(model.parameters(), **SETTINGS)
    losses = []
    for batch in order.split(batch_size):
        optimizer.zero_grad()
        with dropout:
            loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@single
def test_training(entry):
    """Three steps on batches of 4, 4 and 2, dropout included."""
    plain, fast = (entry.trainable(entry.model(torch.float64)) for _ in range(2))
    images, labels = entry.inputs(10, torch.float64)[0], entry.labels(10)
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(10, generator=generator)
    seed()
    if entry.autograd:
        dropout = contextlib.nullcontext()
    else:
        dropout = SameDropout(int(torch.randint(2**63 - 1, (), generator=generator)))
    expected = plain_training(plain, images, labels, order, 4, dropout)
    trainer = lf.FusedTrainer(fast, "sgd", **SETTINGS)
    seed()
    history = trainer.run(images, labels, batch_size=4, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(history.losses[0], expected, rtol=1e-9, atol=1e-9)
    assert_same(fast.state_dict(), plain.state_dict(), 1e-9)
    assert ("native" if not entry.autograd else "autograd") in trainer.how(images)
    for name in ("iter_num", "feature_maps"):  # what forward leaves on the model
        assert (name in vars(fast)) is (name in vars(plain))
    assert vars(fast).get("iter_num") == vars(plain).get("iter_num")


@single
def test_native_only(entry):
    """Raises, and trains nothing, exactly where steps are not native."""
    model = entry.trainable(entry.model())
    batch = entry.inputs(4)[0], entry.labels(4)
    before = copy.deepcopy(model.state_dict())
    if not entry.autograd:
        assert math.isfinite(lf.FusedTrainer(model, "sgd", lr=0.1, native_only=True).step(*batch))
        return
    with pytest.raises(ValueError, match=r"\w"):
        lf.FusedTrainer(model, "sgd", lr=0.1, native_only=True).step(*batch)
    assert_same(model.state_dict(), before, 0.0)


@pytest.mark.parametrize("net", [name for name, entry in LENETS.items() if entry.scores])
def test_training_with_a_loss_of_several_results(net):
    """No module around it: the loss picks the scores from what the model returns."""
    entry = LENETS[net]
    around, model = (entry.model(torch.float64) for _ in range(2))
    images, labels = entry.inputs(6, torch.float64)[0], entry.labels(6)
    seed()
    expected = lf.FusedTrainer(Scores(around, entry.scores), "sgd", **SETTINGS)
    losses = [expected.step(images, labels) for _ in range(2)]

    def loss(outputs, labels):
        return F.cross_entropy(entry.scores(outputs), labels)

    seed()
    trainer = lf.FusedTrainer(model, "sgd", loss=loss, **SETTINGS)
    assert [trainer.step(images, labels) for _ in range(2)] == pytest.approx(losses, rel=1e-9)
    assert_same(model.state_dict(), around.state_dict(), 1e-9)
    with pytest.raises(TypeError, match="outputs: expected a tensor"):
        lf.FusedTrainer(entry.model(torch.float64), "sgd", lr=0.1).step(images, labels)


@pytest.mark.parametrize("net", ["counts-calls", "keeps-activations", "stochastic-depth"])
@pytest.mark.parametrize("way", ["accelerate", "trainer"])
def test_what_changes_in_every_call_is_not_compiled_in_every_call(net, way, monkeypatch):
    """A number that grows or an activation that is kept: reading a forward takes longer than 20 steps."""
    entry = LENETS[net]
    model, images, labels = entry.model(), entry.inputs()[0], entry.labels()
    if way == "accelerate":
        lf.accelerate(model)

        def step():
            model(images)
    else:
        trainer = lf.FusedTrainer(model, "sgd", lr=0.01)

        def step():
            trainer.step(images, labels)

    read = []
    compile_frame = torch._dynamo.convert_frame._compile

    def counted(*args, **kwargs):
        read.append(args)
        return compile_frame(*args, **kwargs)

    monkeypatch.setattr(torch._dynamo.convert_frame, "_compile", counted)
    seed()
    for _ in range(50):
        step()
    assert len(read) <= 24
