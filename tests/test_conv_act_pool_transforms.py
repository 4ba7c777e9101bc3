"""conv_act_pool under autograd of any order, torch.func, torch.compile, torch.export, autocast and opcheck."""

import pytest
import torch
from operators import POOLS, SMALL, implementations
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacrev, vmap

from lenet_fast import nn

implementation = pytest.mark.parametrize("implementation", implementations())


def call(implementation, activation="tanh", pool="avg"):
    """The fused operator and its reference as functions of (input, weight, bias), and tensors for them."""
    device, backend = implementation
    tensors = SMALL.tensors(device=device)

    def fused(input, weight, bias):
        return SMALL.run((input, weight, bias), activation, pool, backend)

    def plain(input, weight, bias):
        return SMALL.run((input, weight, bias), activation, pool, "reference")

    return fused, plain, tensors


def raw(pool="avg"):
    return lambda *tensors: torch.ops.lenet_fast.conv_act_pool(*tensors, 1, "tanh", pool)


@implementation
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("activation", ["identity", "sigmoid", "tanh", "scaled_tanh"])
def test_gradcheck_and_gradgradcheck(activation, pool, implementation):
    fused, _, tensors = call(implementation, activation, pool)
    tensors = tuple(t.requires_grad_() for t in tensors)
    assert gradcheck(fused, tensors)
    assert gradgradcheck(fused, tensors)


@pytest.mark.parametrize("pool", POOLS)
def test_the_raw_operator_differentiates_twice(pool):
    tensors = tuple(t.requires_grad_() for t in SMALL.tensors())
    assert gradcheck(raw(pool), tensors)
    assert gradgradcheck(raw(pool), tensors)


def test_double_backward_where_weight_depends_on_input():
    """The input's gradient must not be counted a second time through another argument."""
    input, weight, bias = SMALL.tensors()
    fused, plain, _ = call(("cpu", "auto"))
    results = []
    for run in (fused, plain):
        leaf = input.clone().requires_grad_()
        output = run(leaf, weight * leaf.mean(), bias)
        (first,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        results.append((first.detach(), second))
    torch.testing.assert_close(results[0], results[1])


TRANSFORMS = {
    "grad": lambda f, x, w, b: grad(lambda *t: f(*t).square().sum(), argnums=(0, 1, 2))(x, w, b),
    "vmap over inputs": lambda f, x, w, b: vmap(f, in_dims=(1, None, None))(x[:, None].expand(-1, 3, -1, -1, -1), w, b),
    "ensemble": lambda f, x, w, b: vmap(f, in_dims=(None, 0, 0))(x, torch.stack([w, -w]), torch.stack([b, b + 1])),
    "ensemble on own inputs": lambda f, x, w, b: vmap(f)(
        torch.stack([x, -x]), torch.stack([w, -w]), torch.stack([b, b + 1])
    ),
    "per-sample gradients": lambda f, x, w, b: vmap(
        grad(lambda w, b, x: f(x[None], w, b).square().sum(), argnums=(0, 1)), in_dims=(None, None, 0)
    )(w, b, x),
    "gradients of an ensemble": lambda f, x, w, b: vmap(
        grad(lambda w, x: f(x, w, b).square().sum()), in_dims=(0, None)
    )(torch.stack([w, -w]), x),
    "jacrev": lambda f, x, w, b: jacrev(f, argnums=(0, 1, 2))(x, w, b),
    "jacrev of grad": lambda f, x, w, b: jacrev(grad(lambda w: f(x, w, b).square().sum()))(w),
    "no bias": lambda f, x, w, b: vmap(grad(lambda w, x: f(x[None], w, None).square().sum()), in_dims=(None, 0))(w, x),
    "nested vmap": lambda f, x, w, b: vmap(vmap(lambda w, b: f(x, w, b), in_dims=(None, 0)), in_dims=(0, None))(
        torch.stack([w, -w]), torch.stack([b, b + 1, b - 1])
    ),
}


@implementation
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_torch_func(transform, implementation):
    fused, plain, tensors = call(implementation)
    torch.testing.assert_close(transform(fused, *tensors), transform(plain, *tensors))


def test_per_sample_gradients_of_a_layer():
    layer = nn.ConvActPool2d(2, 3, 3, dtype=torch.float64)
    input = SMALL.tensors()[0]
    parameters = dict(layer.named_parameters())

    def loss(parameters, sample):
        return functional_call(layer, parameters, (sample[None],)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, input)
    layer(input).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad)


