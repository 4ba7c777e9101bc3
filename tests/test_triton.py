"""The Triton kernels without a GPU: other tests' checks under Triton's interpreter, registration, traced graphs.

Triton reads TRITON_INTERPRET when it is imported, so that whatever is interpreted runs in a process of its own.
"""

import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func
from operators import INTERPRETED, LENET_C1, SMALL_CASES, SPARSE_C3, Case, DenseCase, random_table
from test_operators import assert_as_accurate_as_pytorch
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from lenet_fast import backends, env, functional

TESTS = Path(__file__).parent
SUITES = {  # the files themselves make less of their tests where Triton is interpreted
    "operators": ["test_operators.py", "-k", "cpu-triton"],
    "transforms": ["test_transforms.py", "-k", "cpu-triton"],
    "kernels": ["test_triton.py", "-m", "interpreted"],
}

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
compiled = pytest.mark.skipif(INTERPRETED, reason="runs where Triton compiles")


@pytest.fixture(scope="module")
def suites():
    """The results of all suites, as futures; two run at a time, the longest first."""

    def run(file, *selection):
        # NumPy, which computes there, warns of what the tests do on purpose: infinities.
        command = [sys.executable, "-m", "pytest", TESTS / file, *selection, "-W", "ignore::RuntimeWarning"]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, *suite) for name, suite in SUITES.items()}


@needs_triton
@compiled
@pytest.mark.parametrize("suite", SUITES)
def test_under_the_interpreter(suites, suite):
    done = suites[suite].result()
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


# --- under the interpreter -------------------------------------------------------------------------------------------


def interpreted(test):
    reason = "runs under Triton's interpreter, by test_under_the_interpreter"
    return pytest.mark.interpreted(pytest.mark.skipif(not INTERPRETED, reason=reason)(test))


TILED = [
    replace(LENET_C1, batch=9),
    Case(5, 3, 7, 6, 11, 3, table=random_table(11, 3)),  # the last tile of maps is not full
    Case(3, 9, 5, 6, 5, 3, 1, subsample=True),
]


@interpreted
@pytest.mark.parametrize("case", [Case(2, 6, 14, 14, 16, 5), replace(SPARSE_C3, kernel_size=5)], ids=str)
def test_interpreted_c3(case):
    check(case, "tanh", "max")


@interpreted
@pytest.mark.parametrize("case", TILED, ids=str)
def test_interpreted_with_the_launch_configuration_of_a_gpu(case, monkeypatch):
    """Many programs, several tiles, partial sums of several."""
    from lenet_fast import triton_conv

    grids = []
    launch = triton_conv.launch
    monkeypatch.setattr(triton_conv, "INTERPRETED", False)
    monkeypatch.setattr(
        triton_conv,
        "launch",
        lambda kernel, grid, *args, **kw: (grids.append(grid), launch(kernel, grid, *args, **kw)),
    )
    check(case, "sigmoid", "avg")
    assert max(grid[0] for grid in grids) > 8


@interpreted
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_interpreted_under_compile(case):
    def run(*tensors, backend):
        return case.run(tensors, "tanh", backend=backend)

    tensors = tuple(t.requires_grad_() for t in case.tensors())
    output = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors, backend="triton")
    expected = run(*tensors, backend="reference")
    torch.testing.assert_close(output, expected)
    grads = torch.autograd.grad(output.square().sum(), tensors)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), tensors))


def check(case, activation, pool):
    expected, expected_grads = case.gradients(case.tensors(), activation, pool, "reference")
    output, grads = case.gradients(case.tensors(), activation, pool, "triton")
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-11, atol=1e-11)


DENSE = [
    DenseCase(operator, *shape, bias)
    for operator, bias in (("linear_act", True), ("linear_act", False), ("rbf", False))
    for shape in ((5, 84, 10), (70, 33, 40), (0, 7, 3), (2, 1, 1))
]


