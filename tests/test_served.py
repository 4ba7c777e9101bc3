"""Which GPUs the compiled CUDA kernels serve, and what runs on others: shown without a GPU, and without the kernels."""

import ctypes
import warnings

import pytest
import torch

from lenet_fast import backends, env, functional, models, ops
from lenet_fast.trainer import FusedTrainer

OLD = "no kernel image for sm_60: built for sm_75, sm_80"
needs_triton = pytest.mark.skipif(
    backends.why_unavailable("triton", "cuda") is not None, reason=str(backends.why_unavailable("triton", "cuda"))
)


class Machine:
    """Stands for torch.cuda and the compiled library where there are several GPUs."""

    def __init__(self, monkeypatch, reasons, capabilities):
        self.reasons, self.current, self.asked = reasons, 0, []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(reasons))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(reasons))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(backends, "missing_native", lambda: {"cpu": None, "cuda": None})
        monkeypatch.setattr(backends, "_library_path", lambda name: f"lenet_fast/{name}.so")
        monkeypatch.setattr(ctypes, "CDLL", self.load)

    def load(self, path):
        assert path == "lenet_fast/_C_cuda.so"
        return self

    def lenet_fast_why_unserved(self, index, reason, size):
        self.asked.append(index.value)
        encoded = self.reasons[index.value].encode()
        assert len(encoded) < size.value
        reason.value = encoded


@pytest.fixture
def machine(monkeypatch):
    """Makes one: of each GPU why it is not served, and its compute capability."""

    def forget():
        for cached in (backends._why_unserved, backends._why_without_triton, backends.fall_back):
            cached.cache_clear()

    forget()
    yield lambda reasons, capabilities: Machine(monkeypatch, reasons, capabilities)
    forget()


def test_each_gpu_is_asked_once(machine):
    gpus = machine(["", OLD], [(9, 0), (6, 0)])
    for _ in range(3):
        assert backends.why_unavailable("native", "cuda:0") is None
        assert backends.why_unavailable("native", torch.device("cuda", 1)) == OLD
        gpus.current = 0
        assert backends.why_unavailable("native", "cuda") is None
        gpus.current = 1
        assert backends.why_unavailable("native", "cuda") == OLD
    assert gpus.asked == [0, 1]
    assert backends.why_unavailable("native", "cpu") is None


def test_without_a_gpu_nothing_is_asked(machine):
    gpus = machine([], [])
    for device in ("cuda", "cuda:0"):
        assert backends.why_unavailable("native", device) is None
        assert backends.serving(device) == "native"
    assert gpus.asked == []


def test_a_missing_library_is_not_asked(machine, monkeypatch):
    gpus = machine([""], [(9, 0)])
    monkeypatch.setattr(backends, "missing_native", lambda: {"cuda": "it was not built"})
    assert backends.why_unavailable("native", "cuda:0") == "it was not built"
    assert gpus.asked == []


@needs_triton
def test_other_kernels_take_over_gpu_by_gpu(machine):
    machine(["", OLD, OLD], [(9, 0), (7, 5), (6, 1)])
    old_triton = "Triton needs compute capability 7.0, this GPU has 6.1"
    assert backends.why_unavailable("triton", "cuda:1") is None
    assert backends.why_unavailable("triton", "cuda:2") == old_triton
    assert [backends.why_untrained(f"cuda:{i}") for i in range(3)] == [None, None, f"{OLD}; {old_triton}"]
    facts = env.facts()
    assert facts["kernels on cuda:0"] == "native"
    assert facts["kernels on cuda:1"] == f"Triton ({OLD})"
    assert facts["kernels on cuda:2"] == f"plain PyTorch ({OLD}; {old_triton})"
    assert facts["training on cuda:0"].startswith("one launch a run")
    assert facts["training on cuda:1"] == f"CUDA graphs of the operators ({OLD})"
    assert facts["training on cuda:2"] == f"not possible ({OLD}; {old_triton})"
    assert "kernels on cuda" not in facts
    with pytest.warns(RuntimeWarning, match=r"'cuda:1' tensors run through Triton \(no kernel image for sm_60"):
        assert backends.fall_back(torch.device("cuda", 1)) == "triton"
    with pytest.warns(RuntimeWarning, match="'cuda:2' tensors run through plain PyTorch"):
        assert backends.fall_back(torch.device("cuda", 2)) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.fall_back(torch.device("cuda", 1))  # once each


