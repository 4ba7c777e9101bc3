"""Those who look at operators instead of running them: fake tensors, make_fx, torch.export, torch.jit.trace."""

import contextlib
import gc
import io

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import lenet_fast as lf
from lenet_fast import functional, models
from lenet_fast.tables import LENET5_C3, Connections

TABLE = Connections.of(LENET5_C3)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


X, W, V, B = draw(3, 6, 8, 8), draw(16, 6, 3, 3), draw(60, 3, 3), draw(16)
FUNCTIONS = {  # functions of a batch and parameters
    "conv_act_pool": (functional.conv_act_pool, (X, W, B)),
    "conv_act_pool, no bias": (lambda x, w: functional.conv_act_pool(x, w, padding=1, pool="max"), (X, W)),
    "one window": (lambda x, w, b: functional.conv_act_pool(x, w, b, pool="none"), (draw(3, 6, 3, 3), W, B)),
    "same": (lambda x, w, b: functional.conv_act_pool(x, w, b, padding="same"), (X, draw(16, 6, 2, 2), B)),
    "sparse_conv_act_pool": (lambda x, v, b: functional.sparse_conv_act_pool(x, v, b, table=TABLE), (X, V, B)),
    "conv_subsample": (functional.conv_subsample, (X, W, B, draw(16), draw(16))),
    "sparse conv_subsample": (
        lambda x, v, b, c, d: functional.conv_subsample(x, v, b, c, d, table=TABLE),
        (X, V, B, draw(16), draw(16)),
    ),
    "linear_act": (functional.linear_act, (draw(3, 7), draw(5, 7), draw(5))),
    "rbf": (functional.rbf, (draw(3, 7), draw(5, 7))),
}
MODULES = {
    "ConvActPool2d": (lambda dtype: lf.nn.ConvActPool2d(6, 16, 3, dtype=dtype), (6, 8, 8)),
    "SparseConvActPool2d": (lambda dtype: lf.nn.SparseConvActPool2d(LENET5_C3, 3, padding=1, dtype=dtype), (6, 8, 8)),
    "ConvSubsample2d": (lambda dtype: lf.nn.ConvSubsample2d(6, 16, 3, dtype=dtype), (6, 8, 8)),
    "RBF": (lambda dtype: lf.nn.RBF(84, 10, dtype=dtype), (84,)),
    "random RBF": (lambda dtype: lf.nn.RBF(8, 10, dtype=dtype), (8,)),
    "ScaledTanh": (lambda dtype: lf.nn.ScaledTanh(), (84,)),
    "lenet1": (models.lenet1, (1, 28, 28)),
    "lenet5": (models.lenet5, (1, 32, 32)),
    "lenet5-d2l": (models.lenet5_d2l, (1, 28, 28)),
    "lenet5-1998": (models.lenet5_1998, (1, 32, 32)),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)
