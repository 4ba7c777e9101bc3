"""The CUDA kernels on the CPU. Run by test_cuda_host.py, in processes of their own, with one of the shim's two checks.

The comparison with the reference is that of test_operators.py; here are the cases, small enough for the shim, and what
only the shim can ask: other orders, other numbers of multiprocessors.
"""

import ctypes
import os
from contextlib import contextmanager
from dataclasses import replace

import cuda_resources
import pytest
import torch
from operators import ACTIVATIONS, CASES, LENET_1998_C3, LENET_C1, LENET_C3, ODD, SMALL_CASES, SPARSE_C3, Case
from test_operators import assert_as_accurate_as_pytorch, channels_last, error, offset, strided, transposed

from cuda_host import redirect
from lenet_fast import backends

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LENET_1 = [Case(2, 1, 28, 28, 4, 5), Case(2, 4, 12, 12, 12, 5)]
FEW_IMAGES = [
    replace(case, batch=min(case.batch, 2 if case.kernel_size < 8 else 1))
    for case in [*CASES, Case(2, 1, 32, 32, 6, 5), *LENET_1]
]
LENETS = [replace(case, batch=2) for case in (LENET_C1, LENET_C3, SPARSE_C3, LENET_1998_C3)]
every_case = pytest.mark.parametrize(
    ("case", "pool", "activation"),
    [
        pytest.param(case, pool, ACTIVATIONS[(i + j) % len(ACTIVATIONS)], id=f"{case}-{pool}")
        for i, case in enumerate(FEW_IMAGES)
        for j, pool in enumerate(case.pools)
    ],
)


@pytest.fixture(params=["1", "3"])
def multiprocessors(request, monkeypatch):
    """Few of them: blocks of several images, blocks that stride over the batch, sums over few rows."""
    monkeypatch.setenv("CUDA_HOST_MULTIPROCESSORS", request.param)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", [LENETS[0], *SMALL_CASES], ids=str)
def test_the_shim_is_what_runs(case, direction, monkeypatch):
    output = case.run(tuple(t.requires_grad_() for t in case.tensors()), pool=case.pools[0], backend="native")
    monkeypatch.setenv("CUDA_HOST_ORDER", "sideways")
    with pytest.raises(RuntimeError, match="CUDA_HOST_ORDER: expected forward"):
        case.run(case.tensors(), pool=case.pools[0]) if direction == "forward" else output.sum().backward()


@every_case
def test_float64(case, pool, activation):
    expected, expected_grads = case.gradients(case.tensors(), activation, pool, "reference")
    output, grads = case.gradients(case.tensors(), activation, pool, "native")
    assert error(output, expected) < 1e-13
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert error(grad, expected_grad) < 1e-12


@every_case
def test_float32(case, pool, activation):
    assert_as_accurate_as_pytorch(case, torch.float32, "cpu", "native", activation, pool)