@interpreted
@pytest.mark.parametrize("case", DENSE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_interpreted_dense_operators(case, dtype):
    assert_as_accurate_as_pytorch(case, dtype, "cpu", "triton", "scaled_tanh" if case.bias else "relu", None)


@interpreted
@pytest.mark.parametrize("case", [replace(case, batch=3, features=4, outputs=2) for case in DENSE[::4]], ids=str)
def test_interpreted_dense_operators_differentiate_twice(case):
    tensors = tuple(t if t is None else t.requires_grad_() for t in case.tensors())
    assert gradgradcheck(lambda *t: case.run(t, "scaled_tanh", backend="triton"), tensors)
    input, *others = tensors
    vmapped = torch.func.vmap(lambda x: case.run((x, *others), backend="triton"))(torch.stack([input, -input]))
    torch.testing.assert_close(vmapped[1], case.run((-input, *others), backend="reference"))


class Products(TorchDispatchMode):
    """Records PyTorch's matrix products: dtype of the operands, and whether cuBLAS may take TF32 for them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten.mm.default:
            self.seen.append((*(tensor.dtype for tensor in args), torch.backends.cuda.matmul.allow_tf32))
        return operator(*args, **(kwargs or {}))


@needs_triton
@pytest.mark.parametrize(("precision", "tf32"), [(None, False), ("highest", False), ("high", True)])
def test_gradients_of_dense_layers_are_products_as_pytorch_is_told_to_take_them(monkeypatch, precision, tf32):
    """With the precision that PyTorch has, which is exact unless somebody says otherwise."""
    from lenet_fast import triton_dense

    grad = torch.randn(5, 3)
    monkeypatch.setattr(triton_dense, "_linear_act", lambda *_: grad)
    input, weight, bias = torch.randn(5, 7), torch.randn(3, 7), torch.randn(3)
    before = torch.get_float32_matmul_precision()
    try:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        with Products() as products:
            grads = triton_dense.linear_act_backward(grad, input, weight, bias, "tanh", True, True, True)
        assert torch.get_float32_matmul_precision() == (precision or before)
    finally:
        torch.set_float32_matmul_precision(before)
    assert products.seen == [(torch.float32, torch.float32, tf32)] * 2
    for found, expected in zip(grads, (grad @ weight, grad.mT @ input, grad.sum(0)), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2 if tf32 else 1.3e-6, atol=2e-2 if tf32 else 1e-5)


# --- where they run, and why not --------------------------------------------------------------------------------------


@compiled
@needs_triton
def test_cpu_tensors_need_the_interpreter():
    with pytest.raises(RuntimeError, match=r"backend: 'triton' cannot run here: .*TRITON_INTERPRET=1"):
        functional.conv_act_pool(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), backend="triton")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    for device_type in ("cpu", "cuda"):
        assert backends.why_unavailable("triton", device_type) == "the package triton is not installed"


@pytest.mark.parametrize(
    ("native", "triton", "expected"),
    [
        (None, None, "native"),
        ("no native", None, "Triton (no native)"),
        ("no native", "no triton", "plain PyTorch (no native; no triton)"),
    ],
)
def test_the_report_says_what_serves_cuda_tensors(native, triton, expected, monkeypatch):
    reasons = {"native": native, "triton": triton}
    monkeypatch.setattr(backends, "why_unavailable", lambda backend, device_type: reasons[backend])
    assert backends.serving("cuda") == expected
    assert env.facts()["kernels on cuda"] == expected
    if native is not None:
        backends.fall_back.cache_clear()
        device = torch.device("cuda")
        with pytest.warns(RuntimeWarning, match=re.escape(f"'cuda' tensors run through {expected}")):
            chosen = backends.fall_back(device)
        assert chosen == ("reference" if triton else "triton")
        assert backends.fall_back(device) == chosen  # said once
        backends.fall_back.cache_clear()


# --- graphs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def a_gpu_in_name(monkeypatch):
    """What tracing asks of a GPU: its architecture."""
    import triton
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


def raw_triton(case, tensors):
    indices = None if case.table is None else case.table.indices
    namespace = torch.ops.lenet_fast
    if case.subsample:
        return namespace.conv_subsample_triton(*tensors, indices, case.padding, "tanh")
    if case.table is not None:
        options = (indices, case.out_channels, case.padding, "tanh", "avg")
        return namespace.sparse_conv_act_pool_triton(*tensors, *options)
    return namespace.conv_act_pool_triton(*tensors, case.padding, "tanh", "avg")


@needs_triton
@compiled
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_a_compiled_graph_contains_the_kernels(case, dynamic, a_gpu_in_name):
    """And what each one writes to is what it was given to write to: its results are new tensors, no copies."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        values = [node and node.meta["val"] for node in graph.graph.output_node().args[0]]
        results = [torch.zeros([*map(int, v.shape)]) if isinstance(v, torch.Tensor) else v and int(v) for v in values]
        return make_boxed_func(lambda *_: results)  # nothing here could run the kernels

    tensors = tuple(t.requires_grad_() for t in case.tensors(torch.float32))
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    torch.compile(lambda *t: raw_triton(case, t).square().sum(), fullgraph=True, dynamic=dynamic, backend=backend)(
        *tensors
    ).backward()
    names = [[str(node.target) for node in graph.graph.nodes] for graph in graphs]
    assert [nodes.count("triton_kernel_wrapper_functional") for nodes in names] == [1, 5 if case.subsample else 4]
    assert not any("lenet_fast" in name for nodes in names for name in nodes)


@needs_triton
@compiled
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_an_exported_program_keeps_the_operator(case):
    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return raw_triton(case, tensors)

    program = torch.export.export(Layer(), case.tensors(torch.float32), dynamic_shapes=None)
    (target,) = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert str(target).startswith("lenet_fast.")
    assert str(target).endswith("_triton.default")