every_module = pytest.mark.parametrize("name", MODULES)
CONTEXTS = {"grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
in_every_context = pytest.mark.parametrize("context", CONTEXTS)


def build(name):
    torch.manual_seed(0)
    make, shape = MODULES[name]
    return make(dtype=torch.float64).eval(), shape


def gradients(function):
    """The output of a function, and the gradients of its arguments."""

    def compute(*tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = function(*leaves)
        return output, *torch.autograd.grad(output.square().sum(), leaves)

    return compute


def as_function(module):
    """A module as a function of its input, parameters and buffers, and these."""
    state = {name: value.detach() for name, value in (*module.named_parameters(), *module.named_buffers())}

    def function(input, *values):
        return functional_call(module, dict(zip(state, values, strict=True)), (input,))

    return function, tuple(state.values())


def assert_fake_like(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert isinstance(a, FakeTensor)
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


# --- fake tensors ----------------------------------------------------------------------------------------------------


@every_function
@pytest.mark.parametrize("shapes", ["static", "symbolic"])
def test_fake_tensors(name, shapes):
    function, tensors = FUNCTIONS[name]
    mode = FakeTensorMode(shape_env=ShapeEnv() if shapes == "symbolic" else None)
    fakes = [mode.from_tensor(tensor, static_shapes=shapes == "static") for tensor in tensors]
    expected = gradients(function)(*tensors)
    with mode:
        found = gradients(function)(*fakes)
    outside = gradients(function)(*fakes)  # fake tensors are so without their mode
    for values in (found, outside):
        assert all(isinstance(value, FakeTensor) for value in values)
        if shapes == "static":
            assert_fake_like(values, expected)
        else:
            assert [value.dim() for value in values] == [value.dim() for value in expected]


@every_module
@in_every_context
def test_fake_modules(name, context):
    with FakeTensorMode(), CONTEXTS[context]():
        module, shape = build(name)
        for size in (1, 4, 40):
            output = module(torch.randn(size, *shape, dtype=torch.float64))
            assert isinstance(output, FakeTensor)
            assert output.shape[0] == size
            if output.requires_grad:
                output.sum().backward()
                for parameter in module.parameters():
                    assert_fake_like([parameter.grad], [parameter])
        assert output.requires_grad == (context == "grad" and any(True for _ in module.parameters()))


def test_a_real_model_among_fake_images():
    """After it was used, so that it is known to the native code."""
    model = models.lenet5().eval()
    with torch.inference_mode():
        expected = model(torch.ones(2, 1, 32, 32))
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(model(torch.ones(2, 1, 32, 32)), FakeTensor)
        torch.testing.assert_close(model(torch.ones(2, 1, 32, 32)), expected, rtol=0, atol=0)


# --- make_fx ---------------------------------------------------------------------------------------------------------


def operators(graph):
    return {str(node.target).removeprefix("lenet_fast.") for node in graph.nodes if "lenet_fast" in str(node.target)}


@every_function
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(name, tracing_mode):
    function, tensors = FUNCTIONS[name]
    compute = gradients(function)
    traced = make_fx(compute, tracing_mode=tracing_mode)(*tensors)
    assert all(not name.startswith("_") for name in operators(traced.graph))
    if "conv" in name:
        assert len(operators(traced.graph)) == 2  # and backward
    sizes = (3, 5) if tracing_mode == "symbolic" else (3,)
    for size in sizes:
        batch = torch.cat([tensors[0], 2 * tensors[0]])[-size:]
        for found, expected in zip(traced(batch, *tensors[1:]), compute(batch, *tensors[1:]), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["SparseConvActPool2d", "lenet1", "lenet5-1998"])
@in_every_context
@pytest.mark.parametrize("tracing_mode", ["real", "symbolic"])
def test_make_fx_of_modules(name, tracing_mode, context):
    module, shape = build(name)
    function, parameters = as_function(module)
    compute = gradients(function) if context == "grad" else function
    images = draw(4, *shape)
    with CONTEXTS[context]():
        module(images)  # is known to the native code then
        traced = make_fx(compute, tracing_mode=tracing_mode)(images, *parameters)
    assert all(not name.startswith(("_", "network")) for name in operators(traced.graph))
    others = 2 * draw(7 if tracing_mode == "symbolic" else 4, *shape)
    torch.testing.assert_close(traced(others, *parameters), compute(others, *parameters), rtol=0, atol=1e-9)


def test_a_network_that_is_collected_while_a_graph_is_traced_is_not_in_it():
    held = [build("lenet1")[0]]
    with torch.inference_mode():
        held[0](draw(2, 1, 28, 28))  # is known to the native code then

    def compute(input):
        held.clear()
        gc.collect()
        return 2 * input

    assert operators(make_fx(compute)(torch.ones(3)).graph) == set()


# --- torch.export ----------------------------------------------------------------------------------------------------


class Function(nn.Module):
    def __init__(self, function, parameters):
        super().__init__()
        self.function = function
        self.values = nn.ParameterList(parameters)

    def forward(self, input):
        return self.function(input, *self.values)


@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_export_with_any_number_of_images(name):
    if name in MODULES:
        module, shape = build(name)
        input = draw(4, *shape)
    else:
        function, (input, *parameters) = FUNCTIONS[name]
        module = Function(function, parameters)
    batch = torch.export.Dim("batch", max=4096)
    program = torch.export.export(module, (input,), dynamic_shapes=({0: batch},))
    others = torch.cat([input, 2 * input, 3 * input])[:7]
    torch.testing.assert_close(program.module()(others), module(others), rtol=0, atol=1e-9)


# --- torch.jit.trace -------------------------------------------------------------------------------------------------


@every_module
@in_every_context
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace(name, context):
    module, shape = build(name)
    images, others = draw(4, *shape), draw(7, *shape)
    with CONTEXTS[context]():
        module(images)
        traced = torch.jit.trace(module, images, check_trace=True)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for way in (traced, loaded):
        for later in CONTEXTS.values():
            with later():
                torch.testing.assert_close(way(others), module(others), rtol=0, atol=1e-9)
    parameters = list(module.parameters())
    if context == "grad" and parameters:
        expected = torch.autograd.grad(module(others).square().sum(), parameters)
        for way in (traced, loaded):
            found = torch.autograd.grad(way(others).square().sum(), list(way.parameters()))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("context", ["grad", "no_grad"])
@every_function
def test_jit_trace_of_functions(name, context):
    function, tensors = FUNCTIONS[name]
    with CONTEXTS[context]():
        traced = torch.jit.trace(function, tensors, check_trace=True)
    batch = torch.cat([tensors[0], 2 * tensors[0]])[:5]
    found, expected = gradients(traced)(batch, *tensors[1:]), gradients(function)(batch, *tensors[1:])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


# --- the trainer -----------------------------------------------------------------------------------------------------


def under_fake_tensors(step, images):
    with FakeTensorMode(allow_non_fake_inputs=True):
        step(torch.ones_like(images))


SURROUNDINGS = {
    "fake tensors": under_fake_tensors,
    "make_fx": lambda step, images: make_fx(step)(images),
    "make_fx with symbols": lambda step, images: make_fx(step, tracing_mode="symbolic")(images),
    "jit.trace": lambda step, images: torch.jit.trace(step, images),
    "vmap": lambda step, images: torch.func.vmap(lambda image: step(image[None]))(images),
    "grad": lambda step, images: torch.func.grad(step)(images),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_the_trainer_says_where_it_cannot_be_followed(name):
    trainer = lf.FusedTrainer(models.lenet1(), "adam", lr=0.01)
    images, labels = torch.rand(3, 1, 28, 28), [torch.zeros(size, dtype=torch.int64) for size in range(4)]

    def step(images):
        return torch.tensor(trainer.step(images, labels[len(images)]))

    with pytest.raises(RuntimeError, match="cannot follow the fused trainer"):
        SURROUNDINGS[name](step, images)
    assert not trainer.optimizer.state
    step(images)
