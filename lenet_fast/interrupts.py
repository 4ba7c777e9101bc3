"""Ctrl-C in the command line: exit status 130, no traceback, and what is on disk stays whole.

Imported before PyTorch, so that the second which that takes can be interrupted, too.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

__all__ = ["STATUS", "Interrupted", "Interrupts"]

STATUS = 130  # as a shell reports a process that SIGINT ended
_PATIENCE_SECONDS = 3.0


class Interrupted(BaseException):
    """Ctrl-C. Not a KeyboardInterrupt, of which click makes an exit of its own."""


class Interrupts:
    """Within this context Ctrl-C raises Interrupted, once; further ones are ignored until the context is left.

    Python raises an exception of a signal at any line, and one that is raised in a callback is lost. So `deferred` code
    asks for it by `check`, between steps. A second Ctrl-C is raised at once even in deferred code, and a further one
    that comes seconds later ends the process.
    """

    def __init__(self) -> None:
        self._asked = False
        self._deferred = False
        self._raised: float | None = None  # when

    def __enter__(self) -> "Interrupts":
        self._before = None
        ignored = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None)  # as in a background job
        if threading.current_thread() is threading.main_thread() and not ignored:
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            ends = _IS_COMMAND and self._raised is not None  # and nothing is left to interrupt
            signal.signal(signal.SIGINT, _do_nothing if ends else self._before)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it, Ctrl-C waits for `check`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self) -> None:
        """Raise Interrupted if Ctrl-C was pressed."""
        if self._asked:
            self._raise()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        was_asked, self._asked = self._asked, True
        if self._raised is None:
            if was_asked or not self._deferred:
                self._raise()
        elif time.monotonic() - self._raised > _PATIENCE_SECONDS:
            _leave()

    def _raise(self) -> NoReturn:
        if self._raised is None:
            self._raised = time.monotonic()
        raise Interrupted


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """In the place of SIG_IGN, with which Python prints a traceback where a signal comes while it is being set."""


def _leave(number: int = signal.SIGINT, frame: FrameType | None = None) -> NoReturn:
    signal.signal(signal.SIGINT, _do_nothing)
    with contextlib.suppress(OSError):
        os.write(2, b"lenet-fast: interrupted\n")
    os._exit(STATUS)


def _is_command() -> bool:
    """Whether this process is `lenet-fast` or `python -m lenet_fast`, and not a program that imports the package."""
    arguments = getattr(sys, "argv", None) or [""]
    if arguments[0] == "-m":  # so while Python imports the package of the module that it is to run
        return sys.orig_argv[-len(arguments)] in ("lenet_fast", "-mlenet_fast")
    return Path(arguments[0]).stem == "lenet-fast"


_IS_COMMAND = _is_command()
if _IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)  # until `Interrupts` is entered: nothing is begun yet
