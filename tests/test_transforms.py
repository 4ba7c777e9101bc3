"""The operators under autograd of any order, torch.func, torch.compile, torch.export, autocast and opcheck."""

import pytest
import torch
from operators import INTERPRETED, SMALL, SMALL_CASES, implementations
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacrev, vmap

from lenet_fast import nn
from lenet_fast.tables import LENET5_C3

implementation = pytest.mark.parametrize("implementation", implementations())


every_case = pytest.mark.parametrize("case", SMALL_CASES, ids=str)
CASES_AND_POOLS = [(case, pool) for case in SMALL_CASES for pool in case.pools]
every_case_and_pool = pytest.mark.parametrize(("case", "pool"), CASES_AND_POOLS, ids=str)
CPU = ("cpu", "auto")


def call(implementation, case=SMALL, activation="tanh", pool="avg"):
    """The fused operator and its reference as functions of their tensors, and the tensors."""
    device, backend = implementation
    tensors = case.tensors(device=device)

    def fused(*tensors):
        return case.run(tensors, activation, pool, backend)

    def plain(*tensors):
        return case.run(tensors, activation, pool, "reference")

    return fused, plain, tensors


@implementation
@pytest.mark.parametrize(
    ("case", "pool"),
    [
        (case, pool)
        for case, pool in CASES_AND_POOLS
        if not INTERPRETED or pool == "subsample" or (case, pool) == (SMALL, "avg")
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "activation", ["tanh", "scaled_tanh"] if INTERPRETED else ["identity", "sigmoid", "tanh", "scaled_tanh"]
)
def test_gradcheck_and_gradgradcheck(case, pool, activation, implementation):
    fused, _, tensors = call(implementation, case, activation, pool)
    tensors = tuple(t.requires_grad_() for t in tensors)
    assert gradcheck(fused, tensors, fast_mode=True)
    assert gradgradcheck(fused, tensors, fast_mode=True)


@every_case_and_pool
def test_the_raw_operator_differentiates_twice(case, pool):
    tensors = tuple(t.requires_grad_() for t in case.tensors())

    def raw(*tensors):
        return case.raw(tensors, "tanh", pool)

    assert gradcheck(raw, tensors)
    assert gradgradcheck(raw, tensors)


def test_double_backward_where_weight_depends_on_input():
    """The input's gradient must not be counted a second time through another argument."""
    input, weight, bias = SMALL.tensors()
    fused, plain, _ = call(CPU)
    results = []
    for run in (fused, plain):
        leaf = input.clone().requires_grad_()
        output = run(leaf, weight * leaf.mean(), bias)
        (first,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        results.append((first.detach(), second))
    torch.testing.assert_close(results[0], results[1])


# Of f(x, w, b, *rest); `rest` is what subsampling has more.
TRANSFORMS = {
    "grad": lambda f, x, w, *rest: grad(lambda *t: f(*t).square().sum(), argnums=tuple(range(len(rest) + 2)))(
        x, w, *rest
    ),
    "vmap over inputs": lambda f, x, *rest: vmap(lambda x: f(x, *rest), in_dims=1)(
        x[:, None].expand(-1, 3, -1, -1, -1)
    ),
    "ensemble": lambda f, x, *rest: vmap(f, in_dims=(None, *(0 for _ in rest)))(
        x, *(torch.stack([t, -t]) for t in rest)
    ),
    "ensemble on own inputs": lambda f, *tensors: vmap(f)(*(torch.stack([t, -t]) for t in tensors)),
    "per-sample gradients": lambda f, x, w, *rest: vmap(
        grad(lambda w, x: f(x[None], w, *rest).square().sum()), in_dims=(None, 0)
    )(w, x),
    "gradients of an ensemble": lambda f, x, w, *rest: vmap(
        grad(lambda w, x: f(x, w, *rest).square().sum()), in_dims=(0, None)
    )(torch.stack([w, -w]), x),
    "jacrev": lambda f, *tensors: jacrev(f, argnums=(0, 1, 2))(*tensors),
    "jacrev of grad": lambda f, x, w, *rest: jacrev(grad(lambda w: f(x, w, *rest).square().sum()))(w),
    "no bias": lambda f, x, w, b, *rest: vmap(
        grad(lambda w, x: f(x[None], w, None, *rest).square().sum()), in_dims=(None, 0)
    )(w, x),
    "nested vmap": lambda f, x, w, b, *rest: vmap(
        vmap(lambda w, b: f(x, w, b, *rest), in_dims=(None, 0)), in_dims=(0, None)
    )(torch.stack([w, -w]), torch.stack([b, b + 1, b - 1])),
}

# Triton's interpreter is slow.
INTERPRETED_TRANSFORMS = ("ensemble", "ensemble on own inputs", "per-sample gradients", "gradients of an ensemble")


@implementation
@every_case
@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(each, id=name)
        for name, each in TRANSFORMS.items()
        if not INTERPRETED or name in INTERPRETED_TRANSFORMS
    ],
)
def test_torch_func(transform, case, implementation):
    fused, plain, tensors = call(implementation, case)
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


