"""The Triton kernels compiled for real architectures, without a GPU: what they take is within the committed table."""

import pytest
import triton_resources
from resource_table import compare

pytestmark = pytest.mark.skipif(
    triton_resources.why_unavailable() is not None, reason=str(triton_resources.why_unavailable())
)


@pytest.fixture(scope="module")
def kernels():
    return triton_resources.compile_all()


def test_no_kernel_spills(kernels):
    names = {resources.kernel.partition("<")[0] for resources in kernels}
    assert names == {kernel.__name__ for kernel in triton_resources.kernels()}
    assert {resources.architecture for resources in kernels} == {"sm_80", "sm_90"}
    assert [problem for resources in kernels for problem in resources.problems()] == []


@pytest.mark.skipif(
    triton_resources.why_unavailable() is None and not triton_resources.TABLE.is_of_release_here(),
    reason=f"the table of resources is of Triton {triton_resources.TABLE.release}, and this is another",
)
def test_resources_are_within_the_table(kernels):
    assert compare(kernels, triton_resources.TABLE.read()) == []


def test_dense_layers_take_no_tf32():
    """What PyTorch's matrix products may do with float32 is another matter: see test_triton.py."""
    launches = [
        launch
        for launch in triton_resources.launches()
        if launch[0] == "linear_act_kernel" and launch[1]["input"] == "*fp32"
    ]
    assert len(launches) == 2  # forward, and the gradient of what the activation is given
    for launch in launches:
        ptx = triton_resources.compiled(launch, 90).asm["ptx"]
        assert "fma.rn.f32" in ptx
        assert "tf32" not in ptx


def test_a_spilling_launch_is_seen():
    """As many sums a thread as no register file holds."""
    name, signature, constants, divisible, _ = next(
        launch for launch in triton_resources.launches() if launch[0] == "conv_act_pool_kernel"
    )
    greedy = {
        position: value * 4 if list(signature)[position] == "MAPS" else value for position, value in constants.items()
    }
    resources = triton_resources.compile_launch((name, signature, greedy, divisible, 1), 80)
    assert resources.stack > 0
    assert "stack frame of" in resources.problems()[0]