@pytest.mark.parametrize("case", [*LENETS, ODD], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_shorter_dtypes(case, dtype):
    for pool, activation in zip(case.pools, ("sigmoid", "relu", "scaled_tanh"), strict=False):
        assert_as_accurate_as_pytorch(case, dtype, "cpu", "native", activation, pool)


@pytest.mark.parametrize("layout", [channels_last, strided, transposed, offset])
@pytest.mark.parametrize("case", [*SMALL_CASES, LENETS[1]], ids=str)
def test_strides(case, layout):
    tensors = case.tensors(torch.float32)
    expected = case.gradients(tensors, pool=case.pools[0], backend="native")
    output = case.gradients(tuple(map(layout, tensors)), pool=case.pools[0], backend="native")
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", LENETS, ids=str)
def test_many_images(case, multiprocessors):
    assert_as_accurate_as_pytorch(replace(case, batch=21), torch.float32, "cpu", "native", "tanh", case.pools[0])


@pytest.mark.parametrize("case", [case for case in FEW_IMAGES if case.batch], ids=str)
def test_bit_equal_in_every_order(case, monkeypatch):
    tensors = case.tensors(torch.float32)
    results = []
    for order in ("forward", "reverse", "1"):
        monkeypatch.setenv("CUDA_HOST_ORDER", order)
        output, grads = case.gradients(tensors, pool=case.pools[0], backend="native")
        results.append((output, *grads))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


# Bytes of a multiprocessor's shared memory; the system takes 1 KiB of every block's.
SHARED_BYTES = {"sm_80": 164 << 10, "sm_90": 228 << 10}
# The most that a block can have on the GPU with the least, sm_75.
SHARED_BYTES_OF_A_BLOCK = 64 << 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_launches_fit_the_designed_occupancy(dtype, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOST_LAUNCHES", str(tmp_path / "launches"))
    for case in FEW_IMAGES:
        case.gradients(case.tensors(dtype), pool=case.pools[0], backend="native")
    monkeypatch.setenv("CUDA_HOST_MULTIPROCESSORS", "1")  # several images a block
    for case in LENETS:
        many = replace(case, batch=21)
        many.run(many.tensors(dtype), pool=case.pools[0], backend="native")
    launches = {tuple(line.split(" ", 2)) for line in (tmp_path / "launches").read_text().splitlines()}
    table = {row.key: row for row in cuda_resources.TABLE.read()}
    for threads, shared_bytes, kernel in launches:
        static = max(row.static_shared for row in table.values() if row.kernel == cuda_resources.short_name(kernel))
        assert static + int(shared_bytes) <= SHARED_BYTES_OF_A_BLOCK, kernel
        for architecture, limit in SHARED_BYTES.items():
            designed = table[cuda_resources.short_name(kernel), architecture]
            assert int(threads) <= designed.threads
            assert designed.blocks * (designed.static_shared + int(shared_bytes) + 1024) <= limit, kernel
    assert len({kernel for _, _, kernel in launches}) > 5


# What is launched, and barriers that its first kernel cannot do without; later ones repeat them image by image.
SKIPPED = [(case, "forward", barrier) for case in LENETS for barrier in (0, 1)]
SKIPPED += [(case, "backward", barrier) for case in LENETS for barrier in (0, 1, 2)]
SKIPPED += [(ODD, "forward", 1), *((ODD, "backward", barrier) for barrier in (0, 1, 2, 3))]


@pytest.mark.parametrize(("case", "direction", "barrier"), SKIPPED, ids=str)
def test_a_skipped_barrier_is_seen(case, direction, barrier, monkeypatch):
    """Planted in the package's own kernels: all threads run through their n-th __syncthreads."""
    leaves = tuple(t.requires_grad_() for t in case.tensors(torch.float32))

    def skip(when):
        monkeypatch.setenv("CUDA_HOST_SKIP_BARRIER", str(barrier if direction == when else -1))

    with pytest.raises(RuntimeError, match=r"race on shared memory, byte \d+: a .* at .*\.cuh:\d+ and a"):  # noqa: PT012
        skip("forward")
        output = case.run(leaves, pool=case.pools[0], backend="native")
        skip("backward")
        output.sum().backward()


# --- Devices that the kernels cannot run on ---------------------------------------------------------------------------

LIBRARY = ctypes.CDLL(os.environ[redirect.LIBRARY])
UNSERVED = {
    "older": ("CUDA_HOST_CAPABILITY", "75", "no kernel image for sm_75: built for sm_90"),
    "newer": ("CUDA_HOST_CAPABILITY", "100", "no kernel image for sm_100: built for sm_90"),
    "driver": ("CUDA_HOST_DRIVER", "12040", "the driver supports CUDA 12.4, the kernels were built with CUDA 13.0"),
    "ptx": (
        *("CUDA_HOST_LOAD_ERROR", "222"),
        "no kernel image for sm_90: built for sm_90, and the driver does not compile their PTX (the provided PTX was "
        "compiled with an unsupported toolchain.)",
    ),
    "mismatch": (
        *("CUDA_HOST_LOAD_ERROR", "803"),
        "the driver cannot run them: system has unsupported display driver / cuda driver combination",
    ),
}
CALL = (torch.ones(1, 1, 6, 6), torch.ones(1, 1, 3, 3), None, 0, "relu", "max")  # its outputs are four times 9


def ask(device=-1):
    """Anew; -1 is the index of CPU tensors."""
    reason = ctypes.create_string_buffer(1024)
    LIBRARY.lenet_fast_why_unserved(device, reason, len(reason))
    return reason.value.decode()


@contextmanager
def unserved_device(monkeypatch, which):
    """Gives the reason; what falls back to plain PyTorch there says it anew."""
    variable, value, reason = UNSERVED[which]
    backends.fall_back.cache_clear()
    with monkeypatch.context() as patch:
        patch.setenv(variable, value)
        patch.setattr(backends, "why_unavailable", lambda backend, _: reason if backend == "native" else None)
        assert ask() == reason
        assert LIBRARY.cuda_host_last_error() == 0
        yield reason
    assert ask() == ""
    backends.fall_back.cache_clear()


@pytest.mark.parametrize("which", UNSERVED)
def test_an_operator_falls_back_where_its_kernels_cannot_run(monkeypatch, which, recwarn):
    with unserved_device(monkeypatch, which) as reason:
        for case in (LENETS[1], ODD, *SMALL_CASES):
            for pool in case.pools:
                tensors = case.tensors()
                expected = case.gradients(tensors, "tanh", pool, "reference")
                torch.testing.assert_close(case.gradients(tensors, "tanh", pool), expected, rtol=1e-12, atol=1e-12)
        with torch.inference_mode():
            assert torch.ops.lenet_fast.conv_act_pool(*CALL).sum() == 36
    (said,) = [str(warning.message) for warning in recwarn if warning.category is RuntimeWarning]
    assert said.startswith(f"lenet_fast: operators on 'cpu' tensors run through plain PyTorch ({reason})")


def test_the_device_is_asked_once(monkeypatch):
    assert ask() == ""
    monkeypatch.setenv("CUDA_HOST_CAPABILITY", "75")
    with pytest.raises(RuntimeError, match="no kernel image is available for execution"):
        torch.ops.lenet_fast.conv_act_pool(*CALL)


def test_devices_are_asked_one_by_one(monkeypatch):
    assert ask(5) == ""
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_HOST_CAPABILITY", "75")
        assert ask(6) == UNSERVED["older"][2]
    assert torch.ops.lenet_fast.conv_act_pool(*CALL).sum() == 36


def test_an_error_of_another_kind_is_no_answer(monkeypatch):
    """The operator itself reports it; nothing is remembered."""
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_HOST_LOAD_ERROR", "719")
        assert ask() == ""
        with pytest.raises(RuntimeError, match="lenet_fast: CUDA: conv_act_pool"):
            torch.ops.lenet_fast.conv_act_pool(*CALL)
    assert torch.ops.lenet_fast.conv_act_pool(*CALL).sum() == 36


@pytest.mark.filterwarnings("ignore:lenet_fast:RuntimeWarning")
def test_a_wrong_argument_is_an_error_in_the_fallback_too(monkeypatch):
    with unserved_device(monkeypatch, "older"), pytest.raises(RuntimeError, match=r"^lenet_fast: "):
        torch.ops.lenet_fast.conv_act_pool(torch.ones(1, 1, 6, 6), torch.ones(1, 2, 3, 3), None, 0, "relu", "max")
