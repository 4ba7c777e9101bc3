"""What takes a CUDA device to show: streams, graphs, several devices, synchronisation, memory, large batches.

Values, gradients, layouts and dtypes on CUDA are in the tests of the operators, which run on every device there is.
"""

import re
from dataclasses import dataclass, replace

import pytest
import torch
from operators import (
    CASES,
    LENET_1998_C3,
    LENET_C1,
    LENET_C3,
    ODD,
    SPARSE_C3,
    Case,
    implementations,
)
from test_operators import error

from lenet_fast import backends, functional, models

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

ON_CUDA = [each for each in implementations() if each.values[0][0] == "cuda"]
LAYERS = [LENET_C1, LENET_C3, SPARSE_C3, LENET_1998_C3, ODD]
SLEEP = 200_000_000  # device cycles, some 0.1 s

backend = pytest.mark.parametrize("backend", [pytest.param(e.values[0][1], marks=e.marks, id=e.id) for e in ON_CUDA])
layer = pytest.mark.parametrize("case", LAYERS, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)


@dataclass
class Call:
    """Forward and backward of a case with everything on the device already, so that nothing but kernels is queued."""

    case: Case
    backend: str
    leaves: tuple
    grad_output: torch.Tensor
    options: tuple

    @classmethod
    def make(cls, case, backend, dtype=torch.float32, device="cuda", options=("sigmoid", "avg"), seed=0):
        leaves = tuple(t if t is None else t.requires_grad_() for t in case.tensors(dtype, device, seed))
        output = case.run(leaves, *options, backend)
        generator = torch.Generator().manual_seed(seed + 1)
        grad_output = torch.randn(output.shape, generator=generator).to(dtype).to(device)
        return cls(case, backend, leaves, grad_output, options)

    def __call__(self):
        """Output, then the gradients."""
        output = self.case.run(self.leaves, *self.options, self.backend)
        present = [leaf for leaf in self.leaves if leaf is not None]
        return output.detach(), *torch.autograd.grad(output, present, self.grad_output)

    def fill(self, other):
        """Take the values of `other`, in place."""
        with torch.no_grad():
            for mine, its in zip(self.leaves, other.leaves, strict=True):
                if mine is not None:
                    mine.copy_(its)
            self.grad_output.copy_(other.grad_output)


def assert_equal(results, expected):
    """Bit for bit."""
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert all(result.isfinite().all() for result in results)


def assert_close(results, expected):
    """In float32, where the order of a sum may be another."""
    assert all(error(a, b) < 1e-5 for a, b in zip(results, expected, strict=True))


@backend
@pytest.mark.parametrize("case", [case for case in CASES if case.batch < 40], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", [("sigmoid", "avg"), ("relu", "max")], ids="-".join)
def test_small(case, dtype, options, backend):
    """For compute-sanitizer, which is slow: on the device, nothing runs but our kernels and copies."""
    tensors = case.tensors(dtype)
    on_device = tuple(t if t is None else t.to("cuda") for t in tensors)
    expected, expected_grads = case.gradients(tensors, *options, "reference")
    output, grads = case.gradients(on_device, *options, backend)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2}[dtype]
    assert error(output.cpu(), expected) < tolerance
    if dtype == torch.float32 and "max" not in options:  # a maximum may fall on another of two near-equal values
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert error(grad.cpu(), expected_grad) < tolerance


# ---- Streams, synchronisation, memory