@every_case
def test_forward_mode_raises(case):
    fused, _, (input, weight, *rest) = call(CPU, case)
    for run in (fused, lambda *t: case.raw(t)):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            run(forward_ad.make_dual(input, input), weight, *rest)
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        hessian(lambda w: fused(input, w, *rest).sum())(weight)  # forward over reverse
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(fused, (input, weight, *rest), (input, weight, *rest))


def test_raw_operator_under_torch_func_raises():
    input, weight, bias = SMALL.tensors()
    with pytest.raises(RuntimeError, match=r"lenet_fast\.functional\.conv_act_pool"):
        grad(lambda w: SMALL.raw((input, w, bias)).sum())(weight)


@every_case_and_pool
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(case, pool, bias):
    input, weight, b, *rest = (t.requires_grad_() for t in case.tensors(torch.float32))
    indices = case.table and case.table.indices
    if case.subsample:
        operator, options = "conv_subsample", (indices, 1, "sigmoid")
    elif case.table:
        operator, options = "sparse_conv_act_pool", (indices, case.out_channels, 1, "sigmoid", pool)
    else:
        operator, options = "conv_act_pool", (1, "sigmoid", pool)
    arguments = (input, weight, b if bias else None, *rest, *options)
    forward = getattr(torch.ops.lenet_fast, operator).default
    backward = getattr(torch.ops.lenet_fast, f"{operator}_backward").default
    torch.library.opcheck(forward, arguments)
    grad_output = torch.ones_like(forward(*arguments)).detach()
    if torch.__version__ < (2, 12):  # its own convolution cannot be differentiated twice with symbolic shapes
        arguments = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    for needs in ((True,) * (3 + len(rest)), (False, True, False, *(False for _ in rest))):
        torch.library.opcheck(backward, (grad_output, *arguments, *needs))


@every_case
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic, case):
    fused, plain, tensors = call(CPU, case)
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


@every_case
def test_compile_of_torch_func(case):
    fused, plain, tensors = call(CPU, case)
    transform = TRANSFORMS["per-sample gradients"]
    compiled = torch.compile(lambda *t: transform(fused, *t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), transform(plain, *tensors))


LAYERS = {
    "conv_act_pool": nn.ConvActPool2d(6, 16, 3, padding="same"),
    "sparse_conv_act_pool": nn.SparseConvActPool2d(LENET5_C3, 3, padding=1),
    "conv_subsample": nn.ConvSubsample2d(6, 16, 3, table=LENET5_C3),
}


@pytest.mark.parametrize("operator", LAYERS)
def test_export_keeps_one_node(operator):
    layer, batch = LAYERS[operator], torch.export.Dim("batch")
    program = torch.export.export(layer, (torch.randn(4, 6, 8, 8),), dynamic_shapes=({0: batch},))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [getattr(torch.ops.lenet_fast, operator).default]
    input = torch.randn(7, 6, 8, 8)
    torch.testing.assert_close(program.module()(input), layer(input))


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, case):
    tensors = tuple(t.requires_grad_() for t in case.tensors(torch.float32))
    low = tuple(t.detach().to(dtype) for t in tensors)
    expected = case.run(low)
    with torch.autocast("cpu", dtype):
        for run in (case.run, case.raw):
            torch.testing.assert_close(run(tensors), expected)
        assert torch.compile(lambda *t: case.run(t), fullgraph=True, backend="aot_eager")(*tensors).dtype == dtype
        assert case.run(tuple(t.double() for t in tensors)).dtype == torch.float64
        mixed = case.run((tensors[0], low[1], *tensors[2:]))
    torch.testing.assert_close(mixed, expected)
    mixed.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (tensors[0], *tensors[2:]))
