"""Fused convolution + activation + pooling and LeCun's sparse C3 layer as PyTorch operators, layers and models."""

# Before PyTorch: Ctrl-C ends the command while that is imported.
from . import interrupts  # noqa: F401

# isort: split
from . import functional, models, nn, tables
from ._version import __version__
from .accelerate import accelerate, report, restore
from .trainer import FusedTrainer

__all__ = ["FusedTrainer", "__version__", "accelerate", "functional", "models", "nn", "report", "restore", "tables"]
