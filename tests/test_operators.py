"""The operators against their plain PyTorch definitions: values, gradients, layouts, dtypes, determinism."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from operators import (
    ACTIVATIONS,
    CASES,
    INTERPRETED,
    K7,
    K11,
    LENET_1998_C3,
    LENET_C1,
    LENET_C3,
    ODD,
    POOLS,
    SMALL,
    SMALL_CASES,
    SPARSE_C3,
    Case,
    implementations,
    random_cases,
)

from lenet_fast import functional, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

implementation = pytest.mark.parametrize("implementation", implementations())
every_case = pytest.mark.parametrize(
    ("case", "pool"), [pytest.param(case, pool, id=f"{case}-{pool}") for case in CASES for pool in case.pools]
)


def error(actual, expected):
    """Largest difference as a share of the expected values' largest magnitude."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    if expected.numel() == 0:
        return 0.0
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))


def assert_as_accurate_as_pytorch(case, dtype, device, backend, activation, pool):
    """No more than 2x (forward) or 3x (gradients) the error of PyTorch's own operators in the same dtype.

    In float64, of which nothing here is more exact: equal to PyTorch's own but for some roundings.
    """
    tensors = case.tensors(dtype)
    if dtype == torch.float64:
        expected, expected_grads = case.gradients(tensors, activation, pool, "reference")
        output, grads = case.gradients(case.tensors(device=device), activation, pool, backend)
        assert error(output.cpu(), expected) < 1e-13
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert error(grad.cpu(), expected_grad) < 1e-12
        return
    exact = case.gradients(tuple(t.double() if t is not None else None for t in tensors), activation, pool, "reference")
    plain = case.gradients(tensors, activation, pool, "reference")
    on_device = tuple(t.to(device) if t is not None else None for t in tensors)
    output, grads = case.gradients(on_device, activation, pool, backend)
    assert output.dtype == dtype
    # In float32 both errors are a few roundings, and either may be lucky: never ask for less than four.
    eps = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    assert error(output.cpu(), exact[0]) <= 2 * max(error(plain[0], exact[0]), eps)
    for grad, plain_grad, exact_grad in zip(grads, plain[1], exact[1], strict=True):
        assert grad.dtype == dtype
        assert error(grad.cpu(), exact_grad) <= 3 * max(error(plain_grad, exact_grad), eps)


@implementation
@pytest.mark.parametrize(
    ("case", "pool", "activation"),
    [
        pytest.param(case, pool, activation, id=f"{activation}-{case}-{pool}")
        for activation in ACTIVATIONS
        for case in CASES
        for pool in case.pools
        if not INTERPRETED or activation == "sigmoid" or (case.height, case.width) == (ODD.height, ODD.width)
    ],
)
def test_float64(case, activation, pool, implementation):
    assert_as_accurate_as_pytorch(case, torch.float64, *implementation, activation, pool)


@implementation
@pytest.mark.parametrize(
    ("seed", "dtype"),
    [
        pytest.param(0, torch.float32, marks=pytest.mark.cuda_host),
        *((seed, torch.float32) for seed in range(1, 2 if INTERPRETED else 10)),
        *((seed, torch.float64) for seed in range(0 if INTERPRETED else 10)),
    ],
    ids=str,
)
def test_random_shapes(seed, dtype, implementation):
    """Where tiles, bands and vectors end anywhere."""
    device, backend = implementation
    bound = 1e-12 if dtype == torch.float64 else 1e-4
    for number, case in enumerate(random_cases(2 if INTERPRETED else 50, seed)):
        activation, pool = ("tanh", "sigmoid", "identity")[number % 3], case.pools[number % len(case.pools)]
        if dtype == torch.float64:
            activation = ACTIVATIONS[number % len(ACTIVATIONS)]
        elif pool == "max":
            pool = "avg"  # in float32 rounding decides between near-equal maxima, as at the kink of a ReLU
        expected, expected_grads = case.gradients(case.tensors(), activation, pool, "reference")
        output, grads = case.gradients(case.tensors(dtype, device), activation, pool, backend)
        assert error(output.cpu(), expected) < bound, (case, activation, pool)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert error(grad.cpu(), expected_grad) < bound, (case, activation, pool)