def test_gpus_that_are_alike_are_one_line(machine):
    machine([OLD, OLD], [(6, 0), (6, 0)])
    facts = env.facts()
    assert OLD in facts["kernels on cuda"]
    assert "kernels on cuda:0" not in facts


def test_a_native_operator_is_refused_with_the_reason(machine):
    """The device of the tensor counts, not the current one."""
    machine(["", OLD], [(9, 0), (6, 0)])
    fake = torch._subclasses.FakeTensorMode()
    with fake:
        tensors = [torch.empty(shape, device="cuda:1") for shape in ((1, 1, 6, 6), (1, 1, 3, 3))]
        with pytest.raises(RuntimeError, match=f"backend: 'native' cannot run here: {OLD}"):
            functional.conv_act_pool(*tensors, backend="native")


def test_the_trainer_asks_about_the_device_of_the_parameters(monkeypatch):
    asked = []
    monkeypatch.setattr(backends, "why_untrained", lambda device: asked.append(device) or OLD)
    trainer = FusedTrainer(models.lenet1(), lr=0.1)
    assert f"on cpu, where the fused trainer cannot run: {OLD}" in trainer.how()
    assert set(asked) == {torch.device("cpu")}


# --- what takes the kernels' place ------------------------------------------------------------------------------------


def fallback(name):
    return getattr(torch.ops.lenet_fast, f"_{name}_fallback")


@pytest.mark.parametrize("name", ops.dispatched)
def test_every_operator_has_a_fallback_of_its_schema(name):
    for each in (name, f"{name}_backward"):
        own, other = (str(packet.default._schema) for packet in (getattr(torch.ops.lenet_fast, each), fallback(each)))
        assert own.replace(each, f"_{each}_fallback", 1) == other


@pytest.mark.parametrize("name", ops.dispatched)
def test_triton_is_the_first_to_fall_back_to(name, monkeypatch):
    operator, seen = ops.dispatched[name], []
    monkeypatch.setattr(backends, "fall_back", lambda device: seen.append(device) or "triton")
    monkeypatch.setattr(operator, "run_triton", lambda *args: args[0] + 1)
    monkeypatch.setattr(operator, "run_triton_backward", lambda *args: (args[0] + 2,) * operator.num_tensors)
    one = torch.ones(1, 1, 6, 6)
    rest = {
        "conv_act_pool": (one, None, 0, "relu", "avg"),
        "sparse_conv_act_pool": (one, None, [0], 1, 0, "relu", "avg"),
        "conv_subsample": (one, None, one, one, None, 0, "relu"),
    }[name]
    assert torch.equal(fallback(name)(one, *rest), one + 1)
    grads = fallback(f"{name}_backward")(one, one, *rest, *[True] * operator.num_tensors)
    assert all(torch.equal(grad, one + 2) for grad in grads)
    assert seen == [torch.device("cpu")] * 2


def test_plain_pytorch_in_their_place_gives_contiguous_tensors(monkeypatch):
    """Whatever the input's memory format: a compiled graph relies on the strides that the operator declares."""
    monkeypatch.setattr(backends, "fall_back", lambda device: "reference")
    input, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    options = weight, None, 0, "tanh", "none"
    last = input.to(memory_format=torch.channels_last)
    assert not torch.nn.functional.conv2d(last, weight).is_contiguous()
    output = fallback("conv_act_pool")(last, *options)
    assert output.is_contiguous()
    torch.testing.assert_close(output, fallback("conv_act_pool")(input, *options))
    grad_output = torch.randn_like(output).to(memory_format=torch.channels_last)
    grads = fallback("conv_act_pool_backward")(grad_output, last, *options, True, True, False)
    assert all(grad.is_contiguous() for grad in grads)
    expected = fallback("conv_act_pool_backward")(grad_output.contiguous(), input, *options, True, True, False)
    torch.testing.assert_close(grads, expected)


@pytest.mark.skipif(backends.why_unavailable("native", "cpu") is not None, reason="no compiled CPU kernels")
def test_a_traced_graph_does_not_look_for_libraries():
    """Whether a backend is there is a constant of the graph."""
    call = lambda *tensors: functional.conv_act_pool(*tensors, backend="native")  # noqa: E731
    tensors = torch.rand(1, 1, 6, 6), torch.rand(1, 1, 3, 3)
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="eager")(*tensors), call(*tensors))