@pytest.mark.alone
@backend
@layer
def test_runs_on_the_current_stream(case, backend):
    """Queued behind a long sleep and a copy on a side stream: elsewhere, kernels would read NaN."""
    call, values = (Call.make(case, backend, seed=seed) for seed in (0, 5))
    expected = values()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()  # loads kernels and takes memory, which may wait for the device
    torch.cuda.synchronize()
    with torch.no_grad():
        for leaf in call.leaves:
            leaf.fill_(torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        call.fill(values)
        results = call()
        assert not stream.query(), "the host waited for the device"
    stream.synchronize()
    assert_equal(results, expected)


@pytest.mark.alone
@backend
@layer
def test_does_not_wait_for_the_default_stream(case, backend):
    """Nor does work on a side stream wait for what the default stream is busy with."""
    call = Call.make(case, backend)
    expected = call()
    stream, default = torch.cuda.Stream(), torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    with torch.cuda.stream(stream):
        results = call()
    stream.synchronize()
    assert not default.query(), "the side stream waited for the default stream"
    torch.cuda.synchronize()
    assert_equal(results, expected)


@pytest.mark.alone
@backend
@layer
@dtypes
def test_never_synchronises(case, dtype, backend):
    call = Call.make(case, backend, dtype)
    call()
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    try:
        torch.cuda.set_sync_debug_mode("error")  # sees PyTorch's own waits; the stream shows those of a library
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.cuda.current_stream().query(), "the host waited for the device"


@pytest.mark.alone
@backend
@layer
def test_takes_memory_from_pytorchs_allocator_only(case, backend):
    """And gives it back. Another process may take memory meanwhile: one clean try out of three is enough."""
    call = Call.make(replace(case, batch=1000), backend)
    call()

    def taken():
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()  # by anyone else

    def taken_by_20_calls():
        before, allocated = taken(), torch.cuda.memory_allocated()
        for _ in range(20):
            call()
        assert torch.cuda.memory_allocated() == allocated
        return taken() - before

    assert any(taken_by_20_calls() <= 0 for _ in range(3))


# ---- CUDA graphs


def captured(run):
    """A graph of `run`, and the results that its replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@backend
@layer
@dtypes
def test_graph_replay_equals_eager(case, dtype, backend):
    """Capture also fails at any synchronisation and at any allocation by cudaMalloc."""
    call = Call.make(case, backend, dtype)
    graph, results = captured(call)
    for seed in (3, 4):
        values = Call.make(case, backend, dtype, seed=seed)
        call.fill(values)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(results, values())


# ---- Devices


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="one CUDA device")
@backend
@layer
@pytest.mark.parametrize(("current", "other"), [(0, 1), (1, 0)])
def test_tensors_of_a_device_that_is_not_current(case, current, other, backend):
    expected = Call.make(case, backend, device=f"cuda:{current}")()
    with torch.cuda.device(current):
        call = Call.make(case, backend, device=f"cuda:{other}")
        results = call()
    assert all(result.device == call.leaves[0].device for result in results)
    assert_close([result.cpu() for result in results], [result.cpu() for result in expected])


# ---- Sizes


def in_chunks(call, size=4096):
    """Output and gradients by plain PyTorch in float64, some images at a time: the input's, then sums over images."""
    totals = None
    outputs, input_grads = [], []
    input, *parameters = (t if t is None else t.detach().double() for t in call.leaves)
    for images, grad_output in zip(input.split(size), call.grad_output.double().split(size), strict=True):
        part = replace(call, backend="reference", grad_output=grad_output)
        part.leaves = tuple(t if t is None else t.detach().requires_grad_() for t in (images, *parameters))
        output, input_grad, *grads = part()
        outputs.append(output)
        input_grads.append(input_grad)
        totals = grads if totals is None else [total + grad for total, grad in zip(totals, grads, strict=True)]
    return torch.cat(outputs), torch.cat(input_grads), *totals


@backend
@pytest.mark.parametrize("batch", [65_536, 70_000])
@pytest.mark.parametrize("case", [Case(0, 1, 8, 8, 2, 3), LENET_C1, SPARSE_C3, LENET_1998_C3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_batches(case, batch, dtype, backend):
    call = Call.make(replace(case, batch=batch), backend, dtype)
    (output, *grads), (expected, *expected_grads) = call(), in_chunks(call)
    eps = torch.finfo(dtype).eps
    assert error(output, expected) < 100 * eps
    terms = expected.numel() / expected.shape[1]  # that a weight's gradient sums: rounding grows as a random walk
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert error(grad, expected_grad) < 2 * eps * terms**0.5


@backend
@layer
def test_an_empty_batch(case, backend):
    output, input_grad, *grads = Call.make(replace(case, batch=0), backend)()
    assert output.shape[0] == input_grad.shape[0] == 0
    assert all((grad == 0).all() for grad in grads)


SIZES = [
    *(Case(3, 1, side, side, 6, 5) for side in (5, 6, 7, 31, 32, 33, 63, 64, 65)),
    Case(3, 2, 5, 70, 3, 3),
    Case(3, 2, 70, 5, 3, 3),
    Case(2, 3, 224, 224, 8, 5, 2),
    Case(1, 3, 224, 224, 16, 7, 3),
    Case(4, 64, 14, 14, 96, 3, 1),
    Case(2, 130, 9, 9, 7, 5),
    Case(2, 5, 9, 9, 300, 5),
    Case(5, 16, 5, 5, 120, 5),
]


@backend
@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize("options", [("tanh", "avg"), ("relu", "max"), ("sigmoid", "none")], ids="-".join)
def test_sizes(case, options, backend):
    if min(case.height, case.width) + 2 * case.padding == case.kernel_size and options[1] != "none":
        pytest.skip("nothing to pool")
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        call = Call.make(case, backend, dtype, options=options)
        results = call()
        if dtype == torch.float32 and "relu" in options:
            results = results[:1]  # rounding decides which side of the kink a gradient falls on
        for result, expected in zip(results, in_chunks(call), strict=False):
            assert error(result, expected) < bound


@backend
@layer
@dtypes
def test_bit_equal_over_20_runs(case, dtype, backend):
    call = Call.make(replace(case, batch=1000), backend, dtype)
    first = call()
    for _ in range(19):
        assert_equal(call(), first)


# ---- PyTorch around the operators


@backend
@layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(case, dtype, backend):
    call = Call.make(case, backend)
    lowered = replace(call, leaves=tuple(t.detach().to(dtype).requires_grad_() for t in call.leaves))
    lowered.grad_output = call.grad_output = call.grad_output.to(dtype)
    with torch.autocast("cuda", dtype=dtype):
        output, *grads = call()
    expected, *expected_grads = lowered()
    assert output.dtype == dtype
    assert_equal([output], [expected])
    assert_equal(grads, [grad.float() for grad in expected_grads])


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@backend
@layer
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(case, dynamic, backend):
    pytest.importorskip("triton", reason="torch.compile needs Triton on CUDA")
    call = Call.make(case, backend)

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def run(*leaves):
        return case.run(leaves, *call.options, backend) * 1

    output = run(*call.leaves)
    assert_close([output.detach(), *torch.autograd.grad(output, call.leaves, call.grad_output)], call())


@pytest.mark.parametrize("make", [models.lenet1, models.lenet5, models.lenet5_d2l, models.lenet5_1998])
def test_models_as_their_twins(make):
    """On whatever kernels the machine has, plain PyTorch among them."""
    model = make()
    twin = model.reference().double().to("cuda")
    twin.load_state_dict(model.state_dict())
    model = model.double().to("cuda")
    side = model.input_spec.size
    images = torch.rand(7, 1, side, side, dtype=torch.float64).to("cuda")
    outputs = [each(images) for each in (model, twin)]
    assert error(*(output.detach() for output in outputs)) < 1e-12
    gradients = [
        torch.autograd.grad(output.square().mean(), list(each.parameters()))
        for output, each in zip(outputs, (model, twin), strict=True)
    ]
    for one, other in zip(*gradients, strict=True):
        assert error(one, other) < 1e-11


@pytest.mark.parametrize("name", ["native", "triton"])
def test_missing_kernels_are_an_error_with_the_reason(name):
    if (reason := backends.why_unavailable(name, "cuda")) is None:
        pytest.skip("they are not missing")
    with pytest.raises(RuntimeError, match=f"backend: '{name}' cannot run here: {re.escape(reason)}"):
        functional.conv_act_pool(torch.rand(1, 1, 6, 6).to("cuda"), torch.rand(1, 1, 3, 3).to("cuda"), backend=name)
