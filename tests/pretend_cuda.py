"""Runs Python with the CPU in the place of a CUDA device, so that no slip in GPU code waits for a GPU to be found.

    python tests/pretend_cuda.py -m pytest tests/test_cuda.py
    PYTHON="python tests/pretend_cuda.py" benchmarks/gpu_run.sh second operators

Tensors asked for on "cuda" are CPU tensors, the CPU's kernels serve them, and every call is done when it returns: this
executes each line of the tests and benchmarks, and shows nothing about kernels. A graph is really captured (as the
list of operators that ran) and really replayed. Figures written here name "pretended GPU" as the device.
"""

import runpy
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")


def on_cpu(value: object) -> object:
    is_cuda = isinstance(value, torch.device) and value.type == "cuda"
    return CPU if is_cuda or (isinstance(value, str) and value.startswith("cuda")) else value


class OnCpu(TorchFunctionMode):
    """Replaces every device "cuda" in a call of PyTorch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*map(on_cpu, args), **{name: on_cpu(value) for name, value in (kwargs or {}).items()})


class Stream:
    device = CPU

    def __init__(self, *_, **__):
        pass

    def query(self):
        return False  # still busy with a sleep, as far as a test can see

    def synchronize(self):
        pass

    wait_stream = wait_event = record_event = lambda self, *_: None


class Event:
    def __init__(self, enable_timing=False):
        self.timing = enable_timing

    def record(self, *_):
        self.seconds = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        assert self.timing
        assert end.timing
        return 1e3 * (end.seconds - self.seconds)


class CUDAGraph:
    """The operators that ran during the capture, run again by `replay` into the tensors that they made then."""

    def __init__(self):
        self.calls = []

    @torch.no_grad()  # kernels, no autograd: a backward is among the operators
    @torch.autocast("cpu", enabled=False)
    def replay(self):
        for operator, args, kwargs, results in self.calls:
            for old, new in zip(tensors(results), tensors(operator(*args, **kwargs)), strict=True):
                if old is not new:
                    old.detach().copy_(new)


class Capture(TorchDispatchMode):
    """Records every operator. A capture computes nothing: in the end what was made is NaN, what was given as before."""

    def __init__(self, graph, **_):
        super().__init__()
        self.graph = graph
        self.made = []
        self.before = {}  # address -> a tensor given to an operator that writes, and its values

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host reads a value while a graph is captured")
        if operator._schema.is_mutable:
            for tensor in tensors((args, kwargs)):
                if tensor.numel() and tensor.data_ptr() not in self.before:
                    self.before[tensor.data_ptr()] = tensor.detach(), tensor.detach().clone()
        results = operator(*args, **(kwargs or {}))
        self.graph.calls.append((operator, args, kwargs or {}, results))
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
        self.made += [new for new in tensors(results) if new.untyped_storage().data_ptr() not in given]
        return results

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for tensor, values in self.before.values():
            tensor.copy_(values)
        for tensor in self.made:
            if tensor.is_floating_point():
                tensor.detach().fill_(torch.nan)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


# Of torch.cuda, what it takes to capture a graph.
GRAPHS = {
    "device": lambda *_: nullcontext(),
    "current_stream": lambda *_: Stream(),
    "stream": lambda *_: nullcontext(),
    "graph_pool_handle": lambda: (0, 0),
    "Stream": Stream,
    "CUDAGraph": CUDAGraph,
    "graph": Capture,
}


def install():
    """For the rest of the process."""
    from lenet_fast import backends

    properties = SimpleNamespace(
        name="pretended GPU", L2_cache_size=2**14, multi_processor_count=1, total_memory=2**30, major=9, minor=0
    )
    torch.cuda.__dict__.update(
        is_available=lambda: True,
        device_count=lambda: 2,
        current_device=lambda: 0,
        get_device_properties=lambda *_: properties,
        get_device_name=lambda *_: properties.name,
        get_device_capability=lambda *_: (9, 0),
        mem_get_info=lambda *_: (2**29, 2**30),
        memory_reserved=lambda *_: 0,
        memory_allocated=lambda *_: 0,
        empty_cache=lambda: None,
        synchronize=lambda *_: None,
        set_sync_debug_mode=lambda mode: None,
        _sleep=lambda cycles: None,
        Event=Event,
        **GRAPHS,
    )
    torch.version.cuda = torch.version.cuda or "pretended"
    why_unavailable = backends.why_unavailable
    backends.why_unavailable = lambda backend, device: why_unavailable(backend, str(on_cpu(device)))
    autocast = torch.autocast
    torch.autocast = lambda device_type, **options: autocast("cpu", **options)
    torch.compile = lambda model=None, **_: model or (lambda function: function)
    OnCpu().__enter__()


def main():
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the package, as with `python -m`
    _, first, *rest = sys.argv
    install()
    if first == "-m":
        name, *_ = sys.argv = rest
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main()