@implementation
@pytest.mark.parametrize("case", [LENET_C1, LENET_C3, SPARSE_C3, LENET_1998_C3, ODD, K7, K11], ids=str)
@pytest.mark.parametrize(("activation", "pool"), [("sigmoid", "avg"), ("relu", "max"), ("scaled_tanh", "none")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_shorter_dtypes(case, activation, pool, dtype, implementation):
    assert_as_accurate_as_pytorch(case, dtype, *implementation, activation, pool)


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def strided(tensor):
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]


def transposed(tensor):
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def offset(tensor):
    return torch.cat([torch.full((3,), torch.nan, dtype=tensor.dtype), tensor.flatten()])[3:].view(tensor.shape)


@implementation
@pytest.mark.parametrize("layout", [channels_last, strided, transposed, offset])
@pytest.mark.parametrize("case", [LENET_C3, SPARSE_C3, LENET_1998_C3], ids=str)
def test_strides(case, layout, implementation):
    device, backend = implementation
    tensors = tuple(layout(t).to(device) for t in case.tensors())
    expected, expected_grads = case.gradients(case.tensors(), backend="reference")
    output, grads = case.gradients(tensors, backend=backend)
    assert error(output.cpu(), expected) < 1e-13
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert error(grad.cpu(), expected_grad) < 1e-12


@pytest.mark.cuda_host
@implementation
def test_expanded_tensors_and_gradients(implementation):
    device, backend = implementation
    input, weight, bias = SMALL.tensors(device=device)
    results = []
    for run in (backend, "reference"):
        leaf = input[:1].clone().requires_grad_()
        output = SMALL.run(
            (leaf.expand(5, -1, -1, -1), weight[:1].expand(3, -1, -1, -1), bias[:1].expand(3)), backend=run
        )
        output.sum().backward()  # an expanded gradient
        results.append((output.detach(), leaf.grad))
    assert error(results[0][0], results[1][0]) < 1e-13
    assert error(results[0][1], results[1][1]) < 1e-12


@pytest.mark.cuda_host
@implementation
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)], ids=str)
def test_only_the_wanted_gradients(needs, implementation):
    device, backend = implementation
    tensors = SMALL.tensors(device=device)
    expected = dict(zip(range(3), SMALL.gradients(tensors, backend="reference", seed=1)[1], strict=True))
    leaves = tuple(t.requires_grad_(bool(need)) for t, need in zip(tensors, needs, strict=True))
    output = SMALL.run(leaves, backend=backend)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator, dtype=output.dtype).to(device))
    for index, leaf in enumerate(leaves):
        if needs[index]:
            assert error(leaf.grad, expected[index]) < 1e-12
        else:
            assert leaf.grad is None


@pytest.mark.cuda_host
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@implementation
def test_unbatched_input_and_padding_names(implementation):
    device, backend = implementation
    for case in (SMALL, replace(SMALL, kernel_size=4)):  # "same" of an even kernel is one-sided
        input, weight, bias = case.tensors(device=device)
        for padding in (0, 1, "valid", "same"):
            one = functional.conv_act_pool(input[0], weight, bias, padding=padding, backend=backend)
            expected = F.avg_pool2d(torch.sigmoid(F.conv2d(input, weight, bias, padding=padding)), 2)[0]
            assert error(one, expected) < 1e-13


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch", [0, 1, 7])
def test_one_window_over_the_whole_input(batch, activation):
    """Computed as a matrix product."""
    case = Case(batch, 4, 5, 5, 6, 5)
    expected, expected_grads = case.gradients(case.tensors(), activation, "none", "reference")
    output, grads = case.gradients(case.tensors(), activation, "none")
    assert error(output, expected) < 1e-13
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert error(grad, expected_grad) < 1e-12


@pytest.mark.cuda_host
@implementation
@pytest.mark.parametrize("pool", POOLS)
def test_nan_and_infinity_propagate_as_in_pytorch(pool, implementation):
    device, backend = implementation
    input, weight, bias = Case(3, 1, 8, 8, 2, 3).tensors(torch.float32)
    input[0, 0, 2, 3] = torch.nan
    input[1, 0, 0, 0] = torch.inf
    input[1, 0, 7, 7] = -torch.inf
    for activation in ACTIVATIONS:
        options = {"activation": activation, "pool": pool}
        expected = functional.conv_act_pool(input, weight, bias, backend="reference", **options)
        output = functional.conv_act_pool(
            input.to(device), weight.to(device), bias.to(device), backend=backend, **options
        )
        torch.testing.assert_close(output.cpu(), expected, equal_nan=True)


