"""CUDA sources executed on the CPU, through the shim in cuda_host/: what the shim sees, and the package's kernels."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cuda_host import build

pytestmark = pytest.mark.skipif(build.why_unavailable() is not None, reason=str(build.why_unavailable()))

ORDERS = ("forward", "reverse", "1", "2")


def build_samples(**options):
    sources = [build.HERE / "samples.cu", build.HERE / "samples_main.cpp"]
    return build.build("samples", sources, shared_memory="_ZN7samples13sample_sharedE", **options)


@pytest.fixture(scope="session")
def samples():
    return build_samples()


@pytest.fixture(scope="session")
def samples_with_race_detector():
    return build_samples(check="races")


def run_sample(samples, *arguments, order="forward", **options):
    environment = {**os.environ, "CUDA_HOST_ORDER": order}
    return subprocess.run([samples, *map(str, arguments)], env=environment, capture_output=True, timeout=60, **options)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", ["stencil", "block_sum", "grid_sum"])
def test_a_kernel_without_fault_passes(samples, samples_with_race_detector, kernel, order):
    for executable in (samples, samples_with_race_detector):
        done = run_sample(executable, kernel, "none", order=order)
        assert (done.returncode, done.stderr) == (0, b"")


def test_portable_fibers():
    """What processors without a switch of their own use."""
    samples = build_samples(flags=["-DCUDA_HOST_UCONTEXT"])
    for kernel in ("stencil", "block_sum", "grid_sum"):
        assert run_sample(samples, kernel, "none", order="1").returncode == 0


# Planted fault: the kernel, the orders in which it must show, and what is said.
FAULTS = {
    "missing_barrier": ("stencil", ORDERS, "wrong result"),
    "divergent_barrier": ("stencil", ORDERS, "divergent barrier: 32 of 64 threads wait at __syncthreads"),
    "early_exit": ("stencil", ORDERS, r"1 of 64 threads have returned \(first \(7,0,0\)\)"),
    "global_read": ("stencil", ORDERS, "AddressSanitizer: heap-buffer-overflow .*READ of size 4"),
    "global_write": ("stencil", ORDERS, "AddressSanitizer: heap-buffer-overflow .*WRITE of size 4"),
    "shared_read": ("stencil", ORDERS, "AddressSanitizer: use-after-poison .*READ of size 4"),
    "shared_write": ("stencil", ORDERS, "AddressSanitizer: use-after-poison .*WRITE of size 4"),
    "misaligned": ("block_sum", ORDERS, "misaligned address .* requires 8 byte alignment"),
    "uninitialised": ("block_sum", ORDERS, "wrong result: output.* = -?nan"),
    "race": ("block_sum", ORDERS, "wrong result"),
    "shuffle_mask": ("block_sum", ORDERS, r"__shfl_down_sync by lane \d+, which its mask .* leaves out"),
    "shuffle_from_nobody": ("block_sum", ORDERS, "__shfl_xor_sync reads lane 31, which takes no part"),
    "missing_grid_barrier": ("grid_sum", ("forward", "1", "2"), "wrong result"),
    "grid_exit": ("grid_sum", ORDERS, "divergent grid barrier"),
    "not_cooperative": ("grid_sum", ORDERS, r"grid\.sync in a launch that is not cooperative"),
    "too_many_blocks": ("grid_sum", ORDERS, "too many blocks in cooperative launch"),
    "too_much_shared": ("grid_sum", ORDERS, "invalid argument"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(samples, fault):
    kernel, orders, report = FAULTS[fault]
    for order in orders:
        done = run_sample(samples, kernel, fault, order=order)
        assert done.returncode != 0
        assert re.search(report, done.stderr.decode(), re.DOTALL), done.stderr.decode()


# Whatever the order, and whether or not the results differ: the two accesses and their lines.
RACES = {
    "missing_barrier": ("stencil", r"race on shared memory, byte \d+: a (read|write) at .*samples.cu:\d+ and a"),
    "race": ("block_sum", r"race on shared memory, byte \d: a write at .*samples.cu:\d+ and a write by thread \("),
    "benign_race": (
        "block_sum",
        r"race on shared memory, byte 8: a write at .*samples.cu:\d+ and a write by thread \(",
    ),
    "missing_grid_barrier": ("grid_sum", r"race on global memory, .*samples.cu:\d+"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", RACES)
def test_a_planted_race_is_caught(samples_with_race_detector, fault, order):
    kernel, report = RACES[fault]
    done = run_sample(samples_with_race_detector, kernel, fault, order=order)
    assert done.returncode == 1
    assert re.search(report, done.stderr.decode()), done.stderr.decode()


def test_every_fault_of_the_samples_is_tried():
    declared = re.findall(r"X\((\w+)\)", (build.HERE / "samples.h").read_text())
    assert set(declared) == {"none", *FAULTS, *RACES}


def test_an_unknown_order_is_refused(samples):
    done = run_sample(samples, "stencil", "none", order="sideways")
    assert b"CUDA_HOST_ORDER: expected forward, reverse or a seed, got 'sideways'" in done.stderr
    assert done.returncode == 1


def test_shared_memory_of_static_size_does_not_compile(tmp_path):
    """It would silently become a variable of each thread."""
    source = tmp_path / "static_shared.cu"
    source.write_text(
        "#include <cuda_runtime.h>\n__global__ void f(float* x) { __shared__ float y[2]; x[0] = y[0]; }\n"
    )
    with pytest.raises(AssertionError, match="attribute ignored"):
        build.build("static_shared", [source], shared_memory="unused")


def test_conversions_round_as_pytorch_does(samples):
    every_half = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    generator = torch.Generator().manual_seed(0)
    values = torch.cat(
        [
            every_half.view(torch.float16).float(),
            every_half.view(torch.bfloat16).float(),
            torch.randint(-(2**31), 2**31, (100_000,), generator=generator).int().view(torch.float),
            torch.tensor([65519.996, 65520.0, -65520.0, 2**-25, 2**-25 * 1.0001, 2**-14 - 2**-25, 2049.0, 2051.0]),
        ]
    )
    done = run_sample(samples, "convert", input=values.numpy().tobytes())
    assert done.returncode == 0
    records = torch.frombuffer(bytearray(done.stdout), dtype=torch.int16).view(2, -1, 3)
    for dtype, record in zip((torch.float16, torch.bfloat16), records, strict=True):
        stored, back = record[:, 0].contiguous().view(dtype), record[:, 1:].contiguous().view(torch.float32)[:, 0]
        expected = values.to(dtype)
        number = ~values.isnan()
        assert torch.equal(stored[number].view(torch.int16), expected[number].view(torch.int16))
        assert torch.equal(back[number].view(torch.int32), expected[number].float().view(torch.int32))
        assert stored[~number].isnan().all()
        assert back[~number].isnan().all()


# --- the package's kernels -------------------------------------------------------------------------------------------

# What each process runs: the shim's check, and pytest's arguments. Two at a time, the longest first. Tests are chosen
# by their marks, and left out by name only: a test that is renamed stays in.
NETWORK = ["tests/cuda_host/network.py", "tests/cuda_host/regularisation.py"]
PROCESSES = {
    "memory": ("memory", ["tests/cuda_host/kernels.py", "-m", "not only_races"]),
    "races": ("races", ["tests/cuda_host/kernels.py", "-m", "races or only_races"]),
    "network": ("memory", NETWORK),
    "network-races": ("races", [*NETWORK, "-m", "races"]),
    "operators": ("memory", ["tests/test_operators.py", "-m", "cuda_host", "-k", "not (cpu-reference or cuda-)"]),
    "phase-clocks": ("clocks", ["tests/cuda_host/phase_clocks.py"]),
}


@pytest.fixture(scope="module")
def processes():
    """The results of all of them, as futures."""
    libraries = {check: build.build_operators(check) for check in build.CHECKS}
    clocks = {"train_network.cu": ["-DLENET_FAST_CLOCKS"]}
    libraries["clocks"] = build.build_operators("memory", own_flags=clocks)

    def run(check, arguments):
        return subprocess.run(
            [sys.executable, "-m", "pytest", *build.PYTEST_OPTIONS, *arguments],
            cwd=build.ROOT,
            env=build.environment(libraries[check]),
            capture_output=True,
            text=True,
            timeout=600,
        )

    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, *process) for name, process in PROCESSES.items()}


@pytest.mark.parametrize("name", PROCESSES)
def test_kernels(processes, name):
    done = processes[name].result()
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= (4 if name == "phase-clocks" else 5)
    assert "skipped" not in done.stdout
