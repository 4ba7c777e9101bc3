"""Many training steps of one kind on a GPU: one is captured in a CUDA graph for each batch size, and replayed."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .autograd_step import AutogradStep

__all__ = ["GraphedSteps"]

_MOST_STEPS = 1024  # of a call
_MOST_GRAPHS = 8  # batch sizes, for each takes memory
_WARM_UPS = 3  # before a capture: libraries load kernels and take memory

_capturing = threading.Lock()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a device: cuBLAS keeps some megabytes for every stream that it has seen."""
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class _Graph:
    """A captured step, and where it finds its batch."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    labels: Tensor


class GraphedSteps:
    """Takes steps whose kernels are queued at once: a replay and two copies each.

    Args:
        step: what is captured.
        device: where.
    """

    def __init__(self, step: AutogradStep, device: torch.device) -> None:
        self._step = step
        self._device = device
        self._graphs: dict[tuple, _Graph] = {}  # the one that was used last comes last
        with torch.inference_mode(False):
            self._number = torch.zeros(1, dtype=torch.int64, device=device)  # of the step in a call
            self._skip = torch.zeros((), dtype=torch.float32, device=device)  # 1: no further step of a call is taken
            self._rates = torch.zeros(_MOST_STEPS, dtype=torch.float32, device=device)
            self._losses = torch.zeros(_MOST_STEPS, dtype=torch.float64, device=device)
            self._correct = torch.zeros(_MOST_STEPS, dtype=torch.int64, device=device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self, images: Tensor, labels: Tensor, order: Tensor | None, batch_size: int, rates: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Take a step for each of `rates`, or the first thousand of them; waits until they are done.

        Returns:
            On the CPU the mean loss, float64, and the number of images right, int64, of each step until one whose
            loss is not finite: that was not taken, nor any after it.
        """
        if order is None:
            order = torch.arange(len(labels), device=self._device)
        steps = min(len(rates), _MOST_STEPS)
        batches = order[: steps * batch_size].split(batch_size)
        with torch.cuda.device(self._device):
            graphs = {len(batch): self._graph_for(images, labels, batch) for batch in (batches[-1], batches[0])}
            self._rates[:steps] = torch.tensor(rates[:steps], dtype=torch.float32)
            self._number.zero_()
            self._skip.zero_()
            for batch in batches:
                captured = graphs[len(batch)]
                torch.index_select(images, 0, batch, out=captured.images)
                torch.index_select(labels, 0, batch, out=captured.labels)
                captured.graph.replay()
        losses, correct = (results[:steps].to("cpu", copy=True) for results in (self._losses, self._correct))
        failed = (~losses.isfinite()).nonzero()
        taken = int(failed[0]) + 1 if len(failed) else steps
        return losses[:taken], correct[:taken]

    def _graph_for(self, images: Tensor, labels: Tensor, batch: Tensor) -> _Graph:
        """The step for batches as large as this one."""
        key = len(batch), images.dtype, images.shape[1:]
        graph = self._graphs.pop(key, None) or self._capture(images[batch], labels[batch])
        if len(self._graphs) == _MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        self._graphs[key] = graph
        return graph

    def _capture(self, images: Tensor, labels: Tensor) -> _Graph:
        def take(step: AutogradStep) -> None:
            rate = self._rates.index_select(0, self._number).squeeze(0)
            loss, correct = step(images, labels, rate, self._skip)
            self._losses.index_copy_(0, self._number, loss.double().view(1))
            self._correct.index_copy_(0, self._number, correct.view(1))
            self._number.add_(1)

        self._number.zero_()
        graph, stream, rehearsal = torch.cuda.CUDAGraph(), _capture_stream(self._device), self._step.rehearsal()
        with _capturing:
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    take(rehearsal)
                # thread_local: what other threads do, loading data say, is no part of it and may go on
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    take(self._step)
            torch.cuda.current_stream(self._device).wait_stream(stream)
        return _Graph(graph, images, labels)