@pytest.mark.cuda_host
@implementation
@pytest.mark.parametrize("case", SMALL_CASES[:2], ids=str)
def test_of_equal_values_the_first_is_the_largest(case, implementation):
    """The gradient goes there. Sums of ones and minus ones are exact, and often equal."""
    device, backend = implementation
    tensors = tuple(t.sign() for t in case.tensors(device=device))
    _, expected = case.gradients(tensors, "identity", "max", "reference")
    _, grads = case.gradients(tensors, "identity", "max", backend)
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert error(grad, expected_grad) < 1e-13


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_where_it_belongs(value):
    """Also by Winograd's algorithm, though it makes NaN of what PyTorch finds infinite."""
    input, weight, bias = LENET_C3.tensors()
    input[3, 2, 7, 6] = input[4, 0, 0, 13] = input[5, 5, 13, 0] = value
    options = {"activation": "identity", "pool": "none"}
    expected = functional.conv_act_pool(input, weight, bias, backend="reference", **options)
    output = functional.conv_act_pool(input, weight, bias, backend="native", **options)
    finite = expected.isfinite()
    assert torch.equal(output.isfinite(), finite)
    torch.testing.assert_close(output[finite], expected[finite])


# Of activations whose derivative is computed from their value: largest error of the derivative, in eps.
DERIVATIVES = {"sigmoid": 1.5, "tanh": 3, "scaled_tanh": 4}


def exact_derivative(activation, z):
    """Of z in float64; without the cancellation of 1 - y^2."""
    if activation == "sigmoid":
        return torch.sigmoid(z) * torch.sigmoid(-z)
    amplitude, slope = (
        (1, 1) if activation == "tanh" else (reference.SCALED_TANH_AMPLITUDE, reference.SCALED_TANH_SLOPE)
    )
    return amplitude * slope / torch.cosh(slope * z).square()


@pytest.mark.cuda_host
@implementation
@pytest.mark.parametrize("activation", DERIVATIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_are_within_4_ulp_over_the_whole_range(activation, dtype, implementation):
    device, backend = implementation
    one = torch.ones(1, 1, 1, 1, dtype=dtype, device=device)

    def run(z, weight, backend):
        """Values and derivatives."""
        options = {"activation": activation, "pool": "none", "backend": backend}
        z = z.detach().requires_grad_()
        values = functional.conv_act_pool(z.view(1, 1, 1, -1), weight, **options).flatten()
        return values.detach().cpu(), torch.autograd.grad(values.sum(), z)[0].cpu()

    limits = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)
    exact_limits = run(limits.double(), one.cpu().double(), "reference")[0].to(dtype)
    torch.testing.assert_close(run(limits.to(device), one, backend)[0], exact_limits, rtol=0, atol=0, equal_nan=True)

    small = torch.logspace(-30, 0, 4000)
    z = torch.cat([torch.linspace(-120, 120, 40001), torch.linspace(-9, 9, 40001), small, -small]).to(dtype)
    exact, _ = run(z.double(), one.cpu().double(), "reference")
    values, derivatives = run(z.to(device), one, backend)
    # Relative to the value, also where that is tiny: tanh near 0, sigmoid far left. Subnormal results may be 0.
    tiny = torch.finfo(dtype).tiny
    magnitude = exact.abs().clamp_min(tiny).to(dtype)
    ulp = (magnitude.nextafter(torch.tensor(torch.inf, dtype=dtype)) - magnitude).double()
    error = (values.double() - exact).abs()
    error_ulp = torch.where(exact.abs() < tiny, 0, error / ulp)
    assert error_ulp.max() <= 4, f"{error_ulp.max()} ulp at {z[error_ulp.argmax()]}"
    assert (error[exact.abs() < tiny] <= tiny).all()
    error = (derivatives.double() - exact_derivative(activation, z.double())).abs() / torch.finfo(dtype).eps
    assert error.max() <= DERIVATIVES[activation], f"{error.max()} eps at {z[error.argmax()]}"


@implementation
@pytest.mark.parametrize("case", [LENET_C3, LENET_1998_C3], ids=str)
def test_bit_equal_on_every_run(case, implementation):
    device, backend = implementation
    tensors = tuple(t.to(device) for t in replace(case, batch=100).tensors(torch.float32))
    first, *others = (case.gradients(tensors, backend=backend) for _ in range(3))
    for other in others:
        assert torch.equal(first[0], other[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], other[1], strict=True))