def test_forward_mode_raises():
    fused, _, (input, weight, bias) = call(("cpu", "auto"))
    for run in (fused, raw()):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            run(forward_ad.make_dual(input, input), weight, bias)
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        hessian(lambda w: fused(input, w, bias).sum())(weight)  # forward over reverse
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(fused, (input, weight, bias), (input, weight, bias))


def test_raw_operator_under_torch_func_raises():
    input, weight, bias = SMALL.tensors()
    with pytest.raises(RuntimeError, match=r"lenet_fast\.functional\.conv_act_pool"):
        grad(lambda w: raw()(input, w, bias).sum())(weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pool", POOLS)
def test_opcheck(pool, bias):
    input, weight, b = (t.requires_grad_() for t in SMALL.tensors(torch.float32))
    options = (1, "sigmoid", pool)
    arguments = (input, weight, b if bias else None, *options)
    torch.library.opcheck(torch.ops.lenet_fast.conv_act_pool.default, arguments)
    grad_output = torch.ones_like(torch.ops.lenet_fast.conv_act_pool(*arguments))
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(
            torch.ops.lenet_fast.conv_act_pool_backward.default, (grad_output.detach(), *arguments, *needs)
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    fused, plain, tensors = call(("cpu", "auto"))
    compiled = torch.compile(fused, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 5, 9):
        input = torch.cat([tensors[0]] * 5)[:batch]
        leaves = tuple(t.detach().requires_grad_() for t in (input, *tensors[1:]))
        output = compiled(*leaves)
        expected = plain(*leaves)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(
            torch.autograd.grad(output.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
        )


def test_compile_with_inductor():
    layer = torch.nn.Sequential(nn.ConvActPool2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(36, 2))
    input = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(input), layer(input))


def test_compile_of_torch_func():
    fused, plain, tensors = call(("cpu", "auto"))
    transform = TRANSFORMS["per-sample gradients"]
    compiled = torch.compile(lambda *t: transform(fused, *t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), transform(plain, *tensors))


def test_export_keeps_one_node():
    layer = nn.ConvActPool2d(2, 3, 3, padding="same")
    batch = torch.export.Dim("batch")
    program = torch.export.export(layer, (torch.randn(4, 2, 8, 8),), dynamic_shapes=({0: batch},))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.lenet_fast.conv_act_pool.default]
    input = torch.randn(7, 2, 8, 8)
    torch.testing.assert_close(program.module()(input), layer(input))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    tensors = tuple(t.requires_grad_() for t in SMALL.tensors(torch.float32))
    low = tuple(t.detach().to(dtype) for t in tensors)
    expected = SMALL.run(low)
    with torch.autocast("cpu", dtype):
        for run in (SMALL.run, lambda t: torch.ops.lenet_fast.conv_act_pool(*t, 1, "sigmoid", "avg")):
            torch.testing.assert_close(run(tensors), expected)
        assert torch.compile(lambda *t: SMALL.run(t), fullgraph=True, backend="aot_eager")(*tensors).dtype == dtype
        assert SMALL.run(tuple(t.double() for t in tensors)).dtype == torch.float64
        mixed = SMALL.run((tensors[0], low[1], tensors[2]))
    torch.testing.assert_close(mixed, expected)
    mixed.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (tensors[0], tensors[2]))
