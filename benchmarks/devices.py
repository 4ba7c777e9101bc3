"""What a benchmark needs to know of the device that it runs on: how to time, how to launch, and its ceilings."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from harness import Probe, Run, SgemmProbe, Timer, time_on_cpu, time_on_cuda

Row = dict[str, object]

_COOPERATIVE = "LENET_FAST_COOPERATIVE"

CALLS, GRAPH = "calls", "graph"  # how the host starts the work: one kernel after another, or all in a CUDA graph
# For each multiprocessor, so that products and copy are large on every device and small on a pretended one.
_SIDES = (16, 32, 64)
_COPIED_BYTES = 2**23


@dataclass(frozen=True)
class Device:
    """Where contestants run."""

    type: str
    timer: Timer
    probe: Probe
    launches: Mapping[str, Callable[[Run], Run]] = field(default_factory=lambda: {CALLS: lambda run: run})
    bandwidth: float = math.nan  # bytes a second of a large copy, read and written
    cache_bytes: int = 0  # what repeated calls on one set of tensors would find in the cache
    facts: Row = field(default_factory=dict)

    def copies(self, bytes: int) -> int:
        """How many sets of tensors of `bytes` to go through so that twice the cache lies between two uses of one."""
        return max(1, math.ceil(2 * self.cache_bytes / bytes))

    def roofline_seconds(self, flops: float, bytes: float) -> float:
        """The least time that arithmetic and memory traffic allow, at the measured ceilings."""
        return max(flops / (1e9 * self.probe.peak), bytes / self.bandwidth)


def cpu() -> Device:
    return Device("cpu", time_on_cpu, SgemmProbe())


def cuda() -> Device:
    """The current CUDA device, with TF32 switched off for everyone and cuDNN free to choose its fastest algorithm.

    Raises:
        RuntimeError: there is none.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    processors = properties.multi_processor_count
    return Device(
        "cuda",
        time_on_cuda,
        SgemmProbe([side * processors for side in _SIDES], device="cuda", timer=time_on_cuda),
        {CALLS: lambda run: run, GRAPH: captured},
        _copy_bandwidth(_COPIED_BYTES * processors),
        properties.L2_cache_size,
        {"gpu": properties.name, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "tf32": "off"},
    )


@contextmanager
def cooperative_launches(allowed: str) -> Iterator[None]:
    """Within it `FusedTrainer` may ("1") or may not ("0") take all steps in one launch."""
    before = os.environ.get(_COOPERATIVE)
    os.environ[_COOPERATIVE] = allowed
    try:
        yield
    finally:
        del os.environ[_COOPERATIVE]
        if before is not None:
            os.environ[_COOPERATIVE] = before


def captured(run: Run) -> Run:
    """A CUDA graph of `run`: the call replays it and returns the tensors that hold the results of the last replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # what happens once (compilation, choice of an algorithm) must not happen in the capture
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay() -> object:
        graph.replay()
        return results

    return replay


def _copy_bandwidth(bytes: int) -> float:
    source, target = torch.rand(2, bytes // 4, device="cuda")

    def copy() -> None:
        target.copy_(source)

    copy()
    return 2 * bytes / min(time_on_cuda(copy, 1) for _ in range(10))
