"""The CUDA kernels compiled for real architectures, without a GPU: what they take is within the committed table."""

import subprocess
from dataclasses import replace

import cuda_resources
import pytest
from cuda_resources import ARCHITECTURES, SOURCES, TESTED_JOBS, compile_kernels
from cuda_toolkit import NVCC_FLAGS, find_nvcc
from resource_table import Resources, compare

pytestmark = pytest.mark.skipif(
    cuda_resources.why_unavailable() is not None, reason=str(cuda_resources.why_unavailable())
)


@pytest.fixture(scope="session")
def kernels():
    return cuda_resources.compile_all(TESTED_JOBS)


def test_no_kernel_spills_or_exceeds_the_multiprocessor(kernels):
    assert SOURCES
    assert {resources.architecture for resources in kernels} == set(ARCHITECTURES)
    assert [problem for resources in kernels for problem in resources.problems()] == []


@pytest.mark.skipif(
    cuda_resources.why_unavailable() is None and not cuda_resources.TABLE.is_of_release_here(),
    reason=f"the table of resources is of nvcc {cuda_resources.TABLE.release}, and this is another",
)
def test_resources_are_within_the_table(kernels):
    compiled = {resources.key for resources in kernels}
    table = cuda_resources.TABLE.read()
    assert compare(kernels, [row for row in table if row.architecture == "sm_90" or row.key in compiled]) == []


def test_the_table_has_every_kernel_on_every_architecture():
    """Whatever is compiled here: `scripts/cuda_resources.py` compiles all."""
    table = cuda_resources.TABLE.read()
    names = {row.kernel for row in table}
    assert {row.key for row in table} == {(name, architecture) for name in names for architecture in ARCHITECTURES}
    assert len(table) == len(names) * len(ARCHITECTURES)
    assert [problem for row in table for problem in row.problems()] == []


READ_ONLY = """
__global__ void copy(const float* __restrict__ from, float* __restrict__ to) { to[threadIdx.x] = from[threadIdx.x]; }
"""


def test_what_other_blocks_write_is_not_read_as_read_only(tmp_path):
    """Such loads may come from a stale cache line after a grid-wide barrier, which no run on the CPU can show."""
    sample = tmp_path / "copy.cu"
    sample.write_text(READ_ONLY)
    for source, expected in ((cuda_resources.ROOT / "csrc" / "cuda" / "train_network.cu", False), (sample, True)):
        ptx = tmp_path / f"{source.stem}.ptx"
        command = [str(find_nvcc()), *NVCC_FLAGS, "-arch=sm_90", "-ptx", str(source), "-o", str(ptx)]
        subprocess.run(command, check=True)
        assert ("ld.global.nc" in ptx.read_text()) == expected


# --- the checks themselves -------------------------------------------------------------------------------------------

GREEDY = """
__global__ void __launch_bounds__(1024, 2) greedy(float* data, int count) {
  float sums[64] = {};
  for (int k = 0; k < count; ++k)
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[i] += data[k + i] * data[k * i];
#pragma unroll
  for (int i = 0; i < 64; ++i) data[threadIdx.x + i * 1024] = sums[i];
}

__global__ void __launch_bounds__(64) indexed(float* data, int at) {
  float values[32];
  for (int i = 0; i < 32; ++i) values[i] = data[i];
  values[at] = 0.0f;
  for (int i = 0; i < 32; ++i) data[i] = values[(i * at) % 32];
}

__global__ void __launch_bounds__(64, 8) modest(float* data) {
  __shared__ float values[64];
  values[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  data[threadIdx.x] = values[63 - threadIdx.x];
}
"""


def test_spills_and_stack_frames_are_seen(tmp_path):
    source = tmp_path / "greedy.cu"
    source.write_text(GREEDY)
    greedy, indexed, modest = sorted(compile_kernels(source, "sm_90"))
    assert greedy.kernel == "greedy"
    assert (greedy.threads, greedy.blocks) == (1024, 2)
    assert greedy.spills > 0
    assert "bytes of spills" in greedy.problems()[0]
    assert indexed.stack >= 128
    assert indexed.problems()[0].startswith("indexed on sm_90: stack frame of")
    assert (modest.threads, modest.blocks, modest.static_shared) == (64, 8, 256)
    assert modest.problems() == []


ROW = Resources("kernel<float>", "sm_80", 256, 2, 128, 0, 0, 0)


def test_too_many_registers_for_the_designed_occupancy():
    assert ROW.problems() == []
    assert "3 blocks of 256 threads take 98304 registers of 65536" in replace(ROW, blocks=3).problems()[0]
    assert replace(ROW, registers=129).problems()  # allocated by eights


def test_every_difference_from_the_table_is_named():
    assert compare([ROW], [ROW]) == []
    assert compare([replace(ROW, registers=100)], [ROW]) == []
    assert compare([ROW], []) == ["kernel<float> on sm_80: not in the table"]
    assert compare([], [ROW]) == ["kernel<float> on sm_80: only in the table"]
    assert compare([replace(ROW, registers=129)], [ROW]) == ["kernel<float> on sm_80: 129 registers, 128 in the table"]
    assert "16 static_shared, 0 in the table" in compare([replace(ROW, static_shared=16)], [ROW])[0]
    assert "bounds of 256 threads, 1 blocks; 256, 2 in the table" in compare([replace(ROW, blocks=1)], [ROW])[0]


def test_the_sample_kernels_of_the_shim_are_cuda():
    source = cuda_resources.ROOT / "tests" / "cuda_host" / "samples.cu"
    names = {resources.kernel.partition("<")[0] for resources in compile_kernels(source, "sm_80")}
    assert names == {"samples::stencil", "samples::block_sum", "samples::grid_sum"}
