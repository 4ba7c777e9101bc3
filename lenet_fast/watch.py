"""What the host sees of training steps that a GPU is still taking: their losses, and a way to stop them."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Watch"]

_LAUNCH_SECONDS = 0.8  # that one launch may last: a display, say, has to wait as long
_LONGEST_SLEEP = 0.01
_UNKNOWN = -1.0  # no loss is negative


class Watch:
    """Over one call of `lenet_fast::network_train` on CUDA, which returns when its steps are queued.

    `memory` is that operator's argument: host memory that the device reads and writes while the steps run. A loss is
    one store of eight bytes, there or not there, so that nothing has to be ordered or waited for.
    """

    def __init__(self, steps: int) -> None:
        self.memory = _pinned(1 + steps)
        self.memory.fill_(_UNKNOWN)[0] = 0

    def stop(self) -> None:
        """Let no further step begin."""
        self.memory[0] = 1

    def follow(self, finished: torch.cuda.Event, note: Callable[[list[float]], None]) -> int:
        """Pass the losses to `note`, some at a time, until `finished`; returns how many steps were taken.

        They may be fewer than were asked for: a launch that lasts too long is stopped, and without cooperative launches
        a call takes some hundreds only.
        """
        losses = self.memory[1:]
        taken = 0
        started = time.perf_counter()
        over = False
        while not over:
            over = finished.query()  # before a look at the losses, so that none is missed
            unknown = (losses[taken:] == _UNKNOWN).nonzero()
            new = losses[taken : taken + int(unknown[0])] if len(unknown) else losses[taken:]
            if len(new):
                note(new.tolist())
            elif taken == 0:
                started = time.perf_counter()  # the device has other things to do first
            taken += len(new)
            seconds = time.perf_counter() - started
            if taken and seconds > _LAUNCH_SECONDS:
                self.stop()
            if not over:
                time.sleep(min(seconds / 50, _LONGEST_SLEEP))
        return taken


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float64, pin_memory=True)
