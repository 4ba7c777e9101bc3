"""Checkpoint files: written in one step, and checked whole before they are believed."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or of another program."""


_FORMAT = 1
_KEYS = {"format", "config", "history", "model", "engine", "generator", "data_crc32", "threads"}


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a run's checkpoint, all tensors on the CPU.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is damaged, or no checkpoint of this package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; a run folder has one once its training starts")
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:  # torch.load does not look at the checksums
                raise ValueError(f"checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways: zipfile, unpickler, EOF, missing keys
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path}: the checkpoint is damaged or of another program ({reason})") from error
    if not isinstance(checkpoint, dict) or checkpoint.keys() != _KEYS or checkpoint["format"] != _FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint that this version of lenet_fast writes")
    return checkpoint


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a run's `state`, replacing the checkpoint before it in one step."""
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step: an interruption leaves the old or the new file, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
