"""Checkpoint files: written in one step, and read only as a whole."""

import io
import os
import re
import secrets
import zipfile
from pathlib import Path
from typing import Any

import torch


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or of another program."""


_FORMAT = 1
_KEYS = {"format", "config", "history", "model", "engine", "generator", "data_crc32", "threads"}


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a run's checkpoint, all tensors on the CPU. The entries are there; `SavedRun` checks what they are.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is damaged, or no checkpoint of this package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; a run folder has one once its training starts")
    content = io.BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(content) as archive:
            if (damaged := archive.testzip()) is not None:  # torch.load does not look at the checksums
                raise ValueError(f"checksum of {damaged}")
        content.seek(0)
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file fails in many ways: zipfile, unpickler, EOF, missing keys
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path}: the checkpoint is damaged or of another program ({reason})") from error
    foreign = f"{path}: not a checkpoint that this version of lenet_fast writes"
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{foreign}: expected a dict, found {type(checkpoint).__name__}")
    if checkpoint.keys() != _KEYS:
        missing = ", ".join(sorted(_KEYS - checkpoint.keys())) or "nothing"
        unknown = ", ".join(sorted(map(str, checkpoint.keys() - _KEYS))) or "nothing"
        raise CheckpointError(f"{foreign}: {missing} is missing, {unknown} is unknown")
    if type(checkpoint["format"]) is not int or checkpoint["format"] != _FORMAT:
        raise CheckpointError(f"{foreign}: format: expected {_FORMAT}, found {checkpoint['format']!r:.40}")
    return checkpoint


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a run's `state`, replacing the checkpoint before it in one step."""
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step: an interruption leaves the old or the new file, whole.

    Raises:
        OSError: it cannot be written; names `path`, and leaves nothing behind.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")  # its own: others may write the same file
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # of a full disk, it names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


_TEMPORARY = re.compile(r"(.+?)(\.[0-9a-f]{8})?\.tmp")  # without digits in versions before


def is_temporary(name: str, *, of: tuple[str, ...]) -> bool:
    """Whether a process that was killed in `write_atomically` may have left this file, for one of the names `of`."""
    match = _TEMPORARY.fullmatch(name)
    return match is not None and match[1] in of
