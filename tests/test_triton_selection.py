"""Every Triton kernel on a GPU with few compilations, a second each: all other Triton tests need thousands of them.

    python -m pytest -m triton_selection -k cuda-triton

Without a GPU the compilations are counted, and no kernel, no branch of a kernel and no dtype may be left out.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import triton_resources
from operators import ACTIVATIONS, INTERPRETED, POOLS, SPARSE_C3, Case, DenseCase, implementations
from test_operators import assert_as_accurate_as_pytorch

from lenet_fast import backends, ops

MOST_COMPILATIONS = 100
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
POOLINGS = (*POOLS, "subsample")

# Each dtype meets each activation and each pooling; over the four dtypes, each activation meets each pooling.
CONVOLUTIONS = [
    (replace(SPARSE_C3, subsample=pooling == "subsample"), dtype, activation, pooling)
    for shift, dtype in enumerate(DTYPES)
    for index, activation in enumerate(ACTIVATIONS)
    for pooling in [POOLINGS[(index + shift) % len(POOLINGS)]]
]
CONVOLUTIONS += [
    (Case(20, 1, 28, 28, 6, 5, 2), torch.float32, "tanh", "avg"),  # padded
    (Case(3, 2, 13, 10, 3, 11, 5, bias=False), torch.float32, "sigmoid", "max"),  # too large a kernel to unroll
    (Case(2 if INTERPRETED else 1400, 6, 14, 14, 16, 5), torch.float32, "sigmoid", "avg"),  # the largest tiles
]
DENSE = [
    *((DenseCase("linear_act", 70, 33, 40), torch.float32, activation, None) for activation in ACTIVATIONS),
    *((DenseCase("linear_act", 70, 33, 40, bias=False), dtype, "scaled_tanh", None) for dtype in DTYPES[1:]),
    *((DenseCase("rbf", 70, 84, 10), dtype, None, None) for dtype in DTYPES),
]
SELECTED = CONVOLUTIONS + DENSE
TRITON = [each for each in implementations() if each.values[0][1] == "triton"]


@pytest.mark.triton_selection
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("implementation", TRITON)
@pytest.mark.parametrize(
    ("case", "dtype", "activation", "pool"), [pytest.param(*each, id="-".join(map(str, each))) for each in SELECTED]
)
def test_selected(case, dtype, activation, pool, implementation):
    assert_as_accurate_as_pytorch(case, dtype, *implementation, activation, pool)


# --- what it compiles, counted without a GPU --------------------------------------------------------------------------

counted = pytest.mark.skipif(
    INTERPRETED or backends.why_unavailable("triton", "cuda") is not None, reason="Triton does not compile here"
)


@pytest.fixture
def compilations(monkeypatch):
    """(kernel, {constant: value}, dtypes of the tensors) of all that the selected tests compile.

    They run here, on CPU tensors: launches are recorded, and the results are those of the plain definitions.
    """
    launch_forward, launch_backward = ops.TritonOperator.run_triton, ops.TritonOperator.run_triton_backward

    def forward(operator, *args):
        launch_forward(operator, *args)
        return operator.definition(*args)

    def backward(operator, *args):
        launch_backward(operator, *args)
        return operator._gradients(*args)

    monkeypatch.setattr(ops.TritonOperator, "run_triton", forward)
    monkeypatch.setattr(ops.TritonOperator, "run_triton_backward", backward)
    monkeypatch.setattr(backends, "why_unavailable", lambda backend, device_type: None)
    with triton_resources.recorded() as found:
        for each in SELECTED:
            test_selected(*each, ("cpu", "triton"))
    compilations = []
    for kernel, signature, constants, *_ in found.values():
        names = list(signature)
        pointers = {kind.removeprefix("*") for kind in signature.values() if kind.startswith("*")}
        compilations.append((kernel, {names[position]: value for position, value in constants.items()}, pointers))
    return compilations


@counted
def test_the_selection_is_small(compilations):
    assert len(compilations) <= MOST_COMPILATIONS


@counted
def test_the_selection_leaves_nothing_out(compilations):
    def values(kernel, *constants):
        """That the kernel's constants take in some compilation."""
        return {tuple(found[each] for each in constants) for name, found, _ in compilations if name == kernel}

    kernels = {kernel.__name__ for kernel in triton_resources.kernels()}
    assert {kernel for kernel, *_ in compilations} == kernels
    for kernel, dtype in product(kernels, DTYPES):
        name = triton_resources.DTYPES[dtype]
        assert any(kernel == other and name in pointers for other, _, pointers in compilations), (kernel, dtype)
    for kernel in ("conv_act_pool_kernel", "pre_activation_gradient_kernel"):
        assert values(kernel, "ACTIVATION", "POOL") == set(product(ACTIVATIONS, POOLINGS))
    assert values("linear_act_kernel", "ACTIVATION", "BACKWARD") == set(product(ACTIVATIONS, (False, True)))
    # Of every kernel that has such a constant.
    for constant, expected in {
        "SPARSE": {False, True},
        "BIAS": {False, True},
        "PADDED": {False, True},
        "K": {5, 11},
    }.items():
        having = [k for k in triton_resources.kernels() if constant in k.arg_names]
        assert having
        for kernel in having:
            assert values(kernel.__name__, constant) == {(value,) for value in expected}, (kernel, constant)


@counted
def test_the_back_end_is_in_the_tests_names():
    """With which a GPU machine selects them, and a pretended one, too."""
    assert [each.id for each in TRITON] == ["cuda-triton"]


def test_no_other_test_is_in_the_selection():
    """Whose compilations nobody would count."""
    tests = Path(__file__).parent
    marked = {path.name for path in tests.glob("**/*.py") if "mark.triton_selection" in path.read_text()}
    assert marked == {Path(__file__).name}