def test_within_rounding_across_thread_counts():
    tensors = replace(LENET_C3, batch=100).tensors()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(LENET_C3.gradients(tensors))
    finally:
        torch.set_num_threads(threads)
    for output, grads in results[1:]:
        assert torch.equal(output, results[0][0])
        assert all(error(a, b) < 1e-13 for a, b in zip(grads, results[0][1], strict=True))


@pytest.mark.parametrize("case", [LENET_C1, LENET_C3, LENET_1998_C3, ODD], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 6, 8, 12, 24, 31, 65])
def test_every_batch_size(case, batch):
    """Few images are cut into bands of rows: each size cuts differently."""
    case = replace(case, batch=batch)
    expected, expected_grads = case.gradients(case.tensors(), backend="reference")
    output, grads = case.gradients(case.tensors(), backend="native")
    assert error(output, expected) < 1e-13
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert error(grad, expected_grad) < 1e-12


@every_case
def test_a_record_changes_nothing(case, pool):
    """Autograd on the CPU keeps a record of forward; the raw backward operator computes the same anew."""
    if case.padding == "same":
        pytest.skip("the raw operators take an int")
    tensors = case.tensors(torch.float32)
    leaves = tuple(t.detach().requires_grad_() if t is not None else None for t in tensors)
    recorded, recorded_grads = case.gradients(tensors, pool=pool)
    output = case.raw(leaves, pool=pool)
    assert torch.equal(output, recorded)
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    grads = torch.autograd.grad(output, [t for t in leaves if t is not None], grad_output)
    assert all(map(torch.equal, grads, recorded_grads))


def test_a_large_batch_keeps_no_record():
    input, weight, bias = replace(LENET_C1, batch=1200).tensors(torch.float32)
    forward, backward = torch.ops.lenet_fast._conv_recording, torch.ops.lenet_fast._conv_recorded_backward
    arguments = (weight, bias, None, None, None, -1, 2, "sigmoid", "avg")
    needs = (False, True, True, False, False)
    output, record = forward(input, *arguments)
    assert record.numel() == 0
    parts = [forward(part, *arguments) for part in input.split(400)]
    assert all(record.numel() > 0 for _, record in parts)
    assert torch.equal(output, torch.cat([part for part, _ in parts]))
    grads = backward(output, record, input, *arguments, *needs)
    sums = zip(
        *(backward(y, r, x, *arguments, *needs) for (y, r), x in zip(parts, input.split(400), strict=True)), strict=True
    )
    for grad, parts_of_grad in zip(grads, sums, strict=True):
        assert error(grad, sum(parts_of_grad)) < 1e-5
    for wrong in (parts[0][1], parts[0][1].double(), torch.zeros(3)):
        with pytest.raises(RuntimeError, match="record: expected the one that forward made"):
            backward(output, wrong, input, *arguments, *needs)


@pytest.mark.cuda_host
def test_infinite_pixels_reach_only_the_weights_that_see_them():
    """An odd convolution width is computed rounded up: what is computed too much must not mix 0 * inf in."""
    case = Case(2, 1, 7, 7, 2, 3)
    input, weight, bias = case.tensors()
    input[0, 0, 3, 0] = torch.inf
    for activation in ("relu", "tanh"):
        expected = case.gradients((input, weight, bias), activation, "none", "reference")
        output = case.gradients((input, weight, bias), activation, "none", "native")
        torch.testing.assert_close(output, expected, equal_nan=True)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("offset", [0, 1])
def test_what_is_saved_for_backward_may_come_back_from_anywhere(pool, offset):
    """By hooks on saved tensors: other memory, aligned for nothing but its values."""

    def moved(tensor):
        memory = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)[offset:]
        return memory.copy_(tensor.flatten()).view(tensor.shape)

    case = replace(LENET_C1, batch=33)
    tensors = case.tensors(torch.float32)
    expected = case.gradients(tensors, "relu", pool)
    with torch.autograd.graph.saved_tensors_hooks(moved, lambda tensor: tensor):
        output, grads = case.gradients(tensors, "relu", pool)
    assert torch.equal(output, expected[0])
    for grad, right in zip(grads, expected[1], strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-5, atol=1e-5)
