"""The folder of a training run: one process at a time uses it, and an interrupted creation leaves no dead end."""

import contextlib
import errno
import gc
import os
import platform
import time
import warnings
import weakref
from datetime import datetime
from pathlib import Path
from types import TracebackType

from .checkpoint import is_temporary

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["CHECKPOINT", "CONFIG", "METRICS", "FolderInUseError", "RunFolder"]

CHECKPOINT, CONFIG, METRICS = "checkpoint.pt", "config.json", "metrics.csv"
_CURVE, _LOCK = "curve.png", "lock"
_OWN = (CHECKPOINT, CONFIG, METRICS)
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # what a file system says


class FolderInUseError(OSError):
    """Another process, or another run of this one, uses the folder."""


class RunFolder:
    """A folder that is held by whoever trains in it, from `create` or `open` until `release`, and again by `hold`.

    The lock is the operating system's, on a file `lock`, which tells others who holds it. It ends with the process that
    took it, however that process ends; a forked child does not have it. As a context manager, a folder is held, and
    then released.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._unlock: weakref.finalize | None = None
        self._made: list[Path] = []  # folders, innermost first
        self._left: tuple[int, ...] | None = None  # which checkpoint `release` left there

    @classmethod
    def create(cls, path: str | Path) -> "RunFolder":
        """Take a new or empty folder, or one that has only what an interrupted creation leaves.

        Raises:
            FolderInUseError: another run holds it.
            FileExistsError: there is something else in it.
        """
        folder = cls(path)
        folder._made = [missing for missing in (folder.path, *folder.path.parents) if not missing.exists()]
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.hold()
            if there := folder._contents():
                remedy = "name another folder" + (", or resume the run in it" if CHECKPOINT in there else "")
                raise FileExistsError(f"{path}: not empty, it has {', '.join(there[:3])}; {remedy}")
        except BaseException:
            folder._leave()
            raise
        return folder

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Take the folder of a run.

        Raises:
            FolderInUseError: another run holds it.
            FileNotFoundError: there is no checkpoint in it.
        """
        folder = cls(path)
        missing = f"{folder.path / CHECKPOINT}: no such checkpoint"
        if not folder.path.is_dir():
            raise FileNotFoundError(f"{missing}; {folder.path} is no folder")
        folder.hold()
        if not (folder.path / CHECKPOINT).is_file():
            there = folder._contents()
            folder.release()
            if there:
                raise FileNotFoundError(f"{missing}; {folder.path} is not the folder of a run")
            raise FileNotFoundError(f"{missing}; the run ended before it had one; start it anew in this folder")
        folder._remove_temporaries()
        return folder

    def hold(self) -> None:
        """Take the folder again, if it was released.

        Raises:
            FolderInUseError: another run holds it, or has gone on with the run meanwhile.
        """
        if self._unlock is not None and self._unlock.alive:
            return
        lock = (self.path / _LOCK).absolute()
        try:
            file = _lock(lock, self.path)
        except FolderInUseError as error:
            if f" process {os.getpid()} " not in str(error):
                raise
            gc.collect()  # perhaps that was a run that nothing refers to any more
            file = _lock(lock, self.path)
        self._unlock = weakref.finalize(self, _unlock, file, lock, os.getpid())
        _held.add(self)
        if self._left is not None and self._left != self._checkpoint():
            self.release()
            raise FolderInUseError(f"{self.path}: another process has gone on with the run; resume it anew")

    def release(self) -> None:
        """Let others use the folder."""
        if self._unlock is not None and self._unlock.alive:
            self._left = self._checkpoint()
            self._unlock()

    def discard(self) -> None:
        """Undo `create`: remove the run's files, and the folders that it has made if nothing else is in them."""
        for name in _OWN:
            (self.path / name).unlink(missing_ok=True)
        self._remove_temporaries()
        self._leave()

    def _leave(self) -> None:
        self.release()
        with contextlib.suppress(OSError):  # one that is not empty stays
            for made in self._made:
                made.rmdir()

    def __enter__(self) -> "RunFolder":
        self.hold()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _contents(self) -> list[str]:
        """What is there but for that which an interrupted creation leaves."""
        return sorted(
            entry.name
            for entry in self.path.iterdir()
            if entry.name != _LOCK
            and not is_temporary(entry.name, of=_OWN)
            and not (entry.name == CONFIG and entry.stat().st_size == 0)  # made first by versions before
        )

    def _remove_temporaries(self) -> None:
        for entry in self.path.iterdir():
            if is_temporary(entry.name, of=(*_OWN, _CURVE)):
                entry.unlink(missing_ok=True)

    def _checkpoint(self) -> tuple[int, ...]:
        try:
            status = (self.path / CHECKPOINT).stat()
        except OSError:
            return ()
        return status.st_ino, status.st_mtime_ns, status.st_size


_held: weakref.WeakSet[RunFolder] = weakref.WeakSet()


def _let_go() -> None:
    """Close what a forked child has inherited: the lock would last as long as the child."""
    for folder in list(_held):
        if folder._unlock is not None:
            folder._unlock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _is_at(file: int, path: Path) -> bool:
    """Whether `path` names the open file; another process may remove it at any moment."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _lock(path: Path, folder: Path) -> int | None:
    """Lock the file `path`, made where it is missing; returns its descriptor, None where there are no locks.

    Raises:
        FolderInUseError: someone else has it.
    """
    if fcntl is None:
        warnings.warn(f"{folder}: not locked, {platform.system()} has no flock; train in it only once", stacklevel=4)
        return None
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                os.ftruncate(file, 0)
                since = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
                os.pwrite(file, f"process {os.getpid()} on {platform.node()} since {since}\n".encode(), 0)
                return file
            os.close(file)  # who had it before has removed it meanwhile
        except BlockingIOError:
            holder = _holder(file)
            os.close(file)
            raise FolderInUseError(f"{folder}: in use by {holder}; wait until that ends, or stop it") from None
        except OSError as error:
            _unlock(file, path, os.getpid())
            if error.errno not in _NO_LOCKS:
                raise OSError(error.errno, error.strerror, str(path)) from error
            warnings.warn(f"{folder}: not locked, its file system has no locks; train in it only once", stacklevel=4)
            return None


def _unlock(file: int | None, path: Path, process: int) -> None:
    """Remove the file and close it; in a child process, which has inherited it, only close it."""
    if file is None:
        return
    with contextlib.suppress(OSError):
        if os.getpid() == process and os.path.samestat(os.fstat(file), path.stat()):
            path.unlink()
    os.close(file)


def _holder(file: int) -> str:
    """Who has the lock, in words."""
    for _ in range(20):  # it has the lock a moment before its name is written
        if text := os.pread(file, 200, 0).decode(errors="replace").strip():
            return text
        time.sleep(0.01)
    return "another process"
