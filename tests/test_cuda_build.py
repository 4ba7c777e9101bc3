"""`_C_cuda` is built by setup.py without a GPU, and loads beside a PyTorch without CUDA."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_toolkit
import pytest
import torch

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    cuda_toolkit.why_unavailable() is not None, reason=f"cannot compile CUDA: {cuda_toolkit.why_unavailable()}"
)

SEEN = """
import ctypes, sys, torch, lenet_fast
torch.ops.load_library(sys.argv[1])
layers = ("conv_act_pool", "sparse_conv_act_pool", "conv_subsample")
for operator in (*layers, *(f"{layer}_backward" for layer in layers), "network_train"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lenet_fast::{operator}", "CUDA"), operator
ctypes.CDLL(sys.argv[1]).lenet_fast_why_unserved  # what backends.py asks
print("all registered")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(folder)]
    command += ["--build-temp", "build/test_cuda"]  # kept: a second run compiles nothing
    # For the oldest GPUs, whose code tests/test_cuda_compile.py compiles in part only.
    environment = os.environ | {"LENET_FAST_CUDA": "only", "TORCH_CUDA_ARCH_LIST": "7.5"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (built,) = folder.glob("lenet_fast/_C_cuda*.so")
    return built


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf (binutils)")
def test_libtorch_is_needed(library):
    """Only through it are the weak symbols of libtorch_cuda found, also by a library linked beside a CPU build."""
    assert "[libtorch.so]" in subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout


def test_every_operator_is_registered_for_cuda(library):
    if torch.cuda.is_available():
        pytest.skip("built; here the installed library is loaded already")
    done = subprocess.run([sys.executable, "-c", SEEN, str(library)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "all registered", done.stderr
